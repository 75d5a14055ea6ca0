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
use crate::args::ReportArgs;
use crate::printer::Printer;

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    report: &'a Report,
    /// With `--previous`.
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<Vec<BranchChange<'a>>>,
}

pub(crate) fn run(args: &ReportArgs, printer: &Printer) -> Result<()> {
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
