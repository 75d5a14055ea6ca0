//! What ranks must have alike before they work together: names and values, and what to say when they
//! differ.
//!
//! A rank solves its share of every linear from sums of all ranks' inputs. Were one started with
//! another setting, model or text, all would go well, and the result would be of no use. So the
//! ranks compare everything that their parts depend on first. This crate knows nothing of models and
//! texts: the code that does gives names and values.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::hex::hex;

/// Fields that are read of another rank, bytes of all of them, and bytes of a value that is kept.
const MOST_FIELDS: usize = 64;
const MOST_BYTES: usize = 1 << 15;
const MOST_OF_VALUE: usize = 256;
/// Letters of a value, and differences, that a message shows.
const SHOWN: usize = 64;
const MOST_SHOWN: usize = 6;

/// Names and values, in the order in which differences are reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    fields: Vec<(String, String)>,
    words: u64,
}

impl Agreement {
    /// Nothing yet. `words` is the most that a rank's part of a message has in the work to come.
    #[must_use]
    pub fn new(words: u64) -> Self {
        Self { fields: Vec::new(), words }
    }

    /// The most words of a rank's part of a message.
    pub(super) fn words(&self) -> u64 {
        self.words
    }

    /// Adds a field. A value too long to be sent is cut, and told from others by its digest.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        let mut value = value.to_string();
        if value.len() > MOST_OF_VALUE {
            let digest = hex(&Sha256::digest(&value));
            let start: String = value.chars().take(SHOWN).collect();
            value = format!("{start}… ({digest})");
        }
        self.fields.push((name.to_owned(), value));
        self
    }

    /// The fields as they travel.
    #[must_use]
    pub fn encode(&self) -> Vec<u32> {
        let mut bytes = Vec::new();
        for text in self.fields.iter().flat_map(|(name, value)| [name, value]) {
            bytes.extend((text.len() as u32).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Reads the fields of another rank, as far as they make sense.
    #[must_use]
    pub fn decode(words: &[u32]) -> Self {
        let words = &words[..words.len().min(MOST_BYTES / 4)];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut rest = bytes.as_slice();
        let mut text = || {
            let (length, after) = rest.split_first_chunk::<4>()?;
            let (text, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            rest = after;
            Some(std::str::from_utf8(text).ok()?.to_owned())
        };
        let mut fields = Vec::new();
        while let (Some(name), Some(value)) = (text(), text()) {
            fields.push((name, value));
            if fields.len() == MOST_FIELDS {
                break;
            }
        }
        Self { fields, words: 0 }
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// In what the ranks differ, a line for each field; `all` in rank order.
pub(super) fn differences(all: &[Agreement]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in all.iter().flat_map(|rank| &rank.fields) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut found: Vec<String> = names.iter().filter_map(|name| difference(all, name)).collect();
    if found.len() > MOST_SHOWN {
        let more = found.len() - MOST_SHOWN;
        found.truncate(MOST_SHOWN);
        found.push(format!("{more} more"));
    }
    found
}

fn difference(all: &[Agreement], name: &str) -> Option<String> {
    let mut held: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
    for (rank, agreement) in all.iter().enumerate() {
        held.entry(agreement.value(name)).or_default().push(rank);
    }
    if held.len() < 2 {
        return None;
    }
    // By the first rank that has a value.
    let mut held: Vec<(Option<&str>, Vec<usize>)> = held.into_iter().collect();
    held.sort_by_key(|(_, ranks)| ranks[0]);
    let values =
        held.iter().take(3).map(|(value, ranks)| format!("{}: {}", who(ranks), shown(*value)));
    let values: Vec<String> = values.collect();
    Some(format!("{} ({})", plain(name), values.join(", ")))
}

/// Words come from other processes, too; apostrophes do no harm.
fn plain(word: &str) -> String {
    word.split('\'').map(|part| part.escape_debug().to_string()).collect::<Vec<_>>().join("'")
}

fn who(ranks: &[usize]) -> String {
    match ranks {
        [one] => format!("rank {one}"),
        [first, rest @ ..] => format!("rank {first} and {} more", rest.len()),
        [] => String::new(),
    }
}

fn shown(value: Option<&str>) -> String {
    let Some(value) = value else { return "nothing".to_owned() };
    // Digests say nothing to a reader beyond that they differ.
    let digest = value.len() == 64 && value.bytes().all(|b| b.is_ascii_hexdigit());
    let length = if digest { 12 } else { SHOWN };
    let start: String = value.chars().take(length).collect();
    let more = if start.len() < value.len() { "…" } else { "" };
    format!("`{}{more}`", plain(&start))
}

/// The running program: the digest of its file, so that no two builds are taken for one. Ranks that
/// round differently solve differently.
pub(super) fn program() -> std::io::Result<String> {
    // The file that was started, even where another has taken its name since.
    let started = Path::new("/proc/self/exe");
    let path = if started.exists() { started.to_owned() } else { std::env::current_exe()? };
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agreement(bits: &str, source: &str) -> Agreement {
        Agreement::new(0).with("bits", bits).with("source", source.repeat(64))
    }

    #[test]
    fn fields_are_read_as_sent() {
        for sent in [Agreement::new(0), agreement("4", "a"), agreement("ü", "")] {
            assert_eq!(Agreement::decode(&sent.encode()), sent);
        }
        let long = |end: &str| Agreement::new(0).with("text", "long ".repeat(100) + end);
        assert_ne!(long("a"), long("b"));
        assert!(long("a").encode().len() < 60);
    }

    #[test]
    fn what_makes_no_sense_has_no_fields_or_fewer() {
        assert_eq!(Agreement::decode(&[u32::MAX; 9]), Agreement::new(0));
        let mut words = agreement("4", "a").encode();
        words.truncate(words.len() - 1);
        assert_eq!(Agreement::decode(&words), Agreement::new(0).with("bits", 4));
        assert_eq!(Agreement::decode(&vec![0; 1 << 20]).fields.len(), MOST_FIELDS);
    }

    #[test]
    fn differences_name_the_field_and_who_has_what() {
        assert_eq!(differences(&[agreement("4", "a"), agreement("4", "a")]), [""; 0]);
        let found = differences(&[agreement("4", "a"), agreement("3", "b"), agreement("3", "a")]);
        assert_eq!(
            found,
            [
                "bits (rank 0: `4`, rank 1 and 1 more: `3`)",
                "source (rank 0 and 1 more: `aaaaaaaaaaaa…`, rank 1: `bbbbbbbbbbbb…`)",
            ]
        );
        let lacks = differences(&[agreement("4", "a"), Agreement::new(0).with("bits", 4)]);
        assert_eq!(lacks, ["source (rank 0: `aaaaaaaaaaaa…`, rank 1: nothing)"]);
        let evil = differences(&[agreement("4", "a"), agreement("\u{1b}]0;x", "a")]);
        assert_eq!(evil, ["bits (rank 0: `4`, rank 1: `\\u{1b}]0;x`)"]);
        let mut many = Agreement::new(0);
        for i in 0..9 {
            many = many.with(&i.to_string(), i);
        }
        assert_eq!(differences(&[many, Agreement::new(0)]).last().unwrap(), "3 more");
    }

    #[test]
    fn the_program_has_one_digest() {
        let digest = program().unwrap();
        assert_eq!(digest.len(), 64);
        assert_eq!(program().unwrap(), digest);
    }
}
