//! The standard cache of one repository: `blobs/` by hash, `snapshots/COMMIT/` of links to them,
//! `refs/REVISION` with a commit, `trees/COMMIT.json` with all that the Hub lists.
//!
//! Links and references are made only when every blob is there, so that a download which was cut
//! short is never taken for a model. The layout and the lock files are those of huggingface_hub:
//! its Python client and this one may share a cache.
//!
//! Files that one run brings for itself alone lie apart, in `discarding-COMMIT-NUMBER/`, which that
//! run holds locked: what is deleted there is nobody else's.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gptq_checkpoint::{bytes_free, has_no_locks, is_hub_name, read_small_text};

use crate::api::Kind;
use crate::listing::RemoteFile;
use crate::stop::Stop;
use crate::{Error, Progress, Result};

/// Tells backup programs that what lies here can be downloaded again.
const TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag.
# For information about cache directory tags, see:
#\thttps://bford.info/cachedir/
";

/// The beginning of the names of folders in which runs keep what they delete again.
const DISCARDING: &str = "discarding-";

pub(crate) struct RepoCache {
    root: PathBuf,
    name: String,
    /// The folder of files that are this run's alone, with the lock that makes it so.
    own: Option<(PathBuf, Option<File>)>,
}

/// A lock, or what stands for it where none is needed or none can be had.
pub(crate) struct Held {
    _lock: Option<File>,
}

impl RepoCache {
    /// Makes the folders of a repository in the cache `root`.
    pub(crate) fn create(root: &Path, kind: Kind, id: &str) -> Result<Self> {
        let cache = Self::at(root, kind, id);
        make_folder(&cache.folder().join("blobs"))?;
        // A help to others, so its absence is no failure.
        if let Ok(mut tag) = File::create_new(root.join("CACHEDIR.TAG")) {
            let _ = tag.write_all(TAG.as_bytes());
        }
        Ok(cache)
    }

    /// A repository in the cache `root`, which may be absent.
    pub(crate) fn at(root: &Path, kind: Kind, id: &str) -> Self {
        let name = format!("{}--{}", kind.plural(), id.replace('/', "--"));
        Self { root: root.to_owned(), name, own: None }
    }

    /// The same repository, whose files go to a folder of their own. One that an earlier run of this
    /// commit left is taken up again; those of other commits are removed.
    pub(crate) fn private(&self, commit: &str) -> Result<Self> {
        self.remove_left_over(commit);
        let mut number = 0;
        let (place, lock) = loop {
            let place = format!("{DISCARDING}{commit}-{number}");
            match self.try_lock(&place)? {
                Some(lock) => break (place, lock),
                // Another run holds that one.
                None => number += 1,
            }
        };
        let folder = self.folder().join(place);
        make_folder(&folder)?;
        Ok(Self { root: self.root.clone(), name: self.name.clone(), own: Some((folder, lock)) })
    }

    /// The lock of a private place; `None` where another run holds it. Where a file system has no
    /// locks there is nothing to hold.
    fn try_lock(&self, place: &str) -> Result<Option<Option<File>>> {
        let (lock, path) = self.lock_file(place)?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(Some(lock))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) if has_no_locks(&e) => Ok(Some(None)),
            Err(TryLockError::Error(e)) => Err(Error::io("lock", &path)(e)),
        }
    }

    /// Removes what runs of other commits left that were killed. It is a tidying: it may fail.
    fn remove_left_over(&self, commit: &str) {
        for entry in fs::read_dir(self.folder()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let of_other =
                name.strip_prefix(DISCARDING).is_some_and(|rest| !rest.starts_with(commit));
            if of_other && let Ok(Some(Some(_lock))) = self.try_lock(name) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Removes the private folder, unless files of `shards`, or parts of them, are left in it.
    pub(crate) fn remove_private(&self, shards: &[RemoteFile]) {
        let Some((folder, _)) = &self.own else { return };
        let is_left = |s: &RemoteFile| self.blob(s).exists() || self.incomplete(s).exists();
        if !shards.iter().any(is_left) {
            let _ = fs::remove_dir_all(folder);
        }
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        match &self.own {
            Some((folder, _)) => folder.clone(),
            None => self.folder().join("snapshots").join(commit),
        }
    }

    pub(crate) fn blob(&self, file: &RemoteFile) -> PathBuf {
        match &self.own {
            Some((folder, _)) => folder.join(&file.path),
            None => self.folder().join("blobs").join(file.digest.hex()),
        }
    }

    /// A blob that is still arriving.
    pub(crate) fn incomplete(&self, file: &RemoteFile) -> PathBuf {
        let mut path = self.blob(file).into_os_string();
        path.push(".incomplete");
        path.into()
    }

    /// Bytes of a file that need not be downloaded: all, some or none.
    pub(crate) fn present(&self, file: &RemoteFile) -> u64 {
        let bytes = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
        match bytes(self.blob(file)) {
            whole if whole == file.bytes => whole,
            _ => bytes(self.incomplete(file)).min(file.bytes),
        }
    }

    /// Whether the blob is there, going by its size. This client checks a blob before it gives it
    /// its name, but others fill the cache, too; [`Self::remove_damaged`] looks at the contents.
    pub(crate) fn is_complete(&self, file: &RemoteFile) -> bool {
        fs::metadata(self.blob(file)).is_ok_and(|meta| meta.len() == file.bytes)
    }

    /// Removes a blob that is not what its name says; whether it was removed. Of one that lies in a
    /// store that several repositories share, the link goes.
    pub(crate) fn remove_damaged(&self, file: &RemoteFile) -> Result<bool> {
        let blob = self.blob(file);
        if file.digest.is_of(&blob).map_err(Error::io("read", &blob))? {
            return Ok(false);
        }
        fs::remove_file(&blob).map_err(Error::io("remove", &blob))?;
        Ok(true)
    }

    /// Gives this private folder a file of the shared cache: a name of its own, which stays when the
    /// other is removed, and whose removal leaves the other. Whether it was there to be given.
    pub(crate) fn adopt(&self, shared: &Self, file: &RemoteFile) -> Result<bool> {
        let own = self.blob(file);
        let Ok(blob) = fs::canonicalize(shared.blob(file)) else { return Ok(false) };
        make_folder(own.parent().unwrap_or(&own))?;
        let make = || {
            fs::hard_link(&blob, &own).or_else(|e| match e.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound => Err(e),
                // On another disk, or where there are no such names.
                _ => std::os::unix::fs::symlink(&blob, &own),
            })
        };
        let made = make().or_else(|e| match e.kind() {
            io::ErrorKind::AlreadyExists if self.is_complete(file) => Ok(()),
            io::ErrorKind::AlreadyExists => fs::remove_file(&own).and_then(|()| make()),
            _ => Err(e),
        });
        match made {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            made => made.map(|()| self.is_complete(file)).map_err(Error::io("create", &own)),
        }
    }

    /// Keeps other processes from writing the same blob until dropped; `None` when it was stopped
    /// before they had done so.
    pub(crate) fn lock(
        &self,
        file: &RemoteFile,
        stop: &Stop,
        progress: &dyn Progress,
    ) -> Result<Option<Held>> {
        if self.own.is_some() {
            return Ok(Some(Held { _lock: None }));
        }
        let (lock, path) = self.lock_file(file.digest.hex())?;
        let mut announced = false;
        while !stop.is_set() {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(Held { _lock: Some(lock) })),
                Err(TryLockError::WouldBlock) => {
                    if !announced {
                        progress.note(&format!("waiting for another download of {}", file.path));
                        announced = true;
                    }
                    stop.wait(Duration::from_millis(500));
                }
                // Two downloads at once may damage a file there, which its hash shows.
                Err(TryLockError::Error(e)) if has_no_locks(&e) => {
                    return Ok(Some(Held { _lock: None }));
                }
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path)(e)),
            }
        }
        Ok(None)
    }

    /// Lock files stay, empty: removing one that somebody waits for would make two of it.
    fn lock_file(&self, name: &str) -> Result<(File, PathBuf)> {
        let folder = self.root.join(".locks").join(&self.name);
        make_folder(&folder)?;
        let path = folder.join(format!("{name}.lock"));
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        Ok((lock, path))
    }

    /// Refuses a download that the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        let path = self.folder();
        let available = bytes_free(&path).map_err(Error::io("inspect", &path))?;
        if available >= needed {
            return Ok(());
        }
        Err(Error::DiskSpace { path, needed, available })
    }

    /// Publishes files whose blobs are all there as `revision`, which is `commit` now.
    pub(crate) fn publish(
        &self,
        revision: &str,
        commit: &str,
        files: &[RemoteFile],
    ) -> Result<PathBuf> {
        let snapshot = self.snapshot(commit);
        for file in files {
            let link = snapshot.join(&file.path);
            make_folder(link.parent().unwrap_or(&snapshot))?;
            let up = "../".repeat(file.path.split('/').count() + 1);
            let target = format!("{up}blobs/{}", file.digest.hex());
            make_link(Path::new(&target), &link)?;
        }
        if revision != commit {
            self.refer(revision, commit)?;
        }
        // Another program may have taken one away meanwhile.
        for file in files {
            let path = snapshot.join(&file.path);
            if !fs::metadata(&path).is_ok_and(|meta| meta.len() == file.bytes) {
                return Err(Error::Gone { path });
            }
        }
        Ok(snapshot)
    }

    /// Makes a revision stand for a commit, at once: a reader meanwhile, or after a kill,
    /// finds the old commit or the new one.
    fn refer(&self, revision: &str, commit: &str) -> Result<()> {
        let reference = self.folder().join("refs").join(revision);
        // Not in `refs`, where a left-over would be taken for a revision.
        self.replace(&reference, commit.as_bytes())
    }

    /// The commit that a revision stood for when it was fetched last; a commit stands for itself.
    pub(crate) fn referred(&self, revision: &str) -> Option<String> {
        let text = match read_small_text(&self.folder().join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        is_hub_name(&text).then_some(text)
    }

    /// Writes a small file at once: a reader finds the old one or the new one.
    pub(crate) fn replace(&self, path: &Path, contents: &[u8]) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        make_folder(path.parent().unwrap_or(path))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let new = self.folder().join(format!(".new-{}-{number}", std::process::id()));
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(contents)?;
            file.sync_all()
        });
        written.map_err(Error::io("write", &new))?;
        fs::rename(&new, path).map_err(Error::io("write", path))
    }
}

/// Makes a link, or leads one elsewhere, while other processes do the same.
fn make_link(target: &Path, link: &Path) -> Result<()> {
    let make = || match std::os::unix::fs::symlink(target, link) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            Ok(fs::read_link(link).is_ok_and(|there| there == target))
        }
        made => made.map(|()| true).map_err(Error::io("create", link)),
    };
    if make()? {
        return Ok(());
    }
    match fs::remove_file(link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("replace", link)(e)),
        _ => {}
    }
    let taken = || Error::io("replace", link)(io::ErrorKind::AlreadyExists.into());
    if make()? { Ok(()) } else { Err(taken()) }
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Error::io("create", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::tests::{Impatient, Silent};

    #[test]
    fn links_lead_to_blobs_however_deep_they_lie() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let file = |path: &str, digit: &str| RemoteFile::test(path, 4, &digit.repeat(40));
        let files = [file("config.json", "a"), file("LLAMA 2 LICENSE/LICENSE.txt", "b")];
        for file in &files {
            assert!(!cache.is_complete(file));
            fs::write(cache.incomplete(file), "12").unwrap();
            assert_eq!(cache.present(file), 2);
            fs::write(cache.blob(file), &file.path[..4]).unwrap();
            assert!(cache.is_complete(file));
        }
        // A second time, and over what an older version left.
        for commit in ["c0ffee", "c0ffee", "decaf"] {
            let snapshot = cache.publish("refs/pr/1", commit, &files).unwrap();
            assert_eq!(snapshot, root.path().join("models--org--name/snapshots").join(commit));
            for file in &files {
                let text = fs::read_to_string(snapshot.join(&file.path)).unwrap();
                assert_eq!(text, file.path[..4]);
            }
            let reference = root.path().join("models--org--name/refs/refs/pr/1");
            assert_eq!(fs::read_to_string(reference).unwrap(), commit);
        }
        let changed = [file("config.json", "b")];
        let snapshot = cache.publish("decaf", "decaf", &changed).unwrap();
        assert_eq!(fs::read_to_string(snapshot.join("config.json")).unwrap(), "LLAM");
        assert!(!root.path().join("models--org--name/refs/decaf").exists());
    }

    #[test]
    fn several_may_publish_the_same_at_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let file = |i: u32| RemoteFile::test(&i.to_string(), 4, &"a".repeat(40));
        let files: Vec<RemoteFile> = (0..200).map(file).collect();
        fs::write(cache.blob(&files[0]), "1234").unwrap();
        for commit in 0..8 {
            let publish = || cache.publish("main", &format!("c{commit}"), &files).unwrap();
            std::thread::scope(|scope| {
                let others: Vec<_> = (0..3).map(|_| scope.spawn(publish)).collect();
                others.into_iter().for_each(|other| drop(other.join().unwrap()));
            });
        }
        let names = |folder: PathBuf| fs::read_dir(folder).unwrap().count();
        assert_eq!(names(cache.snapshot("c7")), files.len());
        assert_eq!(names(cache.folder()), 3, "nothing beside blobs, refs and snapshots");
    }

    #[test]
    fn a_reference_is_replaced_not_rewritten() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        cache.publish("main", "c0ffee", &[]).unwrap();
        let (reference, old) = (cache.folder().join("refs/main"), root.path().join("old"));
        fs::hard_link(&reference, &old).unwrap();
        cache.publish("main", "decaf", &[]).unwrap();
        assert_eq!(fs::read_to_string(reference).unwrap(), "decaf");
        assert_eq!(fs::read_to_string(old).unwrap(), "c0ffee");
    }

    #[test]
    fn a_lock_is_waited_for_until_all_is_stopped() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let file = RemoteFile::test("a", 4, &"a".repeat(40));
        let held = cache.lock(&file, &Stop::new(), &Silent).unwrap();
        assert!(held.is_some());
        let announced = Impatient(Stop::new());
        assert!(cache.lock(&file, &announced.0, &announced).unwrap().is_none());
        drop(held);
        assert!(cache.lock(&file, &Stop::new(), &Silent).unwrap().is_some());
    }

    #[test]
    fn success_is_not_reported_of_files_that_went() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let file = RemoteFile::test("a", 4, &"a".repeat(40));
        let gone = cache.publish("main", "c0ffee", std::slice::from_ref(&file)).unwrap_err();
        assert!(matches!(gone, Error::Gone { .. }), "{gone}");
        fs::write(cache.blob(&file), "1234").unwrap();
        cache.publish("main", "c0ffee", &[file]).unwrap();
    }

    #[test]
    fn private_files_are_one_runs_alone() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let file = RemoteFile::test("model-1.safetensors", 4, &"a".repeat(64));
        let (one, two) = (cache.private("c0ffee").unwrap(), cache.private("c0ffee").unwrap());
        assert_ne!(one.snapshot("c0ffee"), two.snapshot("c0ffee"));
        assert!(!one.adopt(&cache, &file).unwrap());
        // A blob in a store that repositories share is a link.
        let store = root.path().join("store");
        fs::write(&store, "1234").unwrap();
        std::os::unix::fs::symlink(&store, cache.blob(&file)).unwrap();
        for private in [&one, &two] {
            assert!(private.adopt(&cache, &file).unwrap());
            assert!(private.adopt(&cache, &file).unwrap(), "a second time");
        }
        fs::remove_file(one.blob(&file)).unwrap();
        one.remove_private(std::slice::from_ref(&file));
        assert!(!one.snapshot("").exists());
        fs::remove_file(cache.blob(&file)).unwrap();
        fs::remove_file(store).unwrap();
        assert_eq!(fs::read_to_string(two.blob(&file)).unwrap(), "1234");
        two.remove_private(std::slice::from_ref(&file));
        assert!(two.snapshot("").exists(), "it was not read");

        // The next run resumes what a killed one left, but nothing of another commit's.
        let left = two.snapshot("").to_owned();
        drop(two);
        let next = [cache.private("c0ffee").unwrap(), cache.private("c0ffee").unwrap()];
        assert!(next.iter().any(|next| next.snapshot("") == left && next.is_complete(&file)));
        let other = cache.private("decaf").unwrap();
        assert!(left.exists(), "a run holds it");
        drop((next, other));
        cache.private("decaf").unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn a_full_disk_is_noticed_before_it_is_full() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Dataset, "org/name").unwrap();
        cache.check_space(1).unwrap();
        let error = cache.check_space(u64::MAX).unwrap_err();
        assert!(error.to_string().contains("datasets--org--name"), "{error}");
        assert!(error.hint().unwrap().contains("HF_HOME"), "{error}");
    }
}
