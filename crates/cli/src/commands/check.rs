//! `gptq check`: the accuracy gate.

use std::path::{Path, PathBuf};

use anyhow::Result;
use gptq_checkpoint::REPORT_FILE;
use gptq_records::atomic_file::refuse_inputs;
use gptq_report::check::{Baseline, Finding, Outcome, Verdict};
use gptq_report::{Error, Report};

use super::table::table;
use super::{print_json, print_result};
use crate::hint::advised;
use crate::printer::Printer;

/// Compare a sweep's accuracy with accepted values, and fail where it is worse
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit code 1 means worse, missing, changed, or not comparable. A folder of one
checkpoint is checked alone; of a sweep, every branch of the baseline must be there.

Examples:
  gptq check branches --baseline tests/baselines/demo.json
  gptq check branches --baseline tests/baselines/demo.json --update"
)]
pub(crate) struct Args {
    /// Sweep folder, checkpoint folder, or a file that gptq report --json printed
    report: PathBuf,
    /// Accepted values and tolerances, as JSON
    #[arg(long, value_name = "FILE")]
    baseline: PathBuf,
    /// Write the report's values into the baseline; tolerances in it are kept
    #[arg(long)]
    update: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let report = Report::open(std::slice::from_ref(&args.report))?;
    let whole = !one_checkpoint(&args.report);
    if args.update {
        return update(args, &report, whole, printer);
    }
    let outcome = Baseline::read(&args.baseline)?.check(&report, whole)?;
    show(args, &outcome)?;
    let failed = outcome.findings.iter().filter(|f| f.verdict.fails()).count();
    if failed > 0 {
        let (all, baseline) = (outcome.findings.len(), args.baseline.display());
        return Err(advised(
            format!("{failed} of {all} values fail against `{baseline}`"),
            "if that is intended, accept it with --update",
        ));
    }
    if outcome.findings.iter().any(|f| matches!(f.verdict, Verdict::Improved | Verdict::New)) {
        printer.note("improved or new: run with --update to hold it");
    }
    Ok(())
}

/// Shows what the update changes, where that can be compared, and makes it.
fn update(args: &Args, report: &Report, whole: bool, printer: &Printer) -> Result<()> {
    refuse_inputs(&args.baseline, [args.report.as_path()])?;
    // A pipe or a device is written into, and has no values of before: what could be read from it may
    // be this program's own output.
    let written_into = args.baseline.exists() && !args.baseline.is_file();
    let before = match (!written_into).then(|| Baseline::read(&args.baseline)).transpose() {
        Err(Error::NoBaseline(_)) => None,
        before => before?,
    };
    let accepted = Baseline::accept(report, before.as_ref(), whole)?;
    match before.unwrap_or_else(|| accepted.clone()).check(report, whole) {
        Ok(outcome) => show(args, &outcome)?,
        Err(error) => printer.note(&format!("starts anew: {error}")),
    }
    accepted.write(&args.baseline)?;
    printer.note(&format!("wrote {}", args.baseline.display()));
    Ok(())
}

/// A folder or file about one checkpoint says nothing about the branches beside it.
fn one_checkpoint(path: &Path) -> bool {
    path.join(REPORT_FILE).is_file() || path.file_name().is_some_and(|name| name == REPORT_FILE)
}

fn show(args: &Args, outcome: &Outcome) -> Result<()> {
    if args.json {
        return print_json(outcome);
    }
    let header = ["branch", "what", "baseline", "now", "change", "allowed", "verdict"];
    let rows: Vec<Vec<String>> = outcome.findings.iter().map(cells).collect();
    let mut text = table(&header, 2, &rows);
    for finding in &outcome.findings {
        if let Some(detail) = &finding.detail {
            text.push_str(&format!("{} {}: {detail}\n", finding.branch, finding.what));
        }
    }
    print_result(&text)
}

fn cells(finding: &Finding) -> Vec<String> {
    // A column stays as wide as numbers that mean something are.
    let number = |value: Option<f64>| {
        value.map_or_else(String::new, |v| match finding.what.as_ref() {
            _ if v.abs() >= 1e15 => format!("{v:.3e}"),
            "file_bytes" => format!("{v}"),
            _ if v.abs() >= 1e7 => format!("{v:.3e}"),
            "kl" => format!("{v:.5}"),
            _ => format!("{v:.4}"),
        })
    };
    let change = match (finding.baseline, finding.now) {
        (Some(then), Some(now)) if now == then => "same".to_owned(),
        (Some(then), Some(now)) => match 100.0 * (now - then) / then {
            change if change.abs() < 1e6 => format!("{change:+.2} %"),
            _ => String::new(),
        },
        _ => String::new(),
    };
    vec![
        finding.branch.clone(),
        finding.what.to_string(),
        number(finding.baseline),
        number(finding.now),
        change,
        number(finding.allowed),
        finding.verdict.name().to_owned(),
    ]
}
