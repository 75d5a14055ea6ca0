//! Several runs of one sweep at once: whose turn a branch is, and who writes what all of them share.
//!
//! Every branch has a lock file in `.gptq-sweep`, locked from the first look at what is there until
//! the run ends. The system gives up a dead process's locks, and a network file system's server
//! those of a dead machine, so a lock needs no age and no process number to be judged by. Where a
//! file system has no locks, `--jobs` keeps runs apart.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use gptq_checkpoint::has_no_locks;

use crate::atomic_file::{replace, replace_through};
use crate::error::{Error, Result};

/// Folder of a sweep's own files beside the branches.
pub const STATE_DIR: &str = ".gptq-sweep";

/// A lock that is held until it is dropped, or its process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// False on a file system that has no locks.
    held: bool,
}

impl Lock {
    /// Locks a branch of the sweep in `out` for this process.
    ///
    /// # Errors
    /// [`Error::BranchInUse`] when another process holds it.
    pub fn branch(out: &Path, name: &str) -> Result<Self> {
        let (file, path) = open(out, name)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file, held: true }),
            Err(TryLockError::WouldBlock) => Err(Error::BranchInUse(name.to_owned())),
            Err(TryLockError::Error(e)) => Self::without(file, path, e),
        }
    }

    /// Waits for the lock of a name that all processes of a sweep use.
    fn wait(out: &Path, name: &str) -> Result<Self> {
        let (file, path) = open(out, name)?;
        match file.lock() {
            Ok(()) => Ok(Self { _file: file, held: true }),
            Err(e) => Self::without(file, path, e),
        }
    }

    /// Some network file systems have no locks.
    fn without(file: File, path: PathBuf, error: io::Error) -> Result<Self> {
        if has_no_locks(&error) {
            return Ok(Self { _file: file, held: false });
        }
        Err(Error::Io { action: "lock", path, source: error })
    }
}

/// Files that all processes of a sweep write, one process at a time.
#[derive(Debug)]
pub struct SharedFile {
    _lock: Lock,
    working: PathBuf,
}

impl SharedFile {
    /// Waits until no other process of the sweep in `out` writes what goes by this name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn lock(out: &Path, name: &str) -> Result<Self> {
        let lock = Lock::wait(out, name)?;
        // One name, beside the branches and not in them: what a killed process leaves is no part of
        // a branch, and the next one writes over it. Where there are no locks each has its own.
        let working = match lock.held {
            true => format!("{name}.new"),
            false => format!("{name}.{}.new", std::process::id()),
        };
        Ok(Self { _lock: lock, working: out.join(STATE_DIR).join(working) })
    }

    /// Writes a whole file in the sweep's folder, or replaces it, by one rename.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        match replace_through(&self.working, path, bytes) {
            // A finished branch may have been moved to another disk, with a link in its place.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::CrossesDevices => {
                replace(path, bytes)
            }
            written => written,
        }
    }
}

fn open(out: &Path, name: &str) -> Result<(File, PathBuf)> {
    let dir = out.join(STATE_DIR);
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    let path = dir.join(format!("{name}.lock"));
    match OpenOptions::new().create(true).truncate(false).write(true).open(&path) {
        Ok(file) => Ok((file, path)),
        Err(source) => Err(Error::Io { action: "create", path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_sweep_goes_without_locks_where_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        // As Linux numbers them: no locks left or no lock server, and an input or output error.
        for (errno, goes_on) in [(37, true), (5, false)] {
            let (file, path) = open(dir.path(), "a").unwrap();
            let lock = Lock::without(file, path, io::Error::from_raw_os_error(errno));
            assert_eq!(lock.is_ok_and(|lock| !lock.held), goes_on, "{errno}");
        }
    }
}
