//! What can go wrong with the files beside a branch's weights.

use std::borrow::Cow;
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
    #[error("There is no `{}`", .0.display())]
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
    #[error("`{}` is read as `{}`, and would be overwritten", path.display(), input.display())]
    Overwrites {
        /// The file to write.
        path: PathBuf,
        /// What it is, or lies in, among what is read.
        input: PathBuf,
    },
    /// Another process makes this branch.
    #[error("Another gptq sweep is at work on branch `{0}`")]
    BranchInUse(String),
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::NoReport(_) => {
                Some("name a folder that gptq quantize or gptq sweep made: they write it".into())
            }
            Self::Overwrites { .. } => Some("name another file".into()),
            Self::BranchInUse(_) => Some("wait for it, or split the sweep with --jobs".into()),
            _ => None,
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::BranchInUse("main".to_owned());
        assert_eq!(error.to_string(), "Another gptq sweep is at work on branch `main`");
        assert_eq!(error.hint().unwrap(), "wait for it, or split the sweep with --jobs");
        let report = Error::Report { path: "r".into(), message: "m".to_owned() };
        assert_eq!(report.hint(), None);
    }
}
