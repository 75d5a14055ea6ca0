//! What can go wrong with a folder that is written, apart from what can with its tensors.

use std::io;
use std::path::PathBuf;

/// A failure to begin an output folder, to fill it, or to give it its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutputError {
    /// Metadata given by the caller collides with a key that the writer sets.
    #[error("Metadata key `{key}` is set by the writer")]
    ReservedMetadata {
        /// The key.
        key: String,
    },
    /// The output exists and is not an empty folder.
    #[error("Output `{}` already exists and is not an empty folder", path.display())]
    Exists {
        /// The output folder asked for.
        path: PathBuf,
    },
    /// The working folder's name is taken by something this crate did not make.
    #[error("Working folder `{}` exists and was not made by this program", path.display())]
    ForeignPartial {
        /// The working folder.
        path: PathBuf,
    },
    /// The output is the folder that this process runs in.
    #[error("Cannot replace `{}`: it is the current folder", path.display())]
    CurrentFolder {
        /// The output folder asked for.
        path: PathBuf,
    },
    /// The output is a link that leads nowhere.
    #[error("Cannot create `{}`: it is a link to `{}`, which is missing", path.display(), target.display())]
    DeadLink {
        /// The output folder asked for.
        path: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },
    /// The output is where a file system is mounted.
    #[error("Cannot replace `{}`: it is a mount point, which no folder can be renamed to", path.display())]
    MountPoint {
        /// The output folder asked for.
        path: PathBuf,
    },
    /// A finished checkpoint that could not get its name.
    #[error("Cannot create `{}`; the finished checkpoint is in `{}`", out.display(), at.display())]
    Unnamed {
        /// The output folder asked for.
        out: PathBuf,
        /// Where the checkpoint is.
        at: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another run is writing the same output.
    #[error("Another run is writing `{}`", path.display())]
    PartialInUse {
        /// The working folder.
        path: PathBuf,
    },
    /// A file of the source that would be carried over has a name that cannot be recorded.
    #[error("`{}` has a name that is no UTF-8", path.display())]
    FileName {
        /// The file.
        path: PathBuf,
    },
    /// The disk cannot hold the checkpoint.
    #[error(
        "`{}` has {available} bytes free, but the checkpoint needs {needed}",
        path.display()
    )]
    DiskSpace {
        /// The folder whose file system was asked.
        path: PathBuf,
        /// Bytes that the plan needs.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// A tensor was handed to the writer that the plan does not have.
    #[error("Tensor `{tensor}` is not part of the planned checkpoint")]
    UnplannedTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor was handed to the writer a second time.
    #[error("Tensor `{tensor}` was already written")]
    WrittenTwice {
        /// The tensor.
        tensor: String,
    },
    /// The writer was asked to publish a checkpoint that is not complete.
    #[error("Cannot finish the checkpoint: {count} tensors were not written ({examples})")]
    MissingTensors {
        /// How many are missing.
        count: usize,
        /// The first of them.
        examples: String,
    },
    /// The writer was used after it had failed and cleaned up.
    #[error("Writing `{}` failed earlier and its partial files were removed", path.display())]
    WriterFailed {
        /// The output folder.
        path: PathBuf,
    },
}

impl OutputError {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::ReservedMetadata { .. } => "choose another name",
            Self::Exists { .. } => "remove it or choose another name",
            Self::ForeignPartial { .. } => "move it away or choose another output",
            Self::CurrentFolder { .. } => {
                "run the command from another folder, or name a folder inside this one"
            }
            Self::DeadLink { .. } => "make that folder, or remove the link",
            Self::MountPoint { .. } => "name a folder inside it",
            Self::Unnamed { .. } => "rename that folder, as the next run would replace it",
            Self::PartialInUse { .. } => "wait for it or choose another output",
            Self::FileName { .. } => "rename it, or move it out of the folder",
            Self::DiskSpace { .. } => "free some space or choose another disk",
            _ => return None,
        })
    }
}
