//! `gptq ppl`: perplexity of a model, and its distance from another.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, Ranks};
use gptq_model::{Model, SourcePrecision};
use gptq_pipeline::config::EvaluationSpec;
use gptq_pipeline::evaluation::{EvalText, evaluation_text};
use gptq_pipeline::perplexity::{Perplexity, Scored, score};
use gptq_pipeline::progress::Progress;
use serde::Serialize;

use super::source::{open_checkpoint, provide_text, warn_of};
use super::{peak_memory, print_json, print_result};
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
    if let Some(file) = &args.per_token {
        let folder = file.parent().filter(|p| !p.as_os_str().is_empty());
        let writable = folder.is_none_or(Path::is_dir) && !file.is_dir();
        ensure!(writable, "Cannot write `{}`: no such folder, or a folder itself", file.display());
    }
    let team = args.device.open(printer)?;
    let checkpoint = open_checkpoint(&args.model, printer)?;
    let base = match args.base.as_deref() {
        Some(name) => Some((name, open_checkpoint(name, printer)?)),
        None => None,
    };
    for checkpoint in [Some(&checkpoint), base.as_ref().map(|(_, base)| base)].into_iter().flatten()
    {
        warn_of(checkpoint, false, printer)?;
    }
    provide_text(&args.dataset, printer)?;
    let spec = EvaluationSpec {
        dataset: args.dataset.clone(),
        protocol: args.protocol,
        seq_len: args.seq_len,
        max_windows: args.max_windows,
    };
    let text = evaluation_text(&checkpoint, &spec, None)?;
    if text.contaminated == Some(true) {
        printer.warn("the checkpoint was calibrated on this text, which flatters it");
    }
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
        let (scored, losses, result) = evaluate(&checkpoint, place, &text, printer)?;
        let compare = |base| compare(base, (&checkpoint, place), &text, &scored, printer);
        Ok((result, losses, base.as_ref().map(compare).transpose()?))
    })?;
    let Some((result, losses, base)) = measured else { return Ok(()) };
    let (base, base_losses) = base.unzip();
    // The result is printed whatever becomes of the file.
    let saved = args.per_token.as_ref().map_or(Ok(()), |file| {
        std::fs::write(file, per_token(&text, &losses, base_losses.as_deref()))
            .with_context(|| format!("Cannot write `{}`", file.display()))
    });
    let output = Output {
        model: &args.model,
        text: &text,
        result,
        dtype: device.dtype(),
        device: device_name,
        base,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory(),
    };
    if args.json { print_json(&output) } else { print_result(&summary(&output)) }?;
    saved
}

fn evaluate(
    checkpoint: &Checkpoint,
    (device, ranks): (&Device, &Ranks),
    text: &EvalText,
    printer: &Printer,
) -> Result<(Scored, Vec<f32>, Perplexity)> {
    let model = Model::new(checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?
        .with_ranks(ranks.clone());
    let scored = score(&model, &text.windows, printer)?;
    let losses = scored.losses(&model)?;
    let result = scored.mean(&losses)?;
    Ok((scored, losses, result))
}

/// A row a scored token: its window, its place there from 0, its id, and its loss.
fn per_token(text: &EvalText, losses: &[f32], base: Option<&[f32]>) -> String {
    let mut rows = "window,position,token,nll".to_owned();
    rows.push_str(if base.is_some() { ",base_nll\n" } else { "\n" });
    let scored = text.windows.iter().enumerate().flat_map(|(index, window)| {
        let targets = window.tokens.iter().enumerate().skip(window.score_from);
        targets.map(move |(position, token)| (index, position, token))
    });
    for (i, ((window, position, token), loss)) in scored.zip(losses).enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(rows, "{window},{position},{token},{loss}");
        if let Some(base) = base {
            let _ = write!(rows, ",{}", base[i]);
        }
        rows.push('\n');
    }
    rows
}

/// Measures the base model on the same windows.
fn compare<'a>(
    (name, base): &(&'a str, Checkpoint),
    (checkpoint, place): (&Checkpoint, (&Device, &Ranks)),
    text: &EvalText,
    scored: &Scored,
    printer: &Printer,
) -> Result<(Comparison<'a>, Vec<f32>)> {
    let (base_scored, losses, result) = evaluate(base, place, text, printer)?;
    let (device, ranks) = place;
    let model = Model::new(checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?
        .with_ranks(ranks.clone());
    let kl = scored.kl_from(&base_scored, &model)?;
    Ok((Comparison { model: name, perplexity: result.perplexity, kl }, losses))
}

fn summary(output: &Output<'_>) -> String {
    let Output { text, result, .. } = output;
    let mut lines = super::table::perplexity(result, text, output.dtype);
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
