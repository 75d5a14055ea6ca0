//! `gptq sweep`: every branch of a configuration, made and measured.

use anyhow::Result;
use gptq_pipeline::calibration::CalibrationRecipe;
use gptq_pipeline::config::{Branch, SweepConfig};
use gptq_pipeline::sweep::{SweepReport, SweepRow, sweep};

use super::quantize::sample;
use super::table::{group, size, table, yes_no};
use super::{open_checkpoint, print_json, print_result};
use crate::args::SweepArgs;
use crate::printer::Printer;

pub(crate) fn run(args: &SweepArgs, printer: &Printer) -> Result<()> {
    let mut config = SweepConfig::open(&args.config)?;
    if let Some(model) = &args.model {
        config.model.clone_from(model);
    }
    if let Some(name) = &args.calibration.calib {
        config.calibration = CalibrationRecipe::open(name)?;
    }
    config.calibration = config.calibration.clone().with(args.calibration.overrides())?;
    let branches = selected(&config, &args.only)?;
    let source = open_checkpoint(&config.model)?;
    let team = args.device.open(printer)?;
    let calibration = sample(&source, &config.calibration, printer)?;
    let report = team.run(|device, ranks| {
        let place = (device, ranks);
        Ok(sweep(&config, &branches, &source, &calibration, place, &args.out, printer)?)
    })?;
    let Some(report) = report else { return Ok(()) };
    if args.json { print_json(&report) } else { print_result(&text(&report)) }
}

/// The branches named by `--only`, in the configuration's order; all of them otherwise.
fn selected(config: &SweepConfig, only: &[String]) -> Result<Vec<Branch>> {
    for name in only {
        config.branch(name)?;
    }
    let chosen = |b: &&Branch| only.is_empty() || only.contains(&b.name);
    Ok(config.branches.iter().filter(chosen).cloned().collect())
}

fn text(report: &SweepReport) -> String {
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
        let mut row = vec!["fp16".to_owned(), "16".to_owned()];
        row.extend(["", "", ""].map(str::to_owned));
        row.push(format!("{:.3}", baseline.perplexity));
        rows.push(row);
    }
    rows.extend(report.rows.iter().map(cells));
    let mut text = table(&header, 1, &rows);
    if let (Some(e), Some(b)) = (&report.evaluation, &report.baseline) {
        text.push_str(&format!(
            "\n{}: {} windows × {} tokens of {}; KL to fp16 in nats a token; f32.\n",
            e.protocol, b.windows, e.seq_len, e.dataset
        ));
        if e.contaminated {
            text.push_str(
                "The branches were calibrated on this split: perplexities are optimistic.\n",
            );
        }
    }
    text
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
        number(Some(row.quantise_seconds), 1),
    ]
}
