//! What a branch's folder holds and what it was made from, so that a finished branch is recognized
//! by its content.
//!
//! The manifest is the last file written. It lists every other file with its SHA-256, and all that the
//! bytes depend on in words, so that a run that finds other words can say what has changed. Sums of
//! small files are those that `sha256sum` prints; those of weight files are made of their tensors'
//! ([`gptq_checkpoint::sum_of_pieces`]), since tensors are written in another order than they lie.
//!
//! A manifest that came with a checkpoint from elsewhere is data: it may name files of its own folder
//! and nothing else.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Component, Path};

use gptq_checkpoint::{CARD_FILE, MANIFEST_FILE, Partial, REPORT_FILE, WeightSum};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::branch_report::BranchReport;
use crate::digest::{hex, of_file, of_weights, sha256};
use crate::error::{Error, Result};

/// What is written. Format 1, which is read as well, had no sums of tensors.
const FORMAT: u32 = 2;

/// Everything that a branch's bytes depend on, by name.
pub type MadeFrom = BTreeMap<String, String>;

/// The manifest of a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// What it was made from.
    pub made_from: MadeFrom,
    /// What it was measured on.
    pub measured_on: Option<String>,
    /// Every file but the manifest, the report and the model card, by relative path.
    files: BTreeMap<String, FileSum>,
    /// SHA-256 of the report before anything was measured.
    made_report: String,
    /// SHA-256 of the report.
    report: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileSum {
    bytes: u64,
    #[serde(flatten)]
    sum: ContentSum,
}

/// What is known of a file's content, as hexadecimal text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ContentSum {
    /// SHA-256 of the file.
    Sha256(String),
    /// SHA-256 of its header's and its tensors' SHA-256.
    TensorsSha256(String),
}

/// How a file of the recorded size differs from its sum.
const OTHER_CONTENT: &str = "has another content than when it was written";

fn unreadable(error: &dyn fmt::Display) -> String {
    format!("cannot be read: {error}")
}

impl FileSum {
    /// Of a file that is listed as a whole.
    fn of(path: &Path) -> io::Result<Self> {
        let (bytes, sum) = of_file(path)?;
        Ok(Self { bytes, sum: ContentSum::Sha256(sum) })
    }

    /// How a file differs from the sum. Only a regular file of the right size is read at all: from a
    /// device or a pipe there might come bytes for ever.
    fn fault(&self, path: &Path) -> Option<String> {
        if let Some(fault) = self.size_fault(path) {
            return Some(fault);
        }
        let (found, sum) = match &self.sum {
            ContentSum::Sha256(sum) => (of_file(path).map_err(|e| unreadable(&e)), sum),
            // A header that cannot be read is a changed one.
            ContentSum::TensorsSha256(sum) => (of_weights(path), sum),
        };
        match found {
            Ok((bytes, found)) if bytes == self.bytes && found == *sum => None,
            Ok(_) => Some(OTHER_CONTENT.to_owned()),
            Err(fault) => Some(fault),
        }
    }

    /// What is wrong with a file that can be seen without reading it.
    fn size_fault(&self, path: &Path) -> Option<String> {
        match fs::metadata(path) {
            Ok(meta) if !meta.is_file() => Some("is no regular file".to_owned()),
            Ok(meta) if meta.len() != self.bytes => {
                Some(format!("has {} bytes, {} when it was written", meta.len(), self.bytes))
            }
            Ok(_) => None,
            Err(error) => Some(unreadable(&error)),
        }
    }
}

impl Manifest {
    /// Writes the manifest of a working folder whose files are complete but for a measurement.
    /// `weights` are the sums of what the writer wrote; the other files, all small, are read.
    pub fn list(
        folder: &Partial,
        weights: &[WeightSum],
        made_from: &MadeFrom,
        report: &BranchReport,
    ) -> Result<Self> {
        let dir = folder.path();
        let mut files = BTreeMap::new();
        for WeightSum { file_name, bytes, sum } in weights {
            let sum = ContentSum::TensorsSha256(hex(sum));
            files.insert(file_name.clone(), FileSum { bytes: *bytes, sum });
        }
        for name in names(dir)?.into_iter().filter(|name| !is_extra(name)) {
            if let Entry::Vacant(new) = files.entry(name) {
                let path = dir.join(new.key());
                new.insert(FileSum::of(&path).map_err(Error::io("read", &path))?);
            }
        }
        let report = sha256(&report.to_bytes()?);
        let manifest = Self {
            format: FORMAT,
            made_from: made_from.clone(),
            measured_on: None,
            files,
            made_report: report.clone(),
            report,
        };
        folder.replace(MANIFEST_FILE, &manifest.to_bytes()?)?;
        Ok(manifest)
    }

    /// The same folder with another report.
    pub fn measured(mut self, on: Option<&str>, report: &[u8]) -> Self {
        self.measured_on = on.map(str::to_owned);
        self.report = sha256(report);
        self
    }

    /// The same folder with another report of the same measurements.
    #[must_use]
    pub fn with_report(mut self, report: &[u8]) -> Self {
        self.report = sha256(report);
        self
    }

    /// Reads the manifest of a folder; `None` where there is none that this program understands.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        Ok(Self::read_or_fault(dir)?.and_then(std::result::Result::ok))
    }

    /// Reads the manifest of a folder, if there is one, or says why it cannot be understood.
    pub fn read_or_fault(dir: &Path) -> Result<Option<std::result::Result<Self, String>>> {
        let path = dir.join(MANIFEST_FILE);
        let text = match gptq_checkpoint::read_small(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { action: "read", path, source }),
        };
        Ok(Some(Self::parse(&text)))
    }

    /// Reads the text of a manifest, or says why it cannot be understood.
    ///
    /// # Errors
    /// Another format, and names of files outside of the folder.
    pub fn parse(text: &[u8]) -> std::result::Result<Self, String> {
        let manifest: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if !(1..=FORMAT).contains(&manifest.format) {
            return Err(format!(
                "its format is {}, and this program reads those up to {FORMAT}",
                manifest.format
            ));
        }
        match manifest.files.keys().find(|name| !stays_inside(name)) {
            Some(name) => {
                Err(format!("it lists `{name}`, which is no plain path inside the folder"))
            }
            None => Ok(manifest),
        }
    }

    /// The file's contents.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::Report { path: MANIFEST_FILE.into(), message: e.to_string() })?;
        text.push(b'\n');
        Ok(text)
    }

    /// The first file that is not what the manifest says, the report apart.
    pub fn damaged(&self, dir: &Path) -> Option<String> {
        // Sizes first: they cost nothing.
        let other_size =
            self.files.iter().find(|(name, sum)| sum.size_fault(&dir.join(name)).is_some());
        if let Some((name, _)) = other_size {
            return Some(name.clone());
        }
        let files: Vec<(&String, &FileSum)> = self.files.iter().collect();
        let other = |&&(name, sum): &&(&String, &FileSum)| sum.fault(&dir.join(name)).is_some();
        files.par_iter().find_first(other).map(|(name, _)| (*name).clone())
    }

    /// Files with a recorded sum: those that are listed, and the report.
    pub fn sums(&self) -> usize {
        self.files.len() + 1
    }

    /// All files that are not what the manifest says, the report included, and how they differ.
    pub fn faults(&self, dir: &Path) -> Vec<(String, String)> {
        let files: Vec<(&String, &FileSum)> = self.files.iter().collect();
        let fault = |(name, sum): &(&String, &FileSum)| {
            Some(((*name).clone(), sum.fault(&dir.join(name))?))
        };
        let mut faults: Vec<(String, String)> = files.par_iter().filter_map(fault).collect();
        let report = match gptq_checkpoint::read_small(&dir.join(REPORT_FILE)) {
            Ok(text) => (sha256(&text) != self.report).then(|| OTHER_CONTENT.to_owned()),
            Err(e) => Some(unreadable(&e)),
        };
        faults.extend(report.map(|fault| (REPORT_FILE.to_owned(), fault)));
        faults
    }

    /// The folder's report, if it is the one that the manifest was written for.
    pub fn final_report(&self, dir: &Path) -> Option<BranchReport> {
        let text = gptq_checkpoint::read_small(&dir.join(REPORT_FILE)).ok()?;
        (sha256(&text) == self.report).then(|| BranchReport::read(dir).ok()).flatten()
    }

    /// The folder's report as it was before anything was measured, if it is the manifest's. A run
    /// may have been killed between writing evaluations and saying so here.
    pub fn made_report(&self, dir: &Path) -> Option<BranchReport> {
        let mut report = BranchReport::read(dir).ok()?;
        report.evaluations.clear();
        // Results on tasks are of the file, which is the same.
        let tasks = std::mem::take(&mut report.tasks);
        let made = sha256(&report.to_bytes().ok()?) == self.made_report;
        report.tasks = tasks;
        made.then_some(report)
    }

    /// A file of the folder that is neither listed nor made beside what is.
    pub fn stray(&self, dir: &Path) -> Result<Option<String>> {
        let stray = |name: &String| !self.files.contains_key(name) && !is_extra(name);
        Ok(names(dir)?.into_iter().find(stray))
    }

    /// What differs between this and what is wanted now, in words.
    pub fn changes(&self, wanted: &MadeFrom) -> Option<String> {
        let mut changes: Vec<String> = wanted
            .iter()
            .filter(|(name, value)| {
                let old = self.made_from.get(*name);
                !old.is_some_and(|old| old == *value || says_less(old, value))
            })
            .map(|(name, value)| match self.made_from.get(name) {
                Some(old) if readable(old) && readable(value) => {
                    format!("{name} was `{old}` and is `{value}`")
                }
                _ => format!("{name} has changed"),
            })
            .collect();
        let dropped = self.made_from.iter().filter(|(name, _)| !wanted.contains_key(*name));
        changes.extend(dropped.map(|(name, value)| format!("{name} was `{value}`")));
        (!changes.is_empty()).then(|| changes.join("; "))
    }
}

/// Whether the one value is the other without the instructions of a CPU, as earlier versions wrote it:
/// `cpu (x86_64)` of `cpu (x86_64, fma)`. Such a branch was made on a processor that may have been
/// this one; making all of them again would cost more than the last bits are worth.
fn says_less(old: &str, value: &str) -> bool {
    let kind = old.strip_suffix(')').filter(|kind| kind.starts_with("cpu ("));
    kind.and_then(|kind| value.strip_prefix(kind)).is_some_and(|rest| rest.starts_with(", "))
}

/// Digests say nothing to a reader.
fn readable(value: &str) -> bool {
    !(value.len() == 64 && value.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Whether a name joined to a folder is that of a file in it: parts with a name each, and nothing that
/// a system might read as another separator.
fn stays_inside(name: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    !name.is_empty() && !name.contains(['\\', '\0']) && Path::new(name).components().all(plain)
}

/// Files that a manifest does not list: itself, the report, the model card, and hidden working files.
pub(crate) fn is_extra(name: &str) -> bool {
    let working = name.starts_with(".gptq");
    // A card may be written, and edited, after the branch is finished.
    matches!(name, MANIFEST_FILE | REPORT_FILE | CARD_FILE) || working
}

/// Relative paths of all files of a folder and its folders, sorted.
fn names(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder);
        let failed = Error::io("read", &path);
        for entry in fs::read_dir(&path).map_err(&failed)? {
            let entry = entry.map_err(&failed)?;
            let name = format!("{folder}{}", entry.file_name().to_string_lossy());
            if entry.file_type().map_err(&failed)?.is_dir() {
                folders.push(name + "/");
            } else {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(name: &str, bytes: u64) -> String {
        let sum = "0".repeat(64);
        format!(
            r#"{{"format": 1, "made_from": {{}}, "measured_on": null, "made_report": "", "report": "",
                 "files": {{{}: {{"bytes": {bytes}, "sha256": "{sum}"}}}}}}"#,
            serde_json::to_string(name).unwrap()
        )
    }

    #[test]
    fn names_lead_nowhere_but_into_the_folder() {
        for name in ["model.safetensors", "original/params.json", ".gitattributes", "a..b"] {
            Manifest::parse(listing(name, 1).as_bytes()).unwrap();
        }
        for name in ["", "/dev/zero", "../x", "a/../../x", "./x", "a\\..\\x", "a\0b", ".."] {
            let error = Manifest::parse(listing(name, 1).as_bytes()).unwrap_err();
            assert!(error.contains("no plain path inside the folder"), "{name}: {error}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_no_regular_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        // Reading the one would never end, opening the other never begin.
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("zero")).unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(pipe).status().unwrap().success());
        for name in ["zero", "pipe"] {
            let manifest = Manifest::parse(listing(name, 0).as_bytes()).unwrap();
            assert_eq!(manifest.damaged(dir.path()).as_deref(), Some(name));
            let faults = manifest.faults(dir.path());
            assert_eq!(faults[0], (name.to_owned(), "is no regular file".to_owned()));
        }
    }

    #[test]
    fn changes_are_described_in_words_unless_they_are_digests() {
        let made_from = |settings: &str, source: char| {
            let source = String::from(source).repeat(64);
            MadeFrom::from([
                ("settings".to_owned(), settings.to_owned()),
                ("the source".to_owned(), source),
            ])
        };
        let manifest = Manifest {
            format: FORMAT,
            made_from: made_from("4 bits", 'a'),
            measured_on: None,
            files: BTreeMap::new(),
            made_report: String::new(),
            report: String::new(),
        };
        assert_eq!(manifest.changes(&made_from("4 bits", 'a')), None);
        assert_eq!(
            manifest.changes(&made_from("3 bits", 'b')).unwrap(),
            "settings was `4 bits` and is `3 bits`; the source has changed"
        );
        // A version that did not look at a CPU's instructions, and one that did.
        let on = |device: &str| MadeFrom::from([("the device".to_owned(), device.to_owned())]);
        for (old, now, differs) in [
            ("cpu (x86_64)", "cpu (x86_64, fma)", false),
            ("cpu (x86_64, avx)", "cpu (x86_64, fma)", true),
            ("cpu (x86_64, fma)", "cpu (x86_64)", true),
            ("cpu (aarch64)", "cpu (x86_64, fma)", true),
        ] {
            let manifest = Manifest { made_from: on(old), ..manifest.clone() };
            assert_eq!(manifest.changes(&on(now)).is_some(), differs, "{old}, {now}");
        }
        // A version that knows of more that bytes depend on.
        let mut more = made_from("4 bits", 'a');
        more.insert("weather".to_owned(), "fair".to_owned());
        assert_eq!(manifest.changes(&more).unwrap(), "weather has changed");
        // What several ranks have made is not what one makes.
        let mut ranks = manifest;
        ranks.made_from.insert("the number of ranks".to_owned(), "2".to_owned());
        let changes = ranks.changes(&made_from("4 bits", 'a'));
        assert_eq!(changes.unwrap(), "the number of ranks was `2`");
    }

    #[test]
    fn sums_are_those_of_sha256sum_and_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        fs::write(dir.path().join("folder/b"), "abc").unwrap();
        for extra in [".gptq-partial", CARD_FILE, REPORT_FILE, MANIFEST_FILE] {
            fs::write(dir.path().join(extra), "x").unwrap();
        }
        assert_eq!(names(dir.path()).unwrap().iter().filter(|n| !is_extra(n)).count(), 1);
        let sum = FileSum::of(&dir.path().join("folder/b")).unwrap();
        // printf abc | sha256sum
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sum, FileSum { bytes: 3, sum: ContentSum::Sha256(expected.to_owned()) });
        let manifest = Manifest {
            format: FORMAT,
            made_from: MadeFrom::new(),
            measured_on: None,
            files: BTreeMap::from([("folder/b".to_owned(), sum)]),
            made_report: String::new(),
            report: String::new(),
        };
        assert_eq!(manifest.damaged(dir.path()), None);
        assert_eq!(manifest.stray(dir.path()).unwrap(), None);
        fs::write(dir.path().join("folder/b"), "abd").unwrap();
        assert_eq!(manifest.damaged(dir.path()).as_deref(), Some("folder/b"));
        fs::remove_file(dir.path().join("folder/b")).unwrap();
        assert_eq!(manifest.damaged(dir.path()).as_deref(), Some("folder/b"));
        fs::write(dir.path().join("thesis"), "").unwrap();
        assert_eq!(manifest.stray(dir.path()).unwrap().as_deref(), Some("thesis"));
    }
}
