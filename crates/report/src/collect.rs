//! Reports found: of a sweep, of single checkpoints, or of what was printed as JSON.
//!
//! They come in one order that does not depend on where they lie.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::REPORT_FILE;
use gptq_records::branch_report::{BranchReport, REPORT_FORMAT};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Branches, as `gptq report --json` prints them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_FORMAT`].
    pub format: u32,
    /// More bits first, then smaller groups, then act-order, then by name.
    pub branches: Vec<BranchReport>,
}

impl Report {
    /// Reads sweep folders, checkpoint folders, and JSON files of either kind.
    ///
    /// # Errors
    /// A path without a report, or with one that cannot be read; see [`BranchReport::read`].
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut found = Vec::new();
        for path in paths {
            let branches = if path.is_dir() {
                checkpoints(path)?.into_iter().map(|(_, branch)| branch).collect()
            } else {
                file(path)?
            };
            found.extend(branches.into_iter().map(|branch| (path, branch)));
        }
        let names: Vec<String> = found.iter().map(|(_, b)| b.branch.clone()).collect();
        let mut branches: Vec<BranchReport> = Vec::with_capacity(found.len());
        for (path, mut branch) in found {
            // Branches of two sweeps are told apart by where they were found.
            if names.iter().filter(|&name| *name == branch.branch).count() > 1 {
                branch.branch = format!("{}/{}", path.display(), branch.branch);
            }
            if branches.iter().any(|other| other.branch == branch.branch) {
                return Err(Error::BranchTwice { branch: branch.branch });
            }
            branches.push(branch);
        }
        Ok(Self::of(branches))
    }

    /// Branches in the report's order.
    pub(crate) fn of(mut branches: Vec<BranchReport>) -> Self {
        branches.sort_by(|a, b| order(a).cmp(&order(b)));
        Self { format: REPORT_FORMAT, branches }
    }
}

/// Branches of the table's order; the name last, so that it is total.
fn order(branch: &BranchReport) -> (u8, usize, bool, &str, &str) {
    let group = branch.group_size.unwrap_or(usize::MAX);
    (u8::MAX - branch.bits, group, !branch.act_order, &branch.recipe, &branch.branch)
}

/// The checkpoints of a folder that is one or holds them, with their folders, in the report's order.
pub(crate) fn checkpoints(path: &Path) -> Result<Vec<(PathBuf, BranchReport)>> {
    if path.join(REPORT_FILE).is_file() {
        return Ok(vec![(path.to_owned(), BranchReport::read(path)?)]);
    }
    let unreadable = gptq_records::Error::reading_report(path);
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(&unreadable)? {
        let dir = entry.map_err(&unreadable)?.path();
        // What is still being made has no name of its own yet.
        let unfinished = dir.extension().is_some_and(|extension| extension == "partial");
        if !unfinished && dir.join(REPORT_FILE).is_file() {
            let branch = BranchReport::read(&dir)?;
            found.push((dir, branch));
        }
    }
    if found.is_empty() {
        return Err(Error::NoReports(path.to_owned()));
    }
    Ok(in_order(found))
}

/// The finished branches of these names in a sweep's folder, with their folders, in the report's
/// order. What else lies there is somebody else's, whatever it holds.
pub(crate) fn branches<'a>(
    out: &Path,
    names: impl Iterator<Item = &'a str>,
) -> Result<Vec<(PathBuf, BranchReport)>> {
    let mut found = Vec::new();
    for name in names {
        let dir = out.join(name);
        if dir.join(REPORT_FILE).is_file() {
            let branch = BranchReport::read(&dir)?;
            found.push((dir, branch));
        }
    }
    // A folder that was renamed is no branch of its new name.
    found.retain(|(dir, branch)| dir.ends_with(&branch.branch));
    Ok(in_order(found))
}

fn in_order(mut found: Vec<(PathBuf, BranchReport)>) -> Vec<(PathBuf, BranchReport)> {
    found.sort_by(|(_, a), (_, b)| order(a).cmp(&order(b)));
    found
}

/// What `gptq report --json` printed, or the report of one checkpoint.
fn file(path: &Path) -> Result<Vec<BranchReport>> {
    let text = gptq_checkpoint::read_small_text(path)
        .map_err(gptq_records::Error::reading_report(path))?;
    let invalid = |message: String| gptq_records::Error::Report { path: path.to_owned(), message };
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
    if value.get("format").and_then(serde_json::Value::as_u64) != Some(u64::from(REPORT_FORMAT)) {
        return Err(invalid(format!("it has no `format` of {REPORT_FORMAT}")).into());
    }
    let read = if value.get("branches").is_some() {
        serde_json::from_str(&text).map(|report: Report| report.branches)
    } else {
        serde_json::from_str(&text).map(|branch: BranchReport| vec![branch])
    };
    Ok(read.map_err(|e| invalid(e.to_string()))?)
}
