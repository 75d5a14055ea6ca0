//! What can go wrong with the files beside a branch's weights.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a record, a lock or a digest; every message names the file or folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] gptq_checkpoint::Error),
    /// A checkpoint's report that cannot be read.
    #[error("Cannot read `{}`: {source}; gptq quantize and gptq sweep write it", path.display())]
    ReadReport {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A checkpoint's report that cannot be written.
    #[error("Cannot write `{}`: {source}", path.display())]
    WriteReport {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A checkpoint's report that does not say what it should.
    #[error("`{}` is not a report of this program: {message}", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place.
        message: String,
    },
    /// A file or folder of a sweep that the system refused.
    #[error("Cannot {action} `{}`: {source}", path.display())]
    Folder {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process makes this branch.
    #[error(
        "Another gptq sweep is at work on branch `{0}`; wait for it, or split the sweep with --jobs"
    )]
    BranchInUse(String),
}
