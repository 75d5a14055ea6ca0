//! A sweep of a source whose shards are deleted once they are read (`--discard-shards`), so that all
//! branches of a table come from one download, on a disk smaller than the model.
//!
//! # Design
//!
//! The source is read once, block by block, and everything that looks at it is a walk of that reading
//! (see [`crate::one_reading`]): every branch that is to be made; on each device the dense model's
//! evaluation and one walk of all rounded grids; and the digest that manifests know the source by.
//! A block's shard goes when all of them have read the block, and no walk reads a block before all
//! have read the one before it, so no more shards wait on the disk than for one branch made alone.
//! Embedding, norms and head are kept in memory by the [`Checkpoint`](gptq_checkpoint::Checkpoint).
//! Branches are measured afterwards, from their own files and the dense model's final states.
//!
//! Before the first shard is asked for it is refused what would need a second reading: more branches
//! than are made at the same time, and an evaluation whose windows memory holds in batches only. So
//! is a folder that holds branches while nothing is known of the source: whether they are of it would
//! show only when it is read.
//!
//! # What a killed run costs
//!
//! While the source is read: the branches, and what was downloaded for them. The next run begins
//! again, with those shards that had not been read. Once the digest is known it is remembered beside
//! the branches, by the commit that the shards are of; so after the reading nothing is made again.
//! Branches that were not measured then need the dense model's states, which are gone: the next run
//! downloads the source once more for the evaluation alone.

use super::dense_along::{Evaluation, Walking};
use super::dense_measure::DenseMeasure;
use super::group::{Group, MadeBranch, Member, Shared, join};
use super::source_digest::{Digest, find_digest};
use super::sweep_job::SweepJob;
use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::memory::Along;
use crate::one_reading::OneReading;
use crate::progress::{Progress, Silent};

/// What one reading gives.
pub(super) struct Read<'a> {
    /// The members' branches, in their order.
    pub(super) made: Vec<Result<MadeBranch>>,
    pub(super) dense: Option<DenseMeasure<'a>>,
}

/// Reads the source of `job` once: makes all `members`, evaluates, and finds `digest`.
///
/// # Errors
/// A source that cannot be read, and a dense model that cannot be evaluated: branches that were made
/// until then are kept for the next run.
pub(super) fn read_once<'a>(
    job: &SweepJob<'a>,
    members: &[Member<'_>],
    shared: &[FirstGrams],
    evaluation: Option<Evaluation>,
    digest: &Digest,
    progress: &dyn Progress,
) -> Result<Read<'a>> {
    let along = match &evaluation {
        Some(evaluation) => evaluation.along(job)?,
        None => vec![Along::default(); job.devices.len()],
    };
    let group = Group::new(job, members, shared, &along, digest)?;
    // Beside branches all of its states wait in host memory, which their plan leaves room for.
    let offloaded = 1.0;
    let parts = evaluation.as_ref().map(|e| e.parts(job, offloaded)).transpose()?;
    let parts = parts.unwrap_or_default();
    let evaluating = evaluation.as_ref().map_or(0, |e| e.walks() * parts.len());
    let unread = !digest.is_known();
    let reading = OneReading::new(members.len() + evaluating + usize::from(unread));
    let shown = Shared::new(progress, members.len());
    let evaluates: &dyn Progress = if members.is_empty() { progress } else { &Silent };
    let read = std::thread::scope(|scope| {
        let branches = group.spawn(scope, &reading, &shown);
        let from = (&reading, members.len());
        let walking = evaluation
            .as_ref()
            .map_or_else(Vec::new, |e| e.spawn(scope, &parts, from, &group.turns, evaluates));
        let digesting = unread.then(|| {
            let reader = reading.reader(members.len() + evaluating);
            scope.spawn(move || find_digest(job, reader, digest))
        });
        let made = join(branches);
        let walked: Vec<_> = walking.into_iter().map(Walking::join).collect();
        if let Some(digesting) = digesting {
            // First: a shard that does not come fails every walk, and this says why.
            digesting.join().unwrap_or(Err(Error::Thread("reading")))?;
        }
        Ok::<_, Error>((made, walked))
    });
    shown.end();
    let (made, walked) = read?;
    let walked = walked.into_iter().collect::<Result<Vec<_>>>()?;
    let measure = |e| DenseMeasure::of_walks(e, parts.into_iter().zip(walked).collect(), progress);
    Ok(Read { made, dense: evaluation.map(measure).transpose()? })
}
