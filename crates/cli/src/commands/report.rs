//! `gptq report`: what a sweep gave, for people.

use std::path::PathBuf;

use anyhow::Result;
use gptq_records::atomic_file::{refuse_inputs, replace};
use gptq_report::Report;
use gptq_report::compare::{BranchChange, changes, comparisons};
use gptq_report::markdown::markdown;
use gptq_report::page::page;
use serde::Serialize;

use super::{print_json, print_result};
use crate::printer::Printer;

/// Show what a sweep gave, as Markdown, JSON or a page with charts
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq report branches
  gptq report branches --html report.html --previous last-release.json
  gptq report branches --json > this-release.json")]
pub(crate) struct Args {
    /// Sweep folders, checkpoint folders, or files that gptq report --json printed
    #[arg(required = true, value_name = "DIR|FILE")]
    paths: Vec<PathBuf>,
    /// Compare with an earlier report: a folder or file as above
    #[arg(long, value_name = "DIR|FILE")]
    previous: Option<PathBuf>,
    /// Write a page with charts, too: one file that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print JSON instead of Markdown
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    report: &'a Report,
    /// With `--previous`.
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<Vec<BranchChange<'a>>>,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    if let Some(path) = &args.html {
        refuse_inputs(path, args.paths.iter().chain(&args.previous).map(PathBuf::as_path))?;
    }
    let report = Report::open(&args.paths)?;
    let previous =
        args.previous.as_ref().map(|p| Report::open(std::slice::from_ref(p))).transpose()?;
    if let Some(path) = &args.html {
        replace(path, page(&report, previous.as_ref())?.as_bytes())?;
        printer.note(&format!("wrote {}", path.display()));
    }
    if !args.json {
        return print_result(&markdown(&report, previous.as_ref()));
    }
    let comparisons = comparisons(&report, previous.as_ref());
    let changes = previous.is_some().then(|| changes(&comparisons));
    print_json(&Output { report: &report, changes })
}
