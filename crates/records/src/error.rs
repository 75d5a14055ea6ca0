//! What can go wrong with the files beside a branch's weights.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a record, a lock or a digest; every message names the file or folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] gptq_checkpoint::Error),
    /// A file or folder that the system refused.
    #[error("Cannot {action} `{}`", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A checkpoint without a report, or nothing at all.
    #[error("There is no `{}`; gptq quantize and gptq sweep write it", .0.display())]
    NoReport(PathBuf),
    /// A checkpoint's report that does not say what it should.
    #[error("`{}` is not a report of this program: {message}", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place.
        message: String,
    },
    /// A file to write that is one of those to read.
    #[error("`{}` is read as `{}`, and would be overwritten; name another file", path.display(), input.display())]
    Overwrites {
        /// The file to write.
        path: PathBuf,
        /// What it is, or lies in, among what is read.
        input: PathBuf,
    },
    /// Another process makes this branch.
    #[error(
        "Another gptq sweep is at work on branch `{0}`; wait for it, or split the sweep with --jobs"
    )]
    BranchInUse(String),
}

impl Error {
    /// What the system said to `action` on a file or folder.
    pub fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// What the system said to reading a report, or the folder where one should be.
    pub fn reading_report(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::NoReport(path.to_owned()),
            _ => Self::io("read", path)(source),
        }
    }
}
