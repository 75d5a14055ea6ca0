//! `gptq verify`: every check of a checkpoint, all findings, and the loaders that take it.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use gptq_checkpoint::loaders::Seen;
use gptq_compute::Device;
use gptq_pipeline::verify::{Check, Limits, LinearError, VerifyJob, VerifyReport, verify};
use gptq_quant::Rotate;
use gptq_text::dataset::DatasetSpec;
use gptq_text::evaluation::EvaluationSpec;
use gptq_text::protocol::Protocol;

use super::source::{locate, open_checkpoint, provide_text, warn_of};
use super::table::{group, number, size, table, yes_no};
use super::{print_json, print_result};
use crate::args::DeviceArgs;
use crate::args::values::{parse_limit, parse_whole};
use crate::hint::advised;
use crate::printer::Printer;

/// Check a GPTQ checkpoint in every respect, and say who loads it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq verify ./SmolLM2-135M-4bit-128g
  gptq verify ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M
  gptq verify ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --dataset ./book.txt \\
    --max-windows 8 --max-kl 0.05 --max-ppl-ratio 1.1")]
pub(crate) struct Args {
    /// Folder of the checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    checkpoint: String,
    /// Dense model that it was made from: compares every weight
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Text to run on: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl or .parquet; with --base, also measures
    /// every linear's output error and the KL divergence
    #[arg(long)]
    dataset: Option<DatasetSpec>,
    /// How the text is cut and scored: paper, llama-cpp or strided
    #[arg(long, default_value = "paper", requires = "dataset")]
    protocol: Protocol,
    /// Tokens of a window [default: 2048 (paper), 512 (llama-cpp), the context (strided)]
    #[arg(long, value_name = "N", value_parser = parse_whole::<usize>, requires = "dataset")]
    seq_len: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N", value_parser = parse_whole::<usize>, requires = "dataset")]
    max_windows: Option<usize>,
    /// Highest perplexity to accept
    #[arg(long, value_name = "X", value_parser = parse_limit, requires = "dataset")]
    max_ppl: Option<f64>,
    /// Highest perplexity to accept, over the base's
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    max_ppl_ratio: Option<f64>,
    /// Highest KL divergence from the base to accept, in nats a token
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    max_kl: Option<f64>,
    /// Highest output error of a linear to accept, as energy over that of its outputs
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    max_output_error: Option<f64>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What the outputs may at most be.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            perplexity: self.max_ppl,
            ratio: self.max_ppl_ratio,
            kl: self.max_kl,
            output_error: self.max_output_error,
        }
    }
}

/// Findings of one check that are printed; `--json` has all.
const SHOWN: usize = 10;

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let dir = locate(&args.checkpoint, printer)?;
    let base = args.base.as_deref().map(|base| open_checkpoint(base, printer)).transpose()?;
    if let Some(base) = &base {
        warn_of(base, false, printer)?;
    }
    let text = args.dataset.clone().map(|dataset| EvaluationSpec {
        dataset,
        protocol: args.protocol,
        seq_len: args.seq_len,
        max_windows: args.max_windows,
    });
    if let Some(text) = &text {
        provide_text(&text.dataset, printer)?;
    }
    if text.is_none() && args.device.is_given() {
        return Err(advised(
            "only a text is measured on a device",
            "name one with --dataset, or leave the device out",
        ));
    }
    // Values are compared on the host; only a text needs a device.
    let device = if text.is_some() {
        args.device.open_one(printer, "name it as --device cuda:0")?
    } else {
        Device::Cpu
    };
    let dtype = device.dtype();
    let job = VerifyJob {
        dir: &dir,
        base: base.as_ref(),
        text: text.as_ref(),
        device,
        limits: args.limits(),
    };
    let report = verify(&job, printer)?;
    let printed =
        if args.json { print_json(&report) } else { print_result(&summary(&report, dtype)) };
    printed?;
    match report.findings.len() {
        0 => Ok(()),
        1 => bail!("`{}` has a fault", args.checkpoint),
        count => bail!("`{}` has {count} faults", args.checkpoint),
    }
}

fn summary(report: &VerifyReport, dtype: &str) -> String {
    let mut parts = vec![checks(report)];
    if !report.findings.is_empty() {
        parts.push(findings(report));
    }
    parts.extend(report.settings.map(|s| {
        format!(
            "{} bits, group size {}, act-order {}, layout {}, {}\n",
            s.bits,
            group(s.group_size),
            yes_no(s.act_order),
            s.layout,
            size(s.file_bytes)
        )
    }));
    parts.extend(errors(report));
    parts.extend(outputs(report, dtype));
    if !report.loaders.is_empty() {
        parts.push(loaders(report));
    }
    parts.join("\n")
}

fn checks(report: &VerifyReport) -> String {
    let verdict = |findings| match findings {
        0 => "ok".to_owned(),
        count => format!("{count} wrong"),
    };
    let rows: Vec<Vec<String>> = report
        .checks
        .iter()
        .map(|c| vec![c.check.title().to_owned(), c.examined.to_string(), verdict(c.findings)])
        .collect();
    table(&["check", "examined", "found"], 1, &rows)
}

fn findings(report: &VerifyReport) -> String {
    let mut lines = String::new();
    let mut shown: BTreeMap<Check, usize> = BTreeMap::new();
    for finding in &report.findings {
        let count = shown.entry(finding.check).or_insert(0);
        *count += 1;
        if *count <= SHOWN {
            lines.push_str(&format!("{} {}\n", finding.place, finding.message));
            if let Some(hint) = &finding.hint {
                lines.push_str(&format!("hint: {hint}\n"));
            }
        }
    }
    for (check, count) in shown.into_iter().filter(|&(_, count)| count > SHOWN) {
        let more = count - SHOWN;
        lines.push_str(&format!("{}: {more} more, see --json\n", check.title()));
    }
    lines
}

/// Errors by kind of linear: the mean over blocks, and the worst with its block.
fn errors(report: &VerifyReport) -> Option<String> {
    let weights = report.weights.as_ref()?;
    let measured = weights.linears.iter().any(|l| l.output_error.is_some());
    let mut kinds: Vec<(String, Vec<&LinearError>)> = Vec::new();
    for linear in &weights.linears {
        let kind = kind(&linear.name);
        match kinds.iter_mut().find(|(of, _)| *of == kind) {
            Some((_, linears)) => linears.push(linear),
            None => kinds.push((kind, vec![linear])),
        }
    }
    let rows: Vec<Vec<String>> = kinds
        .into_iter()
        .map(|(of, linears)| {
            let mut row = vec![of];
            let named = |error: fn(&LinearError) -> Option<f64>| {
                linears.iter().filter_map(move |l| Some((l.name.as_str(), error(l)?)))
            };
            row.extend(spread(named(|l| l.weight_error)));
            if measured {
                row.extend(spread(named(|l| l.output_error)));
            }
            row
        })
        .collect();
    let mut header = vec!["linear", "weight error", "worst", "in block"];
    if measured {
        header.extend(["output error", "worst", "in block"]);
    }
    let how = match weights.rotation {
        "none" => "error energy over the base's".to_owned(),
        rotation => {
            format!("error energy over the base's, in coordinates {}={rotation}", Rotate::KEY)
        }
    };
    Some(format!("{}{how}\n", table(&header, 1, &rows)))
}

/// Name of a linear in its block, with a star for the number of an expert: there may be hundreds.
fn kind(name: &str) -> String {
    let name = name.splitn(4, '.').nth(3).unwrap_or(name);
    let Some((before, numbered)) = name.split_once("experts.") else { return name.to_owned() };
    match numbered.split_once('.') {
        Some((number, last)) if number.bytes().all(|b| b.is_ascii_digit()) => {
            format!("{before}experts.*.{last}")
        }
        _ => name.to_owned(),
    }
}

/// Mean, worst, and the block of the worst; dashes where no linear has an error.
fn spread<'a>(errors: impl Iterator<Item = (&'a str, f64)> + Clone) -> [String; 3] {
    let Some((name, error)) = errors.clone().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        return ["–"; 3].map(str::to_owned);
    };
    let mean = errors.clone().map(|(_, e)| e).sum::<f64>() / errors.count() as f64;
    let block = name.split('.').nth(2).unwrap_or_default().to_owned();
    [format!("{mean:.4}"), format!("{error:.4}"), block]
}

fn outputs(report: &VerifyReport, dtype: &str) -> Option<String> {
    let (outputs, text) = (report.outputs.as_ref()?, report.text.as_ref()?);
    let mut lines = super::table::perplexity(&outputs.result, text, dtype);
    if let (Some(base), Some(ratio), Some(kl)) =
        (outputs.base_perplexity, outputs.ratio, outputs.kl)
    {
        lines.push_str(&format!(
            "base       {base:.4}; ratio {ratio:.4}, KL {} nats a token\n",
            number(kl, 5)
        ));
    }
    Some(lines)
}

fn loaders(report: &VerifyReport) -> String {
    let rows: Vec<Vec<String>> = report
        .loaders
        .iter()
        .map(|v| {
            let mut reasons = v.reasons.clone();
            // The others were run.
            reasons.extend((v.seen == Seen::Code).then(|| "read in code".to_owned()));
            vec![v.loader.to_owned(), yes_no(v.loads), reasons.join("; ")]
        })
        .collect();
    table(&["loader", "loads", "how, or why not"], 3, &rows)
}
