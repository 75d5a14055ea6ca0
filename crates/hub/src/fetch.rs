//! A model or a split of a dataset: listed, chosen, downloaded side by side, published.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use gptq_checkpoint::{CONFIG_FILE, read_small};

use crate::api::{Api, Kind};
use crate::cache::RepoCache;
use crate::download::Download;
use crate::listing::{Listing, RemoteFile, clash};
use crate::lock::lock;
use crate::needed::{Needed, available_splits, model_files, shards, small_files, split_files};
use crate::progress::Meter;
use crate::revision::check_revision;
use crate::stop::Stop;
use crate::{Error, Hub, Progress, Result};
use crate::{offline, tree};

/// Files downloaded at a time: one connection seldom fills a fast line.
const CONNECTIONS: usize = 4;

/// What to download.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Weights, configuration, tokenizer and licenses of the model `ORG/NAME`.
    Model(String),
    /// The configuration of the model `ORG/NAME` alone.
    Config(String),
    /// Its small files: what [`Model`](Self::Model) has beside weights.
    Settings(String),
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
/// Each file that arrives is checked by size and hash before it gets its name. One that is there is
/// taken on its size; with `verified` it is hashed, and downloaded again if it is wrong. What has
/// arrived stays when this fails, and the next call goes on from there. Where the network is
/// forbidden, what was asked for has to be in the cache.
///
/// # Errors
/// When the network is forbidden and something is missing, or it fails for too long, the Hub
/// refuses, the repository has not what was asked for, a file arrives wrong twice, or the disk is
/// full.
pub fn fetch(
    hub: &Hub,
    source: &Source,
    revision: &str,
    cache: &Path,
    verified: bool,
    progress: &dyn Progress,
) -> Result<Fetched> {
    let (kind, id) = source.repository();
    check_revision(revision)?;
    if hub.is_offline() {
        return offline::fetched(hub, source, revision, cache, verified);
    }
    let api = Api::new(hub, kind, id)?;
    let commit = api.commit(revision, progress)?;
    let listing = listed(&api, &commit, progress)?;
    let Needed { mut files, indices } = choose(source, &listing.files)?;

    let cache = RepoCache::create(cache, kind, id)?;
    let received = Cell::new(0);
    let bring = Bring { api: &api, cache: &cache, commit: &commit, verified, received, progress };
    files.extend(bring.shards(&indices, &listing.files)?);
    bring.all(&files)?;
    tree::write(&cache, &commit, &listing)?;
    let folder = cache.publish(revision, &commit, &files)?;
    let bytes = blobs(&files).iter().map(|file| file.bytes).sum();
    let downloaded = bring.received.get();
    Ok(Fetched { folder, commit, files: files.len(), bytes, downloaded })
}

impl Source {
    /// The repository's kind and id.
    pub(crate) fn repository(&self) -> (Kind, &str) {
        match self {
            Self::Model(id) | Self::Config(id) | Self::Settings(id) => (Kind::Model, id),
            Self::Dataset { id, .. } => (Kind::Dataset, id),
        }
    }
}

/// All files of a commit, in names that a folder can hold.
pub(crate) fn listed(api: &Api<'_>, commit: &str, progress: &dyn Progress) -> Result<Listing> {
    let listing = api.files(commit, progress)?;
    if listing.odd > 0 {
        progress.note(&format!(
            "{}: left out {} files whose names would leave the repository's folder, or fit into none",
            api.id(),
            listing.odd
        ));
    }
    if let Some(path) = clash(&listing.files) {
        let reason = format!("`{path}` is a file and a folder at once");
        return Err(Error::Answer { what: format!("{}@{commit}", api.id()), reason });
    }
    Ok(listing)
}

pub(crate) fn choose(source: &Source, listing: &[RemoteFile]) -> Result<Needed> {
    match source {
        Source::Model(id) => {
            model_files(listing).ok_or_else(|| Error::NoWeights { repo: id.clone() })
        }
        Source::Config(id) => {
            let config = listing.iter().find(|file| file.path == CONFIG_FILE);
            let what = || format!("`{CONFIG_FILE}` in `{id}`");
            let config = config.ok_or_else(|| Error::NotFound { what: what() })?;
            Ok(Needed::files(vec![config.clone()]))
        }
        Source::Settings(_) => Ok(Needed::files(small_files(listing))),
        Source::Dataset { id, config, split } => {
            let files = split_files(listing, config, split);
            if files.is_empty() {
                let available = available_splits(listing);
                let (repo, config, split) = (id.clone(), config.clone(), split.clone());
                return Err(Error::NoSplit { repo, config, split, available });
            }
            Ok(Needed::files(files))
        }
    }
}

/// Equal files are one blob.
pub(crate) fn blobs(files: &[RemoteFile]) -> Vec<&RemoteFile> {
    let by_hash: BTreeMap<&str, &RemoteFile> = files.iter().map(|f| (f.digest.hex(), f)).collect();
    by_hash.into_values().collect()
}

/// Brings files of a repository at a commit into its cache.
pub(crate) struct Bring<'a> {
    pub(crate) api: &'a Api<'a>,
    pub(crate) cache: &'a RepoCache,
    pub(crate) commit: &'a str,
    /// What is there is hashed, too.
    pub(crate) verified: bool,
    /// Bytes that came over the network so far.
    pub(crate) received: Cell<u64>,
    pub(crate) progress: &'a dyn Progress,
}

impl Bring<'_> {
    /// The shards that `indices` name, once each. The indices are brought, as nothing else says
    /// which files of a repository are shards.
    pub(crate) fn shards(
        &self,
        indices: &[RemoteFile],
        listing: &[RemoteFile],
    ) -> Result<Vec<RemoteFile>> {
        self.all(indices)?;
        let mut found = BTreeMap::new();
        for index in indices {
            let blob = self.cache.blob(index);
            let text = read_small(&blob).map_err(Error::io("read", &blob))?;
            let what = format!("{}/{}", self.api.id(), index.path);
            let shards = shards(&what, &text, listing)?;
            found.extend(shards.into_iter().map(|shard| (shard.path.clone(), shard)));
        }
        Ok(found.into_values().collect())
    }

    /// Brings the blobs of `files` that are not there.
    pub(crate) fn all(&self, files: &[RemoteFile]) -> Result<()> {
        let Self { api, cache, commit, progress, .. } = *self;
        let blobs = blobs(files);
        if self.verified {
            self.verify(&blobs)?;
        }
        let bytes: u64 = blobs.iter().map(|file| file.bytes).sum();
        let present: u64 = blobs.iter().map(|file| cache.present(file)).sum();
        cache.check_space(bytes - present)?;
        let missing: Vec<&RemoteFile> =
            blobs.into_iter().filter(|file| !cache.is_complete(file)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        progress.begin(api.id(), bytes, present);
        let stop = Stop::new();
        let all =
            Download { api, cache, commit, meter: Meter::new(progress, present), stop: &stop };
        let doing = || format!("downloading `{}`", api.id());
        let result = side_by_side(&missing, &stop, doing, |file| all.file(file));
        progress.end();
        self.received.set(self.received.get() + all.meter.received());
        result
    }

    /// Removes the blobs that are not what their names say.
    fn verify(&self, blobs: &[&RemoteFile]) -> Result<()> {
        let Self { api, cache, progress, .. } = *self;
        let there: Vec<&RemoteFile> =
            blobs.iter().copied().filter(|file| cache.is_complete(file)).collect();
        if there.is_empty() {
            return Ok(());
        }
        progress.begin(&format!("checking {}", api.id()), there.iter().map(|f| f.bytes).sum(), 0);
        let (stop, meter) = (Stop::new(), Meter::new(progress, 0));
        let doing = || format!("checking `{}`", api.id());
        let result = side_by_side(&there, &stop, doing, |file| {
            let Some(_lock) = cache.lock(file, &stop, progress)? else { return Ok(()) };
            if cache.is_complete(file) && cache.remove_damaged(file)? {
                let name = &file.path;
                progress.note(&format!("{}/{name}: damaged; downloading it again", api.id()));
            }
            meter.add(file.bytes);
            Ok(())
        });
        progress.end();
        result
    }
}

/// Works on all of `items`, several at a time; the first failure stops the others.
pub(crate) fn side_by_side<T: Sync>(
    items: &[T],
    stop: &Stop,
    doing: impl Fn() -> String,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Mutex::new(items.iter());
    let next = || lock(&queue).next();
    let work = || -> Result<()> {
        while let Some(item) = next() {
            if let Err(error) = work(item) {
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

    #[test]
    fn a_panic_is_called_one_and_loses_no_other_file() {
        let file = |path: &str| RemoteFile::test(path, 4, &"a".repeat(40));
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
