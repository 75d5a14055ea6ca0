//! What can go wrong between here and the Hub.
//!
//! One enum for the crate. A message names the repository or file, and [`Error::hint`] says what to do;
//! none ever holds the token.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed download or upload.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The user forbade the network.
    #[error("{variable} is set, so the Hub cannot be asked for `{what}`")]
    Offline {
        /// The repository.
        what: String,
        /// The variable.
        variable: &'static str,
    },
    /// The network is forbidden, and the cache does not hold all that was asked for.
    #[error("{variable} is set, and `{what}` is not all there: {reason}")]
    NotInCache {
        /// The repository.
        what: String,
        /// The variable.
        variable: &'static str,
        /// What is missing.
        reason: String,
    },
    /// `HF_HUB_DOWNLOAD_TIMEOUT` is no time.
    #[error("HF_HUB_DOWNLOAD_TIMEOUT is `{value}`, expected a whole number of seconds")]
    Timeout {
        /// The value found.
        value: String,
    },
    /// `HF_ENDPOINT` is no address.
    #[error("HF_ENDPOINT is `{endpoint}`, expected an http or https address")]
    Endpoint {
        /// The value found.
        endpoint: String,
    },
    /// The token cannot be sent.
    #[error("The token of {source_name} holds characters that no token has")]
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
    #[error("`{revision}` is no revision or branch name that git allows")]
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
    #[error("The Hub does not show `{what}` to everybody{message}")]
    TokenNeeded {
        /// Repository or file.
        what: String,
        /// The Hub's own words, after a colon, or nothing.
        message: String,
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
    #[error("The Hub forbids {action} `{what}`{message}")]
    Forbidden {
        /// `reading` or `writing`.
        action: &'static str,
        /// Repository or file.
        what: String,
        /// What to do, where something helps.
        advice: Option<String>,
        /// The Hub's own words, after a colon, or nothing.
        message: String,
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
    #[error("Cannot get `{what}`: {reason} (attempts made: {attempts})")]
    Network {
        /// Repository or file.
        what: String,
        /// The last failure.
        reason: String,
        /// Attempts made since the last byte arrived.
        attempts: u32,
    },
    /// A body packed in a way that was not asked for.
    #[error(
        "`{what}` came packed as `{coding}`, which was not asked for: a proxy on the way does that"
    )]
    Coding {
        /// Repository or file.
        what: String,
        /// The way of packing.
        coding: String,
    },
    /// An answer that sends what is for the Hub to another server.
    #[error(
        "The Hub's answer for `{what}` is unusable: it is sent on to {host}, which is another server"
    )]
    OtherServer {
        /// Repository or file.
        what: String,
        /// Where it would go.
        host: String,
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
         incomplete"
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
         one after the other"
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
        "`{file}` came with {found} bytes twice, but the Hub lists {expected}: something between here \
         and the Hub changes it, such as a proxy, or the Hub is wrong"
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
    #[error("`{file}` arrived damaged: expected {expected}, found {found}")]
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
        "`{}` has {available} bytes free, but {needed} are to be downloaded",
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
    #[error("Uploading needs a token with the write role")]
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
    #[error("`{repo}` exists and is public")]
    Public {
        /// The repository.
        repo: String,
    },
    /// A fault of this program.
    #[error("A thread that was {doing} panicked, which is a fault of gptq")]
    Panicked {
        /// What it was doing, as a participle phrase.
        doing: String,
    },
    /// Something in a folder that has no contents to send.
    #[error("`{}` is {kind}, not a file", path.display())]
    NoFile {
        /// Its path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A file that somebody else wrote to meanwhile.
    #[error("`{}` changed while it was read", path.display())]
    Changed {
        /// Its path.
        path: PathBuf,
    },
    /// A large file that the Hub would keep in git itself.
    #[error(
        "The Hub would keep `{file}` ({bytes} bytes) as plain git content instead of in its large \
         file storage"
    )]
    NotLarge {
        /// Branch and file.
        file: String,
        /// Size.
        bytes: u64,
    },
    /// A large file that the Hub's storage does not take.
    #[error("The Hub's large file storage does not take `{file}`: {reason}")]
    Storage {
        /// Branch and file.
        file: String,
        /// The Hub's words, or what is wrong with its answer.
        reason: String,
    },
    /// Links to the storage that do not work.
    #[error("Cannot send `{file}` by the links that the Hub gave: {reason}")]
    LinkRefused {
        /// Branch and file.
        file: String,
        /// The storage's answer.
        reason: String,
    },
    /// An upload after which the Hub does not list what was sent.
    #[error("`{repo}` does not hold what was sent: branch {branch} lists {found} for `{file}`")]
    NotArrived {
        /// The repository.
        repo: String,
        /// The branch.
        branch: String,
        /// The file.
        file: String,
        /// What is listed.
        found: String,
    },
    /// A repository that should be private and was made public.
    #[error(
        "`{repo}` was made public although --private asked for a private one; nothing was sent"
    )]
    MadePublic {
        /// The repository.
        repo: String,
    },
    /// A failed step of an upload.
    #[error("Cannot {action}")]
    Upload {
        /// What was attempted, as a verb phrase.
        action: String,
        /// Why it failed.
        source: Box<Error>,
    },
    /// A file that another program took away while it was being put into the cache.
    #[error(
        "`{}` is gone again: another program removes files from this cache",
        path.display()
    )]
    Gone {
        /// The file in the snapshot.
        path: PathBuf,
    },
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        const AGAIN: &str = "run the command again";
        Some(match self {
            Self::Offline { variable, .. } => format!("unset {variable}").into(),
            Self::NotInCache { variable, .. } => {
                format!("unset {variable} to download what is missing").into()
            }
            Self::MalformedToken { .. } => "log in again".into(),
            Self::TokenNeeded { .. } => {
                "check its name, or set HF_TOKEN to a token that may read it".into()
            }
            Self::Forbidden { advice, .. } => advice.as_deref()?.into(),
            Self::Coding { .. } => {
                "tell the proxy to leave these answers as they are, or go around it with NO_PROXY"
                    .into()
            }
            Self::OtherServer { .. } => "if that is the Hub, set HF_ENDPOINT to it".into(),
            Self::MissingShard { .. } => "choose another revision".into(),
            Self::NotSharded { .. } => "leave out --discard-shards".into(),
            Self::DiskSpace { .. } => {
                "free some space, or set HF_HOME to a folder on another disk".into()
            }
            Self::NoToken => "set HF_TOKEN, or HF_TOKEN_PATH to a file that holds it".into(),
            Self::Public { .. } => "make it private on the Hub, or leave out --private".into(),
            Self::Panicked { .. } => "report the lines above, and run the command again".into(),
            Self::NothingToPush { .. } => "gptq quantize and gptq sweep make checkpoints".into(),
            Self::NoFile { .. } => "move it out of the folder".into(),
            Self::Changed { .. } => "run the command again when it is finished".into(),
            Self::NotLarge { .. } => "let `.gitattributes` on the branch name its kind, as in \
                                      `*.safetensors filter=lfs diff=lfs merge=lfs -text`"
                .into(),
            // Its cause may know better, and is a link of the chain of its own.
            Self::Upload { source, .. } => {
                return source
                    .hint()
                    .or(Some("run the command again to upload what is missing".into()));
            }
            Self::Gone { .. } => "run the command again when that is done".into(),
            Self::Network { .. } => {
                "see whether this machine reaches the Hub, by HF_ENDPOINT and proxies as they are \
                 set, and run the command again"
                    .into()
            }
            Self::WrongHash { .. } | Self::LinkRefused { .. } | Self::NotArrived { .. } => {
                AGAIN.into()
            }
            _ => return None,
        })
    }

    /// For `map_err`: an I/O failure with its action and path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let below =
            |source| Error::Upload { action: "send it".to_owned(), source: Box::new(source) };
        let plain = below(Error::Endpoint { endpoint: "x".to_owned() });
        assert_eq!(plain.to_string(), "Cannot send it");
        assert_eq!(plain.hint().unwrap(), "run the command again to upload what is missing");
        assert_eq!(
            below(Error::NotSharded { repo: "a/b".to_owned() }).hint().unwrap(),
            "leave out --discard-shards"
        );
        assert_eq!(Error::NotFound { what: "`a/b`".to_owned() }.hint(), None);
    }
}
