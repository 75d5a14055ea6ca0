//! What can go wrong between here and the Hub.
//!
//! One enum for the crate. A message names the repository or file and says what to do; none ever
//! holds the token.

use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed download or upload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user forbade the network.
    #[error("HF_HUB_OFFLINE is set, so the Hub cannot be asked for `{what}`; unset it")]
    Offline {
        /// The repository.
        what: String,
    },
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is `{endpoint}`, expected an http or https address")]
    Endpoint {
        /// The value found.
        endpoint: String,
    },
    /// The token cannot be sent.
    #[error("The token of {source_name} holds characters that no token has; log in again")]
    MalformedToken {
        /// Variable or file.
        source_name: String,
    },
    /// Not a Hub id.
    #[error("`{id}` is no Hub id of the form `ORG/NAME`")]
    InvalidId {
        /// The id as given.
        id: String,
    },
    /// Not a revision or branch.
    #[error("`{revision}` is no valid revision or branch name")]
    InvalidRevision {
        /// The name as given.
        revision: String,
    },
    /// The operating system refused a file operation.
    #[error("Cannot {action} `{}`", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The Hub wants to know who asks. It says so for repositories that do not exist, too.
    #[error(
        "The Hub does not show `{what}` to everybody: check its name, or set HF_TOKEN to a token \
         that may read it"
    )]
    TokenNeeded {
        /// Repository or file.
        what: String,
    },
    /// The Hub does not know the token.
    #[error("The Hub refused the token of {source_name} for `{what}`: it may have expired")]
    TokenRefused {
        /// Repository or file.
        what: String,
        /// Variable or file that the token came from.
        source_name: String,
    },
    /// Terms that have to be accepted first, or no right to write.
    #[error("The Hub forbids {action} `{what}`: {hint}")]
    Forbidden {
        /// `reading` or `writing`.
        action: &'static str,
        /// Repository or file.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A repository, revision or file that is not there.
    #[error("The Hub has no {what}")]
    NotFound {
        /// Kind and name.
        what: String,
    },
    /// Another refusal.
    #[error("The Hub answered {status} for `{what}`{message}")]
    Status {
        /// Repository or file.
        what: String,
        /// The status line's number and text.
        status: String,
        /// The Hub's own words, after a colon, or nothing.
        message: String,
    },
    /// The network failed as often as it was allowed to.
    #[error("Cannot get `{what}`: {reason} (attempts made: {attempts}); run the command again")]
    Network {
        /// Repository or file.
        what: String,
        /// The last failure.
        reason: String,
        /// Attempts made since the last byte arrived.
        attempts: u32,
    },
    /// An answer that makes no sense.
    #[error("The Hub's answer for `{what}` is unusable: {reason}")]
    Answer {
        /// Repository or file.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An index that promises more than there is.
    #[error(
        "`{index}` names the shard `{shard}`, which does not lie beside it; the repository is \
         incomplete, so choose another revision"
    )]
    MissingShard {
        /// Repository and file.
        index: String,
        /// The shard's name as written there.
        shard: String,
    },
    /// A repository without weights that can be read.
    #[error("`{repo}` has no safetensors and no PyTorch .bin weights")]
    NoWeights {
        /// The repository.
        repo: String,
    },
    /// A model that cannot come in parts.
    #[error(
        "The weights of `{repo}` are one file, or shards without the usual index, and cannot come \
         one after the other; leave out --discard-shards"
    )]
    NotSharded {
        /// The repository.
        repo: String,
    },
    /// A dataset without that split.
    #[error("Dataset `{repo}` has no parquet files of `{config}:{split}`; it holds {available}")]
    NoSplit {
        /// The dataset.
        repo: String,
        /// Configuration asked for.
        config: String,
        /// Split asked for.
        split: String,
        /// What there is.
        available: String,
    },
    /// A file of another size than the listing says.
    #[error(
        "`{file}` has {found} bytes, but the Hub lists {expected}; run the command again later"
    )]
    WrongSize {
        /// Repository and file.
        file: String,
        /// Bytes listed.
        expected: u64,
        /// Bytes received, at least.
        found: u64,
    },
    /// A file of other contents than the listing says.
    #[error("`{file}` arrived damaged: expected {expected}, found {found}; run the command again")]
    WrongHash {
        /// Repository and file.
        file: String,
        /// The hash listed, with its kind.
        expected: String,
        /// The hash of what arrived.
        found: String,
    },
    /// The disk cannot hold the download.
    #[error(
        "`{}` has {available} bytes free, but {needed} are to be downloaded; free some space, or \
         set HF_HOME to a folder on another disk",
        path.display()
    )]
    DiskSpace {
        /// The cache.
        path: PathBuf,
        /// Bytes still to come.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// An upload without a token.
    #[error(
        "Uploading needs a token with the write role: set HF_TOKEN, or HF_TOKEN_PATH to a file \
         that holds it"
    )]
    NoToken,
    /// A folder that has nothing to upload.
    #[error(
        "`{}` is no checkpoint and holds none: expected config.json, or folders with one",
        dir.display()
    )]
    NothingToPush {
        /// The folder.
        dir: PathBuf,
    },
    /// A branch that the folder does not hold.
    #[error("`{}` has no branch `{branch}`; it holds {available}", dir.display())]
    NoBranch {
        /// The folder.
        dir: PathBuf,
        /// The branch asked for.
        branch: String,
        /// The branches there are.
        available: String,
    },
    /// A private upload into a public repository.
    #[error("`{repo}` exists and is public: make it private on the Hub, or leave out --private")]
    Public {
        /// The repository.
        repo: String,
    },
    /// A fault of this program.
    #[error(
        "A thread that was {doing} panicked, which is a fault of gptq: report the lines above, and \
         run the command again"
    )]
    Panicked {
        /// What it was doing, as a participle phrase.
        doing: String,
    },
    /// A failed step of an upload.
    #[error("Cannot {action}: {reason}; run the command again to upload what is missing")]
    Upload {
        /// What was attempted, as a verb phrase.
        action: String,
        /// The Hub's words, or the network's.
        reason: String,
    },
}

impl Error {
    /// For `map_err`: an I/O failure with its action and path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}
