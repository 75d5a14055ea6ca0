//! `gptq sweep`: every branch of a configuration, made and measured.

use std::path::{Path, PathBuf};

use anyhow::Result;
use gptq_checkpoint::{check_folder, free_space};
use gptq_compute::Device;
use gptq_pipeline::plan::BranchPlan;
use gptq_pipeline::rates::{KnownRates, Prediction, Source, compared};
use gptq_pipeline::recipe_fit;
use gptq_pipeline::sweep::config::{Branch, SweepConfig};
use gptq_pipeline::sweep::jobs::Share;
use gptq_pipeline::sweep::log::{SWEEP_FILE, SweepReport, SweepRow};
use gptq_pipeline::sweep::predict::SweepPrediction;
use gptq_pipeline::sweep::resume::State;
use gptq_pipeline::sweep::{Survey, SweepJob, sweep};
use gptq_records::atomic_file::refuse_inputs;
use gptq_records::source_dtype::SourceDtype;
use gptq_report::card::write_sweep_cards;
use gptq_text::calibration::CalibrationRecipe;
use serde::Serialize;

use super::calib::sample;
use super::source::{
    note_parts, open_arriving, open_checkpoint, open_config, open_sweep, provide_text, warn_of,
};
use super::table::{group, operations, plural, size, table, time, times_from, yes_no};
use super::{print_json, print_result};
use crate::args::values::parse_count;
use crate::args::{CalibrationArgs, DeviceArgs};
use crate::hint::advised;
use crate::printer::Printer;

/// Make and measure every branch of a configuration
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq sweep configs/demo.toml
  gptq sweep nine --model HuggingFaceTB/SmolLM2-135M --out ./branches
  gptq sweep configs/stablebeluga2.toml --out ./branches --dry-run
  gptq sweep configs/stablebeluga2.toml --out ./branches --jobs 2/4

An interrupted sweep goes on where it was when the same command is run again: branches whose files
and inputs are unchanged are reused.")]
pub(crate) struct Args {
    /// Sweep configuration: a file, or nine or stablebeluga2, which are built in
    config: String,
    /// Folder for the branches, one folder each
    #[arg(long, value_name = "DIR", default_value = "branches")]
    out: PathBuf,
    /// Only this branch; may be repeated
    #[arg(long, value_name = "BRANCH")]
    only: Vec<String>,
    /// Only the branches of job I of N; the jobs together make all, each once
    #[arg(long, value_name = "I/N")]
    jobs: Option<Share>,
    /// Branches that each device makes at the same time, from one reading of the model
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    together: usize,
    /// Download the model's shards as they are needed and delete them when all branches have read
    /// them, for a disk smaller than the model: all branches are made at the same time (--together).
    /// Shards that the Hub's cache holds already stay
    #[arg(long)]
    discard_shards: bool,
    /// Print what would be made and what is reused, with sizes, work and time; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Dense model instead of the configuration's
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Type in which its weights are quantized, fp16 or fp32, instead of the configuration's
    #[arg(long, value_name = "TYPE")]
    source_dtype: Option<SourceDtype>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Treat as errors: warnings about the source, a Hessian that needs more damping, or f64 on a
    /// GPU, and an expert that sees fewer tokens than it has inputs
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

/// For processes that a launcher has started.
const ADVICE: &str = "start it without a launcher and use --device cuda:all, or on several hosts \
                      give each a part: --jobs 1/2, --jobs 2/2";

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let mut config = open_sweep(&args.config)?;
    refuse_inputs(&args.out.join(SWEEP_FILE), [Path::new(&args.config)])?;
    let Some(model) = args.model.as_ref().or(config.model.as_ref()).cloned() else {
        return Err(advised(format!("`{}` names no model", args.config), "give one with --model"));
    };
    if let Some(name) = &args.calibration.calib {
        config.calibration = CalibrationRecipe::open(name)?;
    }
    config.calibration = config.calibration.clone().with(args.calibration.overrides())?;
    config.source_dtype = args.source_dtype.unwrap_or(config.source_dtype);
    selected(&config, &args.only)?;
    if !args.dry_run {
        check_folder(&args.out)?;
    }
    if config.branches.iter().any(|branch| branch.spec.choices.tune > 0) {
        let model = open_config(&model, printer)?;
        for branch in selected(&config, &args.only)? {
            recipe_fit::check_tuning(&model, &branch.spec)?;
        }
    }
    let (source, origin) = match args.discard_shards {
        true => open_arriving(&model, printer).map(|(source, of)| (source, Some(of)))?,
        false => (open_checkpoint(&model, printer)?, None),
    };
    note_parts(&source, printer);
    config.fit(source.config(), source.is_arriving()).iter().for_each(|note| printer.note(note));
    let branches = selected(&config, &args.only)?;
    warn_of(&source, args.strict, printer)?;
    if let Some(evaluation) = &config.evaluation {
        provide_text(&evaluation.dataset, printer)?;
    }
    let devices = args.device.open_each(printer, ADVICE)?;
    let dtype = devices.first().map_or("f32", Device::dtype);
    let calibration =
        sample(source.dir(), source.config().vocab_size, &config.calibration, printer)?;
    let rates = KnownRates::of_device(devices.first().unwrap_or(&Device::Cpu), 1, printer);
    let mut job = SweepJob {
        config: &config,
        branches: &branches,
        model: &model,
        source: &source,
        origin: origin.as_deref(),
        calibration: &calibration,
        devices: &devices,
        together: args.together,
        out: &args.out,
        strict: args.strict,
        rates: &rates,
    };
    let shared;
    if let Some(share) = args.jobs {
        let work = |b: &Branch| Ok(job.plan(b, 0)?.work.total());
        let work: Vec<f64> = branches.iter().map(work).collect::<Result<_>>()?;
        shared = share.of(&work).into_iter().map(|i| branches[i].clone()).collect::<Vec<_>>();
        job.branches = &shared;
    }
    if args.dry_run {
        return dry_run(&job, args.json, printer);
    }
    let report = sweep(&job, printer)?;
    // First: hours of work are not to end without their table because of a card.
    if args.json { print_json(&report) } else { print_result(&text(&report, dtype)) }?;
    if let Some(facts) = &config.card
        && !report.rows.is_empty()
    {
        let names = config.branches.iter().map(|branch| branch.name.as_str());
        write_sweep_cards(&args.out, names, facts)?;
    }
    Ok(())
}

/// The branches named by `--only`, in the configuration's order; all of them otherwise.
fn selected(config: &SweepConfig, only: &[String]) -> Result<Vec<Branch>> {
    for name in only {
        config.branch(name)?;
    }
    let chosen = |b: &&Branch| only.is_empty() || only.contains(&b.name);
    Ok(config.branches.iter().filter(chosen).cloned().collect())
}

/// What `--dry-run --json` prints.
#[derive(Serialize)]
struct Preview {
    branches: Vec<PreviewRow>,
    /// Of the branches that are to be made.
    bytes_to_write: u64,
    bytes_free: u64,
    /// Of the whole sweep; `null` where a part is not known.
    seconds: Option<f64>,
    seconds_from: Option<Source>,
}

#[derive(Serialize)]
struct PreviewRow {
    branch: String,
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    action: &'static str,
    /// Why a finished branch starts over.
    reason: Option<String>,
    #[serde(flatten)]
    plan: BranchPlan,
    /// Until all that are made beside it are made, too.
    seconds: Option<f64>,
    seconds_from: Option<Source>,
}

fn dry_run(job: &SweepJob<'_>, json: bool, printer: &Printer) -> Result<()> {
    let survey = Survey::new(job, printer)?;
    let device = job.devices.first().unwrap_or(&Device::Cpu);
    let gpu_memory = device.memory()?.map_or(0, |m| m.budget as u64);
    let predicted = SweepPrediction::new(job, &survey)?;
    let mut preview = Preview {
        branches: Vec::new(),
        bytes_to_write: 0,
        bytes_free: free_space(existing(job.out))?,
        seconds: predicted.sweep.map(|p| p.seconds),
        seconds_from: predicted.sweep.map(|p| p.from),
    };
    let states = job.branches.iter().zip(survey.states()).zip(predicted.branches);
    for ((branch, state), predicted) in states {
        let plan = job.plan(branch, gpu_memory)?;
        let (action, reason) = match state {
            State::New => ("make", None),
            State::Made(_) => ("measure", None),
            State::Remeasure(_) => ("measure again", None),
            State::Stale(why) => ("make again", Some(why.clone())),
            State::Finished(_) => ("reuse", None),
        };
        if matches!(state, State::New | State::Stale(_)) {
            preview.bytes_to_write += plan.file_bytes;
        }
        preview.branches.push(PreviewRow {
            branch: branch.name.clone(),
            bits: branch.spec.bits,
            group_size: branch.spec.group_size,
            act_order: branch.spec.act_order,
            action,
            reason,
            plan,
            seconds: predicted.map(|p| p.seconds),
            seconds_from: predicted.map(|p| p.from),
        });
    }
    let on_gpu = gpu_memory > 0;
    if json { print_json(&preview) } else { print_result(&preview_text(&preview, on_gpu)) }
}

/// The folder, or the one above it that exists.
fn existing(out: &Path) -> &Path {
    let exists = |path: &&Path| !path.as_os_str().is_empty() && path.exists();
    out.ancestors().find(exists).unwrap_or(Path::new("."))
}

fn preview_text(preview: &Preview, on_gpu: bool) -> String {
    let header =
        ["branch", "action", "bits", "group", "act-order", "size", "memory", "work", "time"];
    let memory = |plan: &BranchPlan| if on_gpu { plan.gpu.device_bytes } else { plan.cpu_bytes };
    let cells = |row: &PreviewRow| {
        vec![
            row.branch.clone(),
            row.action.to_owned(),
            row.bits.to_string(),
            group(row.group_size),
            yes_no(row.act_order),
            size(row.plan.file_bytes),
            size(memory(&row.plan)),
            operations(row.plan.work.total()),
            time(Prediction::of(row.seconds, row.seconds_from)),
        ]
    };
    let rows: Vec<Vec<String>> = preview.branches.iter().map(cells).collect();
    let mut text = table(&header, 2, &rows);
    text.push_str(&format!(
        "\n{} to write, {} free. Memory: peak {} memory of making the branch.\n",
        size(preview.bytes_to_write),
        size(preview.bytes_free),
        if on_gpu { "GPU" } else { "host" }
    ));
    if let Some(whole) = Prediction::of(preview.seconds, preview.seconds_from) {
        text.push_str(&format!("{} for the whole sweep. ", time(Some(whole))));
    }
    let to_make = || preview.branches.iter().filter(|row| row.action.starts_with("make"));
    if to_make().next().is_some() {
        let from = times_from(to_make().map(|row| Prediction::of(row.seconds, row.seconds_from)));
        text.push_str(&format!(
            "Time: until all branches that are made at the same time are made, {from}.\n"
        ));
    }
    for row in &preview.branches {
        if let Some(reason) = &row.reason {
            text.push_str(&format!("{} would start over: {reason}\n", row.branch));
        }
    }
    text
}

/// The table; `dtype` is the arithmetic of what was measured.
fn text(report: &SweepReport, dtype: &str) -> String {
    let header = [
        "branch",
        "bits",
        "group",
        "act-order",
        "size",
        "perplexity",
        "KL",
        "rtn ppl",
        "rtn KL",
        "seconds",
    ];
    let mut rows: Vec<Vec<String>> = Vec::new();
    if let Some(baseline) = &report.baseline {
        let name = report.source_dtype.name();
        let mut row = vec![name.to_owned(), name.trim_start_matches("fp").to_owned()];
        row.extend(["", "", ""].map(str::to_owned));
        row.push(format!("{:.3}", baseline.perplexity));
        rows.push(row);
    }
    rows.extend(report.rows.iter().map(cells));
    let mut text = table(&header, 1, &rows);
    if let (Some(e), Some(b)) = (&report.evaluation, &report.baseline) {
        text.push_str(&format!(
            "\n{}: {} × {} tokens of {}; KL to {} in nats a token; {dtype}.\n",
            e.protocol,
            plural(b.windows, "window"),
            e.seq_len,
            e.dataset,
            report.source_dtype.name()
        ));
    }
    if let Some(compared) = foreseen(&report.rows) {
        text.push_str(&format!("{compared}\n"));
    }
    if let Some(warning) = contamination(&report.rows) {
        text.push_str(&format!("{warning}\n"));
    }
    text
}

/// How far predictions were off, of all branches that had one.
fn foreseen(rows: &[SweepRow]) -> Option<String> {
    let both = rows.iter().filter_map(|row| row.predicted().zip(row.quantize_seconds));
    let (predicted, took): (Vec<Prediction>, Vec<f64>) = both.unzip();
    let from = predicted.iter().map(|predicted| predicted.from).max()?;
    let branches = took.len() as f64;
    let seconds = predicted.iter().map(|predicted| predicted.seconds).sum::<f64>() / branches;
    let compared = compared(Prediction { seconds, from }, took.iter().sum::<f64>() / branches);
    Some(if took.len() > 1 { format!("a branch: {compared}") } else { compared })
}

/// Which branches were calibrated on the text that they were measured on; a recipe that rounds looks
/// at no text.
fn contamination(rows: &[SweepRow]) -> Option<String> {
    let seen: Vec<&str> =
        rows.iter().filter(|row| row.contaminated).map(|row| row.branch.as_str()).collect();
    let who = match seen.as_slice() {
        [] => return None,
        [one] => format!("{one} was"),
        all if all.len() == rows.len() => "The branches were".to_owned(),
        some => format!("{} were", some.join(", ")),
    };
    Some(format!("{who} calibrated on this split: perplexity and KL are optimistic."))
}

fn cells(row: &SweepRow) -> Vec<String> {
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(String::new, |v| format!("{v:.digits$}"))
    };
    vec![
        row.branch.clone(),
        row.bits.to_string(),
        group(row.group_size),
        yes_no(row.act_order),
        size(row.file_bytes),
        number(row.result.map(|m| m.perplexity), 3),
        number(row.result.map(|m| m.kl), 4),
        number(row.rtn.map(|m| m.perplexity), 3),
        number(row.rtn.map(|m| m.kl), 4),
        number(row.quantize_seconds, 1),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn report() -> SweepReport {
        let row = |branch: &str| {
            json!({
                "branch": branch, "bits": 4, "group_size": 32, "act_order": true, "damp": 0.01,
                "recipe": "autogptq", "dir": branch, "file_bytes": 1, "quantize_seconds": null,
                "measure_seconds": null, "damp_retries": 0, "rtn": null, "key": "",
                "result": {"perplexity": 19.0, "kl": 0.01}
            })
        };
        let report = json!({
            "model": "m", "source_dtype": "fp32", "baseline_key": null,
            "baseline": {
                "perplexity": 18.0, "mean_nll": 2.0, "standard_error": 0.1, "windows": 2, "tokens": 9
            },
            "evaluation": {
                "protocol": "paper", "dataset": "t.txt", "tokens_in_text": 20, "seq_len": 8,
                "contaminated": true
            },
            "rows": [row("a"), row("b")]
        });
        from_value(report).unwrap()
    }

    #[test]
    fn the_arithmetic_is_that_of_the_device() {
        let text = text(&report(), "fp16");
        assert!(text.contains("2 windows × 8 tokens of t.txt; KL to fp32 in nats a token; fp16."));
        assert!(text.contains("\nfp32 "), "{text}");
    }

    #[test]
    fn branches_that_saw_the_text_are_named() {
        let mut report = report();
        let warning = |report: &SweepReport| {
            let text = text(report, "f32");
            text.lines().find(|line| line.contains("optimistic")).map(str::to_owned)
        };
        assert_eq!(warning(&report), None);
        report.rows[1].contaminated = true;
        let one = "b was calibrated on this split: perplexity and KL are optimistic.";
        assert_eq!(warning(&report).as_deref(), Some(one));
        report.rows[0].contaminated = true;
        let all = "The branches were calibrated on this split: perplexity and KL are optimistic.";
        assert_eq!(warning(&report).as_deref(), Some(all));
    }
}
