//! Why a server does not start, or ends.

use std::borrow::Cow;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the server itself; what is wrong with a request is told to its client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key's file could not be read.
    #[error("Could not read `{}`", path.display())]
    ReadKey {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The key's file holds no key that a client could send.
    #[error("`{}` holds no key: {reason}", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Everyone on the network could use the model.
    #[error("{host} is reached by other machines, and there is no key to tell clients apart")]
    Open {
        /// The address, as it was given.
        host: String,
    },
    /// The address could not be listened on.
    #[error("Could not listen on {host} port {port}")]
    Bind {
        /// The address, as it was given.
        host: String,
        /// The port, as it was given.
        port: u16,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The operating system refuses what a server needs.
    #[error("Could not serve")]
    Start(#[source] std::io::Error),
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Open { .. } => Some("give a key with --api-key-file".into()),
            Self::NoKey { .. } => Some("name a file with one line of letters and digits".into()),
            _ => None,
        }
    }
}
