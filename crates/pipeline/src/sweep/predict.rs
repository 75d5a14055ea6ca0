//! What a sweep will take, before it is begun.
//!
//! Branches on one device take turns and those on different devices go block by block together (see
//! `group`), so a group takes as long as the device with the most work, and each of its
//! branches as long as the group. Measuring is forwards over the evaluation's windows, which the
//! devices share: of the dense model once, of every branch, and of every grid rounded to nearest.

use std::collections::BTreeSet;

use super::config::Branch;
use super::dense_measure::grid;
use super::group::device_of;
use super::survey::{Survey, Surveyed};
use super::sweep_job::SweepJob;
use crate::error::Result;
use crate::operations::{Extras, Operations};
use crate::rates::{Prediction, Source};

/// What the branches of a sweep will take, in the job's order.
#[derive(Clone, Debug)]
pub struct SweepPrediction {
    /// From the first of a branch's group to the last: what `quantize_seconds` will be. `None` for
    /// branches that are there, and where it is not known.
    pub branches: Vec<Option<Prediction>>,
    /// Of the whole sweep; `None` where a part is not known.
    pub sweep: Option<Prediction>,
}

impl SweepPrediction {
    /// Of what `survey` found is left to do.
    ///
    /// # Errors
    /// A branch that cannot be planned.
    pub fn new(job: &SweepJob<'_>, survey: &Survey) -> Result<Self> {
        let mut branches = vec![None; job.branches.len()];
        let mut total = Some(Prediction { seconds: 0.0, from: Source::Bench });
        let made = |at: &usize| survey.branches.get(*at).is_some_and(Surveyed::is_to_be_made);
        let to_make: Vec<usize> = (0..job.branches.len()).filter(made).collect();
        for members in to_make.chunks(job.at_once()) {
            let of_group: Vec<&Branch> = members.iter().map(|&at| &job.branches[at]).collect();
            let predicted = group(job, &of_group)?;
            members.iter().for_each(|&at| branches[at] = predicted);
            total = sum(total, predicted);
        }
        let total = sum(total, measuring(job, survey));
        let sweep = total.map(|t| Prediction { seconds: t.seconds + job.rates.start_up(), ..t });
        Ok(Self { branches, sweep })
    }
}

/// What branches that are made side by side take, all of them.
pub(super) fn group(job: &SweepJob<'_>, members: &[&Branch]) -> Result<Option<Prediction>> {
    let budget = job.device().memory()?.map_or(0, |memory| memory.budget as u64);
    let mut busy = vec![0.0_f64; job.devices.len().max(1)];
    let mut from = Source::Bench;
    for (member, branch) in members.iter().enumerate() {
        let plan = job.plan(branch, budget)?;
        let Some(predicted) = job.rates.branch(job.source.config(), &branch.spec, &plan) else {
            return Ok(None);
        };
        busy[device_of(member, job.devices.len())] += predicted.seconds;
        from = from.max(predicted.from);
    }
    Ok(Some(Prediction { seconds: busy.into_iter().fold(0.0, f64::max), from }))
}

/// What it takes to measure all that is not measured yet.
fn measuring(job: &SweepJob<'_>, survey: &Survey) -> Option<Prediction> {
    let nothing = Some(Prediction { seconds: 0.0, from: Source::Bench });
    let Some(text) = &survey.text else { return nothing };
    let states = job.branches.iter().zip(survey.states());
    let left = states.filter(|(_, state)| !matches!(state, super::resume::State::Finished(_)));
    let left: Vec<&Branch> = left.map(|(branch, _)| branch).collect();
    if left.is_empty() {
        return nothing;
    }
    let grids: BTreeSet<_> = left.iter().map(|branch| grid(&branch.spec)).collect();
    let walks = 1 + left.len() + grids.len();
    let model = job.source.config();
    let tokens = (text.windows.len(), text.seq_len);
    let head =
        2.0 * tokens.0 as f64 * tokens.1 as f64 * (model.vocab_size * model.hidden_size) as f64;
    let walk = Operations::of_model(model, tokens, Extras::default()).forward + head;
    let shared = walks as f64 / job.devices.len().max(1) as f64;
    job.rates.forward(model, walk * shared)
}

/// Both, one after the other.
fn sum(a: Option<Prediction>, b: Option<Prediction>) -> Option<Prediction> {
    let (a, b) = a.zip(b)?;
    Some(Prediction { seconds: a.seconds + b.seconds, from: a.from.max(b.from) })
}
