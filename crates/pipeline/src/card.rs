//! The model card: README.md of every checkpoint folder.
//!
//! What only a person knows of a model (its author, licence, prompt) comes from a TOML file; sizes,
//! perplexities and calibration come from the reports in the folders, so that a card cannot claim
//! what was not measured. All branches get the same card with their own name in its commands.

use std::path::{Path, PathBuf};

use gptq_checkpoint::Checkpoint;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use serde::{Deserialize, Serialize};

use crate::branch_report::{BranchReport, TOOL};
use crate::card_loaders::{Judged, LoaderRow, loader_rows, verdicts_of};
use crate::config::Branch;
use crate::error::{Error, Result};
use crate::files::replace;
use crate::report::compare::{Comparison, Row};
use crate::report::markdown;
use crate::report::units::{self, Unit};
use crate::report::{self, Report, checkpoints, summary};
use crate::resume::{STATE_DIR, SharedFile};

const TEMPLATE: &str = include_str!("../templates/card.md");
/// Name of the card in a checkpoint's folder.
pub const CARD_FILE: &str = "README.md";

/// What a card says of the model that was quantised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardFacts {
    /// The model's name, without its author.
    pub name: String,
    /// Hub repository of the quantised branches, as `ORG/NAME`.
    pub repository: String,
    /// Hub id of the model that was quantised, if it is there.
    pub base_model: Option<String>,
    /// Who made the model.
    pub author: String,
    /// Their page.
    pub author_link: Option<String>,
    /// The Hub's identifier of the licence.
    pub license: String,
    /// What else is to be said of it.
    pub license_note: Option<String>,
    /// Language codes.
    pub languages: Vec<String>,
    /// Hub ids of the data that the model was trained on.
    #[serde(default)]
    pub datasets: Vec<String>,
    /// Who publishes the branches.
    pub quantized_by: Option<String>,
    /// What the model is, in a sentence or two.
    pub description: String,
    /// How it wants to be asked; absent for models that only continue a text.
    pub prompt: Option<Prompt>,
    /// Further reading.
    #[serde(default)]
    pub links: Vec<Link>,
}

/// A prompt template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// What the format is called.
    pub name: String,
    /// The text, with `{prompt}` and perhaps `{system_message}`.
    pub template: String,
}

/// A place to read on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// What is there.
    pub text: String,
    /// Its address.
    pub url: String,
}

impl CardFacts {
    /// Reads the facts; `repository` replaces theirs.
    ///
    /// # Errors
    /// [`Error::ReadFacts`] and [`Error::Facts`], which name the file.
    pub fn open(path: &Path, repository: Option<&str>) -> Result<Self> {
        let text = crate::files::read_text(path)
            .map_err(|source| Error::ReadFacts { path: path.to_owned(), source })?;
        let facts = Self::parse(&text, path)?;
        match repository {
            Some(repository) => {
                let facts = Self { repository: repository.to_owned(), ..facts };
                facts.check(path)?;
                Ok(facts)
            }
            None => Ok(facts),
        }
    }

    /// Reads the facts from their text; `path` is named in errors.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        let facts: Self = toml::from_str(text)
            .map_err(|e| Error::Facts { path: path.to_owned(), message: e.message().to_owned() })?;
        facts.check(path)?;
        Ok(facts)
    }

    /// The repository and the base model stand in commands and addresses.
    fn check(&self, path: &Path) -> Result<()> {
        let invalid = |message: String| Error::Facts { path: path.to_owned(), message };
        for id in [Some(&self.repository), self.base_model.as_ref()].into_iter().flatten() {
            if !id.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name)) {
                return Err(invalid(format!("`{id}` is no Hub repository; use ORG/NAME")));
            }
        }
        match &self.prompt {
            Some(prompt) if !prompt.template.contains("{prompt}") => {
                Err(invalid("the prompt template has no {prompt}".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// True for names that stand in commands and addresses as they are.
fn plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with(['-', '.']) && name.chars().all(plain)
}

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
/// A folder without reports, checkpoints that cannot be read, and [`Error::WriteReport`].
pub fn write_cards(dir: &Path, facts: &CardFacts) -> Result<Vec<PathBuf>> {
    let found = checkpoints(dir)?;
    if dir.join(STATE_DIR).is_dir() {
        // A sweep may be at work here, which writes cards too.
        let cards = SharedFile::lock(dir, CARD_FILE)?;
        return write(&found, facts, |path, card| cards.replace(path, card));
    }
    write(&found, facts, replace)
}

/// Writes the cards of a sweep in `out`: of `branches`, those that are finished. Of several processes
/// of one sweep, the last to come here sees them all.
///
/// # Errors
/// As [`write_cards`].
pub fn write_sweep_cards(out: &Path, branches: &[Branch], facts: &CardFacts) -> Result<()> {
    let cards = SharedFile::lock(out, CARD_FILE)?;
    let found = report::branches(out, branches.iter().map(|branch| branch.name.as_str()))?;
    write(&found, facts, |path, card| cards.replace(path, card)).map(drop)
}

/// Writes the cards of what was found, each by `replace`.
fn write(
    found: &[(PathBuf, BranchReport)],
    facts: &CardFacts,
    replace: impl Fn(&Path, &[u8]) -> Result<()>,
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
    let comparisons = report.comparisons(None);
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

/// What a branch is for, as far as its numbers tell.
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
