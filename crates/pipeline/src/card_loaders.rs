//! The card's table of programs: which branches each loads, and why not the others.

use gptq_checkpoint::{Checkpoint, Layout};
use serde::Serialize;

use crate::branch_report::BranchReport;
use crate::error::{Error, Result};
use crate::loaders::{Architecture, Bias, LoaderFacts, LoaderVerdict, verdicts};

/// A program in the card's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LoaderRow {
    pub(crate) loader: &'static str,
    /// True when it loads every branch; false with an empty `branches` when it loads none.
    pub(crate) all: bool,
    /// Branches that it loads.
    pub(crate) branches: Vec<String>,
    /// How it runs them, and why it refuses the others.
    pub(crate) notes: Vec<String>,
}

/// Verdicts on a checkpoint of this program, whose files are known by how they are written: the
/// weights need not be read.
pub(crate) fn verdicts_of(
    checkpoint: &Checkpoint,
    branch: &BranchReport,
) -> Result<Vec<LoaderVerdict>> {
    let Some(quantize) = checkpoint.quantize_config().cloned() else {
        return Err(Error::NotQuantised(checkpoint.dir().to_owned()));
    };
    let layout: Layout = branch.layout.parse().map_err(|message| Error::Report {
        path: checkpoint.dir().join(crate::branch_report::REPORT_FILE),
        message,
    })?;
    let text = quantize.file_text(layout)?;
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
        .map_err(|e| Error::Report { path: checkpoint.dir().to_owned(), message: e.to_string() })?;
    Ok(verdicts(&LoaderFacts {
        architecture: Architecture::from(checkpoint.config()),
        act_order: branch.act_order,
        // One order for q, k and v, and one for gate and up.
        shared_order: true,
        bias: if layout == Layout::Card { Bias::Zero } else { Bias::Absent },
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
pub(crate) fn loader_rows(branches: &[(String, Vec<LoaderVerdict>)]) -> Vec<LoaderRow> {
    let Some((_, first)) = branches.first() else { return Vec::new() };
    let mut rows = Vec::with_capacity(first.len());
    for (i, loader) in first.iter().enumerate() {
        let verdicts = || branches.iter().filter_map(move |(name, all)| Some((name, all.get(i)?)));
        let loaded: Vec<String> =
            verdicts().filter(|(_, v)| v.loads).map(|(name, _)| name.clone()).collect();
        let mut notes: Vec<String> = Vec::new();
        for loads in [true, false] {
            for (_, verdict) in verdicts().filter(|(_, v)| v.loads == loads) {
                for reason in &verdict.reasons {
                    let note = if loads { reason.clone() } else { format!("not {reason}") };
                    if !notes.contains(&note) {
                        notes.push(note);
                    }
                }
            }
        }
        let all = loaded.len() == branches.len();
        rows.push(LoaderRow { loader: loader.loader, all, branches: loaded, notes });
    }
    rows
}
