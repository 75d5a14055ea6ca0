//! `gptq ppl`: perplexity of a model, and its distance from another.

use std::time::Instant;

use anyhow::Result;
use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, Ranks};
use gptq_model::{Model, SourcePrecision};
use gptq_pipeline::config::EvaluationSpec;
use gptq_pipeline::evaluation::{EvalText, evaluation_text};
use gptq_pipeline::perplexity::{Perplexity, Scored, score};
use serde::Serialize;

use super::{open_checkpoint, peak_memory, print_json, print_result};
use crate::args::PplArgs;
use crate::printer::Printer;

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    model: &'a str,
    #[serde(flatten)]
    text: &'a EvalText,
    #[serde(flatten)]
    result: Perplexity,
    dtype: &'static str,
    device: String,
    base: Option<Comparison<'a>>,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
}

/// Against `--base`.
#[derive(Serialize)]
struct Comparison<'a> {
    model: &'a str,
    perplexity: f64,
    kl: f64,
}

pub(crate) fn run(args: &PplArgs, printer: &Printer) -> Result<()> {
    let start = Instant::now();
    let team = args.device.open(printer)?;
    let checkpoint = open_checkpoint(&args.model)?;
    let spec = EvaluationSpec {
        dataset: args.dataset.clone(),
        protocol: args.protocol,
        seq_len: args.seq_len,
        max_windows: args.max_windows,
    };
    let text = evaluation_text(&checkpoint, &spec, None)?;
    printer.note(&format!(
        "{} windows of {} tokens of {}, protocol {}",
        text.windows.len(),
        text.seq_len,
        text.dataset,
        text.protocol
    ));
    let (device, device_name) = (team.device().clone(), team.name());
    let measured = team.run(|device, ranks| {
        let place = (device, ranks);
        let (scored, result) = evaluate(&checkpoint, place, &text, printer)?;
        let compare = |name| compare(name, (&checkpoint, place), &text, &scored, printer);
        Ok((result, args.base.as_deref().map(compare).transpose()?))
    })?;
    let Some((result, base)) = measured else { return Ok(()) };
    let output = Output {
        model: &args.model,
        text: &text,
        result,
        dtype: match device {
            Device::Cpu => "f32",
            Device::Cuda(_) => "fp16",
        },
        device: device_name,
        base,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory(),
    };
    if args.json { print_json(&output) } else { print_result(&summary(&output)) }
}

fn evaluate(
    checkpoint: &Checkpoint,
    (device, ranks): (&Device, &Ranks),
    text: &EvalText,
    printer: &Printer,
) -> Result<(Scored, Perplexity)> {
    let model = Model::new(checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?
        .with_ranks(ranks.clone());
    let scored = score(&model, &text.windows, printer)?;
    let result = scored.perplexity(&model)?;
    Ok((scored, result))
}

/// Measures the base model on the same windows.
fn compare<'a>(
    name: &'a str,
    (checkpoint, place): (&Checkpoint, (&Device, &Ranks)),
    text: &EvalText,
    scored: &Scored,
    printer: &Printer,
) -> Result<Comparison<'a>> {
    let base = open_checkpoint(name)?;
    let (base_scored, result) = evaluate(&base, place, text, printer)?;
    let (device, ranks) = place;
    let model = Model::new(checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?
        .with_ranks(ranks.clone());
    let kl = scored.kl_from(&base_scored, &model)?;
    Ok(Comparison { model: name, perplexity: result.perplexity, kl })
}

fn summary(output: &Output<'_>) -> String {
    let Output { text, result, .. } = output;
    let mut lines = format!(
        "perplexity {:.4} ± {:.4}  ({}, {}, {} windows × {}, {} tokens scored, {})\n",
        result.perplexity,
        result.perplexity * result.standard_error,
        text.protocol,
        text.dataset,
        result.windows,
        text.seq_len,
        result.tokens,
        output.dtype,
    );
    if let Some(base) = &output.base {
        lines.push_str(&format!(
            "base       {:.4}  ({}); ratio {:.4}, KL {:.5} nats a token\n",
            base.perplexity,
            base.model,
            result.perplexity / base.perplexity,
            base.kl
        ));
    }
    lines
}
