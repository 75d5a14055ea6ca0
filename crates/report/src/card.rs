//! The model card: README.md of every checkpoint folder.
//!
//! What only a person knows of a model (its author, license, prompt) comes from a TOML file; sizes,
//! perplexities and calibration come from the reports in the folders, so that a card cannot claim
//! what was not measured. All branches get the same card with their own name in its commands.

use std::path::{Path, PathBuf};

use gptq_checkpoint::{CARD_FILE, Checkpoint};
use gptq_records::atomic_file::replace;
use gptq_records::branch_report::{BranchReport, TOOL};
use gptq_records::locks::{STATE_DIR, SharedFile};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

use crate::card_facts::{CardFacts, plain};
use crate::card_loaders::{Judged, LoaderRow, loader_rows, verdicts_of};
use crate::collect::{Report, branches, checkpoints};
use crate::compare::{Comparison, Row, comparisons};
use crate::error::{Error, Result};
use crate::markdown;
use crate::summary;
use crate::task_table::TaskTable;
use crate::units::{self, Unit};

const TEMPLATE: &str = include_str!("../templates/card.md");

/// A branch in the card's table.
#[derive(Serialize)]
struct CardRow<'a> {
    name: &'a str,
    bits: u8,
    group: String,
    act_order: &'static str,
    damp: f64,
    calibration: Option<&'a str>,
    length: Option<usize>,
    size: String,
    perplexity: Option<String>,
    loss: Option<String>,
    kl: Option<String>,
    contaminated: bool,
    notes: String,
}

/// Writes the card of every checkpoint in `dir`, which is a sweep's folder or one checkpoint's.
/// Returns the files.
///
/// # Errors
/// A folder without reports, checkpoints that cannot be read, and [`gptq_records::Error::Io`].
pub fn write_cards(dir: &Path, facts: &CardFacts) -> Result<Vec<PathBuf>> {
    let found = checkpoints(dir)?;
    if dir.join(STATE_DIR).is_dir() {
        // A sweep may be at work here, which writes cards too.
        let cards = SharedFile::lock(dir, CARD_FILE)?;
        return write(&found, facts, |path, card| cards.replace(path, card));
    }
    write(&found, facts, replace)
}

/// Writes the cards of a sweep in `out`: of the branches of these names, those that are finished. Of
/// several processes of one sweep, the last to come here sees them all.
///
/// # Errors
/// As [`write_cards`].
pub fn write_sweep_cards<'a>(
    out: &Path,
    names: impl Iterator<Item = &'a str>,
    facts: &CardFacts,
) -> Result<()> {
    let cards = SharedFile::lock(out, CARD_FILE)?;
    let found = branches(out, names)?;
    write(&found, facts, |path, card| cards.replace(path, card)).map(drop)
}

/// Writes the cards of what was found, each by `replace`.
fn write(
    found: &[(PathBuf, BranchReport)],
    facts: &CardFacts,
    replace: impl Fn(&Path, &[u8]) -> gptq_records::Result<()>,
) -> Result<Vec<PathBuf>> {
    for (folder, branch) in found {
        if !plain(&branch.branch) {
            return Err(Error::CardBranch { branch: branch.branch.clone(), dir: folder.clone() });
        }
    }
    let mut judged = Vec::with_capacity(found.len());
    let mut families = Vec::with_capacity(found.len());
    for (folder, branch) in found {
        let checkpoint = Checkpoint::open(folder)?;
        families.push(checkpoint.config().family);
        judged.push(Judged { branch, verdicts: verdicts_of(&checkpoint, branch)? });
    }
    let loaders = loader_rows(&judged);
    let report = Report::of(found.iter().map(|(_, branch)| branch.clone()).collect());
    let mut written = Vec::with_capacity(found.len());
    for ((folder, branch), family) in found.iter().zip(families) {
        let path = folder.join(CARD_FILE);
        replace(&path, card(&report, (branch, family), facts, &loaders)?.as_bytes())?;
        written.push(path);
    }
    Ok(written)
}

/// The card of one branch, of a model of that family, among all of a report.
fn card(
    report: &Report,
    (branch, family): (&BranchReport, &str),
    facts: &CardFacts,
    loaders: &[LoaderRow],
) -> Result<String> {
    let comparisons = comparisons(report, None);
    // The measurement that most branches have; the others stay without numbers.
    let Some(main) = comparisons.iter().max_by_key(|c| (c.measurement.is_some(), c.rows.len()))
    else {
        return Err(Error::NotMeasured);
    };
    let unit = Unit::of(report.branches.iter().map(|b| b.file_bytes));
    let rows: Vec<CardRow<'_>> = report.branches.iter().map(|b| card_row(b, main, unit)).collect();
    let context = context! {
        facts => Serde(facts),
        family => family,
        this => branch.branch.as_str(),
        this_size => unit.text(branch.file_bytes),
        rows => Serde(&rows),
        measured => summary::measured_on(main),
        base_name => main.base_name(),
        base_perplexity => main.base_perplexity().map(units::perplexity),
        contaminated => main.contaminated(),
        tasks => Serde(TaskTable::of(main)),
        closest => summary::closest(main).map(|row| row.branch.branch.as_str()),
        made => Serde(summary::provenance(main)),
        loaders => Serde(loaders),
        vllm => vllm(loaders, &branch.branch),
        tool => TOOL,
    };
    render(context).map_err(|source| Error::Template { name: "card.md", source })
}

/// The versions of vLLM that load a branch, as the table names them.
fn vllm(loaders: &[LoaderRow], branch: &str) -> Vec<&'static str> {
    let vllm = loaders.iter().filter(|row| row.loader.starts_with("vLLM"));
    let loading = vllm.filter(|row| row.branches.iter().any(|name| name == branch));
    loading.map(|row| row.loader).collect()
}

fn render(context: Value) -> std::result::Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    // Text is escaped for Markdown unless the template says what else it is.
    environment.set_auto_escape_callback(|_| AutoEscape::Custom("markdown".into()));
    environment.set_formatter(|out, _, value| {
        if value.is_none() || value.is_undefined() {
            return Ok(());
        }
        let text = value.to_string();
        out.write_str(&if value.is_safe() { text } else { markdown::escape(&text) })?;
        Ok(())
    });
    environment.add_filter("code", |text: &str| Value::from_safe_string(markdown::code(text)));
    environment.add_filter("cell", |text: &str| Value::from_safe_string(markdown::cell_code(text)));
    environment.add_filter("fenced", |text: &str| Value::from_safe_string(markdown::fenced(text)));
    environment.add_filter("quoted", |text: &str| Value::from_safe_string(quoted(text)));
    environment.render_str(TEMPLATE, context)
}

/// A string as JSON, which is one in YAML and Python too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn card_row<'a>(branch: &'a BranchReport, main: &Comparison<'_>, unit: Unit) -> CardRow<'a> {
    let row = main.rows.iter().find(|row| row.branch.branch == branch.branch);
    let evaluation = row.and_then(|row| row.evaluation);
    CardRow {
        name: &branch.branch,
        bits: branch.bits,
        group: units::group(branch.group_size),
        act_order: units::yes_no(branch.act_order),
        damp: branch.damp,
        calibration: branch.calibration.as_ref().map(|c| c.dataset.name.as_str()),
        length: branch.calibration.as_ref().map(|c| c.seq_len),
        size: unit.text(branch.file_bytes),
        perplexity: evaluation.map(|e| units::perplexity(e.perplexity)),
        loss: row.and_then(summary::loss).map(units::percent),
        kl: row.and_then(Row::kl).map(units::kl),
        contaminated: row.is_some_and(Row::contaminated),
        notes: notes(branch, main),
    }
}

/// What a branch is for, as far as its numbers show.
fn notes(branch: &BranchReport, main: &Comparison<'_>) -> String {
    let is = |row: Option<&Row<'_>>| row.is_some_and(|row| row.branch.branch == branch.branch);
    let mut notes = Vec::new();
    if is(summary::closest(main)) {
        notes.push("closest to the original");
    }
    if is(summary::smallest(main)) {
        notes.push("smallest");
    }
    if !branch.act_order {
        notes.push("without act-order, for programs that cannot load it");
    }
    notes.join("; ")
}

#[cfg(test)]
#[path = "card_tests.rs"]
mod tests;
