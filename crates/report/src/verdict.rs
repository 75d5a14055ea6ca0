//! What the accuracy gate finds: values against accepted ones, and values that no model can have.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use gptq_records::branch_report::{EvaluationRecord, TaskRecord};
use serde::Serialize;

/// What a value is, measured against what was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Within its tolerance.
    Ok,
    /// Lower by more than its tolerance: accept it with `--update`, or it may be lost unseen.
    Improved,
    /// Higher by more than its tolerance.
    Worse,
    /// Not equal where it must be.
    Changed,
    /// The baseline has it, the report does not.
    Missing,
    /// No model can have it.
    Impossible,
    /// The only branch of the report is none of the baseline's: nothing was compared.
    Unknown,
    /// The report has it, the baseline does not.
    New,
}

impl Verdict {
    /// True when the gate is closed by it.
    pub fn fails(self) -> bool {
        !matches!(self, Self::Ok | Self::Improved | Self::New)
    }

    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Improved => "improved",
            Self::Worse => "WORSE",
            Self::Changed => "CHANGED",
            Self::Missing => "MISSING",
            Self::Impossible => "IMPOSSIBLE",
            Self::Unknown => "NOT IN THE BASELINE",
            Self::New => "new",
        }
    }
}

/// A row of the gate's table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The branch; `fp16` for the model itself.
    pub branch: String,
    /// `perplexity`, `kl`, `file_bytes`, `fp16` for the model's value beside this branch, `settings`,
    /// `contaminated`, a task with its metric, or `branch` for one that is missing or new.
    pub what: Cow<'static, str>,
    /// The baseline's value.
    pub baseline: Option<f64>,
    /// The report's value.
    pub now: Option<f64>,
    /// The largest value that is accepted; of a task where more is better, the least.
    pub allowed: Option<f64>,
    /// The verdict.
    pub verdict: Verdict,
    /// More of it, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The outcome of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// True when nothing fails.
    pub passed: bool,
    /// Every comparison: fp16 first, then branches by name.
    pub findings: Vec<Finding>,
}

/// Perplexities that are accepted: of one that is worse than a guess among all tokens of any model,
/// nothing follows.
pub(crate) const PERPLEXITIES: RangeInclusive<f64> = 1.0..=1e6;
/// Mean KLs that are accepted. Those of equal models are off zero by the rounding of f32, either way.
pub(crate) const KLS: RangeInclusive<f64> = -1e-5..=100.0;

/// Why no model can have a value, where none can.
fn impossibility(what: &str, value: f64) -> Option<&'static str> {
    match what {
        "kl" if !(value.is_finite() && value >= *KLS.start()) => {
            Some("a KL divergence is a number, and not below 0")
        }
        "kl" => None,
        _ if !(value.is_finite() && value >= *PERPLEXITIES.start()) => {
            Some("a perplexity is a number, and not below 1")
        }
        _ => None,
    }
}

/// The values of a branch without accepted ones that no model can have.
pub(crate) fn impossible(branch: &str, evaluation: &EvaluationRecord) -> Vec<Finding> {
    let values = [("perplexity", Some(evaluation.perplexity)), ("kl", evaluation.kl)];
    let finding = |(what, now): (&'static str, Option<f64>)| {
        let detail = impossibility(what, now?)?.to_owned();
        let verdict = Verdict::Impossible;
        Some(Finding {
            what: what.into(),
            now,
            detail: Some(detail),
            ..whole_branch(branch, verdict)
        })
    };
    values.into_iter().filter_map(finding).collect()
}

/// A value against the accepted one.
pub(crate) fn measured(
    branch: &str,
    what: &'static str,
    (then, now): (f64, f64),
    tolerance: f64,
) -> Finding {
    let margin = then.abs() * tolerance;
    let detail = impossibility(what, now).map(str::to_owned);
    let verdict = match now - then {
        _ if detail.is_some() => Verdict::Impossible,
        difference if difference > margin => Verdict::Worse,
        difference if difference < -margin => Verdict::Improved,
        _ => Verdict::Ok,
    };
    Finding {
        branch: branch.to_owned(),
        what: what.into(),
        baseline: Some(then),
        now: Some(now),
        allowed: Some(then + margin),
        verdict,
        detail,
    }
}

/// A result on a task against the accepted one: what may be lost of it is a tolerance in its own unit.
pub(crate) fn task(branch: &str, now: &TaskRecord, then: f64, tolerance: f64) -> Finding {
    let (sign, value) = (if now.higher_is_better { -1.0 } else { 1.0 }, now.value);
    let broken = !value.is_finite();
    let verdict = match sign * (value - then) {
        _ if broken => Verdict::Impossible,
        loss if loss > tolerance => Verdict::Worse,
        loss if loss < -tolerance => Verdict::Improved,
        _ => Verdict::Ok,
    };
    Finding {
        branch: branch.to_owned(),
        what: task_name(now).into(),
        baseline: Some(then),
        now: Some(value),
        allowed: Some(then + sign * tolerance),
        verdict,
        detail: broken.then(|| "a result is a number".to_owned()),
    }
}

/// A task and its metric, as baselines and findings name them.
pub(crate) fn task_name(task: &TaskRecord) -> String {
    format!("{} {}", task.task, task.metric)
}

/// A branch that only one side has.
pub(crate) fn whole_branch(branch: &str, verdict: Verdict) -> Finding {
    let branch = branch.to_owned();
    let (baseline, now, allowed, detail) = (None, None, None, None);
    Finding { branch, what: "branch".into(), baseline, now, allowed, verdict, detail }
}
