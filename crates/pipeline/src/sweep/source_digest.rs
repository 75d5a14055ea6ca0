//! What the manifests of branches know their source by: a digest, which is there from the beginning or
//! when all of the source was read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gptq_checkpoint::PARTIAL_END;
use gptq_records::locks::{STATE_DIR, SharedFile};
use gptq_records::manifest::{MadeFrom, Manifest};
use gptq_records::source_digest::{SourceDigest, source_digest};

use super::sweep_job::{SOURCE, SweepJob};
use crate::error::{Error, Result};
use crate::one_reading::Reader;
use crate::read_ahead::{discard, linears};

/// Digests of sources by what their shards are of, beside the branches.
const SOURCES_FILE: &str = "sources.json";

/// The digest of a source, which is known when all of it was read at the latest.
#[derive(Debug, Default)]
pub(super) struct Digest(OnceLock<Option<String>>);

impl Digest {
    pub(super) fn new(known: Option<String>) -> Self {
        Self(known.map_or_else(OnceLock::new, |digest| Some(digest).into()))
    }

    pub(super) fn is_known(&self) -> bool {
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

/// Looks at every block's weights as they come, and then at the rest.
pub(super) fn find_digest(job: &SweepJob<'_>, reader: Reader<'_>, digest: &Digest) -> Result<()> {
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
