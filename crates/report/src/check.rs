//! The accuracy gate: a report against a small file of accepted values.
//!
//! A baseline fixes one measurement (model, protocol, every scored token) and, for each branch, the
//! bytes of its files, its perplexity and its KL. Bytes must be equal; the others may rise by a
//! tolerance. Results on tasks are held beside them, each with the questions that it was measured by, or
//! alone where no branch was measured on a text. What was measured otherwise, or twice, is an error,
//! not a verdict: its numbers say nothing. Nor does a number that no model can have, on either side,
//! whatever the other one is.
//!
//! Tolerances are relative and do not come from the standard error. That one says how far a
//! perplexity would move on *other* text, and here the text is the same to the token, so sampling is
//! no excuse. What remains is arithmetic. On one kind of device a run gives the same bytes every
//! time; another kind adds in another order, a code falls to its neighbor where a weight lies on a
//! rounding tie, and the rest of its row follows. Between CPU and GPU that moved perplexities by at
//! most 0.5 % at 4 bits, and by up to 5.7 % at 3 bits where calibration was scant
//! (`tests/bench/2026-11-23-h100.md`): such branches get a tolerance of their own.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use gptq_records::atomic_file;
use gptq_records::branch_report::{BranchReport, EvaluationRecord};
use serde::{Deserialize, Serialize};

use crate::collect::Report;
use crate::compare::{Measurement, model_name};
use crate::error::{Error, Result};
use crate::verdict::{KLS, PERPLEXITIES, impossible, measured, whole_branch};

pub use crate::accepted::{Accepted, AcceptedTask, Settings};
pub use crate::verdict::{Finding, Outcome, Verdict};

/// The version of a baseline's fields.
pub const BASELINE_FORMAT: u32 = 1;

/// How far values may rise, as fractions of the baseline's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// Of perplexity.
    pub perplexity: f64,
    /// Of the mean KL to the fp16 model.
    pub kl: f64,
    /// What a result on a task may lose, in the result's own unit: 0.01 is one point of accuracy.
    #[serde(default = "task_tolerance", skip_serializing_if = "is_task_tolerance")]
    pub task: f64,
}

/// Of baselines that say nothing else. The questions are the same, so that only those near a tie move.
const TASK_TOLERANCE: f64 = 0.01;

fn task_tolerance() -> f64 {
    TASK_TOLERANCE
}

fn is_task_tolerance(tolerance: &f64) -> bool {
    *tolerance == TASK_TOLERANCE
}

impl Tolerance {
    /// Perplexity 0.5 %, KL 5 %: what another kind of device may change at 4 bits, and a fraction of
    /// what a mistake in the solver costs. KL is the finer of the two, since it does not see the
    /// text's own luck; perplexity catches what KL cannot, a wrong fp16 model.
    pub const DEFAULT: Self = Self { perplexity: 0.005, kl: 0.05, task: TASK_TOLERANCE };
}

/// Accepted values, reviewed and kept under version control.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// [`BASELINE_FORMAT`].
    pub format: u32,
    /// What the values were measured on; absent where results on tasks are all that is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurement: Option<Measurement>,
    /// The dense model, where no measurement says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Tolerances of branches without their own.
    pub tolerance: Tolerance,
    /// Perplexity of the fp16 model. It depends on the engine alone, so it may not move by more than
    /// its tolerance in either direction.
    #[serde(default)]
    pub base_perplexity: Option<f64>,
    /// Branches by name.
    pub branches: BTreeMap<String, Accepted>,
}

impl Baseline {
    /// Reads a baseline.
    ///
    /// # Errors
    /// [`Error::NoBaseline`], [`gptq_records::Error::Io`] and [`Error::Baseline`], which name the file.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            gptq_checkpoint::read_small_text(path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => Error::NoBaseline(path.to_owned()),
                _ => gptq_records::Error::io("read the baseline", path)(source).into(),
            })?;
        let invalid = |message: String| Error::Baseline { path: path.to_owned(), message };
        let baseline: Self = serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
        if baseline.format != BASELINE_FORMAT {
            let message = format!(
                "its format is {}, and this program reads {BASELINE_FORMAT}",
                baseline.format
            );
            return Err(invalid(message));
        }
        baseline.check_values().map_err(invalid)?;
        Ok(baseline)
    }

    /// Values that would accept everything are mistakes of the person who edited the file.
    fn check_values(&self) -> std::result::Result<(), String> {
        if self.branches.is_empty() {
            return Err("it accepts no branch, so nothing would be compared".to_owned());
        }
        match (&self.measurement, &self.model) {
            (Some(_), Some(_)) => {
                return Err("it has both a measurement and a model, which might differ".to_owned());
            }
            (None, None) => return Err("it has neither a measurement nor a model".to_owned()),
            (None, Some(_)) if self.base_perplexity.is_some() => {
                return Err("it has a base_perplexity, and there is no measurement".to_owned());
            }
            _ => {}
        }
        self.branches.iter().try_for_each(|(name, accepted)| self.check_branch(name, accepted))?;
        self.base_perplexity.map_or(Ok(()), |v| within("perplexity", "fp16", v, &PERPLEXITIES))?;
        let own = self.branches.iter().filter_map(|(name, b)| Some((name.as_str(), b.tolerance?)));
        for (name, tolerance) in own.chain([("all", self.tolerance)]) {
            let Tolerance { perplexity, kl, task } = tolerance;
            for (what, value) in [("perplexity", perplexity), ("kl", kl), ("task", task)] {
                if !(0.0..1.0).contains(&value) {
                    return Err(format!(
                        "the tolerance of {what} for `{name}` is {value}, not a fraction from 0 to 1"
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_branch(&self, name: &str, accepted: &Accepted) -> std::result::Result<(), String> {
        match (accepted.perplexity, accepted.kl, &self.measurement) {
            (Some(perplexity), _, Some(_)) => {
                within("perplexity", name, perplexity, &PERPLEXITIES)?;
            }
            (None, _, Some(_)) => return Err(format!("`{name}` has no perplexity")),
            (Some(_), _, None) => {
                return Err(format!("`{name}` has a perplexity, and there is no measurement"));
            }
            (None, Some(_), None) => {
                return Err(format!("`{name}` has a kl, and there is no measurement"));
            }
            (None, None, None) if accepted.tasks.is_empty() => {
                return Err(format!("`{name}` has neither a perplexity nor a task"));
            }
            (None, None, None) => {}
        }
        accepted.kl.map_or(Ok(()), |kl| within("kl", name, kl, &KLS))?;
        if accepted.file_bytes == 0 {
            return Err(format!("the file_bytes of `{name}` are 0"));
        }
        Ok(())
    }

    /// Writes the baseline by one rename.
    ///
    /// # Errors
    /// [`gptq_records::Error::Io`], and [`Error::Baseline`] for values that would not be read back.
    pub fn write(&self, path: &Path) -> Result<()> {
        let invalid = |message: String| Error::Baseline { path: path.to_owned(), message };
        self.check_values().map_err(invalid)?;
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| invalid(e.to_string()))?;
        text.push(b'\n');
        Ok(atomic_file::replace(path, &text)?)
    }

    /// Accepts a report: all of its branches that were measured as `before` was, or as its first
    /// measured branch was; where none was measured, all that have results on tasks. Tolerances of
    /// `before` are kept. With `whole`, branches that the report lacks are dropped; without, they stay,
    /// for which the measurement must be the same.
    ///
    /// # Errors
    /// [`Error::NotMeasured`], and [`Error::NotComparable`] for a branch whose results on tasks would be
    /// dropped and where perplexities would give way to tasks alone.
    pub fn accept(report: &Report, before: Option<&Self>, whole: bool) -> Result<Self> {
        let first =
            report.branches.iter().find_map(|b| Some(Measurement::new(b, b.evaluations.first()?)));
        let asked = report.branches.iter().find(|branch| !branch.tasks.is_empty());
        let model = match (&first, asked) {
            (Some(_), _) => None,
            (None, Some(branch)) => Some(branch.model.clone()),
            (None, None) => return Err(Error::NotMeasured),
        };
        let kept = before.filter(|before| match (&before.measurement, &first) {
            (Some(measurement), _) => {
                report.branches.iter().any(|b| alike(b, measurement).count() > 0)
            }
            (None, None) => before.other_model(model.as_deref().unwrap_or_default()).is_none(),
            (None, Some(_)) => false,
        });
        if let (Some(before), None) = (before, kept) {
            let loses_perplexities = before.measurement.is_some() && first.is_none();
            if !whole || loses_perplexities {
                let branch = asked.filter(|_| first.is_none()).unwrap_or(&report.branches[0]);
                return Err(before.not_comparable(branch, first.as_ref()));
            }
        }
        let mut accepted = Self {
            format: BASELINE_FORMAT,
            measurement: kept.map_or(first, |before| before.measurement.clone()),
            model,
            tolerance: before.map_or(Tolerance::DEFAULT, |before| before.tolerance),
            base_perplexity: None,
            branches: match (kept, whole) {
                (Some(before), false) => before.branches.clone(),
                _ => BTreeMap::new(),
            },
        };
        accepted.take(report, before)?;
        Ok(accepted)
    }

    /// Takes the values of the branches that this is about, and their tolerances from `before`.
    fn take(&mut self, report: &Report, before: Option<&Self>) -> Result<()> {
        for branch in &report.branches {
            let has_tasks = !branch.tasks.is_empty();
            let evaluation = match &self.measurement {
                // Results on tasks would be lost unseen, where a branch was measured otherwise.
                Some(measurement) if has_tasks || alike(branch, measurement).count() > 0 => {
                    self.evaluation(branch)?
                }
                Some(_) => continue,
                None if has_tasks && self.other_model(&branch.model).is_none() => None,
                None => continue,
            };
            let base = evaluation.and_then(|evaluation| evaluation.base_perplexity);
            self.base_perplexity = self.base_perplexity.or(base);
            let tolerance = before.and_then(|b| b.branches.get(&branch.branch)?.tolerance);
            let accepted = Accepted::of(branch, evaluation, tolerance);
            self.branches.insert(branch.branch.clone(), accepted);
        }
        Ok(())
    }

    /// Compares a report with the accepted values. With `whole`, every branch of the baseline must
    /// be there, and others may be new; without, the report is one branch that the baseline must know,
    /// and the others are not its concern.
    ///
    /// # Errors
    /// [`Error::NotComparable`] for a branch that was measured otherwise, not at all or twice.
    pub fn check(&self, report: &Report, whole: bool) -> Result<Outcome> {
        let mut findings = Vec::new();
        let mut bases = Vec::new();
        for branch in &report.branches {
            let evaluation = self.evaluation(branch)?;
            bases.push((branch.branch.as_str(), evaluation.and_then(|e| e.base_perplexity)));
            match self.branches.get(&branch.branch) {
                Some(accepted) => findings.extend(self.branch(branch, evaluation, accepted)),
                None => {
                    let verdict = if whole { Verdict::New } else { Verdict::Unknown };
                    findings.push(whole_branch(&branch.branch, verdict));
                    findings.extend(evaluation.iter().flat_map(|e| impossible(&branch.branch, e)));
                }
            }
        }
        let lacks = |name: &&String| !report.branches.iter().any(|b| b.branch == **name);
        if whole {
            let missing = self.branches.keys().filter(lacks);
            findings.extend(missing.map(|name| whole_branch(name, Verdict::Missing)));
        }
        findings.sort_by(|a, b| a.branch.cmp(&b.branch));
        let fp16 = self.base_perplexity.map(|accepted| self.fp16(accepted, &bases));
        findings.splice(0..0, fp16.into_iter().flatten());
        let passed = !findings.iter().any(|f| f.verdict.fails());
        Ok(Outcome { passed, findings })
    }

    /// The branch's evaluation that the baseline is about; `None` where it is about tasks alone.
    fn evaluation<'r>(&self, branch: &'r BranchReport) -> Result<Option<&'r EvaluationRecord>> {
        let Some(measurement) = &self.measurement else {
            return match self.other_model(&branch.model) {
                Some(_) => Err(self.not_comparable(branch, None)),
                None => Ok(None),
            };
        };
        unambiguous(branch, measurement)?;
        let mut differs = None;
        for evaluation in &branch.evaluations {
            let now = Measurement::new(branch, evaluation);
            if measurement.difference(&now).is_none() {
                return Ok(Some(evaluation));
            }
            differs = differs.or(Some(now));
        }
        Err(self.not_comparable(branch, differs.as_ref()))
    }

    /// That a branch's numbers say nothing about the baseline's.
    fn not_comparable(&self, branch: &BranchReport, now: Option<&Measurement>) -> Error {
        let reason = match (&self.measurement, now) {
            (Some(then), Some(now)) => then.difference(now).unwrap_or_default(),
            (Some(_), None) if branch.tasks.is_empty() => "it was not measured".to_owned(),
            (Some(_), None) => "it was not measured on a text, as the baseline's values were; \
                                results on tasks alone need a baseline of their own"
                .to_owned(),
            (None, _) => self
                .other_model(&branch.model)
                .unwrap_or_else(|| "the baseline holds results on tasks alone".to_owned()),
        };
        Error::NotComparable { branch: branch.branch.clone(), reason }
    }

    /// Why results on tasks are of another model than a branch.
    fn other_model(&self, now: &str) -> Option<String> {
        let then = self.model.as_deref()?;
        (model_name(then) != model_name(now)).then(|| format!("the model was {then}, now {now}"))
    }

    fn branch(
        &self,
        branch: &BranchReport,
        evaluation: Option<&EvaluationRecord>,
        accepted: &Accepted,
    ) -> Vec<Finding> {
        let tolerance = accepted.tolerance.unwrap_or(self.tolerance);
        let mut findings = match (accepted.perplexity, evaluation) {
            (Some(perplexity), Some(evaluation)) => {
                values(branch, evaluation, (perplexity, accepted.kl), tolerance)
            }
            // Nothing is held to what was measured besides tasks.
            _ => branch.evaluations.first().map_or_else(Vec::new, |evaluation| {
                let (what, now) = ("perplexity".into(), Some(evaluation.perplexity));
                vec![Finding { what, now, ..whole_branch(&branch.branch, Verdict::New) }]
            }),
        };
        findings.extend(accepted.tasks(branch, tolerance.task));
        let bytes = (accepted.file_bytes, branch.file_bytes);
        findings.push(Finding {
            branch: branch.branch.clone(),
            what: "file_bytes".into(),
            baseline: Some(bytes.0 as f64),
            now: Some(bytes.1 as f64),
            allowed: Some(bytes.0 as f64),
            verdict: if bytes.0 == bytes.1 { Verdict::Ok } else { Verdict::Changed },
            detail: None,
        });
        let changed = |what: &'static str, detail| Finding {
            what: what.into(),
            detail: Some(detail),
            ..whole_branch(&branch.branch, Verdict::Changed)
        };
        let settings = accepted.settings.as_ref();
        let settings = settings.and_then(|then| then.difference(&Settings::of(branch)));
        findings.extend(settings.map(|difference| changed("settings", difference)));
        if evaluation.is_some_and(|e| e.contaminated) && !accepted.contaminated {
            let detail = "it was calibrated on the text that it was measured on".to_owned();
            findings.push(changed("contaminated", detail));
        }
        findings
    }

    /// The model itself: a change in either direction is one of the engine or of the model. It was
    /// measured beside every branch: the first value has a row of its own, and so has each that fails
    /// and is another.
    fn fp16(&self, accepted: f64, bases: &[(&str, Option<f64>)]) -> Vec<Finding> {
        let finding = |branch: &str, what: &'static str, now: Option<f64>| {
            let Some(now) = now else {
                let (what, verdict) = (what.into(), Verdict::Missing);
                return Finding { what, baseline: Some(accepted), ..whole_branch(branch, verdict) };
            };
            let finding = measured(branch, what, (accepted, now), self.tolerance.perplexity);
            let verdict = match finding.verdict {
                Verdict::Worse | Verdict::Improved => Verdict::Changed,
                verdict => verdict,
            };
            Finding { verdict, ..finding }
        };
        let Some(&(_, first)) = bases.first() else { return Vec::new() };
        let others = bases.iter().filter(|(_, now)| *now != first);
        let others = others.map(|&(branch, now)| finding(branch, "fp16", now));
        let mut findings = vec![finding("fp16", "perplexity", first)];
        findings.extend(others.filter(|finding| finding.verdict.fails()));
        findings
    }
}

/// Perplexity and KL against the accepted ones.
fn values(
    branch: &BranchReport,
    evaluation: &EvaluationRecord,
    (perplexity, kl): (f64, Option<f64>),
    tolerance: Tolerance,
) -> Vec<Finding> {
    let name = branch.branch.as_str();
    let perplexity = (perplexity, evaluation.perplexity);
    let mut findings = vec![measured(name, "perplexity", perplexity, tolerance.perplexity)];
    findings.extend(match (kl, evaluation.kl) {
        (Some(then), Some(now)) => Some(measured(name, "kl", (then, now), tolerance.kl)),
        (None, None) => None,
        (baseline, now) => {
            let verdict = if now.is_some() { Verdict::New } else { Verdict::Missing };
            Some(Finding { baseline, now, what: "kl".into(), ..whole_branch(name, verdict) })
        }
    });
    findings
}

/// Of two evaluations of one measurement either might be meant.
fn unambiguous(branch: &BranchReport, measurement: &Measurement) -> Result<()> {
    if alike(branch, measurement).count() > 1 {
        let reason = "its report has several evaluations of one measurement".to_owned();
        return Err(Error::NotComparable { branch: branch.branch.clone(), reason });
    }
    Ok(())
}

/// A branch's evaluations of that measurement.
fn alike<'r>(
    branch: &'r BranchReport,
    measurement: &'r Measurement,
) -> impl Iterator<Item = &'r EvaluationRecord> {
    let same =
        move |e: &&EvaluationRecord| measurement.difference(&Measurement::new(branch, e)).is_none();
    branch.evaluations.iter().filter(same)
}

/// That an accepted value is one that a model may have.
fn within(
    what: &str,
    name: &str,
    value: f64,
    range: &RangeInclusive<f64>,
) -> std::result::Result<(), String> {
    if range.contains(&value) {
        return Ok(());
    }
    let (from, to) = (range.start().max(0.0), range.end());
    Err(format!("the {what} of `{name}` is {value}, not one from {from} to {to}"))
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
