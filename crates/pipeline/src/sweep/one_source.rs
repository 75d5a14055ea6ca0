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

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gptq_checkpoint::PARTIAL_END;
use gptq_records::locks::{STATE_DIR, SharedFile};
use gptq_records::manifest::{MadeFrom, Manifest};
use gptq_records::source_digest::{SourceDigest, source_digest};

use super::dense_along::{Evaluation, Walking};
use super::dense_measure::DenseMeasure;
use super::group::{Group, MadeBranch, Member, Shared, join};
use super::{Survey, SweepJob};
use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::memory_evaluation::Along;
use crate::one_reading::{OneReading, Reader};
use crate::progress::{Progress, Silent};
use crate::read_ahead::{discard, linears};

/// Digests of sources by what their shards are of, beside the branches.
const SOURCES_FILE: &str = "sources.json";

/// What a branch's manifest calls the digest of its source.
pub(super) const SOURCE: &str = "the source";

/// The digest of a source, which is known when all of it was read at the latest.
#[derive(Debug, Default)]
pub(super) struct Digest(OnceLock<Option<String>>);

impl Digest {
    pub(super) fn new(known: Option<String>) -> Self {
        Self(known.map_or_else(OnceLock::new, |digest| Some(digest).into()))
    }

    fn is_known(&self) -> bool {
        self.0.get().is_some()
    }

    /// Waits for it.
    ///
    /// # Errors
    /// [`Error::Thread`] where it will not come; why is the error of the walk that should have it.
    pub(super) fn wait(&self) -> Result<&str> {
        self.0.wait().as_deref().ok_or(Error::Thread("reading"))
    }

    /// Puts it among all else that a branch is made from.
    pub(super) fn complete(&self, made_from: &MadeFrom) -> Result<MadeFrom> {
        let mut made_from = made_from.clone();
        made_from.insert(SOURCE.to_owned(), self.wait()?.to_owned());
        Ok(made_from)
    }
}

/// Says that no digest will come, unless one has: nobody waits for a walk that has ended.
struct Told<'a>(&'a Digest);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        // Already set where all went well.
        let _ = self.0.0.set(None);
    }
}

/// The digest of a job's source as far as it is known: that of a source whose shards come and go from
/// an earlier reading.
pub(super) fn known_digest(job: &SweepJob<'_>) -> Result<Option<String>> {
    if !job.source.is_arriving() {
        return Ok(Some(source_digest(job.source)?));
    }
    Ok(job.origin.and_then(|origin| remembered(job.out).remove(origin)))
}

/// Refuses what would need a second reading, or be replaced although it may be finished.
pub(super) fn check(job: &SweepJob<'_>, survey: &Survey) -> Result<()> {
    if !job.source.is_arriving() {
        return Ok(());
    }
    let branches = survey.branches.iter().filter(|b| b.is_to_be_made()).count();
    let made = job.at_once();
    if branches > made {
        let together = branches.div_ceil(job.devices.len().max(1));
        return Err(Error::Together { branches, made, together });
    }
    Ok(())
}

/// Refuses a folder that holds a branch of who knows which source.
pub(super) fn check_unread(dir: &Path) -> Result<()> {
    let mut partial = dir.as_os_str().to_owned();
    partial.push(PARTIAL_END);
    for dir in [dir.to_owned(), PathBuf::from(partial)] {
        if Manifest::read(&dir).is_ok_and(|manifest| manifest.is_some()) {
            return Err(Error::UnreadSource(dir));
        }
    }
    Ok(())
}

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

/// Looks at every block's weights as they come, and then at the rest.
fn find_digest(job: &SweepJob<'_>, reader: Reader<'_>, digest: &Digest) -> Result<()> {
    let told = Told(digest);
    let source = job.source;
    let mut looked = SourceDigest::default();
    for block in 0..source.config().num_hidden_layers {
        let look = || -> Result<()> {
            linears(source, block).try_for_each(|name| Ok(looked.look(source, &name)?))
        };
        reader.block(block, look, |block| discard(source, block))?;
    }
    drop(reader);
    let found = looked.finish(source)?;
    // Before any manifest names it.
    if let Some(origin) = job.origin {
        remember(job.out, origin, &found)?;
    }
    let _ = told.0.0.set(Some(found));
    Ok(())
}

/// The digests that are remembered; none of a file that cannot be read, which costs a reading.
fn remembered(out: &Path) -> BTreeMap<String, String> {
    let text = gptq_checkpoint::read_small(&out.join(STATE_DIR).join(SOURCES_FILE));
    text.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn remember(out: &Path, origin: &str, digest: &str) -> Result<()> {
    let file = SharedFile::lock(out, SOURCES_FILE)?;
    let mut all = remembered(out);
    all.insert(origin.to_owned(), digest.to_owned());
    let path = out.join(STATE_DIR).join(SOURCES_FILE);
    let text = serde_json::to_string_pretty(&all)
        .map_err(|e| gptq_records::Error::Report { path: path.clone(), message: e.to_string() })?;
    Ok(file.replace(&path, (text + "\n").as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_that_will_not_come_is_not_waited_for() {
        let digest = Digest::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| digest.wait().map(str::to_owned));
            drop(Told(&digest));
            assert!(matches!(waiting.join().unwrap(), Err(Error::Thread("reading"))));
        });
        let known = Digest::new(Some("abc".to_owned()));
        drop(Told(&known));
        assert_eq!(known.wait().unwrap(), "abc");
        let made_from = known.complete(&MadeFrom::new()).unwrap();
        assert_eq!(made_from["the source"], "abc");
    }

    #[test]
    fn digests_are_remembered_by_commit() {
        let dir = tempfile::tempdir().unwrap();
        assert!(remembered(dir.path()).is_empty());
        for (origin, digest) in [("org/name@a", "1"), ("org/name@b", "2"), ("org/name@a", "1")] {
            remember(dir.path(), origin, digest).unwrap();
        }
        let all = remembered(dir.path());
        assert_eq!((all.len(), all["org/name@b"].as_str()), (2, "2"));
        std::fs::write(dir.path().join(STATE_DIR).join(SOURCES_FILE), "{").unwrap();
        assert!(remembered(dir.path()).is_empty());
    }
}
