//! The hashes by which the Hub names contents, and the cache its blobs.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

/// What a file must hash to, in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256 of a large file.
    Sha256(String),
    /// Git's name of a small file: SHA-1 of a header with its size, and the file.
    Git(String),
}

impl Digest {
    /// From a listing: SHA-256 has 64 digits, git's hash 40. They become file names, so nothing else
    /// passes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let hexadecimal = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match (hexadecimal, text.len()) {
            (true, 64) => Some(Self::Sha256(text.to_owned())),
            (true, 40) => Some(Self::Git(text.to_owned())),
            _ => None,
        }
    }

    /// The digits, which name the blob.
    #[must_use]
    pub fn hex(&self) -> &str {
        let (Self::Sha256(hex) | Self::Git(hex)) = self;
        hex
    }

    /// A hasher of the same kind for a file of so many bytes.
    pub(crate) fn hasher(&self, bytes: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::sha256(),
            Self::Git(_) => {
                let mut hasher = Sha1::new();
                hasher.update(format!("blob {bytes}\0"));
                Hasher::Git(hasher)
            }
        }
    }

    /// Whether a local file has this hash.
    pub(crate) fn is_of(&self, path: &Path) -> io::Result<bool> {
        let mut file = std::fs::File::open(path)?;
        let mut hasher = self.hasher(file.metadata()?.len());
        hasher.read(&mut file)?;
        Ok(hasher.finish() == self.hex())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sha256(hex) => write!(formatter, "SHA-256 {hex}"),
            Self::Git(hex) => write!(formatter, "git hash {hex}"),
        }
    }
}

/// A hash in the making.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    pub(crate) fn sha256() -> Self {
        Self::Sha256(Sha256::new())
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// Takes in everything that is left to read.
    pub(crate) fn read(&mut self, from: &mut impl Read) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(()),
                n => self.update(&buffer[..n]),
            }
        }
    }

    /// The digits.
    pub(crate) fn finish(self) -> String {
        // `records` has it, too, which this crate is not to know.
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf 'hello\n' | git hash-object --stdin`, and `| sha256sum`.
    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        std::fs::write(&path, "hello\n").unwrap();
        for hex in [git, sha] {
            let digest = Digest::parse(hex).unwrap();
            assert!(digest.is_of(&path).unwrap(), "{digest}");
        }
        let other = sha.replace('5', "6");
        assert!(!Digest::parse(&other).unwrap().is_of(&path).unwrap());
    }

    #[test]
    fn nothing_but_a_hash_becomes_a_file_name() {
        for text in ["", "../x", "ABCD", &"a".repeat(39), &"g".repeat(40), &"A".repeat(64)] {
            assert_eq!(Digest::parse(text), None, "{text}");
        }
    }
}
