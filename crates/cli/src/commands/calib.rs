//! `gptq calib`: what a calibration recipe holds; and the drawing of its windows for commands that
//! quantize.

use std::path::Path;

use anyhow::Result;
use gptq_generate::{ChatTemplate, Error};
use gptq_model::check_context;
use gptq_pipeline::progress::Progress;
use gptq_text::calibration::{
    Calibration, CalibrationRecipe, Cut, DrawnSource, Place, RecipeSource, Start,
};
use gptq_text::chat::{Message, Render, Unrendered};
use gptq_text::dataset::Join;
use gptq_text::evaluation_sets::contained;
use gptq_text::tokens::TextTokenizer;
use serde::Serialize;

use super::source::{open_settings, provide_text};
use super::table::{plural, table};
use super::{print_json, print_result};
use crate::args::RecipeChanges;
use crate::args::values::parse_whole;
use crate::printer::Printer;

/// Show what the windows of a calibration recipe hold, as a model's tokenizer sees them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq calib mix --model HuggingFaceTB/SmolLM2-135M
  gptq calib calib/chat.toml --model ./SmolLM2-135M-Instruct --show 4
  gptq calib wikitext2 --model ./SmolLM2-135M --calib-dataset mine.txt --calib-join paragraphs

The model's configuration, tokenizer and chat template are all that is read of it.")]
pub(crate) struct Args {
    /// Calibration recipe: wikitext2, mix, card, or a TOML file
    #[arg(value_name = "RECIPE|FILE")]
    recipe: String,
    /// Folder of the model, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Show how the first N windows begin and end, special tokens among them
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8", value_parser = parse_whole::<usize>)]
    show: Option<usize>,
    #[command(flatten)]
    changes: RecipeChanges,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Tokens of a window's beginning, and of its end, that are shown.
const SHOWN: usize = 24;

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    recipe: String,
    model: String,
    seed: u64,
    windows: usize,
    seq_len: usize,
    tokens: usize,
    sha256: String,
    sources: Vec<SourceOutput>,
    /// Usual evaluation sets that the sources hold.
    evaluation_sets: Vec<String>,
    shown: Vec<Shown>,
}

#[derive(Serialize)]
struct SourceOutput {
    dataset: String,
    join: Option<Join>,
    template: Option<&'static str>,
    rows: &'static str,
    rows_in_dataset: usize,
    tokens_in_text: Option<usize>,
    refused: usize,
    unanswered: usize,
    windows: usize,
    tokens: usize,
    /// Of all windows' tokens.
    share: f64,
    repeated_tokens: usize,
}

/// A window.
#[derive(Serialize)]
struct Shown {
    window: usize,
    source: usize,
    token: Option<usize>,
    row: Option<usize>,
    tokens: usize,
    first: String,
    last: String,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let recipe = CalibrationRecipe::open(&args.recipe)?.with(args.changes.overrides())?;
    let (folder, config) = open_settings(&args.model, printer)?;
    let tokenizer = TextTokenizer::open(&folder, config.vocab_size)?;
    let calibration = draw(&folder, &tokenizer, &recipe, printer)?;
    // What a quantizer would refuse.
    check_context(&config, calibration.longest())?;
    let shown = calibration.windows.iter().zip(&calibration.places).take(args.show.unwrap_or(0));
    let shown = shown.enumerate().map(|(index, (ids, place))| show(&tokenizer, index, ids, place));
    let all = calibration.tokens();
    let output = Output {
        recipe: recipe.name.clone(),
        model: args.model.clone(),
        seed: calibration.seed,
        windows: calibration.windows.len(),
        seq_len: calibration.seq_len,
        tokens: all,
        sha256: calibration.sha256.clone(),
        sources: calibration.sources.iter().map(|source| SourceOutput::of(source, all)).collect(),
        evaluation_sets: contained(&calibration.dataset),
        shown: shown.collect::<Result<_>>()?,
    };
    if args.json { print_json(&output) } else { print_result(&text(&output, &calibration)) }
}

/// Draws the calibration windows with the tokenizer and chat template in a model's folder.
pub(super) fn sample(
    folder: &Path,
    vocab_size: usize,
    recipe: &CalibrationRecipe,
    printer: &Printer,
) -> Result<Calibration> {
    let tokenizer = TextTokenizer::open(folder, vocab_size)?;
    let calibration = draw(folder, &tokenizer, recipe, printer)?;
    printer.note(&format!("calibrating on {}", described(&calibration)));
    Ok(calibration)
}

/// The windows, with warnings of what became of the sources' rows.
fn draw(
    folder: &Path,
    tokenizer: &TextTokenizer,
    recipe: &CalibrationRecipe,
    printer: &Printer,
) -> Result<Calibration> {
    for RecipeSource { dataset, .. } in &recipe.sources {
        provide_text(dataset, printer)?;
    }
    let template = match recipe.is_chat().then(|| ChatTemplate::open(folder)) {
        // Which source needs it is said where it is needed.
        Some(Err(Error::NoChatTemplate { .. })) => None,
        template => template.transpose()?,
    };
    let chat =
        template.as_ref().map(|template| |messages: &[Message]| rendered(template, messages));
    let calibration = recipe.sample(tokenizer, chat.as_ref().map(|chat| chat as &Render<'_>))?;
    calibration.sources.iter().for_each(|source| warn(source, printer));
    Ok(calibration)
}

fn rendered(template: &ChatTemplate, messages: &[Message]) -> Result<String, Unrendered> {
    template.render_document(messages).map_err(|error| match error {
        Error::TemplateRefused { message, .. } => Unrendered::Refused(message),
        other => Unrendered::Failed(Box::new(other)),
    })
}

fn warn(source: &DrawnSource, printer: &Printer) {
    let DrawnSource { dataset, rows, glued, .. } = source;
    if let (Cut::Text(join), 1..) = (source.cut, *glued) {
        printer.warn(&format!(
            "{glued} of the {rows} rows of {} run into the next, as the {join} join puts nothing \
             between them; --calib-join paragraphs puts a blank line there",
            dataset.name
        ));
    }
    if let Some((count, reason)) = &source.refused {
        printer.warn(&format!(
            "{count} conversations of {} were passed over for others, as the model's chat template \
             refuses them: {reason}",
            dataset.name
        ));
    }
    if source.unanswered > 0 {
        printer.warn(&format!(
            "{} conversations of {} were passed over for others, as an answer in them is empty",
            source.unanswered, dataset.name
        ));
    }
}

/// The windows in words.
fn described(calibration: &Calibration) -> String {
    let Calibration { windows, seq_len, dataset, sources, .. } = calibration;
    let of = |source: &DrawnSource| format!("{} of {}", source.windows, source.dataset.name);
    let each: Vec<String> = sources.iter().map(of).collect();
    let (windows, all) = (plural(windows.len(), "window"), calibration.tokens());
    let (length, all) = match calibration.is_even() {
        true => (format!("{windows} × {seq_len} tokens"), String::new()),
        false => (format!("{windows} of up to {seq_len} tokens"), format!(", {all} in all")),
    };
    match each.as_slice() {
        [_] => format!("{length} of {}{all}", dataset.name),
        each => format!("{length}{all}: {}", each.join(", ")),
    }
}

impl SourceOutput {
    fn of(source: &DrawnSource, all: usize) -> Self {
        Self {
            dataset: source.dataset.name.clone(),
            join: match source.cut {
                Cut::Text(join) => Some(join),
                _ => None,
            },
            template: source.cut.is_chat().then_some("chat"),
            rows: if source.cut.is_packed() { "packed" } else { "padded" },
            rows_in_dataset: source.rows,
            tokens_in_text: source.tokens_in_text,
            refused: source.refused.as_ref().map_or(0, |(count, _)| *count),
            unanswered: source.unanswered,
            windows: source.windows,
            tokens: source.tokens,
            share: source.tokens as f64 / all as f64,
            repeated_tokens: source.repeated,
        }
    }

    /// How its rows become windows.
    fn cut(&self) -> String {
        match (self.join, self.template) {
            (Some(join), _) => format!("join {join}"),
            (None, Some(template)) => format!("{template}, {}", self.rows),
            (None, None) => self.rows.to_owned(),
        }
    }
}

fn show(tokenizer: &TextTokenizer, window: usize, ids: &[u32], place: &Place) -> Result<Shown> {
    let (token, row) = match place.start {
        Start::Token(token) => (Some(token), None),
        Start::Row(row) => (None, Some(row)),
    };
    let (first, last) = (&ids[..ids.len().min(SHOWN)], &ids[ids.len().saturating_sub(SHOWN)..]);
    Ok(Shown {
        window,
        source: place.source,
        token,
        row,
        tokens: ids.len(),
        first: tokenizer.decode(first, false)?,
        last: tokenizer.decode(last, false)?,
    })
}

fn text(output: &Output, calibration: &Calibration) -> String {
    let Output { recipe, model, seed, sha256, .. } = output;
    let length = described(calibration);
    let mut text = format!("{recipe}, tokens of {model}, seed {seed}: {length}\n\n");
    let header = ["source", "rows as", "rows", "windows", "tokens", "of all tokens", "held twice"];
    let percent = |part: f64| format!("{:.1} %", 100.0 * part);
    let rows: Vec<Vec<String>> = output
        .sources
        .iter()
        .map(|source| {
            vec![
                source.dataset.clone(),
                source.cut(),
                source.rows_in_dataset.to_string(),
                source.windows.to_string(),
                source.tokens.to_string(),
                percent(source.share),
                percent(source.repeated_tokens as f64 / source.tokens as f64),
            ]
        })
        .collect();
    text.push_str(&table(&header, 2, &rows));
    text.push_str(&format!("\nSHA-256 of the tokens: {sha256}\n"));
    for set in &output.evaluation_sets {
        text.push_str(&format!("It holds {set}: perplexity and KL there are optimistic.\n"));
    }
    for shown in &output.shown {
        text.push_str(&format!("\n{}\n", window(shown, &output.sources)));
    }
    text
}

fn window(shown: &Shown, sources: &[SourceOutput]) -> String {
    let Shown { window, tokens, first, last, .. } = shown;
    let place = match (shown.token, shown.row) {
        (Some(token), _) => format!("from token {token}"),
        (None, row) => format!("from row {}", row.unwrap_or(0) + 1),
    };
    let source = sources.get(shown.source).map_or("", |source| source.dataset.as_str());
    let head = format!("window {}: {tokens} tokens of {source}, {place}", window + 1);
    // Written as a program would: line ends and what no terminal shows are seen.
    if *tokens <= SHOWN {
        format!("{head}\n  {first:?}")
    } else {
        format!("{head}\n  {first:?}\n  … {last:?}")
    }
}
