//! `gptq check`: the accuracy gate.

use std::path::Path;

use anyhow::{Result, bail};
use gptq_records::branch_report::REPORT_FILE;
use gptq_report::Error;
use gptq_report::Report;
use gptq_report::check::{Baseline, Finding, Outcome, Verdict};

use super::table::table;
use super::{print_json, print_result};
use crate::args::CheckArgs;
use crate::printer::Printer;

pub(crate) fn run(args: &CheckArgs, printer: &Printer) -> Result<()> {
    let report = Report::open(std::slice::from_ref(&args.report))?;
    let whole = !one_checkpoint(&args.report);
    if args.update {
        return update(args, &report, whole, printer);
    }
    let outcome = Baseline::read(&args.baseline)?.check(&report, whole)?;
    show(args, &outcome)?;
    let failed = outcome.findings.iter().filter(|f| f.verdict.fails()).count();
    if failed > 0 {
        bail!(
            "{failed} of {} values fail against `{}`; if that is intended, accept it with --update",
            outcome.findings.len(),
            args.baseline.display()
        );
    }
    if outcome.findings.iter().any(|f| matches!(f.verdict, Verdict::Improved | Verdict::New)) {
        printer.note("improved or new: run with --update to hold it");
    }
    Ok(())
}

/// Shows what the update changes, where that can be compared, and makes it.
fn update(args: &CheckArgs, report: &Report, whole: bool, printer: &Printer) -> Result<()> {
    let before = match Baseline::read(&args.baseline) {
        Ok(before) => Some(before),
        Err(Error::NoBaseline(_)) => None,
        Err(other) => return Err(other.into()),
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

fn show(args: &CheckArgs, outcome: &Outcome) -> Result<()> {
    if args.json {
        return print_json(outcome);
    }
    let header = ["branch", "what", "baseline", "now", "change", "allowed", "verdict"];
    let rows: Vec<Vec<String>> = outcome.findings.iter().map(cells).collect();
    print_result(&table(&header, 2, &rows))
}

fn cells(finding: &Finding) -> Vec<String> {
    let number = |value: Option<f64>| {
        value.map_or_else(String::new, |v| match finding.what {
            "file_bytes" => format!("{v}"),
            "kl" => format!("{v:.5}"),
            _ => format!("{v:.4}"),
        })
    };
    let change = match (finding.baseline, finding.now) {
        (Some(then), Some(now)) if now != then => format!("{:+.2} %", 100.0 * (now - then) / then),
        (Some(_), Some(_)) => "same".to_owned(),
        _ => String::new(),
    };
    vec![
        finding.branch.clone(),
        finding.what.to_owned(),
        number(finding.baseline),
        number(finding.now),
        change,
        number(finding.allowed),
        finding.verdict.name().to_owned(),
    ]
}
