//! Which text a dataset holds, so that a report can say whether a split was also calibrated on.
//!
//! A perplexity measured on the calibration text is optimistic. The same text hides behind several
//! names, so two datasets count as the same when either their names say so (the same Hub split, or
//! two spellings of one) or their text does (a local copy of a Hub split).

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::digest::{hex, sha256};

/// A split of a dataset on the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HubSplit {
    /// `ORG/NAME`, or `NAME` for the Hub's oldest datasets.
    pub repo: String,
    /// The configuration, for example `wikitext-2-raw-v1`.
    pub config: String,
    /// The split, for example `test`.
    pub split: String,
}

/// What a dataset is called and what it holds. Kept in reports and beside quantized checkpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DatasetIdentity {
    /// The dataset as named by the user.
    pub name: String,
    /// The Hub split, unless the dataset is a local file.
    pub hub: Option<HubSplit>,
    /// SHA-256 (hex) of the rows' text without whitespace. Rows, joins and file formats differ in
    /// whitespace only, so a local copy has the fingerprint of the split it was made from. Of several
    /// sources it is that of their fingerprints.
    pub fingerprint: String,
    /// The datasets that a calibration of several takes its windows from; left out where it is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<DatasetIdentity>,
}

/// What stands between the names of several sources.
const BETWEEN_NAMES: &str = " + ";

impl DatasetIdentity {
    /// Describes a dataset by its name, its Hub split if it has one, and its rows.
    #[must_use]
    pub fn new(name: String, hub: Option<HubSplit>, rows: &[String]) -> Self {
        Self::of_texts(name, hub, rows.iter().map(String::as_str))
    }

    /// As [`new`](Self::new), of rows that hold several texts each, as conversations do.
    #[must_use]
    pub fn of_texts<'t>(
        name: String,
        hub: Option<HubSplit>,
        texts: impl Iterator<Item = &'t str>,
    ) -> Self {
        let mut hash = Sha256::new();
        for piece in texts.flat_map(str::split_whitespace) {
            hash.update(piece.as_bytes());
        }
        Self { name, hub, fingerprint: hex(&hash.finalize()), sources: Vec::new() }
    }

    /// Several datasets that one calibration takes its windows from; a single one is itself.
    #[must_use]
    pub fn of_sources(mut sources: Vec<Self>) -> Self {
        if sources.len() == 1
            && let Some(only) = sources.pop()
        {
            return only;
        }
        let names: Vec<&str> = sources.iter().map(|source| source.name.as_str()).collect();
        let name = names.join(BETWEEN_NAMES);
        let fingerprints: String = sources.iter().map(|source| &*source.fingerprint).collect();
        let fingerprint = sha256(fingerprints.as_bytes());
        Self { name, hub: None, fingerprint, sources }
    }

    /// The datasets themselves: its sources, or it alone.
    pub fn each(&self) -> &[Self] {
        if self.sources.is_empty() { std::slice::from_ref(self) } else { &self.sources }
    }

    /// The same dataset as reports and weight files name it: a local file without its folders, which
    /// are one machine's own.
    #[must_use]
    pub fn portable(&self) -> Self {
        if !self.sources.is_empty() {
            return Self::of_sources(self.sources.iter().map(Self::portable).collect());
        }
        let mut portable = self.clone();
        if let (None, Some(name)) = (&self.hub, Path::new(&self.name).file_name()) {
            portable.name = name.to_string_lossy().into_owned();
        }
        portable
    }
}

/// Whether an evaluation on `evaluation` scores text that `calibration` drew its windows from, or any
/// of its sources did.
///
/// Overlap is judged per split: a local file with part of a split is not recognized.
#[must_use]
pub fn contaminated(calibration: &DatasetIdentity, evaluation: &DatasetIdentity) -> bool {
    calibration.each().iter().any(|one| evaluation.each().iter().any(|other| same(one, other)))
}

fn same(calibration: &DatasetIdentity, evaluation: &DatasetIdentity) -> bool {
    let same_split = match (&calibration.hub, &evaluation.hub) {
        (Some(one), Some(other)) => articles(one) == articles(other),
        _ => false,
    };
    same_split || calibration.fingerprint == evaluation.fingerprint
}

/// Names the articles behind a split: equal for two splits made from the same articles.
fn articles(hub: &HubSplit) -> (String, String, &str) {
    // The Hub resolves repository names whatever their case.
    let repo = hub.repo.to_lowercase();
    if repo != "salesforce/wikitext" && repo != "wikitext" {
        return (repo, hub.config.clone(), &hub.split);
    }
    // `-raw` differs in tokenization only (`<unk>`, ` @-@ `). WikiText-2 and WikiText-103 share
    // their validation and test articles and differ in the size of train (Merity et al. 2016, §4).
    let size = match hub.split.as_str() {
        "validation" | "test" => String::new(),
        _ => hub.config.replace("-raw", ""),
    };
    ("wikitext".to_owned(), size, &hub.split)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(repo: &str, config: &str, split: &str) -> DatasetIdentity {
        let name = format!("{repo}:{config}:{split}");
        let hub =
            HubSplit { repo: repo.to_owned(), config: config.to_owned(), split: split.to_owned() };
        // The name as text keeps fingerprints apart, so that these tests see names only.
        DatasetIdentity::new(name.clone(), Some(hub), &[name])
    }

    fn file(rows: &[&str]) -> DatasetIdentity {
        let rows: Vec<String> = rows.iter().map(|&row| row.to_owned()).collect();
        DatasetIdentity::new("local.txt".to_owned(), None, &rows)
    }

    #[test]
    fn wikitext_spellings_of_one_split_are_the_same_articles() {
        let card = hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test");
        for (config, split, expected) in [
            ("wikitext-2-raw-v1", "test", true),
            ("wikitext-2-v1", "test", true),
            ("wikitext-103-raw-v1", "test", true),
            ("wikitext-2-v1", "validation", false),
            ("wikitext-2-raw-v1", "train", false),
        ] {
            for repo in ["Salesforce/wikitext", "salesforce/WikiText", "wikitext"] {
                let other = hub(repo, config, split);
                assert_eq!(contaminated(&card, &other), expected, "{}", other.name);
                assert_eq!(contaminated(&other, &card), expected, "{}", other.name);
            }
        }
        let train = hub("wikitext", "wikitext-2-raw-v1", "train");
        assert!(contaminated(&train, &hub("wikitext", "wikitext-2-v1", "train")));
        assert!(!contaminated(&train, &hub("wikitext", "wikitext-103-v1", "train")));
    }

    #[test]
    fn other_datasets_are_compared_by_repo_config_and_split() {
        let one = hub("allenai/c4", "en", "validation");
        assert!(contaminated(&one, &hub("allenai/c4", "en", "validation")));
        assert!(!contaminated(&one, &hub("allenai/c4", "en", "train")));
        assert!(!contaminated(&one, &hub("allenai/c4", "de", "validation")));
        assert!(!contaminated(&one, &hub("someone/c4", "en", "validation")));
    }

    #[test]
    fn portable_names_have_no_folders() {
        let of = |name: &str| DatasetIdentity::new(name.to_owned(), None, &[]).portable().name;
        assert_eq!(of("/home/me/../data/book.jsonl#body"), "book.jsonl#body");
        assert_eq!(of("book.txt"), "book.txt");
        let split = hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test");
        assert_eq!(split.portable(), split);
    }

    /// One contaminated source is enough, whatever its share; and a report of one source has no word of
    /// sources, as before there were any.
    #[test]
    fn several_sources_are_each_compared() {
        let test = hub("wikitext", "wikitext-2-raw-v1", "test");
        let own = DatasetIdentity::new("/home/me/own.txt".to_owned(), None, &["own".to_owned()]);
        let both = DatasetIdentity::of_sources(vec![own.clone(), test.clone()]);
        assert_eq!(both.name, "/home/me/own.txt + wikitext:wikitext-2-raw-v1:test");
        assert_eq!(both.portable().name, "own.txt + wikitext:wikitext-2-raw-v1:test");
        assert_eq!(both.portable().fingerprint, both.fingerprint);
        assert!(contaminated(&both, &test) && contaminated(&both, &own));
        assert!(!contaminated(&both, &file(&["another"])));
        assert_eq!(DatasetIdentity::of_sources(vec![own.clone()]), own);
        let json = serde_json::to_string(&both).unwrap();
        assert_eq!(serde_json::from_str::<DatasetIdentity>(&json).unwrap(), both);
        assert!(!serde_json::to_string(&own).unwrap().contains("sources"));
        let old = r#"{"name": "a.txt", "hub": null, "fingerprint": "00"}"#;
        assert!(serde_json::from_str::<DatasetIdentity>(old).unwrap().sources.is_empty());
    }

    #[test]
    fn copies_are_recognized_by_their_text() {
        let rows = file(&["", " = Title = \n", " Text . \n"]);
        let whole = file(&[" \n = Title = \n Text . \n"]);
        assert!(contaminated(&rows, &whole));
        assert!(!contaminated(&rows, &file(&[" = Title = \n Text \n"])));
        let mut split = hub("a/b", "c", "test");
        split.fingerprint.clone_from(&whole.fingerprint);
        assert!(contaminated(&split, &rows));
    }
}
