//! A sweep: every branch of a configuration made, then measured from its file.
//!
//! What branches share is done once: the calibration windows, the first Gram (see
//! [`crate::first_gram`]), the dense model's perplexity and its final hidden states (for KL), and the
//! rounded baseline of each grid. Branches that are made side by side read the source together (see
//! `group`); a source that is deleted while it is read is read once for all (see `one_source`).
//! Finished branches are found and reused (see [`crate::sweep::resume`]).

pub mod config;
mod dense_along;
mod dense_measure;
mod group;
pub mod jobs;
pub mod log;
mod one_source;
pub mod predict;
pub mod resume;
mod run;
mod source_digest;
mod survey;
mod sweep_job;

use gptq_records::locks::Lock;

use crate::error::Result;
use crate::progress::Progress;
use config::Branch;
use log::{SweepLog, SweepReport};
use resume::State;
use run::Run;
pub use survey::Survey;
pub use sweep_job::SweepJob;

/// Makes and measures the branches of `job` that are not finished yet.
///
/// # Errors
/// Everything that can go wrong before the first branch, and [`Error::Branches`](crate::Error::Branches) for branches that
/// failed, once all others are finished; the next run goes on from there.
pub fn sweep(job: &SweepJob<'_>, progress: &dyn Progress) -> Result<SweepReport> {
    job.check_devices()?;
    let lock = |branch: &Branch| Lock::branch(job.out, &branch.name);
    let _locks: Vec<Lock> = job.branches.iter().map(lock).collect::<gptq_records::Result<_>>()?;
    let survey = Survey::new(job, progress)?;
    announce(job, &survey, progress);
    if job.strict {
        survey.forbid_fallbacks()?;
    }
    let names = job.config.branches.iter().map(|b| b.name.as_str()).collect();
    let log = SweepLog::new(job.out, names);
    Run::start(job, &survey, log.read(), progress)?.all(survey.branches, &log)
}

/// Announces what an earlier run left.
fn announce(job: &SweepJob<'_>, survey: &Survey, progress: &dyn Progress) {
    for (branch, state) in job.branches.iter().zip(survey.states()) {
        let name = &branch.name;
        match state {
            State::New => {}
            State::Finished(_) => progress.note(&format!("{name}: finished, reused")),
            State::Made(_) => progress.note(&format!("{name}: made, to be measured")),
            State::Remeasure(_) => {
                progress.note(&format!("{name}: finished, but measured on something else"));
            }
            State::Stale(why) => progress.warn(&format!("{name} starts over: {why}")),
        }
    }
}
