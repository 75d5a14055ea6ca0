//! Branches that were measured alike, side by side, and what changed since another report.

use gptq_records::branch_report::{BranchReport, EvaluationRecord};
use gptq_records::source_dtype::SourceDtype;
use serde::{Deserialize, Serialize};

use crate::collect::Report;

/// What makes two perplexities comparable: the model, and every token that was scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measurement {
    /// Hub id of the dense model, or the name of its folder.
    pub model: String,
    /// Protocol name.
    pub protocol: String,
    /// The text's name.
    pub dataset: String,
    /// SHA-256 (hex) of the text without whitespace.
    pub fingerprint: String,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
}

impl Measurement {
    /// The measurement behind an evaluation of `branch`.
    pub fn new(branch: &BranchReport, evaluation: &EvaluationRecord) -> Self {
        Self {
            model: branch.model.clone(),
            protocol: evaluation.protocol.clone(),
            dataset: evaluation.dataset.name.clone(),
            fingerprint: evaluation.dataset.fingerprint.clone(),
            seq_len: evaluation.seq_len,
            windows: evaluation.windows,
            tokens: evaluation.tokens,
        }
    }

    /// Why two measurements cannot be compared; `None` when they can. A text counts by what it
    /// holds, since a local copy has another name, and a model by its name without the owner, since
    /// a folder has none.
    pub fn difference(&self, now: &Self) -> Option<String> {
        let differ = |what: &str, then: &dyn std::fmt::Display, now: &dyn std::fmt::Display| {
            Some(format!("{what} was {then}, now {now}"))
        };
        if model_name(&self.model) != model_name(&now.model) {
            differ("the model", &self.model, &now.model)
        } else if self.protocol != now.protocol {
            differ("the protocol", &self.protocol, &now.protocol)
        } else if self.fingerprint != now.fingerprint && self.dataset == now.dataset {
            Some(format!("the text of {} has changed", self.dataset))
        } else if self.fingerprint != now.fingerprint {
            differ("the text", &self.dataset, &now.dataset)
        } else if self.seq_len != now.seq_len {
            differ("the window length", &self.seq_len, &now.seq_len)
        } else if self.windows != now.windows {
            differ("the number of windows", &self.windows, &now.windows)
        } else if self.tokens != now.tokens {
            differ("the number of tokens scored", &self.tokens, &now.tokens)
        } else {
            None
        }
    }
}

/// A model without its owner, which a folder has not.
pub(crate) fn model_name(model: &str) -> &str {
    model.rsplit('/').next().unwrap_or(model)
}

/// Branches of one dense model, its weights of one type, on one text; or those that were not measured.
#[derive(Clone, Debug)]
pub struct Comparison<'a> {
    /// The model.
    pub model: &'a str,
    /// What the branches were made from, and are compared with.
    pub source_dtype: SourceDtype,
    /// What all rows have in common; `None` for branches without a measurement.
    pub measurement: Option<Measurement>,
    /// Branches, in the report's order.
    pub rows: Vec<Row<'a>>,
    /// True when a previous report was given.
    pub has_previous: bool,
    /// Branches of the previous report that this one lacks.
    pub gone: Vec<&'a str>,
}

/// A branch in a comparison.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// Position of the branch in the report.
    pub index: usize,
    /// The branch.
    pub branch: &'a BranchReport,
    /// Its measurement.
    pub evaluation: Option<&'a EvaluationRecord>,
    /// What the previous report says of it; `None` without a previous report.
    pub change: Option<Change>,
}

/// A branch now and before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum Change {
    /// The previous report has no such branch.
    New,
    /// It has one, but measured something else or nothing.
    NotComparable,
    /// Differences, now minus before.
    Compared {
        /// Perplexity now minus before.
        perplexity: f64,
        /// The same as a fraction of the value before.
        relative_perplexity: f64,
        /// KL now minus before, where both are known.
        kl: Option<f64>,
        /// The same as a fraction of the value before.
        relative_kl: Option<f64>,
        /// Bytes now minus before.
        bytes: i64,
    },
}

impl Comparison<'_> {
    /// What the dense model is called: `fp16` or `fp32`.
    pub fn base_name(&self) -> &'static str {
        self.source_dtype.name()
    }

    /// Bits of the dense model's weights.
    pub fn base_bits(&self) -> &'static str {
        self.base_name().trim_start_matches("fp")
    }

    /// Perplexity of the dense model.
    pub fn base_perplexity(&self) -> Option<f64> {
        self.rows.iter().find_map(|row| row.evaluation?.base_perplexity)
    }

    /// True when a row was calibrated on the text that it was measured on.
    pub fn contaminated(&self) -> bool {
        self.rows.iter().any(Row::contaminated)
    }

    /// True when rows were made by different recipes.
    pub fn several_recipes(&self) -> bool {
        self.rows.windows(2).any(|pair| pair[0].branch.recipe != pair[1].branch.recipe)
    }
}

impl Row<'_> {
    /// Mean KL to the dense model.
    pub fn kl(&self) -> Option<f64> {
        self.evaluation?.kl
    }

    /// True when it was calibrated on the text that it was measured on.
    pub fn contaminated(&self) -> bool {
        self.evaluation.is_some_and(|e| e.contaminated)
    }
}

/// A change with what it is about, for JSON.
#[derive(Clone, Debug, Serialize)]
pub struct BranchChange<'a> {
    /// The model.
    pub model: &'a str,
    /// The branch.
    pub branch: &'a str,
    /// What was measured; `None` for branches without a measurement, and for those that are gone.
    pub measurement: Option<Measurement>,
    /// What changed; `None` for a branch that the previous report has and this one lacks.
    pub change: Option<Change>,
}

/// The changes since the previous report, as one list.
pub fn changes<'a>(comparisons: &[Comparison<'a>]) -> Vec<BranchChange<'a>> {
    let mut all = Vec::new();
    for comparison in comparisons {
        let model = comparison.model;
        let measurement = &comparison.measurement;
        all.extend(comparison.rows.iter().map(|row| BranchChange {
            model,
            branch: &row.branch.branch,
            measurement: measurement.clone(),
            change: row.change,
        }));
        let gone = comparison.gone.iter();
        all.extend(gone.map(|&branch| BranchChange {
            model,
            branch,
            measurement: None,
            change: None,
        }));
    }
    all
}

/// Groups by model, source type and measurement, in the order of first appearance.
#[must_use]
pub fn comparisons<'a>(report: &'a Report, previous: Option<&'a Report>) -> Vec<Comparison<'a>> {
    let mut groups: Vec<Comparison<'a>> = Vec::new();
    let mut add = |measurement: Option<Measurement>, row: Row<'a>| {
        let (model, source_dtype) = (row.branch.model.as_str(), row.branch.source_dtype);
        let alike = |group: &&mut Comparison<'_>| {
            group.model == model
                && group.source_dtype == source_dtype
                && match (&group.measurement, &measurement) {
                    (Some(one), Some(other)) => one.difference(other).is_none(),
                    (None, None) => true,
                    _ => false,
                }
        };
        match groups.iter_mut().find(alike) {
            Some(group) => group.rows.push(row),
            None => groups.push(Comparison {
                model,
                source_dtype,
                measurement,
                rows: vec![row],
                has_previous: previous.is_some(),
                gone: Vec::new(),
            }),
        }
    };
    for (index, branch) in report.branches.iter().enumerate() {
        if branch.evaluations.is_empty() {
            let change = previous.map(|p| change(p, branch, None));
            add(None, Row { index, branch, evaluation: None, change });
        }
        for evaluation in &branch.evaluations {
            let change = previous.map(|p| change(p, branch, Some(evaluation)));
            let measurement = Measurement::new(branch, evaluation);
            add(Some(measurement), Row { index, branch, evaluation: Some(evaluation), change });
        }
    }
    for before in previous.iter().flat_map(|p| &p.branches) {
        let gone = !report.branches.iter().any(|now| same_branch(now, before));
        if let Some(group) = groups.iter_mut().find(|g| gone && g.model == before.model) {
            group.gone.push(&before.branch);
        }
    }
    groups
}

fn same_branch(one: &BranchReport, other: &BranchReport) -> bool {
    one.branch == other.branch && one.model == other.model
}

/// `now` minus `before`, as far as it can be known: any report says any size.
fn bytes_between(before: u64, now: u64) -> i64 {
    let size = i64::try_from(now.abs_diff(before)).unwrap_or(i64::MAX);
    if now < before { -size } else { size }
}

fn change(previous: &Report, now: &BranchReport, evaluation: Option<&EvaluationRecord>) -> Change {
    let Some(before) = previous.branches.iter().find(|b| same_branch(b, now)) else {
        return Change::New;
    };
    let Some(evaluation) = evaluation else { return Change::NotComparable };
    let measured = Measurement::new(now, evaluation);
    let alike = |e: &&EvaluationRecord| Measurement::new(before, e).difference(&measured).is_none();
    let Some(then) = before.evaluations.iter().find(alike) else { return Change::NotComparable };
    let relative = |now: f64, then: f64| (now - then) / then.abs().max(f64::MIN_POSITIVE);
    let kl = evaluation.kl.zip(then.kl);
    Change::Compared {
        perplexity: evaluation.perplexity - then.perplexity,
        relative_perplexity: relative(evaluation.perplexity, then.perplexity),
        kl: kl.map(|(now, then)| now - then),
        relative_kl: kl.map(|(now, then)| relative(now, then)),
        bytes: bytes_between(before.file_bytes, now.file_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{branch, report};

    #[test]
    fn what_was_measured_alike_stands_together() {
        let mut other_text = branch("4bit-64g", 4, Some(64), 19.1, 0.02);
        other_text.evaluations[0].dataset.fingerprint = "other".to_owned();
        let mut copy = branch("3bit-64g", 3, Some(64), 20.1, 0.08);
        copy.evaluations[0].dataset.name = "copy-of-the-text.txt".to_owned();
        let mut unmeasured = branch("8bit-64g", 8, Some(64), 19.0, 0.01);
        unmeasured.evaluations.clear();
        let made = [branch("4bit-32g", 4, Some(32), 19.0, 0.01), other_text, copy, unmeasured];
        let report = report(made);
        let groups = comparisons(&report, None);
        let names: Vec<Vec<&str>> = groups
            .iter()
            .map(|g| g.rows.iter().map(|r| r.branch.branch.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["8bit-64g"], vec!["4bit-32g", "3bit-64g"], vec!["4bit-64g"]]);
        assert!(groups[0].measurement.is_none());
    }

    #[test]
    fn branches_made_from_other_values_are_compared_with_those() {
        let mut wide = branch("wide", 4, Some(32), 19.0, 0.01);
        wide.source_dtype = SourceDtype::Fp32;
        wide.evaluations[0].base_perplexity = Some(18.5);
        let report = report([branch("half", 4, Some(32), 19.0, 0.01), wide]);
        let groups = comparisons(&report, None);
        let bases: Vec<_> =
            groups.iter().map(|g| (g.base_name(), g.base_bits(), g.base_perplexity())).collect();
        assert_eq!(bases, [("fp16", "16", Some(18.727)), ("fp32", "32", Some(18.5))]);
    }

    #[test]
    fn changes_are_named_and_only_for_the_same_measurement() {
        let before = report([
            branch("a", 4, Some(32), 20.0, 0.02),
            branch("b", 4, Some(64), 20.0, 0.02),
            branch("lost", 4, Some(128), 20.0, 0.02),
        ]);
        let mut fewer = branch("b", 4, Some(64), 20.0, 0.02);
        fewer.evaluations[0].windows = 3;
        let mut now = report([
            branch("a", 4, Some(32), 19.0, 0.01),
            fewer,
            branch("added", 4, None, 20.0, 0.02),
        ]);
        now.branches[0].file_bytes -= 10;
        let groups = comparisons(&now, Some(&before));
        let Some(Change::Compared { perplexity, relative_perplexity, kl, relative_kl, bytes }) =
            groups[0].rows[0].change
        else {
            panic!("{:?}", groups[0].rows[0].change);
        };
        assert_eq!((perplexity, bytes), (-1.0, -10));
        assert!((relative_perplexity + 0.05).abs() < 1e-12);
        assert!((kl.unwrap() + 0.01).abs() < 1e-12 && (relative_kl.unwrap() + 0.5).abs() < 1e-12);
        assert_eq!(groups[0].rows[1].change, Some(Change::New));
        assert_eq!(groups[1].rows[0].change, Some(Change::NotComparable));
        assert_eq!(groups[0].gone, ["lost"]);
        assert!(comparisons(&now, None)[0].rows[0].change.is_none());
    }

    #[test]
    fn differences_say_what_differs() {
        let sample = branch("a", 4, Some(32), 20.0, 0.02);
        let one = Measurement::new(&sample, &sample.evaluations[0]);
        assert_eq!(one.difference(&one), None);
        let folder = Measurement { model: "model".to_owned(), ..one.clone() };
        assert_eq!(one.difference(&folder), None);
        let difference = |change: fn(&mut Measurement)| {
            let mut now = one.clone();
            change(&mut now);
            one.difference(&now).unwrap()
        };
        assert_eq!(
            difference(|m| m.model = "other".to_owned()),
            "the model was org/model, now other"
        );
        assert_eq!(difference(|m| m.windows = 7), "the number of windows was 40, now 7");
        assert!(
            difference(|m| m.fingerprint.push('0')).contains("text of heldout.txt has changed")
        );
        assert!(difference(|m| m.protocol = "strided".to_owned()).contains("protocol"));
        assert!(difference(|m| m.seq_len = 1).contains("window length"));
        assert!(difference(|m| m.tokens = 1).contains("tokens scored"));
    }
}
