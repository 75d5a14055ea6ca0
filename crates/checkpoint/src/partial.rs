//! The working folder of a checkpoint in the making.
//!
//! A checkpoint grows in `NAME.partial` beside `NAME` and appears under its name by one rename, so
//! nothing half-made is ever found there. The folder holds a marker file: without it, a folder that
//! happens to have the name is not ours, and is left alone. The run at work holds a lock on the
//! marker; a folder whose marker is free was left by a killed run, and the next one may delete or
//! resume it. The system releases a dead process's locks, so there is no such thing as a stale one.
//!
//! A run may be killed between any two of the steps here, and the next one recognizes what is left.
//! That is why the marker is the first thing made and the last one removed.

mod output;

pub use output::{check_folder, check_output};

use std::env;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::names::PARTIAL_END;
use crate::{Error, OutputError, Result};

const MARKER: &str = ".gptq-partial";

/// A working folder. Dropped before [`Partial::publish`], it is removed, unless it is
/// [kept](Partial::keep_on_drop).
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    out: PathBuf,
    /// Holds the lock for as long as the folder is ours.
    marker: File,
    /// What happens when it is dropped.
    removed_on_drop: bool,
}

impl Partial {
    /// Makes an empty working folder for `out`, over a left-over of an interrupted run. What would
    /// keep it from getting its name is found now, not when the work is done.
    ///
    /// # Errors
    /// [`OutputError::Exists`], [`OutputError::ForeignPartial`], [`OutputError::PartialInUse`] and
    /// [`Error::Io`].
    pub fn create(out: &Path) -> Result<Self> {
        let out = output::resolved(out)?;
        let path = partial_path(&out)?;
        remove_left_over(&path)?;
        output::prove_replaceable(&out, env::current_dir().ok().as_deref())?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        let marker_path = path.join(MARKER);
        let marker = File::create_new(&marker_path).map_err(Error::io("create", &marker_path))?;
        lock(&marker, &path)?;
        Ok(Self { path, out, marker, removed_on_drop: true })
    }

    /// Goes on with the working folder that an earlier run left for `out`; `None` where there is
    /// none of ours. What it holds is the caller's to judge.
    ///
    /// # Errors
    /// [`OutputError::PartialInUse`] and [`Error::Io`].
    pub fn resume(out: &Path) -> Result<Option<Self>> {
        let path = partial_path(out)?;
        let marker_path = path.join(MARKER);
        match OpenOptions::new().write(true).open(&marker_path) {
            Ok(marker) => {
                lock(&marker, &path)?;
                Ok(Some(Self { path, out: out.to_owned(), marker, removed_on_drop: false }))
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                Ok(None)
            }
            Err(e) => Err(Error::io("open", &marker_path)(e)),
        }
    }

    /// Makes a published folder a working folder again, to be changed or replaced. It is kept when
    /// dropped.
    ///
    /// # Errors
    /// [`OutputError::ForeignPartial`], [`OutputError::PartialInUse`] and [`Error::Io`].
    pub fn reopen(out: &Path) -> Result<Self> {
        let path = partial_path(out)?;
        remove_left_over(&path)?;
        let marker_path = out.join(MARKER);
        let marker = File::create(&marker_path).map_err(Error::io("create", &marker_path))?;
        lock(&marker, out)?;
        fs::rename(out, &path).map_err(Error::io("rename", out))?;
        Ok(Self { path, out: out.to_owned(), marker, removed_on_drop: false })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name that it will get.
    pub(crate) fn out(&self) -> &Path {
        &self.out
    }

    /// Leaves the folder to the next run, should this one fail.
    pub fn keep_on_drop(&mut self) {
        self.removed_on_drop = false;
    }

    /// Writes a whole small file, or replaces it, by one rename: a reader finds the old contents or
    /// the new ones.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (new, path) = (format!(".{name}.new"), self.path.join(name));
        self.write(Path::new(&new), bytes)?;
        fs::rename(self.path.join(&new), &path).map_err(Error::io("write", &path))?;
        sync_dir(&self.path)
    }

    /// Writes a whole small file and makes sure that it is on disk.
    pub(crate) fn write(&self, name: &Path, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, bytes).map_err(Error::io("write", &path))?;
        File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io("write", &path))
    }

    /// Gives the folder its final name. Where that fails the folder stays as it is, and the error
    /// says where.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn publish(mut self) -> Result<PathBuf> {
        // It is finished: whatever fails from here on, hours of work are not thrown away.
        self.keep_on_drop();
        // Renaming onto an empty folder replaces it; one that was filled meanwhile is an error.
        let named = sync(&self.path).and_then(|()| fs::rename(&self.path, &self.out));
        named.map_err(|e| self.unnamed(e))?;
        // The marker goes last: a crash before this line leaves either a left-over that is known
        // as ours, or a complete checkpoint with a hidden empty file, which `finish_rename` removes.
        finish_rename(&self.out)?;
        sync_dir(&self.out)?;
        sync_dir(parent_of(&self.out))?;
        Ok(self.out.clone())
    }

    fn unnamed(&self, source: io::Error) -> Error {
        OutputError::Unnamed { out: self.out.clone(), at: self.path.clone(), source }.into()
    }

    /// Removes the folder now, for a writer that failed but lives on.
    pub(crate) fn discard(&mut self) {
        if !self.removed_on_drop {
            return;
        }
        // Nothing better can be done about a folder that cannot be removed: it keeps its name and
        // its marker, and the next run removes it.
        drop(remove_marked(&self.path));
        drop(self.marker.unlock());
        self.removed_on_drop = false;
    }
}

/// Removes what a run that was killed right after it had published left in a finished folder.
///
/// # Errors
/// [`Error::Io`].
pub fn finish_rename(out: &Path) -> Result<()> {
    let marker = out.join(MARKER);
    match fs::remove_file(&marker) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &marker)(e)),
        _ => Ok(()),
    }
}

/// Removes a working folder, the marker after everything else: a run that is killed meanwhile
/// leaves a folder that is known as ours.
fn remove_marked(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_name() != MARKER {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_file(path.join(MARKER))?;
    fs::remove_dir(path)
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.discard();
    }
}

/// `NAME.partial` beside `NAME`.
fn partial_path(out: &Path) -> Result<PathBuf> {
    let Some(name) = out.file_name() else {
        // `/` and `..` cannot be renamed to.
        return Err(OutputError::Exists { path: out.to_owned() }.into());
    };
    let mut name = name.to_os_string();
    name.push(PARTIAL_END);
    Ok(out.with_file_name(name))
}

/// The folder that holds `path`; a bare name lies in the current one.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn remove_left_over(path: &Path) -> Result<()> {
    // Not `exists`: a link must never be followed into somebody's folder.
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("inspect", path)(e)),
        Ok(meta) if !meta.is_dir() => {
            return Err(OutputError::ForeignPartial { path: path.to_owned() }.into());
        }
        Ok(_) => {}
    }
    let marker_path = path.join(MARKER);
    match OpenOptions::new().write(true).open(&marker_path) {
        Ok(marker) => {
            lock(&marker, path)?;
            remove_marked(path).map_err(Error::io("remove", path))
        }
        // A run that died before its marker leaves an empty folder, which only an empty one matches.
        Err(e) if e.kind() == io::ErrorKind::NotFound => fs::remove_dir(path)
            .map_err(|_| OutputError::ForeignPartial { path: path.to_owned() }.into()),
        Err(e) => Err(Error::io("open", &marker_path)(e)),
    }
}

fn lock(marker: &File, path: &Path) -> Result<()> {
    match marker.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            Err(OutputError::PartialInUse { path: path.to_owned() }.into())
        }
        // The marker alone has to do there.
        Err(TryLockError::Error(e)) if has_no_locks(&e) => Ok(()),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", path)(e)),
    }
}

/// Whether an error is that of a file system without locks, as some over a network are.
#[must_use]
pub fn has_no_locks(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || error.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error())
}

fn sync_dir(path: &Path) -> Result<()> {
    sync(path).map_err(Error::io("sync", path))
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all())
}

/// Bytes that the file system of `dir` can still take.
///
/// # Errors
/// [`Error::Io`].
pub fn free_space(dir: &Path) -> Result<u64> {
    bytes_free(dir).map_err(Error::io("inspect", dir))
}

/// As [`free_space`], with the system's own error.
///
/// # Errors
/// Those of `statvfs`.
pub fn bytes_free(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Checks that the file system of `dir` can take `needed` bytes.
pub(crate) fn check_space(dir: &Path, needed: u64) -> Result<()> {
    require_space(dir, free_space(dir)?, needed)
}

fn require_space(dir: &Path, available: u64, needed: u64) -> Result<()> {
    if available >= needed {
        return Ok(());
    }
    Err(OutputError::DiskSpace { path: dir.to_owned(), needed, available }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_folder_is_removed_and_a_published_one_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/model");
        let partial = Partial::create(&out).unwrap();
        assert!(partial.path().ends_with("deep/model.partial"));
        drop(partial);
        assert!(!dir.path().join("deep/model.partial").exists());

        fs::create_dir(&out).unwrap();
        let partial = Partial::create(&out).unwrap();
        partial.write(Path::new("a"), b"x").unwrap();
        assert_eq!(partial.publish().unwrap(), out);
        let names: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn what_cannot_be_named_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let partial = Partial::create(&out).unwrap();
        partial.write(Path::new("a"), b"x").unwrap();
        fs::create_dir_all(out.join("of somebody else")).unwrap();
        let message = partial.publish().unwrap_err().to_string();
        let kept = dir.path().join("m.partial");
        assert!(message.contains(&format!("is in `{}`", kept.display())), "{message}");
        assert_eq!(fs::read(kept.join("a")).unwrap(), b"x");
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
    fn only_our_left_overs_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (out, partial) = (dir.path().join("m"), dir.path().join("m.partial"));
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("precious"), "x").unwrap();
        assert!(matches!(
            Partial::create(&out),
            Err(Error::Output(OutputError::ForeignPartial { .. }))
        ));
        assert!(partial.join("precious").exists());
        fs::write(partial.join(MARKER), "").unwrap();
        drop(Partial::create(&out).unwrap());
        assert!(!partial.exists());
        let target = dir.path().join("elsewhere");
        fs::create_dir(&target).unwrap();
        fs::write(target.join(MARKER), "").unwrap();
        std::os::unix::fs::symlink(&target, &partial).unwrap();
        assert!(matches!(
            Partial::create(&out),
            Err(Error::Output(OutputError::ForeignPartial { .. }))
        ));
        assert!(target.exists());
    }

    #[test]
    fn a_kept_folder_is_resumed_and_a_published_one_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let (out, partial) = (dir.path().join("m"), dir.path().join("m.partial"));
        assert!(Partial::resume(&out).unwrap().is_none());
        let mut kept = Partial::create(&out).unwrap();
        kept.replace("a", b"old").unwrap();
        kept.replace("a", b"new").unwrap();
        kept.keep_on_drop();
        drop(kept);
        let resumed = Partial::resume(&out).unwrap().unwrap();
        assert!(matches!(
            Partial::resume(&out),
            Err(Error::Output(OutputError::PartialInUse { .. }))
        ));
        resumed.publish().unwrap();
        assert!(!partial.exists());

        // Killed between the rename and the removal of the marker.
        fs::write(out.join(MARKER), "").unwrap();
        finish_rename(&out).unwrap();
        finish_rename(&out).unwrap();
        let reopened = Partial::reopen(&out).unwrap();
        assert!(!out.exists());
        assert_eq!(fs::read(reopened.path().join("a")).unwrap(), b"new");
        drop(reopened);
        assert!(partial.exists());
        drop(Partial::create(&out).unwrap());
        assert!(!partial.exists() && !out.exists());
    }

    #[test]
    fn a_running_writer_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let running = Partial::create(&out).unwrap();
        assert!(matches!(
            Partial::create(&out),
            Err(Error::Output(OutputError::PartialInUse { .. }))
        ));
        assert!(running.path().exists());
    }

    #[test]
    fn space_is_compared_and_both_numbers_named() {
        require_space(Path::new("d"), 10, 10).unwrap();
        let message = require_space(Path::new("d"), 9, 10).unwrap_err().to_string();
        assert!(message.contains("9 bytes free") && message.contains("needs 10"), "{message}");
        let dir = tempfile::tempdir().unwrap();
        check_space(dir.path(), 1).unwrap();
        assert!(matches!(
            check_space(dir.path(), u64::MAX),
            Err(Error::Output(OutputError::DiskSpace { .. }))
        ));
    }
}
