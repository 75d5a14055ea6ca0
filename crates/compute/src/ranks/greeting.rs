//! The first words between two processes: who calls, and what rank 0 says to it.
//!
//! Both are of one length, whatever they hold, so that rank 0 knows when a greeting is whole and
//! how much of a stranger's talk to listen to. Their layout is to stay as it is from one version to
//! the next: that is how versions recognize each other.

use sha2::{Digest, Sha256};

/// How a greeting begins, and how an answer does: they differ, so that a process that has reached
/// itself (TCP allows that on one host) does not take its own greeting for an answer.
const CALL: &[u8; 8] = b"gptqrank";
const REPLY: &[u8; 8] = b"gptqhost";

/// Bytes of a version's name, padded by zeros.
const VERSION_BYTES: usize = 24;

/// The version of this program.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
const _: () = assert!(VERSION.len() <= VERSION_BYTES);

/// Which run a process belongs to, as a digest: names of jobs are nobody else's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunDigest([u8; 32]);

impl RunDigest {
    /// The digest of a run's id.
    #[must_use]
    pub fn of(run_id: &str) -> Self {
        Self(Sha256::digest(format!("gptq run\n{run_id}")).into())
    }
}

/// What a process says to rank 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Its rank.
    pub rank: u32,
    /// Its version.
    pub version: String,
    /// Its run.
    pub run: RunDigest,
}

impl Greeting {
    /// Bytes of a greeting.
    pub const LENGTH: usize = CALL.len() + VERSION_BYTES + 32 + 4;

    /// A greeting of this version.
    #[must_use]
    pub fn new(rank: u32, run: RunDigest) -> Self {
        Self { rank, version: VERSION.to_owned(), run }
    }

    /// True as long as these can be the first bytes of a greeting.
    pub(super) fn may_begin(bytes: &[u8]) -> bool {
        bytes.iter().zip(CALL).all(|(a, b)| a == b)
    }

    /// Reads a greeting; `None` for anything else.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::LENGTH]) -> Option<Self> {
        let rest = bytes.strip_prefix(CALL)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (run, rest) = rest.split_first_chunk()?;
        let rank = u32::from_le_bytes(*rest.first_chunk()?);
        Some(Self { rank, version: version_of(version)?, run: RunDigest(*run) })
    }

    /// The greeting as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = CALL.to_vec();
        bytes.extend(padded(&self.version));
        bytes.extend(self.run.0);
        bytes.extend(self.rank.to_le_bytes());
        bytes
    }
}

/// What rank 0 says to a greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The caller is one of the ranks; the others are waited for.
    Admitted,
    /// All ranks are there.
    Begin,
    /// The caller belongs to another run.
    OtherRun,
    /// The caller is of another version.
    OtherVersion,
    /// There is no such rank.
    NoSuchRank,
    /// Another process is that rank already.
    Taken,
}

impl Verdict {
    const ALL: [Self; 6] = [
        Self::Admitted,
        Self::Begin,
        Self::OtherRun,
        Self::OtherVersion,
        Self::NoSuchRank,
        Self::Taken,
    ];
}

/// What rank 0 answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What it makes of the caller.
    pub verdict: Verdict,
    /// Number of ranks.
    pub size: u32,
    /// Its version.
    pub version: String,
}

impl Answer {
    /// Bytes of an answer.
    pub const LENGTH: usize = REPLY.len() + VERSION_BYTES + 4 + 1;

    /// An answer of this version.
    pub(super) fn new(verdict: Verdict, size: u32) -> Self {
        Self { verdict, size, version: VERSION.to_owned() }
    }

    /// Reads an answer; `None` for anything else.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::LENGTH]) -> Option<Self> {
        let rest = bytes.strip_prefix(REPLY)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (size, rest) = rest.split_first_chunk()?;
        let verdict = *Verdict::ALL.get(usize::from(*rest.first()?))?;
        Some(Self { verdict, size: u32::from_le_bytes(*size), version: version_of(version)? })
    }

    /// The answer as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = REPLY.to_vec();
        bytes.extend(padded(&self.version));
        bytes.extend(self.size.to_le_bytes());
        bytes.push(self.verdict as u8);
        bytes
    }
}

fn padded(version: &str) -> [u8; VERSION_BYTES] {
    let mut bytes = [0; VERSION_BYTES];
    bytes.iter_mut().zip(version.bytes()).for_each(|(byte, c)| *byte = c);
    bytes
}

/// A version is printed, so it has to be printable.
fn version_of(bytes: &[u8; VERSION_BYTES]) -> Option<String> {
    let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    let text = &bytes[..used];
    let printable = !text.is_empty() && text.iter().all(u8::is_ascii_graphic);
    printable.then(|| text.iter().copied().map(char::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_and_answers_are_read_as_written() {
        let greeting = Greeting::new(3, RunDigest::of("job 7"));
        let bytes: [u8; Greeting::LENGTH] = greeting.to_bytes().try_into().unwrap();
        assert_eq!(Greeting::parse(&bytes).unwrap(), greeting);
        assert_ne!(RunDigest::of("job 7"), RunDigest::of("job 8"));
        for (code, verdict) in Verdict::ALL.into_iter().enumerate() {
            let answer = Answer::new(verdict, 64);
            let bytes: [u8; Answer::LENGTH] = answer.to_bytes().try_into().unwrap();
            assert_eq!(usize::from(bytes[Answer::LENGTH - 1]), code);
            assert_eq!(Answer::parse(&bytes).unwrap(), answer);
        }
    }

    #[test]
    fn what_is_no_greeting_is_seen_at_its_first_byte() {
        assert!(Greeting::may_begin(b""));
        assert!(Greeting::may_begin(b"gptqr"));
        assert!(Greeting::may_begin(b"gptqrank0.1.0"));
        assert!(!Greeting::may_begin(b"GET / HTTP/1.1"));
        let sound: [u8; Greeting::LENGTH] =
            Greeting::new(1, RunDigest::of("")).to_bytes().try_into().unwrap();
        for (at, value) in [(0, b'G'), (8, 0x1b), (8, 0xff)] {
            let mut bytes = sound;
            bytes[at] = value;
            assert_eq!(Greeting::parse(&bytes), None);
        }
        let mut unnamed = sound;
        unnamed[8..8 + VERSION_BYTES].fill(0);
        assert_eq!(Greeting::parse(&unnamed), None);
    }
}
