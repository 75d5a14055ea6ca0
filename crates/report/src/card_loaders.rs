//! The card's table of programs: which branches each loads, and why not the others.

use std::collections::BTreeSet;

use gptq_checkpoint::loaders::{
    Architecture, Bias, GroupIndex, LoaderFacts, LoaderVerdict, asks_for_bfloat16, verdicts,
};
use gptq_checkpoint::{Checkpoint, Head, Layout};
use gptq_records::branch_report::BranchReport;
use serde::Serialize;

use crate::error::{Error, Result};

/// A branch, with every program's verdict on it.
#[derive(Debug)]
pub(crate) struct Judged<'a> {
    pub(crate) branch: &'a BranchReport,
    pub(crate) verdicts: Vec<LoaderVerdict>,
}

/// A program in the card's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LoaderRow {
    pub(crate) loader: &'static str,
    /// True when it loads every branch; false with an empty `branches` when it loads none.
    pub(crate) all: bool,
    /// Branches that it loads.
    pub(crate) branches: Vec<String>,
    /// How it runs them, and why it refuses the others.
    pub(crate) notes: Vec<Note>,
}

/// What is to be said of some of the branches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Note {
    /// It is why they are refused, where others are not.
    pub(crate) not: bool,
    /// Whom it is about, where a few words say it.
    pub(crate) whose: Option<String>,
    /// Whom it is about, where they have to be named.
    pub(crate) branches: Vec<String>,
    pub(crate) text: String,
}

/// Verdicts on a checkpoint of this program, whose files are known by how they are written: the
/// weights need not be read.
pub(crate) fn verdicts_of(
    checkpoint: &Checkpoint,
    branch: &BranchReport,
) -> Result<Vec<LoaderVerdict>> {
    let Some(quantize) = checkpoint.quantize_config().cloned() else {
        return Err(Error::NotQuantized(checkpoint.dir().to_owned()));
    };
    let layout: Layout = branch.layout.parse().map_err(|message| gptq_records::Error::Report {
        path: checkpoint.dir().join(gptq_checkpoint::REPORT_FILE),
        message,
    })?;
    let text = quantize.file_text(layout)?;
    let keys: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|e| gptq_records::Error::Report {
            path: checkpoint.dir().to_owned(),
            message: e.to_string(),
        })?;
    Ok(verdicts(&LoaderFacts {
        architecture: Architecture::from(checkpoint.config()),
        act_order: branch.act_order,
        zeros: quantize.checkpoint_format,
        zeros_of_zero: false,
        gptqmodel_stamp: false,
        group_index: GroupIndex::Stored,
        dense_linear: None,
        head_only_tied: checkpoint.head().is_ok_and(|head| head == Head::Tied),
        bfloat16: asks_for_bfloat16(checkpoint.config()),
        // One order for q, k and v, and one for gate and up.
        shared_order: true,
        bias: if layout == Layout::Card { Bias::Zero } else { Bias::Absent },
        other_types: Vec::new(),
        frequencies: layout == Layout::Card,
        file_stem: quantize.file_stem(),
        sharded: checkpoint.weight_files().len() > 1,
        pt_metadata: true,
        quantize_config: Some(keys.into_iter().map(|(key, _)| key).collect()),
        quantization_config: true,
        quantize,
    }))
}

/// A row for each loader, from the verdicts on each branch.
pub(crate) fn loader_rows(branches: &[Judged<'_>]) -> Vec<LoaderRow> {
    let Some(first) = branches.first() else { return Vec::new() };
    let row = |(i, loader): (usize, &LoaderVerdict)| {
        let verdicts = branches.iter().filter_map(|b| Some((b.branch, b.verdicts.get(i)?)));
        let (loaded, refused): (Vec<Verdict<'_>>, _) = verdicts.partition(|(_, v)| v.loads);
        LoaderRow {
            loader: loader.loader,
            all: refused.is_empty(),
            notes: [loaded_notes(&loaded), refused_notes(&refused, &loaded)].concat(),
            branches: names(&loaded),
        }
    };
    first.verdicts.iter().enumerate().map(row).collect()
}

/// What one program says of a branch.
type Verdict<'a> = (&'a BranchReport, &'a LoaderVerdict);

/// How branches run that are loaded.
fn loaded_notes(loaded: &[Verdict<'_>]) -> Vec<Note> {
    let note = |text: &String| {
        let (about, others) = parted(loaded, text);
        let by_width = widths_apart(&about, &others);
        Note {
            not: false,
            branches: names(if others.is_empty() || by_width.is_some() { &[] } else { &about }),
            whose: by_width.filter(|_| !others.is_empty()),
            text: text.clone(),
        }
    };
    reasons(loaded).into_iter().map(note).collect()
}

/// Why branches are refused.
fn refused_notes(refused: &[Verdict<'_>], loaded: &[Verdict<'_>]) -> Vec<Note> {
    let note = |text: &String| {
        let (about, others) = parted(refused, text);
        // Of a width that is loaded elsewhere in the table, the width is not why.
        let by_width = widths_apart(&about, &[others.as_slice(), loaded].concat());
        let whole_row = others.is_empty() && loaded.is_empty();
        let whose = match by_width {
            _ if whole_row => None,
            // The reason may begin with the width itself.
            Some(widths) => Some(widths).filter(|widths| !text.starts_with(widths)),
            None if others.is_empty() => Some("the others".to_owned()),
            None => None,
        };
        let implied = whole_row || whose.is_some() || text.starts_with(&widths(&about));
        let branches = names(if implied { &[] } else { &about });
        Note { not: !whole_row, whose, branches, text: text.clone() }
    };
    reasons(refused).into_iter().map(note).collect()
}

/// Every reason once.
fn reasons<'a>(verdicts: &[Verdict<'a>]) -> Vec<&'a String> {
    let mut found = Vec::new();
    for reason in verdicts.iter().flat_map(|(_, verdict)| &verdict.reasons) {
        if !found.contains(&reason) {
            found.push(reason);
        }
    }
    found
}

/// Those that a reason is about, and the others.
fn parted<'a>(verdicts: &[Verdict<'a>], reason: &String) -> (Vec<Verdict<'a>>, Vec<Verdict<'a>>) {
    verdicts.iter().copied().partition(|(_, verdict)| verdict.reasons.contains(reason))
}

/// The widths of some branches, unless others have one of them too.
fn widths_apart(about: &[Verdict<'_>], others: &[Verdict<'_>]) -> Option<String> {
    let shared = |other: &Verdict<'_>| about.iter().any(|(b, _)| b.bits == other.0.bits);
    (!others.iter().any(shared)).then(|| widths(about))
}

/// `3 bits`, `2, 3 bits`.
fn widths(branches: &[Verdict<'_>]) -> String {
    let widths: BTreeSet<u8> = branches.iter().map(|(branch, _)| branch.bits).collect();
    let widths: Vec<String> = widths.iter().map(u8::to_string).collect();
    format!("{} bits", widths.join(", "))
}

fn names(branches: &[Verdict<'_>]) -> Vec<String> {
    branches.iter().map(|(branch, _)| branch.branch.clone()).collect()
}
