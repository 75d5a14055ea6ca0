//! The standard cache of one repository: `blobs/` by hash, `snapshots/COMMIT/` of links to them,
//! `refs/REVISION` with a commit.
//!
//! Links and references are made only when every blob is there, so that a download which was cut
//! short is never taken for a model. The layout and the lock files are those of huggingface_hub:
//! its Python client and this one may share a cache.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::api::{Kind, RemoteFile};
use crate::hash::Digest;
use crate::stop::Stop;
use crate::{Error, Progress, Result};

pub(crate) struct RepoCache {
    root: PathBuf,
    name: String,
}

impl RepoCache {
    /// Makes the folders of a repository in the cache `root`.
    pub(crate) fn create(root: &Path, kind: Kind, id: &str) -> Result<Self> {
        let name = format!("{}--{}", kind.plural(), id.replace('/', "--"));
        let cache = Self { root: root.to_owned(), name };
        make_folder(&cache.folder().join("blobs"))?;
        Ok(cache)
    }

    fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder().join("blobs").join(digest.hex())
    }

    /// A blob that is still arriving.
    pub(crate) fn incomplete(&self, digest: &Digest) -> PathBuf {
        self.folder().join("blobs").join(format!("{}.incomplete", digest.hex()))
    }

    /// Bytes of a file that need not be downloaded: all, some or none.
    pub(crate) fn present(&self, file: &RemoteFile) -> u64 {
        let bytes = |path: PathBuf| fs::metadata(path).map_or(0, |meta| meta.len());
        match bytes(self.blob(&file.digest)) {
            whole if whole == file.bytes => whole,
            _ => bytes(self.incomplete(&file.digest)).min(file.bytes),
        }
    }

    /// Whether the blob is there, going by its size. This client checks a blob before it gives it
    /// its name, but others fill the cache, too; [`Self::remove_damaged`] looks at the contents.
    pub(crate) fn is_complete(&self, file: &RemoteFile) -> bool {
        fs::metadata(self.blob(&file.digest)).is_ok_and(|meta| meta.len() == file.bytes)
    }

    /// Removes a blob that is not what its name says; whether it was removed.
    pub(crate) fn remove_damaged(&self, file: &RemoteFile) -> Result<bool> {
        let blob = self.blob(&file.digest);
        if file.digest.is_of(&blob).map_err(Error::io("read", &blob))? {
            return Ok(false);
        }
        fs::remove_file(&blob).map_err(Error::io("remove", &blob))?;
        Ok(true)
    }

    /// Keeps other processes from writing the same blob until dropped; `None` when it was stopped
    /// before they had done so.
    pub(crate) fn lock(
        &self,
        file: &RemoteFile,
        stop: &Stop,
        progress: &dyn Progress,
    ) -> Result<Option<File>> {
        let folder = self.root.join(".locks").join(&self.name);
        make_folder(&folder)?;
        let path = folder.join(format!("{}.lock", file.digest.hex()));
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        let mut told = false;
        while !stop.is_set() {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        progress.note(&format!("waiting for another download of {}", file.path));
                        told = true;
                    }
                    stop.wait(Duration::from_millis(500));
                }
                // Two downloads at once may damage a file there, which its hash tells.
                Err(TryLockError::Error(e)) if has_no_locks(&e) => return Ok(Some(lock)),
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path)(e)),
            }
        }
        Ok(None)
    }

    /// Refuses a download that the disk cannot hold.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        let path = self.folder();
        let stat = rustix::fs::statvfs(&path).map_err(|e| Error::io("inspect", &path)(e.into()))?;
        let available = stat.f_bavail.saturating_mul(stat.f_frsize);
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
        Ok(snapshot)
    }

    /// Makes a revision stand for a commit, at once: whoever reads meanwhile, or after a kill,
    /// finds the old commit or the new one.
    fn refer(&self, revision: &str, commit: &str) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let reference = self.folder().join("refs").join(revision);
        make_folder(reference.parent().unwrap_or(&reference))?;
        // Not in `refs`, where a left-over would be taken for a revision.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let new = self.folder().join(format!(".ref-{}-{number}", std::process::id()));
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(commit.as_bytes())?;
            file.sync_all()
        });
        written.map_err(Error::io("write", &new))?;
        fs::rename(&new, &reference).map_err(Error::io("write", &reference))
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

/// Whether an error is that of a file system without locks, as some over a network are.
fn has_no_locks(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || error.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error())
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
        let file = |path: &str, digit: &str| RemoteFile {
            path: path.to_owned(),
            bytes: 4,
            digest: Digest::parse(&digit.repeat(40)).unwrap(),
        };
        let files = [file("config.json", "a"), file("LLAMA 2 LICENSE/LICENSE.txt", "b")];
        for file in &files {
            assert!(!cache.is_complete(file));
            fs::write(cache.incomplete(&file.digest), "12").unwrap();
            assert_eq!(cache.present(file), 2);
            fs::write(cache.blob(&file.digest), &file.path[..4]).unwrap();
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
        let digest = Digest::parse(&"a".repeat(40)).unwrap();
        let file = |i| RemoteFile { path: format!("{i}"), bytes: 4, digest: digest.clone() };
        let files: Vec<RemoteFile> = (0..200).map(file).collect();
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
        let digest = Digest::parse(&"a".repeat(40)).unwrap();
        let file = RemoteFile { path: "a".to_owned(), bytes: 4, digest };
        let held = cache.lock(&file, &Stop::new(), &Silent).unwrap();
        assert!(held.is_some());
        let told = Impatient(Stop::new());
        assert!(cache.lock(&file, &told.0, &told).unwrap().is_none());
        drop(held);
        assert!(cache.lock(&file, &Stop::new(), &Silent).unwrap().is_some());
    }

    #[test]
    fn file_systems_without_locks_are_known() {
        use rustix::io::Errno;
        for errno in [Errno::NOLCK, Errno::NOSYS, Errno::OPNOTSUPP] {
            assert!(has_no_locks(&errno.into()), "{errno}");
        }
        assert!(!has_no_locks(&Errno::IO.into()));
    }

    #[test]
    fn a_full_disk_is_noticed_before_it_is_full() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Dataset, "org/name").unwrap();
        cache.check_space(1).unwrap();
        let message = cache.check_space(u64::MAX).unwrap_err().to_string();
        assert!(
            message.contains("datasets--org--name") && message.contains("HF_HOME"),
            "{message}"
        );
    }
}
