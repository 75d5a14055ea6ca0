//! What a baseline holds of a branch.

use std::collections::BTreeMap;

use gptq_records::branch_report::{BranchReport, EvaluationRecord, TaskRecord};
use gptq_records::source_dtype::SourceDtype;
use serde::{Deserialize, Serialize};

use crate::check::Tolerance;
use crate::units::group;
use crate::verdict::{Finding, Verdict, task, task_name, whole_branch};

/// A branch's accepted values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accepted {
    /// Bytes of the weight files.
    pub file_bytes: u64,
    /// Perplexity; absent where the baseline has no measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Mean KL to the fp16 model in nats a token.
    #[serde(default)]
    pub kl: Option<f64>,
    /// How the branch was made; baselines of versions that did not say are held to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// It was calibrated on the text that it was measured on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub contaminated: bool,
    /// Results on tasks, by task and metric.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, AcceptedTask>,
    /// Instead of the baseline's tolerance; kept when the values are updated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<Tolerance>,
}

/// How a branch was made, as far as another way makes another branch of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Width of a code.
    pub bits: u8,
    /// Columns of a group; `null` is all of in_features.
    pub group_size: Option<usize>,
    /// Columns solved by descending diag(H).
    pub act_order: bool,
    /// Solver recipe.
    pub recipe: String,
    /// What was quantized of the source's weights.
    pub source_dtype: SourceDtype,
}

/// A result on a task, and what it was measured by. Baselines of versions that did not say that have the
/// number alone, and are held to no more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "WrittenTask")]
pub struct AcceptedTask {
    /// The result.
    pub value: f64,
    /// Solved questions before each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub few_shot: Option<u64>,
    /// Questions that were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<u64>,
    /// The harness and its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub harness: Option<String>,
}

/// A result as a baseline has it.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a task's result is a number or has value, few_shot, samples, harness"
)]
enum WrittenTask {
    Value(f64),
    Whole(WholeTask),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WholeTask {
    value: f64,
    few_shot: Option<u64>,
    samples: Option<u64>,
    harness: Option<String>,
}

impl From<WrittenTask> for AcceptedTask {
    fn from(written: WrittenTask) -> Self {
        match written {
            WrittenTask::Value(value) => {
                Self { value, few_shot: None, samples: None, harness: None }
            }
            WrittenTask::Whole(WholeTask { value, few_shot, samples, harness }) => {
                Self { value, few_shot, samples, harness }
            }
        }
    }
}

impl Accepted {
    /// What a report says of a branch, and its evaluation where the baseline has a measurement.
    pub(crate) fn of(
        branch: &BranchReport,
        evaluation: Option<&EvaluationRecord>,
        tolerance: Option<Tolerance>,
    ) -> Self {
        Self {
            file_bytes: branch.file_bytes,
            perplexity: evaluation.map(|evaluation| evaluation.perplexity),
            kl: evaluation.and_then(|evaluation| evaluation.kl),
            settings: Some(Settings::of(branch)),
            contaminated: evaluation.is_some_and(|evaluation| evaluation.contaminated),
            tasks: branch.tasks.iter().map(|t| (task_name(t), AcceptedTask::of(t))).collect(),
            tolerance,
        }
    }

    /// Results on tasks: those of both sides against each other, and what one side lacks.
    pub(crate) fn tasks(&self, branch: &BranchReport, tolerance: f64) -> Vec<Finding> {
        let of_one = |name: &str, (baseline, now), verdict| Finding {
            what: name.to_owned().into(),
            baseline,
            now,
            ..whole_branch(&branch.branch, verdict)
        };
        let both = |now: &TaskRecord| {
            let name = task_name(now);
            let Some(then) = self.tasks.get(&name) else {
                return of_one(&name, (None, Some(now.value)), Verdict::New);
            };
            match then.difference(now) {
                Some(difference) if now.value.is_finite() => Finding {
                    detail: Some(difference),
                    ..of_one(&name, (Some(then.value), Some(now.value)), Verdict::Changed)
                },
                _ => task(&branch.branch, now, then.value, tolerance),
            }
        };
        let mut findings: Vec<Finding> = branch.tasks.iter().map(both).collect();
        let there = |name: &&String| branch.tasks.iter().any(|task| task_name(task) == **name);
        let missing = self.tasks.iter().filter(|(name, _)| !there(name));
        findings.extend(
            missing.map(|(name, then)| of_one(name, (Some(then.value), None), Verdict::Missing)),
        );
        findings
    }
}

impl AcceptedTask {
    fn of(task: &TaskRecord) -> Self {
        Self {
            value: task.value,
            few_shot: task.few_shot,
            samples: task.samples,
            harness: Some(task.harness.clone()),
        }
    }

    /// What of the conditions is another, in words: results of other questions say nothing about these.
    fn difference(&self, now: &TaskRecord) -> Option<String> {
        let number = |count: Option<u64>| count.map(|count| count.to_string());
        let harness = Some(now.harness.clone());
        let pairs = [
            (
                "the number of solved questions before each",
                number(self.few_shot),
                number(now.few_shot),
            ),
            ("the number of questions", number(self.samples), number(now.samples)),
            ("the harness", self.harness.clone(), harness),
        ];
        // A baseline that does not say a condition holds it to nothing.
        differences(pairs.into_iter().filter_map(|(what, then, now)| {
            Some((what, then?, now.unwrap_or_else(|| "unknown".to_owned())))
        }))
    }
}

/// What was one way and is another, in words.
fn differences<'a>(pairs: impl IntoIterator<Item = (&'a str, String, String)>) -> Option<String> {
    let differ = pairs.into_iter().filter(|(_, then, now)| then != now);
    let differences: Vec<String> =
        differ.map(|(what, then, now)| format!("{what} was {then}, now {now}")).collect();
    (!differences.is_empty()).then(|| differences.join("; "))
}

impl Settings {
    pub(crate) fn of(branch: &BranchReport) -> Self {
        Self {
            bits: branch.bits,
            group_size: branch.group_size,
            act_order: branch.act_order,
            recipe: branch.recipe.clone(),
            source_dtype: branch.source_dtype,
        }
    }

    /// What differs, in words.
    pub(crate) fn difference(&self, now: &Self) -> Option<String> {
        let pairs = [
            ("bits", self.bits.to_string(), now.bits.to_string()),
            ("group size", group(self.group_size), group(now.group_size)),
            ("act-order", self.act_order.to_string(), now.act_order.to_string()),
            ("recipe", self.recipe.clone(), now.recipe.clone()),
            (
                "source dtype",
                self.source_dtype.name().to_owned(),
                now.source_dtype.name().to_owned(),
            ),
        ];
        differences(pairs)
    }
}
