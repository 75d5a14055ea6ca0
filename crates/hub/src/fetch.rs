//! A model or a split of a dataset: listed, chosen, downloaded side by side, published.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::api::{Api, Kind, RemoteFile};
use crate::cache::RepoCache;
use crate::download::Download;
use crate::hub::check_revision;
use crate::needed::{available_splits, model_files, split_files};
use crate::progress::Meter;
use crate::stop::Stop;
use crate::{Error, Hub, Progress, Result};

/// Files downloaded at a time: one connection seldom fills a fast line.
const CONNECTIONS: usize = 4;

/// A model's configuration.
const CONFIG: &str = "config.json";

/// What to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Weights, configuration, tokeniser and licences of the model `ORG/NAME`.
    Model(String),
    /// The configuration of the model `ORG/NAME` alone.
    Config(String),
    /// The parquet files of a split.
    Dataset {
        /// `ORG/NAME`, or `NAME` for the Hub's oldest datasets.
        id: String,
        /// The configuration, a folder of the repository.
        config: String,
        /// The split.
        split: String,
    },
}

/// What is in the cache now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// The snapshot's folder.
    pub folder: PathBuf,
    /// The commit that the revision stood for.
    pub commit: String,
    /// Files of the snapshot that were asked for.
    pub files: usize,
    /// Bytes on disk; equal files are stored once.
    pub bytes: u64,
    /// Bytes that came over the network, those that arrived damaged included.
    pub downloaded: u64,
}

/// Downloads what is missing of `source` at `revision` (a branch, tag or commit) into `cache`, the
/// folder that holds all repositories.
///
/// Each file is checked by size and hash before it gets its name. What has arrived stays when this
/// fails, and the next call goes on from there.
///
/// # Errors
/// When the network is forbidden or fails for too long, the Hub refuses, the repository has not
/// what was asked for, a file arrives wrong twice, or the disk is full.
pub fn fetch(
    hub: &Hub,
    source: &Source,
    revision: &str,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<Fetched> {
    let (kind, id) = match source {
        Source::Model(id) | Source::Config(id) => (Kind::Model, id),
        Source::Dataset { id, .. } => (Kind::Dataset, id),
    };
    check_revision(revision)?;
    let api = Api::new(hub, kind, id)?;
    let commit = api.commit(revision, progress)?;
    let listing = api.files(&commit, progress)?;
    let files = choose(source, &listing)?;

    let cache = RepoCache::create(cache, kind, id)?;
    let (bytes, downloaded) = bring(&api, &cache, &commit, &files, progress)?;
    let folder = cache.publish(revision, &commit, &files)?;
    Ok(Fetched { folder, commit, files: files.len(), bytes, downloaded })
}

/// Brings the blobs of `files` that are not there; gives the bytes of all, and those that
/// came.
pub(crate) fn bring(
    api: &Api<'_>,
    cache: &RepoCache,
    commit: &str,
    files: &[RemoteFile],
    progress: &dyn Progress,
) -> Result<(u64, u64)> {
    // Equal files are one blob.
    let blobs: BTreeMap<&str, &RemoteFile> = files.iter().map(|f| (f.digest.hex(), f)).collect();
    let bytes = blobs.values().map(|file| file.bytes).sum();
    let present: u64 = blobs.values().map(|file| cache.present(file)).sum();
    cache.check_space(bytes - present)?;
    let missing: Vec<&RemoteFile> =
        blobs.into_values().filter(|file| !cache.is_complete(file)).collect();
    if missing.is_empty() {
        return Ok((bytes, 0));
    }
    progress.begin(api.id(), bytes, present);
    let stop = Stop::new();
    let all = Download { api, cache, commit, meter: Meter::new(progress, present), stop: &stop };
    let doing = || format!("downloading `{}`", api.id());
    let result = side_by_side(&missing, &stop, doing, |file| all.file(file));
    progress.end();
    result.map(|()| (bytes, all.meter.received()))
}

pub(crate) fn choose(source: &Source, listing: &[RemoteFile]) -> Result<Vec<RemoteFile>> {
    match source {
        Source::Model(id) => {
            model_files(listing).ok_or_else(|| Error::NoWeights { repo: id.clone() })
        }
        Source::Config(id) => {
            let config = listing.iter().find(|file| file.path == CONFIG);
            let what = || format!("`{CONFIG}` in `{id}`");
            Ok(vec![config.ok_or_else(|| Error::NotFound { what: what() })?.clone()])
        }
        Source::Dataset { id, config, split } => {
            let files = split_files(listing, config, split);
            if files.is_empty() {
                let available = available_splits(listing);
                let (repo, config, split) = (id.clone(), config.clone(), split.clone());
                return Err(Error::NoSplit { repo, config, split, available });
            }
            Ok(files)
        }
    }
}

/// Works on all of `files`, several at a time; the first failure stops the others.
fn side_by_side(
    files: &[&RemoteFile],
    stop: &Stop,
    doing: impl Fn() -> String,
    work: impl Fn(&RemoteFile) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Mutex::new(files.iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<()> {
        while let Some(file) = next() {
            if let Err(error) = work(file) {
                stop.set();
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(work)).collect();
        let panicked = || Error::Panicked { doing: doing() };
        let results = workers.into_iter().map(std::thread::ScopedJoinHandle::join);
        let results: Vec<_> = results.map(|r| r.unwrap_or_else(|_| Err(panicked()))).collect();
        results.into_iter().collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Digest;

    #[test]
    fn a_panic_is_called_one_and_loses_no_other_file() {
        let digest = Digest::parse(&"a".repeat(40)).unwrap();
        let file =
            |path: &str| RemoteFile { path: path.to_owned(), bytes: 4, digest: digest.clone() };
        let files = [file("a"), file("b"), file("c")];
        let done = Mutex::new(Vec::new());
        let doing = || "downloading `org/name`".to_owned();
        let result = side_by_side(&files.each_ref(), &Stop::new(), doing, |file| {
            assert_ne!(file.path, "b", "a fault");
            done.lock().unwrap().push(file.path.clone());
            Ok(())
        });
        let message = result.unwrap_err().to_string();
        assert!(message.contains("`org/name` panicked"), "{message}");
        let mut done = done.into_inner().unwrap();
        done.sort();
        assert_eq!(done, ["a", "c"]);
    }
}
