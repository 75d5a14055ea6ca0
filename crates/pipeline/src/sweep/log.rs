//! `sweep.json`: the table of a sweep with its timings, beside the branches.
//!
//! Every process of a sweep writes its rows there as each is finished, under a lock, so there is
//! nothing to merge at the end and a killed process loses nothing that it had finished. Unlike the
//! branches' own reports it holds seconds, so it differs from run to run.

use std::path::{Path, PathBuf};

use gptq_records::branch_report::{BranchReport, EvaluationRecord, Measured};
use gptq_records::locks::SharedFile;
use gptq_records::source_dtype::SourceDtype;
use gptq_text::evaluation::EvalText;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::perplexity::Perplexity;
use crate::rates::{Prediction, Source};

/// Name of the table in the sweep's folder.
pub const SWEEP_FILE: &str = "sweep.json";

/// A branch in the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepRow {
    /// Branch name.
    pub branch: String,
    /// Width of a code.
    pub bits: u8,
    /// Columns of a group; `null` is all of in_features.
    pub group_size: Option<usize>,
    /// Columns solved by descending diag(H).
    pub act_order: bool,
    /// Damping asked for.
    pub damp: f64,
    /// Solver recipe.
    pub recipe: String,
    /// Folder that holds the checkpoint.
    pub dir: PathBuf,
    /// Bytes of the weight files.
    pub file_bytes: u64,
    /// Seconds to quantize and write; `null` when an earlier run did and its table is gone.
    #[serde(alias = "quantise_seconds")]
    pub quantize_seconds: Option<f64>,
    /// What [`Self::quantize_seconds`] were predicted to be; left out where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_seconds: Option<f64>,
    /// What that rested on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_from: Option<Source>,
    /// Seconds to measure, as above.
    pub measure_seconds: Option<f64>,
    /// Linears whose damping had to be raised.
    pub damp_retries: u32,
    /// Measured from the file, when the configuration asks for it.
    pub result: Option<Measured>,
    /// The same grid rounded to nearest.
    pub rtn: Option<Measured>,
    /// True when it was calibrated on the text that it was measured on.
    #[serde(default)]
    pub contaminated: bool,
    /// Digest of what the branch is made from and measured on: the timings are of exactly that.
    pub key: String,
}

impl SweepRow {
    /// What [`Self::quantize_seconds`] were predicted to be.
    #[must_use]
    pub fn predicted(&self) -> Option<Prediction> {
        Prediction::of(self.predicted_seconds, self.predicted_from)
    }

    /// The row of a branch that is made, and measured if it was to be.
    pub(crate) fn new(report: &BranchReport, dir: PathBuf, key: String, seconds: Seconds) -> Self {
        let evaluation = report.evaluations.first();
        let measured =
            |e: &EvaluationRecord| e.kl.map(|kl| Measured { perplexity: e.perplexity, kl });
        Self {
            branch: report.branch.clone(),
            bits: report.bits,
            group_size: report.group_size,
            act_order: report.act_order,
            damp: report.damp,
            recipe: report.recipe.clone(),
            dir,
            file_bytes: report.file_bytes,
            quantize_seconds: seconds.quantize,
            predicted_seconds: seconds.predicted.map(|p| p.seconds),
            predicted_from: seconds.predicted.map(|p| p.from),
            measure_seconds: seconds.measure,
            damp_retries: report.damp_retries,
            result: evaluation.and_then(measured),
            rtn: evaluation.and_then(|e| e.rtn),
            contaminated: evaluation.is_some_and(|e| e.contaminated),
            key,
        }
    }
}

/// A finished sweep.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepReport {
    /// Source model.
    pub model: String,
    /// What was quantized of its weights.
    pub source_dtype: SourceDtype,
    /// The dense model, its weights of that type, on the evaluation text.
    pub baseline: Option<Perplexity>,
    /// Digest of what the baseline is measured on and with.
    pub baseline_key: Option<String>,
    /// Protocol, text and windows of the evaluation.
    pub evaluation: Option<EvalText>,
    /// Branches in the configuration's order.
    pub rows: Vec<SweepRow>,
}

impl SweepReport {
    /// Says of the text what is true of the branches in the table, as their own reports have it: a
    /// recipe that rounds has seen no text.
    pub(crate) fn judge_text(&mut self) {
        let contaminated = self.rows.iter().any(|row| row.contaminated);
        if let Some(text) = &mut self.evaluation {
            text.contaminated = Some(contaminated);
        }
    }
}

/// Wall-clock seconds of a branch, where they are known.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seconds {
    pub(crate) quantize: Option<f64>,
    pub(crate) measure: Option<f64>,
    pub(crate) predicted: Option<Prediction>,
}

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
        let text = gptq_checkpoint::read_small(&self.out.join(SWEEP_FILE)).ok()?;
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
        let mut table = SweepReport { rows, ..report.clone() };
        table.judge_text();
        let path = self.out.join(SWEEP_FILE);
        let text = serde_json::to_string_pretty(&table).map_err(|e| {
            gptq_records::Error::Report { path: path.clone(), message: e.to_string() }
        })?;
        Ok(file.replace(&path, (text + "\n").as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn tables_with_the_british_key_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let table = |key: &str| {
            let row = serde_json::json!({
                "branch": "main", "bits": 4, "group_size": null, "act_order": true, "damp": 0.01,
                "recipe": "autogptq", "dir": "out/main", "file_bytes": 1, key: 12.5,
                "measure_seconds": null, "damp_retries": 0, "result": null, "rtn": null, "key": "k",
            });
            let table = serde_json::json!({
                "model": "m", "source_dtype": "fp16", "baseline": null, "baseline_key": null,
                "evaluation": null, "rows": [row],
            });
            fs::write(dir.path().join(SWEEP_FILE), table.to_string()).unwrap();
            SweepLog::new(dir.path(), vec!["main"]).read().unwrap()
        };
        for key in ["quantise_seconds", "quantize_seconds"] {
            let read = table(key);
            assert_eq!(read.rows[0].quantize_seconds, Some(12.5), "{key}");
            let written = serde_json::to_string(&read).unwrap();
            assert!(written.contains("\"quantize_seconds\":12.5"), "{written}");
        }
    }
}
