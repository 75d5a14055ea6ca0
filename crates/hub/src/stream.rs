//! A model's shards one after the other, a few ahead of their reader: for a disk smaller than the
//! model.
//!
//! The reader deletes what it has read; here is only seen to it that no more than [`AHEAD`] shards
//! wait for it. Shards lie in a folder of this run's own within the repository's cache, so that a
//! deletion takes nothing from anybody: those that the cache held before are there by a second name.
//! A run that was cut short leaves the folder to the next, which finds what had not been read.
//!
//! Nothing comes before the first shard is waited for, so that a caller may still find that it has
//! nothing to read.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};

use crate::api::{Api, Kind};
use crate::cache::RepoCache;
use crate::download::Download;
use crate::fetch::{Bring, choose, listed};
use crate::listing::RemoteFile;
use crate::lock::lock;
use crate::progress::Meter;
use crate::revision::check_revision;
use crate::stop::Stop;
use crate::{Error, Hub, Progress, Result, Source, tree};

/// Shards that are arriving or wait to be read. Each has a connection of its own.
const AHEAD: usize = 2;

/// A model whose small files are in the cache and whose shards are on their way.
pub struct Stream {
    shared: Arc<Shared>,
    folder: PathBuf,
    begun: Once,
}

struct Shared {
    hub: Hub,
    id: String,
    commit: String,
    /// What other runs and programs use, too.
    cache: RepoCache,
    /// What this run brings and its reader deletes.
    own: RepoCache,
    /// In the order of their names, which is the order of their tensors.
    shards: Vec<RemoteFile>,
    places: Mutex<Vec<Place>>,
    changed: Condvar,
    stop: Stop,
    progress: Arc<dyn Progress + Send + Sync>,
}

/// Where a shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Remote,
    Coming,
    Here,
    Taken,
}

impl Stream {
    /// Downloads everything but the weights of the model `id` at `revision` into `cache`.
    ///
    /// # Errors
    /// As [`crate::fetch`]; [`Error::NotSharded`] for a model in one file, or without an index by
    /// which a reader knows its shards before they come.
    pub fn start(
        hub: Hub,
        id: &str,
        revision: &str,
        cache: &Path,
        progress: Arc<dyn Progress + Send + Sync>,
    ) -> Result<Self> {
        check_revision(revision)?;
        let api = Api::new(&hub, Kind::Model, id)?;
        let commit = api.commit(revision, &*progress)?;
        let listing = listed(&api, &commit, &*progress)?;
        let needed = choose(&Source::Model(id.to_owned()), &listing.files)?;
        if !needed.is_sharded() {
            return Err(Error::NotSharded { repo: id.to_owned() });
        }
        let cache = RepoCache::create(cache, Kind::Model, id)?;
        let bring = Bring {
            api: &api,
            cache: &cache,
            commit: &commit,
            verified: false,
            received: Cell::new(0),
            progress: &*progress,
        };
        let shards = bring.shards(&needed.indices, &listing.files)?;
        if shards.len() < 2 {
            return Err(Error::NotSharded { repo: id.to_owned() });
        }
        let own = cache.private(&commit)?;
        cache.check_space(space(&shards, &cache, &own))?;
        bring.all(&needed.files)?;
        tree::write(&cache, &commit, &listing)?;
        cache.publish(revision, &commit, &needed.files)?;
        for file in &needed.files {
            if !own.adopt(&cache, file)? {
                return Err(Error::Gone { path: cache.blob(file) });
            }
        }
        let folder = own.snapshot(&commit);
        let shared = Arc::new(Shared {
            id: id.to_owned(),
            commit,
            cache,
            own,
            places: Mutex::new(vec![Place::Remote; shards.len()]),
            shards,
            changed: Condvar::new(),
            stop: Stop::new(),
            progress,
            hub,
        });
        Ok(Self { shared, folder, begun: Once::new() })
    }

    /// What the shards are of: other contents have another name.
    #[must_use]
    pub fn origin(&self) -> String {
        format!("{}@{}", self.shared.id, self.shared.commit)
    }

    /// A folder with the model's files, where shards appear.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until a shard is in the folder. From then on it is the caller's to delete: nothing else
    /// needs that name.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a name that the repository does not have, and as [`crate::fetch`].
    pub fn wait(&self, shard: &str) -> Result<()> {
        let shared = &*self.shared;
        self.begun.call_once(|| self.begin());
        let Some(index) = shared.shards.iter().position(|file| file.path == shard) else {
            return Err(Error::NotFound { what: format!("shard `{shard}` in `{}`", shared.id) });
        };
        let mut places = shared.places();
        loop {
            match places[index] {
                Place::Taken => return Ok(()),
                Place::Here => {
                    places[index] = Place::Taken;
                    shared.changed.notify_all();
                    return Ok(());
                }
                Place::Coming => {
                    places = shared.changed.wait(places).unwrap_or_else(PoisonError::into_inner);
                }
                // Wanted out of turn, or lost by a thread that failed: the failure shows here.
                Place::Remote => {
                    places[index] = Place::Coming;
                    drop(places);
                    shared.download(index)?;
                    places = shared.places();
                }
            }
        }
    }

    fn begin(&self) {
        for _ in 0..AHEAD {
            let shared = Arc::clone(&self.shared);
            // Not waited for: one that waits for the network ends with the process.
            std::thread::spawn(move || shared.work());
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Under the lock, so that nobody misses it between looking and waiting.
        let places = self.shared.places();
        self.shared.stop.set();
        self.shared.changed.notify_all();
        if !self.begun.is_completed() || places.iter().all(|&place| place == Place::Taken) {
            self.shared.own.remove_private(&self.shared.shards);
        }
    }
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        lock(&self.places)
    }

    /// Downloads shards as there is room for them, until none is left or one fails.
    fn work(&self) {
        while let Some(shard) = self.next() {
            if self.download(shard).is_err() {
                return;
            }
        }
    }

    /// The next shard to download, now coming.
    fn next(&self) -> Option<usize> {
        let mut places = self.places();
        loop {
            if self.stop.is_set() {
                return None;
            }
            let next = places.iter().position(|&place| place == Place::Remote)?;
            let waiting = |place: &&Place| matches!(place, Place::Coming | Place::Here);
            if places.iter().filter(waiting).count() < AHEAD {
                places[next] = Place::Coming;
                return Some(next);
            }
            places = self.changed.wait(places).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Downloads a shard that is `Coming`; it is `Here` afterwards, or `Remote` again.
    fn download(&self, shard: usize) -> Result<()> {
        let mut arrival = Arrival { shared: self, shard, place: Place::Remote };
        let file = &self.shards[shard];
        if !self.own.is_complete(file) && !self.is_shared(file)? {
            let api = Api::new(&self.hub, Kind::Model, &self.id)?;
            let meter = Meter::new(&*self.progress, self.own.present(file));
            let (cache, commit, stop) = (&self.own, self.commit.as_str(), &self.stop);
            Download { api: &api, cache, commit, meter, stop }.file(file)?;
        }
        if self.own.is_complete(file) {
            arrival.place = Place::Here;
        }
        Ok(())
    }

    /// Takes a shard that the cache holds for everybody under a second name.
    fn is_shared(&self, file: &RemoteFile) -> Result<bool> {
        Ok(self.cache.is_complete(file) && self.own.adopt(&self.cache, file)?)
    }
}

/// Says where a shard is when its download is over, however it ended.
struct Arrival<'a> {
    shared: &'a Shared,
    shard: usize,
    place: Place,
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.shared.places()[self.shard] = self.place;
        self.shared.changed.notify_all();
    }
}

/// Bytes that may be needed at a time: the shards ahead, and two that are read, as a block may lie
/// in both.
fn space(shards: &[RemoteFile], cache: &RepoCache, own: &RepoCache) -> u64 {
    let missing = |file: &RemoteFile| match cache.is_complete(file) {
        true => 0,
        false => file.bytes - own.present(file),
    };
    let mut missing: Vec<u64> = shards.iter().map(missing).collect();
    missing.sort_unstable();
    missing.iter().rev().take(AHEAD + 2).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::progress::tests::Silent;

    #[test]
    fn no_more_shards_come_than_may_wait() {
        let root = tempfile::tempdir().unwrap();
        let file = |i: u64| RemoteFile::test(&format!("{i}.bin"), 10 + i, &"a".repeat(64));
        let shards: Vec<RemoteFile> = (0..5).map(file).collect();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let own = cache.private("c0ffee").unwrap();
        assert_eq!(space(&shards, &cache, &own), 14 + 13 + 12 + 11);
        let shared = Arc::new(Shared {
            hub: Hub::from_env(0, None).unwrap(),
            id: "org/name".to_owned(),
            commit: "c0ffee".to_owned(),
            cache,
            own,
            places: Mutex::new(vec![Place::Remote; shards.len()]),
            shards,
            changed: Condvar::new(),
            stop: Stop::new(),
            progress: Arc::new(Silent),
        });
        let begun = Once::new();
        // This test is the one that works.
        begun.call_once(|| {});
        let folder = root.path().to_owned();
        let stream = Stream { shared: Arc::clone(&shared), folder, begun };
        let arrive = |shard: usize| {
            drop(Arrival { shared: &shared, shard, place: Place::Here });
        };
        assert_eq!((shared.next(), shared.next()), (Some(0), Some(1)));
        let (sender, receiver) = channel();
        let worker = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || while sender.send(shared.next()).is_ok() {})
        };
        let soon = Duration::from_millis(50);
        assert!(receiver.recv_timeout(soon).is_err());
        // One that has arrived still waits for its reader.
        arrive(0);
        assert!(receiver.recv_timeout(soon).is_err());
        stream.wait("0.bin").unwrap();
        assert_eq!(receiver.recv().unwrap(), Some(2));
        stream.wait("0.bin").unwrap();
        assert!(receiver.recv_timeout(soon).is_err());
        assert!(matches!(stream.wait("9.bin"), Err(Error::NotFound { .. })));
        drop(stream);
        assert_eq!(receiver.recv().unwrap(), None);
        drop(receiver);
        worker.join().unwrap();
    }
}
