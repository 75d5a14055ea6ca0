//! Datasets: where calibration and evaluation text comes from.
//!
//! A dataset is named by one string, the same on the command line, in recipes and in reports:
//! `ORG/NAME:CONFIG:SPLIT` for a Hub dataset already in the local Hugging Face cache (nothing is
//! downloaded here), the path of a `.txt`, `.jsonl` or `.parquet` file, or `builtin:NAME` for a text
//! that the program has in itself. Rows are taken from the column (parquet) or field (JSON lines)
//! `text`; `DATASET#COLUMN` names another. What rows of conversations are is in `chat.rs`.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use gptq_records::dataset_identity::{DatasetIdentity, HubSplit};
use serde::{Deserialize, Serialize};

use crate::chat::Message;
use crate::chat_files::{chats_of_jsonl, chats_of_parquet};
use crate::error::{Error, Result};
use crate::home::expand_home;
use crate::text_files::{read_jsonl, read_parquet, read_text};

const DEFAULT_COLUMN: &str = "text";

/// What the names of texts in the program begin with.
const BUILT_IN: &str = "builtin:";
/// Texts that need no file. They are in the public domain: see `calib/demo/README.md`.
const BUILT_IN_TEXTS: [(&str, &str); 1] = [("addresses", include_str!("../calib/addresses.txt"))];

/// A dataset by name; nothing is read until [`rows`](Self::rows) or [`load`](Self::load).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatasetSpec {
    place: Place,
    column: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Place {
    Hub(HubSplit),
    File(PathBuf, Format),
    /// Its place in [`BUILT_IN_TEXTS`].
    BuiltIn(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Format {
    Text,
    JsonLines,
    Parquet,
}

/// A dataset that has been read.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The texts in order; never all blank.
    pub rows: Vec<String>,
    /// What it is called and what it holds.
    pub identity: DatasetIdentity,
}

/// How rows become the one text that is encoded.
///
/// A `.txt` file is a single row, so both joins give the file itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Join {
    /// Rows separated by a blank line, as the GPTQ paper's evaluation does.
    Paragraphs,
    /// Empty rows become `" \n"` and nothing is put between rows, as in the script behind the
    /// published branches. On wikitext, whose other rows end in a newline, this restores the
    /// original file byte for byte.
    Card,
}

impl Join {
    /// Every join by its name.
    pub const ALL: [(&'static str, Self); 2] =
        [("card", Self::Card), ("paragraphs", Self::Paragraphs)];

    /// The one text of these rows. A file of one row may be gigabytes, and is not copied.
    #[must_use]
    pub fn text(self, mut rows: Vec<String>) -> String {
        match (self, rows.as_mut_slice()) {
            (_, [only]) if !only.is_empty() => std::mem::take(only),
            (Self::Paragraphs, _) => rows.join("\n\n"),
            (Self::Card, _) => {
                rows.iter().map(|row| if row.is_empty() { " \n" } else { row }).collect()
            }
        }
    }

    /// How many rows run into the next one with no white space between: their last word and its
    /// first become one.
    #[must_use]
    pub fn glued(self, rows: &[String]) -> usize {
        let runs_on = |pair: &&[String]| {
            let (last, first) = (pair[0].chars().next_back(), pair[1].chars().next());
            !last.is_none_or(char::is_whitespace) && !first.is_none_or(char::is_whitespace)
        };
        match self {
            Self::Paragraphs => 0,
            Self::Card => rows.windows(2).filter(runs_on).count(),
        }
    }
}

impl FromStr for Join {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, join)| join).ok_or_else(|| "use card or paragraphs".to_owned())
    }
}

impl fmt::Display for Join {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Paragraphs => "paragraphs",
            Self::Card => "card",
        })
    }
}

impl DatasetSpec {
    /// Reads the dataset's texts, in order.
    ///
    /// # Errors
    /// When a Hub dataset or its split is not in the local cache, a file cannot be read or decoded,
    /// a row lacks its text, or there is no text at all.
    pub fn rows(&self) -> Result<Vec<String>> {
        let rows = match &self.place {
            Place::Hub(hub) => self.rows_of(&self.files_in_cache(hub)?)?,
            Place::File(path, Format::Text) => vec![read_text(path)?],
            Place::File(path, Format::JsonLines) => read_jsonl(path, &self.column)?,
            Place::File(path, Format::Parquet) => read_parquet(path, &self.column)?,
            Place::BuiltIn(index) => vec![BUILT_IN_TEXTS[*index].1.to_owned()],
        };
        if rows.iter().all(|row| row.trim().is_empty()) {
            return Err(Error::NoText { dataset: self.to_string() });
        }
        Ok(rows)
    }

    /// Reads the dataset's texts and describes what was read.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub fn load(&self) -> Result<Dataset> {
        let rows = self.rows()?;
        let identity = DatasetIdentity::new(self.to_string(), self.hub().cloned(), &rows);
        Ok(Dataset { rows, identity })
    }

    /// Reads the dataset's conversations, in order, from `messages`, `conversations` or the columns of
    /// a prompt and its response, and describes what was read: its text is what the messages say.
    ///
    /// # Errors
    /// As [`rows`](Self::rows); and for a text without rows, columns that hold no conversations, and
    /// rows that are none, by number.
    pub fn conversations(&self) -> Result<(Vec<Vec<Message>>, DatasetIdentity)> {
        // The default is that of texts.
        let column = Some(self.column.as_str()).filter(|column| *column != DEFAULT_COLUMN);
        let chats = match &self.place {
            Place::Hub(hub) => {
                let mut chats = Vec::new();
                for file in self.files_in_cache(hub)? {
                    chats_of_parquet(&file, column, &mut chats)?;
                }
                chats
            }
            Place::File(path, Format::Parquet) => {
                let mut chats = Vec::new();
                chats_of_parquet(path, column, &mut chats)?;
                chats
            }
            Place::File(path, Format::JsonLines) => chats_of_jsonl(path, column)?,
            Place::File(_, Format::Text) | Place::BuiltIn(_) => {
                return Err(Error::NoConversations { dataset: self.to_string() });
            }
        };
        let said = || chats.iter().flatten().map(|message: &Message| message.content.as_str());
        if said().all(|text| text.trim().is_empty()) {
            return Err(Error::NoText { dataset: self.to_string() });
        }
        let identity = DatasetIdentity::of_texts(self.to_string(), self.hub().cloned(), said());
        Ok((chats, identity))
    }

    /// What it is called, before it is read: the identity of no text.
    #[must_use]
    pub fn unread(&self) -> DatasetIdentity {
        DatasetIdentity::new(self.to_string(), self.hub().cloned(), &[])
    }

    /// The split on the Hub, unless the dataset is a local file.
    #[must_use]
    pub fn hub(&self) -> Option<&HubSplit> {
        match &self.place {
            Place::Hub(hub) => Some(hub),
            Place::File(..) | Place::BuiltIn(_) => None,
        }
    }

    /// The local file, if that is what it is.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path, _) => Some(path),
            Place::Hub(_) | Place::BuiltIn(_) => None,
        }
    }

    /// Whether it is a split on the Hub that is not, or not whole, in the local cache.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        let Place::Hub(hub) = &self.place else { return false };
        let snapshot = gptq_checkpoint::resolve_dataset(&hub.repo, None);
        !snapshot.is_ok_and(|s| self.files_of_split(hub, &s).is_ok())
    }

    /// The same dataset with a relative local path taken from `folder`; others are unchanged.
    #[must_use]
    pub fn relative_to(mut self, folder: &Path) -> Self {
        if let Place::File(path, _) = &mut self.place {
            // An absolute path replaces `folder` in a join.
            *path = tidy(&folder.join(&path));
        }
        self
    }

    /// The rows of a Hub split, from its parquet files in name order.
    fn rows_of(&self, files: &[PathBuf]) -> Result<Vec<String>> {
        let mut rows = Vec::new();
        for file in files {
            rows.extend(read_parquet(file, &self.column)?);
        }
        Ok(rows)
    }

    /// The parquet files of a split in the local cache.
    fn files_in_cache(&self, hub: &HubSplit) -> Result<Vec<PathBuf>> {
        let snapshot = gptq_checkpoint::resolve_dataset(&hub.repo, None)
            .map_err(|source| Error::NotCached { dataset: self.to_string(), source })?;
        self.files_of_split(hub, &snapshot)
    }

    fn files_of_split(&self, hub: &HubSplit, snapshot: &Path) -> Result<Vec<PathBuf>> {
        let mut folders = vec![hub.config.as_str()];
        if hub.config == "default" {
            // Datasets with a single configuration keep their files in `data`.
            folders.push("data");
        }
        for folder in &folders {
            let folder = snapshot.join(folder);
            let names = parquet_files(&folder)?;
            let files: Vec<(&str, Option<usize>)> = names
                .iter()
                .filter_map(|name| Some((name.as_str(), parse_file_name(name)?)))
                .filter(|(_, (split, _))| *split == hub.split)
                .map(|(name, (_, announced))| (name, announced))
                .collect();
            if !files.is_empty() {
                self.check_complete(&folder, &files)?;
                return Ok(files.iter().map(|(name, _)| folder.join(name)).collect());
            }
        }
        let patterns: Vec<String> =
            folders.iter().map(|folder| format!("`{folder}/{}-*.parquet`", hub.split)).collect();
        Err(Error::SplitNotFound {
            dataset: self.to_string(),
            looked_for: patterns.join(" or "),
            folder: snapshot.to_owned(),
            available: available_splits(snapshot)?,
        })
    }

    /// A partly downloaded split would be a shorter text, and so other windows, without a sign.
    fn check_complete(&self, folder: &Path, files: &[(&str, Option<usize>)]) -> Result<()> {
        let announced = files.iter().filter_map(|&(_, announced)| announced).max();
        match announced {
            Some(expected) if expected != files.len() => Err(Error::SplitIncomplete {
                dataset: self.to_string(),
                folder: folder.to_owned(),
                found: files.len(),
                expected,
            }),
            _ => Ok(()),
        }
    }
}

/// Names of the parquet files in a folder, sorted; none where the folder is absent.
fn parquet_files(folder: &Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |source| Error::Read { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.ends_with(".parquet")) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The split a file belongs to and the number of files announced for it: `test` and 2 for
/// `test-00000-of-00002.parquet` or `test-00000-of-00002-0a1b2c.parquet`, `test` for
/// `test-0.parquet`.
fn parse_file_name(name: &str) -> Option<(&str, Option<usize>)> {
    let stem = name.strip_suffix(".parquet")?;
    let (numbered, total) = match stem.split_once("-of-") {
        Some((numbered, rest)) => (numbered, rest.split('-').next()?.parse().ok()),
        None => (stem, None),
    };
    let (split, number) = numbered.rsplit_once('-')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some((split, total))
}

/// The `CONFIG:SPLIT` pairs of a snapshot, as one string for an error.
fn available_splits(snapshot: &Path) -> Result<String> {
    let failed = |source| Error::Read { path: snapshot.to_owned(), source };
    let mut pairs = Vec::new();
    for entry in fs::read_dir(snapshot).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(folder) = name.to_str() else { continue };
        let config = if folder == "data" { "default" } else { folder };
        let files = parquet_files(&snapshot.join(folder))?;
        pairs.extend(
            files
                .iter()
                .filter_map(|file| parse_file_name(file))
                .map(|(split, _)| format!("{config}:{split}")),
        );
    }
    pairs.sort();
    pairs.dedup();
    Ok(if pairs.is_empty() { "no parquet files".to_owned() } else { pairs.join(", ") })
}

/// `a/../b` as `b`, for messages; only where the folder before `..` is named in the path itself.
fn tidy(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        let above = parts.components().next_back();
        match (part, above) {
            (Component::ParentDir, Some(Component::Normal(_))) => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    parts
}

impl FromStr for DatasetSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |reason: &str| Error::DatasetSyntax {
            text: text.to_owned(),
            reason: reason.to_owned(),
        };
        // A `#` inside a path is part of the path.
        let split = if file_format(text).is_some() { None } else { text.rsplit_once('#') };
        let (name, column) = match split {
            Some((_, "")) => return Err(invalid("the column after `#` is empty")),
            Some((name, column)) => (name, Some(column)),
            None => (text, None),
        };
        if let Some(known) = text.strip_prefix(BUILT_IN) {
            let index = BUILT_IN_TEXTS.iter().position(|(name, _)| *name == known);
            let Some(index) = index else {
                let names: Vec<&str> = BUILT_IN_TEXTS.iter().map(|(name, _)| *name).collect();
                return Err(invalid(&format!("the built-in texts are {}", names.join(", "))));
            };
            return Ok(Self { place: Place::BuiltIn(index), column: DEFAULT_COLUMN.to_owned() });
        }
        let place = match file_format(name) {
            Some(Format::Text) if column.is_some() => {
                return Err(invalid("a text file has no columns to choose from"));
            }
            Some(format) => {
                let path = expand_home(name).map_err(|error| invalid(&error.to_string()))?;
                Place::File(PathBuf::from(path.as_ref()), format)
            }
            None => Place::Hub(parse_hub(name).map_err(invalid)?),
        };
        Ok(Self { place, column: column.unwrap_or(DEFAULT_COLUMN).to_owned() })
    }
}

fn file_format(name: &str) -> Option<Format> {
    let extension = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "txt" => Some(Format::Text),
        "jsonl" => Some(Format::JsonLines),
        "parquet" => Some(Format::Parquet),
        _ => None,
    }
}

fn parse_hub(name: &str) -> Result<HubSplit, &'static str> {
    let parts: Vec<&str> = name.split(':').collect();
    let &[repo, config, split] = parts.as_slice() else {
        return Err("it is not three parts with `:` between them, nor a file of a known kind");
    };
    if repo.split('/').count() > 2 || !repo.split('/').all(is_name) {
        return Err("the part before the first `:` is not a dataset's name");
    }
    // These become parts of paths.
    if !is_name(config) || !is_name(split) {
        return Err("configuration and split must be plain names");
    }
    Ok(HubSplit { repo: repo.to_owned(), config: config.to_owned(), split: split.to_owned() })
}

fn is_name(part: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
}

impl fmt::Display for DatasetSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Hub(hub) => write!(formatter, "{}:{}:{}", hub.repo, hub.config, hub.split)?,
            Place::File(path, _) => write!(formatter, "{}", path.display())?,
            Place::BuiltIn(index) => write!(formatter, "{BUILT_IN}{}", BUILT_IN_TEXTS[*index].0)?,
        }
        if self.column != DEFAULT_COLUMN {
            write!(formatter, "#{}", self.column)?;
        }
        Ok(())
    }
}

impl TryFrom<String> for DatasetSpec {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<DatasetSpec> for String {
    fn from(spec: DatasetSpec) -> Self {
        spec.to_string()
    }
}

#[cfg(test)]
#[path = "dataset_tests.rs"]
mod tests;
