//! `gptq quantize`: one branch, from a dense model to a finished folder.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use gptq_checkpoint::{Checkpoint, GroupSize, Layout, check_output};
use gptq_compute::Device;
use gptq_pipeline::host_memory;
use gptq_pipeline::job::QuantizeJob;
use gptq_pipeline::plan::{Setting, plan_branch};
use gptq_pipeline::progress::{BlockReport, Progress};
use gptq_pipeline::quantize::quantize;
use gptq_pipeline::rates::{KnownRates, Prediction, Source, compared};
use gptq_pipeline::recipe_fit;
use gptq_pipeline::sweep::config::BUILT_IN;
use gptq_pipeline::write::planned_metadata;
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::branch_report::{TuningRecord, model_name};
use gptq_records::source_dtype::SourceDtype;
use gptq_text::calibration::{Calibration, CalibrationRecipe, DrawnSource};
use serde::Serialize;

use super::calib::sample;
use super::source::{note_parts, open_arriving, open_checkpoint, open_config, open_sweep, warn_of};
use super::table::{number, plural, size};
use super::{print_json, print_result};
use crate::args::values::{parse_bits, parse_bytes, parse_number};
use crate::args::{CalibrationArgs, DeviceArgs};
use crate::launch::follower;
use crate::printer::Printer;

/// Help of `--set`.
fn set_help() -> String {
    format!("Change one choice of the recipe: {}; may be repeated", gptq_quant::Choices::help())
}

/// Make one quantized checkpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq quantize ./SmolLM2-135M --out ./SmolLM2-135M-4bit-128g --bits 4 --group-size 128
  gptq quantize stabilityai/StableBeluga2 --branch gptq-4bit-32g-actorder_True --out ./4bit-32g")]
pub(crate) struct Args {
    /// Folder of the dense model, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// Folder to make; it must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Bits of a weight: 2, 3, 4 or 8 [default: 4]
    #[arg(long, alias = "wbits", value_parser = parse_bits)]
    bits: Option<u8>,
    /// Input features that share a scale: a number, or none (or -1) for all [default: 128]
    #[arg(long, value_name = "N|none", alias = "groupsize", allow_hyphen_values = true)]
    group_size: Option<GroupSize>,
    /// Solve columns in order of importance [default: true]
    #[arg(long, alias = "desc-act", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    act_order: Option<bool>,
    /// Fraction of the Hessian's mean diagonal added to it [default: 0.03 (best, tuned), 0.01]
    #[arg(long, alias = "percdamp", alias = "damp-percent", value_parser = parse_number)]
    damp: Option<f64>,
    /// Solver choices: best, tuned (best, then all scales by the whole model's KL), autogptq, or rtn (round
    /// to nearest, no calibration) [default: best]
    #[arg(long)]
    recipe: Option<Recipe>,
    #[arg(long, value_name = "KEY=VALUE", help = set_help())]
    set: Vec<String>,
    /// Type in which the source's weights are quantized: fp16 (rounded first, as the published
    /// branches were) or fp32 (as stored) [default: fp16]
    #[arg(long, value_name = "TYPE")]
    source_dtype: Option<SourceDtype>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Tensors beside the quantized ones: modern, or card as published in 2023 [default: modern]
    #[arg(long)]
    layout: Option<Layout>,
    /// Take the settings of this branch of --config; options given here win
    #[arg(long, value_name = "NAME")]
    branch: Option<String>,
    /// Sweep configuration that holds --branch: a file, or nine or stablebeluga2, which are built in
    /// [default: stablebeluga2]
    #[arg(long, value_name = "FILE", requires = "branch")]
    config: Option<String>,
    /// Split the weights into files of at most this size, such as 5GB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    max_shard_size: Option<u64>,
    /// Download the model's shards as they are needed and delete them when they are read, for a
    /// disk smaller than the model; shards that the Hub's cache holds already stay
    #[arg(long)]
    discard_shards: bool,
    /// Treat as errors: warnings about the source, a Hessian that needs more damping, or f64 on a
    /// GPU, and an expert that sees fewer tokens than it has inputs
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    out: &'a std::path::Path,
    recipe: &'static str,
    choices: Option<String>,
    bits: u8,
    group_size: Option<usize>,
    act_order: bool,
    damp: f64,
    source_dtype: SourceDtype,
    calibration: Option<CalibrationOutput<'a>>,
    file_bytes: u64,
    carried: usize,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted_from: Option<Source>,
    device: String,
    ranks: usize,
    peak_memory_bytes: Option<u64>,
    peak_device_bytes: Option<usize>,
    damp_retries: u32,
    f64_retries: u32,
    few_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    tuning: Option<TuningOutput>,
    blocks: &'a [BlockReport],
}

#[derive(Serialize)]
struct TuningOutput {
    #[serde(flatten)]
    record: TuningRecord,
    seconds: f64,
}

#[derive(Serialize)]
struct CalibrationOutput<'a> {
    dataset: &'a str,
    windows: usize,
    seq_len: usize,
    tokens: usize,
    sources: Vec<SourceOutput<'a>>,
    sha256: &'a str,
}

/// One of the texts.
#[derive(Serialize)]
struct SourceOutput<'a> {
    dataset: &'a str,
    windows: usize,
    tokens: usize,
}

impl<'a> SourceOutput<'a> {
    fn of(source: &'a DrawnSource) -> Self {
        let DrawnSource { dataset, windows, tokens, .. } = source;
        Self { dataset: &dataset.name, windows: *windows, tokens: *tokens }
    }
}

/// Settings after branch and options were merged.
struct Settings {
    spec: QuantSpec,
    source_dtype: SourceDtype,
    layout: Layout,
    calibration: CalibrationRecipe,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let start = Instant::now();
    let mut settings = settings(args)?;
    let spec = &mut settings.spec;
    spec.validate()?;
    if !spec.recipe.calibrates() && args.calibration.is_given() {
        let unused =
            format!("recipe {} does not calibrate: its options change nothing", spec.recipe.name());
        ensure!(!args.strict, "{unused} (--strict)");
        printer.warn(&unused);
    }
    // Before a model is downloaded. Of several processes the first one writes.
    if follower().is_none() {
        check_output(&args.out)?;
    }
    if spec.choices.tune > 0 {
        recipe_fit::check_tuning(&open_config(&args.model, printer)?, spec)?;
    }
    let source = if args.discard_shards {
        args.device.check_one("--discard-shards lets each shard be read once")?;
        open_arriving(&args.model, printer)?.0
    } else {
        open_checkpoint(&args.model, printer)?
    };
    note_parts(&source, printer);
    recipe_fit::fit(source.config(), source.is_arriving(), spec)
        .iter()
        .for_each(|note| printer.note(note));
    // What was downloaded is nobody's prediction.
    let opened = Instant::now();
    warn_of(&source, args.strict, printer)?;
    let local_ranks = args.device.open(printer)?;
    let calibration = if spec.recipe.calibrates() {
        Some(sample(source.dir(), source.config().vocab_size, &settings.calibration, printer)?)
    } else {
        None
    };
    let (device, device_name, ranks) =
        (local_ranks.device().clone(), local_ranks.name(), local_ranks.ranks());
    let predicted = match args.discard_shards {
        true => None,
        false => predict(&source, &device, ranks, &settings, calibration.as_ref(), printer)?,
    };
    let Settings { spec, source_dtype, layout, .. } = settings;
    let outcome = local_ranks.run(|device, ranks| {
        let job = QuantizeJob {
            source: &source,
            model: model_name(&args.model),
            branch: args.branch.clone().unwrap_or_else(|| branch_name(&spec)),
            source_dtype,
            device: device.clone(),
            ranks: ranks.clone(),
            spec: spec.clone(),
            calibration: calibration.as_ref(),
            layout,
            out: args.out.clone(),
            max_shard_bytes: args.max_shard_size,
            strict: args.strict,
            shared: None,
            beside: None,
        };
        Ok(quantize(&job, printer)?)
    })?;
    let Some(outcome) = outcome.flatten() else { return Ok(()) };
    let took = opened.elapsed().as_secs_f64();
    let output = Output {
        out: &outcome.written.dir,
        recipe: spec.recipe.name(),
        choices: spec.recipe.calibrates().then(|| spec.choices.to_string()),
        bits: spec.bits,
        group_size: spec.group_size,
        act_order: spec.act_order,
        damp: spec.damp,
        source_dtype,
        calibration: calibration.as_ref().map(|c| CalibrationOutput {
            dataset: &c.dataset.name,
            windows: c.windows.len(),
            seq_len: c.seq_len,
            tokens: c.tokens(),
            sources: c.sources.iter().map(SourceOutput::of).collect(),
            sha256: &c.sha256,
        }),
        file_bytes: outcome.written.bytes,
        carried: source.config().carried().map_or(0, <[_]>::len),
        seconds: start.elapsed().as_secs_f64(),
        predicted_seconds: predicted.map(|p| p.seconds),
        predicted_from: predicted.map(|p| p.from),
        device: device_name,
        ranks,
        peak_memory_bytes: host_memory::peak(),
        peak_device_bytes: device.memory()?.map(|m| m.peak),
        damp_retries: outcome.damp_retries,
        f64_retries: outcome.f64_retries,
        few_tokens: outcome.few_tokens,
        tuning: outcome
            .tuned
            .as_ref()
            .map(|tuned| TuningOutput { record: tuned.record, seconds: tuned.seconds }),
        blocks: &outcome.blocks,
    };
    if args.json { print_json(&output) } else { print_result(&summary(&output, took)) }
}

/// Seconds from the opened source to the finished folder, where enough is known of the device.
fn predict(
    source: &Checkpoint,
    device: &Device,
    ranks: usize,
    settings: &Settings,
    calibration: Option<&Calibration>,
    printer: &Printer,
) -> Result<Option<Prediction>> {
    let Some(calibration) = calibration else { return Ok(None) };
    let Settings { spec, source_dtype, layout, calibration: recipe } = settings;
    let (windows, seq_len) = calibration.workload();
    let setting = Setting {
        windows,
        seq_len,
        shared_grams: 0,
        together: 1,
        gpu_memory: device.memory()?.map_or(0, |memory| memory.budget as u64),
    };
    let metadata = planned_metadata(spec, *source_dtype, recipe);
    let plan = plan_branch(source.config(), spec, *source_dtype, *layout, &metadata, setting)?;
    let rates = KnownRates::of_device(device, ranks, printer);
    Ok(rates.run(source.config(), spec, &plan))
}

/// The name that published branches of these settings have; the folder's own would make its bytes
/// depend on where it lies.
fn branch_name(spec: &QuantSpec) -> String {
    let group = GroupSize(spec.group_size).stored();
    let act_order = if spec.act_order { "True" } else { "False" };
    format!("gptq-{}bit-{group}g-actorder_{act_order}", spec.bits)
}

/// The branch's settings, or the defaults, with the options given on the command line on top.
fn settings(args: &Args) -> Result<Settings> {
    let mut own_damp = false;
    let mut settings = match &args.branch {
        Some(name) => {
            let config = open_sweep(args.config.as_deref().unwrap_or(BUILT_IN))?;
            let branch = config.branch(name)?;
            own_damp = branch.own_damp;
            Settings {
                spec: branch.spec.clone(),
                source_dtype: config.source_dtype,
                layout: config.layout,
                calibration: config.calibration,
            }
        }
        None => {
            let recipe = args.recipe.unwrap_or(Recipe::Best);
            Settings {
                spec: QuantSpec::new(4, Some(128), true, recipe.damp(), recipe),
                source_dtype: SourceDtype::default(),
                layout: Layout::Modern,
                calibration: CalibrationRecipe::open(CalibrationRecipe::DEFAULT)?,
            }
        }
    };
    let spec = &mut settings.spec;
    spec.bits = args.bits.unwrap_or(spec.bits);
    spec.group_size = args.group_size.map_or(spec.group_size, |g| g.0);
    spec.act_order = args.act_order.unwrap_or(spec.act_order);
    spec.damp = args.damp.unwrap_or(spec.damp);
    if let Some(recipe) = args.recipe {
        (spec.recipe, spec.choices) = (recipe, recipe.choices());
        if !own_damp {
            spec.damp = args.damp.unwrap_or(recipe.damp());
        }
    }
    spec.set(&args.set)?;
    settings.source_dtype = args.source_dtype.unwrap_or(settings.source_dtype);
    settings.layout = args.layout.unwrap_or(settings.layout);
    if let Some(name) = &args.calibration.calib {
        settings.calibration = CalibrationRecipe::open(name)?;
    }
    settings.calibration = settings.calibration.with(args.calibration.overrides())?;
    Ok(settings)
}

fn summary(output: &Output<'_>, took: f64) -> String {
    let dir = output.out.display();
    let mut text = format!(
        "{dir}: {} bits, group size {}, {}, {} in {:.1} s",
        output.bits,
        super::table::group(output.group_size),
        output.recipe,
        size(output.file_bytes),
        output.seconds,
    );
    if let Some(peak) = output.peak_memory_bytes {
        text.push_str(&format!(", peak memory {}", size(peak)));
    }
    if let Some(peak) = output.peak_device_bytes {
        text.push_str(&format!(" of host and {} of device", size(peak as u64)));
    }
    if output.carried > 0 {
        let carried = plural(output.carried, "tensor");
        text.push_str(&format!("\ncarried {carried} of other parts unchanged"));
    }
    if let Some(predicted) = Prediction::of(output.predicted_seconds, output.predicted_from) {
        text.push_str(&format!("\n{}", compared(predicted, took)));
    }
    if output.damp_retries > 0 {
        text.push_str(&format!("\ndamping was raised for {} linears", output.damp_retries));
    }
    if output.f64_retries > 0 {
        let count = output.f64_retries;
        text.push_str(&format!("\nthe Hessians of {count} linears were factored in f64"));
    }
    if output.few_tokens > 0 {
        let count = output.few_tokens;
        text.push_str(&format!(
            "\n{count} linears of experts saw too few tokens and were calibrated on all of their blocks'"
        ));
    }
    if let Some(TuningOutput { record, seconds }) = &output.tuning {
        let also = if record.unseen { "" } else { ", which the solver has seen" };
        text.push_str(&format!(
            "\nscales were tuned in {seconds:.1} s: KL {} before and {} after {} of {}, on {}{also}",
            number(record.kl_before, 4),
            number(record.kl_after, 4),
            record.best_step,
            plural(record.steps as usize, "step"),
            plural(record.held_out, "held-out window")
        ));
    }
    text.push_str(&format!("\nMeasure it: gptq ppl {dir}\n"));
    text
}
