//! `gptq ppl`: perplexity of a model, and its distance from another.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use gptq_checkpoint::{Checkpoint, TOKENIZER_FILE};
use gptq_compute::{Device, Ranks};
use gptq_model::{Model, SourcePrecision};
use gptq_pipeline::agreement;
use gptq_pipeline::batches::{Batches, Beside};
use gptq_pipeline::host_memory;
use gptq_pipeline::perplexity::{Perplexity, Tally, score};
use gptq_pipeline::progress::Progress;
use gptq_records::atomic_file::{check_target, refuse_inputs, replace};
use gptq_text::dataset::DatasetSpec;
use gptq_text::evaluation::{EvalText, EvaluationSpec, evaluation_text};
use gptq_text::protocol::Protocol;
use gptq_text::tokens::TextTokenizer;
use serde::Serialize;

use super::source::{open_checkpoint, provide_text, warn_of};
use super::table::{number, plural};
use super::{print_json, print_result};
use crate::args::DeviceArgs;
use crate::args::values::parse_whole;
use crate::hint::advised;
use crate::printer::Printer;

/// Measure the perplexity of a dense model or a GPTQ checkpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq ppl ./SmolLM2-135M-4bit-128g
  gptq ppl ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --max-windows 8 --json
  gptq ppl ./model --protocol llama-cpp --dataset ./book.txt
  gptq ppl ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --per-token losses.csv")]
pub(crate) struct Args {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    model: String,
    /// How the text is cut and scored: paper, llama-cpp or strided
    #[arg(long, default_value = "paper")]
    protocol: Protocol,
    /// Text to score: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl or .parquet
    #[arg(long, default_value = "Salesforce/wikitext:wikitext-2-raw-v1:test")]
    dataset: DatasetSpec,
    /// Tokens of a window [default: 2048 (paper), 512 (llama-cpp), the context (strided)]
    #[arg(long, value_name = "N", value_parser = parse_whole::<usize>)]
    seq_len: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N", value_parser = parse_whole::<usize>)]
    max_windows: Option<usize>,
    /// Dense model to compare with: adds its perplexity and the KL divergence from it
    #[arg(long, value_name = "MODEL")]
    base: Option<String>,
    /// Also write the loss of every scored token, in nats, to this CSV file (with --base: of both)
    #[arg(long, value_name = "FILE")]
    per_token: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

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
    ranks: usize,
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

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let start = Instant::now();
    if let Some(file) = &args.per_token {
        let models = std::iter::once(&args.model).chain(&args.base).map(Path::new);
        refuse_inputs(file, models.chain(args.dataset.file()))?;
        check_target(file)?;
    }
    let local_ranks = args.device.open(printer)?;
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
    if let Some((name, base)) = &base {
        same_tokens(&checkpoint, (name, base), &text, &spec)?;
    }
    if text.contaminated == Some(true) {
        printer.warn("the checkpoint was calibrated on this text, which flatters it");
    }
    if text.glued > 0 {
        printer.warn(&format!(
            "{} rows of {} run into the next: protocol {} puts nothing between rows",
            text.glued, text.dataset, text.protocol
        ));
    }
    printer.note(&format!(
        "{} of {} tokens of {}, protocol {}",
        plural(text.windows.len(), "window"),
        text.seq_len,
        text.dataset,
        text.protocol()
    ));
    let (device, device_name, ranks) =
        (local_ranks.device().clone(), local_ranks.name(), local_ranks.ranks());
    let measured = local_ranks.run(|device, ranks| {
        let base = base.as_ref().map(|(_, base)| base);
        ranks.agree(|| agreement::perplexity(&checkpoint, base, &text))?;
        evaluate((&checkpoint, base), (device, ranks), &text, printer)
    })?;
    let Some((tally, base_tally)) = measured else { return Ok(()) };
    let windows = text.windows.len();
    let result = tally.perplexity(windows)?;
    let compare = |(name, base): (_, &Tally)| -> Result<Comparison<'_>> {
        let Perplexity { perplexity, .. } = base.perplexity(windows)?;
        Ok(Comparison { model: name, perplexity, kl: tally.kl()? })
    };
    let name = base.as_ref().map(|(name, _)| *name);
    let base = name.zip(base_tally.as_ref()).map(compare).transpose()?;
    // The result is printed whatever becomes of the file.
    let saved = args.per_token.as_ref().map_or(Ok(()), |file| {
        let base_losses = base_tally.as_ref().map(|base| base.losses.as_slice());
        let rows = per_token(&text, &tally.losses, base_losses);
        Ok(replace(file, rows.as_bytes())?)
    });
    let output = Output {
        model: &args.model,
        text: &text,
        result,
        dtype: device.dtype(),
        device: device_name,
        ranks,
        base,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: host_memory::peak(),
    };
    if args.json { print_json(&output) } else { print_result(&summary(&output)) }?;
    saved
}

/// The base reads the model's tokens: to one whose tokenizer makes others of the text they are another
/// text, and its perplexity and the KL say nothing. A base without a tokenizer takes what it is given.
fn same_tokens(
    checkpoint: &Checkpoint,
    (name, base): (&str, &Checkpoint),
    text: &EvalText,
    spec: &EvaluationSpec,
) -> Result<()> {
    if !base.dir().join(TOKENIZER_FILE).is_file() {
        return Ok(());
    }
    let open = |of: &Checkpoint| TextTokenizer::open(of.dir(), of.config().vocab_size);
    // The usual case, in which the text need not be read and encoded once more.
    if open(base)?.is_same(&open(checkpoint)?) {
        return Ok(());
    }
    let spec = EvaluationSpec { seq_len: Some(text.seq_len), ..spec.clone() };
    let theirs = evaluation_text(base, &spec, None)?;
    if theirs.windows == text.windows {
        return Ok(());
    }
    let message = format!(
        "The tokenizers of the model and of `{name}` make other tokens of {}, so that neither the \
         base's perplexity nor the KL would say anything",
        text.dataset
    );
    Err(advised(message, "give both the tokenizer that the base was trained with"))
}

/// The losses of the model and of the base, if there is one, which are walked in turns.
fn evaluate(
    (checkpoint, base): (&Checkpoint, Option<&Checkpoint>),
    (device, ranks): (&Device, &Ranks),
    text: &EvalText,
    printer: &Printer,
) -> Result<(Tally, Option<Tally>)> {
    let open = |checkpoint| -> Result<Model<'_>> {
        let model = Model::new(checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?;
        Ok(model.with_ranks(ranks.clone()))
    };
    let model = open(checkpoint)?;
    let base = base.map(open).transpose()?;
    let beside = Beside { base: base.is_some(), ..Beside::default() };
    let batches = Batches::new(&model, &text.windows, beside, printer)?;
    let (mut tally, mut base_tally) = (Tally::default(), Tally::default());
    for batch in batches.iter(&text.windows) {
        let scored = score(&model, batch, printer)?;
        tally.add(&scored, &model)?;
        if let Some(base) = &base {
            let wanted = score(base, batch, printer)?;
            base_tally.add(&wanted, base)?;
            tally.compare(&scored, &wanted, &model)?;
        }
    }
    let tally = tally.of_all_ranks(&model)?;
    let base_tally = base.map(|base| base_tally.of_all_ranks(&base)).transpose()?;
    Ok((tally, base_tally))
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

fn summary(output: &Output<'_>) -> String {
    let Output { text, result, .. } = output;
    let mut lines = super::table::perplexity(result, text, output.dtype);
    if let Some(base) = &output.base {
        lines.push_str(&format!(
            "base       {:.4}  ({}); ratio {:.4}, KL {} nats a token\n",
            base.perplexity,
            base.model,
            result.perplexity / base.perplexity,
            number(base.kl, 5)
        ));
    }
    lines
}
