//! `sweep.json`: the table of a sweep with its timings, beside the branches.
//!
//! Every process of a sweep writes its rows there as each is finished, under a lock, so there is
//! nothing to merge at the end and a killed process loses nothing that it had finished. Unlike the
//! branches' own reports it holds seconds, so it differs from run to run.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::resume::SharedFile;
use crate::sweep::{SweepReport, SweepRow};

/// Name of the table in the sweep's folder.
pub const SWEEP_FILE: &str = "sweep.json";

/// The table of the sweep in a folder.
pub(crate) struct SweepLog<'a> {
    out: &'a Path,
    /// All branches of the configuration, in its order.
    branches: Vec<&'a str>,
}

impl<'a> SweepLog<'a> {
    pub(crate) fn new(out: &'a Path, branches: Vec<&'a str>) -> Self {
        Self { out, branches }
    }

    /// What processes have written so far; `None` where there is nothing that can be read, which
    /// only costs timings.
    pub(crate) fn read(&self) -> Option<SweepReport> {
        let text = fs::read(self.out.join(SWEEP_FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Puts the rows and the baseline of `report` into the table. Rows of other processes stay, those
    /// of branches that the configuration has no more go.
    pub(crate) fn update(&self, report: &SweepReport) -> Result<()> {
        let file = SharedFile::lock(self.out, SWEEP_FILE)?;
        let mut rows: Vec<SweepRow> = self.read().map_or_else(Vec::new, |table| table.rows);
        rows.retain(|row| report.rows.iter().all(|new| new.branch != row.branch));
        rows.extend(report.rows.iter().cloned());
        rows.retain(|row| self.branches.contains(&row.branch.as_str()));
        rows.sort_by_key(|row| self.branches.iter().position(|name| *name == row.branch));
        let table = SweepReport { rows, ..report.clone() };
        let path = self.out.join(SWEEP_FILE);
        let text = serde_json::to_string_pretty(&table)
            .map_err(|e| Error::Report { path: path.clone(), message: e.to_string() })?;
        file.replace(&path, (text + "\n").as_bytes())
    }
}
