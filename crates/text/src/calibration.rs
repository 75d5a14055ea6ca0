//! Calibration recipes: which text calibrates a model, and which windows are cut from it.
//!
//! A recipe is a small TOML file (see `calib/README.md`). Windows start at offsets drawn by
//! Python's generator over one long encoded text, which is how the published branches were
//! calibrated; the digest of the tokens makes "the same calibration" a checkable statement.

use std::path::Path;

use gptq_records::dataset_identity::DatasetIdentity;
use gptq_records::digest::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::dataset::{Dataset, DatasetSpec, Join};
use crate::error::{Error, Result};
use crate::python_random::PythonRandom;
use crate::tokens::TextTokenizer;

/// Recipes that need no file, by the name they are asked for.
const BUILT_IN: [(&str, &str); 2] = [
    ("card", include_str!("../calib/card.toml")),
    ("wikitext2", include_str!("../calib/wikitext2.toml")),
];

/// What to calibrate on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationRecipe {
    /// The name shown in reports.
    pub name: String,
    /// Where the text comes from.
    pub dataset: DatasetSpec,
    /// How its rows become one text.
    pub join: Join,
    /// How many windows are drawn; they may overlap.
    pub windows: usize,
    /// Length of a window, in tokens.
    pub seq_len: usize,
    /// Seed of the offsets, as given to Python's `random.seed`.
    pub seed: u64,
}

/// More than any text has, and little enough to count work with.
pub const MOST_TOKENS: usize = 1 << 40;

/// Parts of a recipe replaced for one run; None keeps the recipe's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationOverrides {
    /// Another dataset.
    pub dataset: Option<DatasetSpec>,
    /// Another way to make one text of its rows.
    pub join: Option<Join>,
    /// Another number of windows.
    pub windows: Option<usize>,
    /// Another window length, in tokens.
    pub seq_len: Option<usize>,
    /// Another seed.
    pub seed: Option<u64>,
}

/// The windows of a recipe, as tokens of one tokenizer.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// `[windows][seq_len]` tokens, in the order drawn.
    pub windows: Vec<Vec<u32>>,
    /// Where each window starts in the encoded text, in tokens.
    pub offsets: Vec<usize>,
    /// Length of the encoded text.
    pub tokens_in_text: usize,
    /// SHA-256 (hex) of all windows' tokens as little-endian u32.
    pub sha256: String,
    /// Seed of the offsets.
    pub seed: u64,
    /// The text they were drawn from.
    pub dataset: DatasetIdentity,
    /// Rows of it.
    pub rows: usize,
    /// Rows that the join lets run into the next.
    pub glued: usize,
}

impl CalibrationRecipe {
    /// The names that [`open`](Self::open) knows without a file.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|&(name, _)| name)
    }

    /// Finds a recipe by built-in name or by the path of a `.toml` file. A relative dataset path
    /// in a file is taken from that file's folder.
    ///
    /// # Errors
    /// When there is no such recipe, or it is invalid.
    pub fn open(name_or_path: &str) -> Result<Self> {
        if let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(text, name);
        }
        let path = Path::new(name_or_path);
        if path.extension().is_none_or(|extension| extension != "toml") {
            let built_in: Vec<&str> = Self::built_in_names().collect();
            return Err(Error::RecipeUnknown {
                name: name_or_path.to_owned(),
                built_in: built_in.join(", "),
            });
        }
        let text = gptq_checkpoint::read_small_text(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let mut recipe = Self::parse(&text, name_or_path)?;
        if let Some(folder) = path.parent() {
            recipe.dataset = recipe.dataset.relative_to(folder);
        }
        Ok(recipe)
    }

    /// The recipe with some of its parts replaced.
    ///
    /// # Errors
    /// When no windows, or windows of no use, would remain.
    pub fn with(mut self, overrides: CalibrationOverrides) -> Result<Self> {
        self.dataset = overrides.dataset.unwrap_or(self.dataset);
        self.join = overrides.join.unwrap_or(self.join);
        self.windows = overrides.windows.unwrap_or(self.windows);
        self.seq_len = overrides.seq_len.unwrap_or(self.seq_len);
        self.seed = overrides.seed.unwrap_or(self.seed);
        self.check(&self.name)?;
        Ok(self)
    }

    /// Reads the dataset, encodes it and draws the windows.
    ///
    /// # Errors
    /// When the dataset cannot be read or encoded, or is too short for one window.
    pub fn sample(&self, tokenizer: &TextTokenizer) -> Result<Calibration> {
        let Dataset { rows, identity } = self.dataset.load()?;
        let (count, glued) = (rows.len(), self.join.glued(&rows));
        let ids = tokenizer.encode(&self.join.text(rows))?;
        let drawn = self.draw(&ids, identity)?;
        Ok(Calibration { rows: count, glued, ..drawn })
    }

    /// Draws the windows from an encoded text of one row.
    fn draw(&self, ids: &[u32], dataset: DatasetIdentity) -> Result<Calibration> {
        // Python's randint includes its upper end, N − seq_len − 1; so the text must exceed a
        // window by one token, and its last token is never drawn.
        let needed = self.seq_len.saturating_add(1);
        let Some(last_offset) = ids.len().checked_sub(needed) else {
            return Err(Error::CalibrationTextTooShort {
                dataset: dataset.name,
                tokens: ids.len(),
                needed,
            });
        };
        let mut random = PythonRandom::new(self.seed);
        let offsets: Vec<usize> =
            (0..self.windows).map(|_| random.up_to(last_offset as u64) as usize).collect();
        let windows: Vec<Vec<u32>> =
            offsets.iter().map(|&start| ids[start..start + self.seq_len].to_vec()).collect();
        let sha256 = digest(&windows);
        let (tokens_in_text, seed) = (ids.len(), self.seed);
        let (rows, glued) = (1, 0);
        Ok(Calibration { windows, offsets, tokens_in_text, sha256, seed, dataset, rows, glued })
    }

    fn parse(text: &str, origin: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text).map_err(|error| Error::RecipeInvalid {
            origin: origin.to_owned(),
            // The message alone: the excerpt that toml adds takes several lines.
            reason: error.message().to_owned(),
        })?;
        recipe.check(origin)?;
        Ok(recipe)
    }

    fn check(&self, origin: &str) -> Result<()> {
        let reason = if self.windows == 0 {
            "windows must be at least 1"
        } else if self.seq_len == 0 {
            "seq_len must be at least 1"
        } else if self.windows.checked_mul(self.seq_len).is_none_or(|n| n > MOST_TOKENS) {
            "windows × seq_len is more than 2^40 tokens"
        } else {
            return Ok(());
        };
        Err(Error::RecipeInvalid { origin: origin.to_owned(), reason: reason.to_owned() })
    }
}

fn digest(windows: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for window in windows {
        let bytes: Vec<u8> = window.iter().flat_map(|id| id.to_le_bytes()).collect();
        hash.update(bytes);
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::protocol::Protocol;

    const RECIPE: &str = r#"
        name = "own"
        dataset = "text/own.txt"
        join = "paragraphs"
        windows = 3
        seq_len = 4
        seed = 0
    "#;

    fn identity() -> DatasetIdentity {
        DatasetIdentity::new("own.txt".to_owned(), None, &[])
    }

    #[test]
    fn built_in_recipes_are_as_published() {
        let card = CalibrationRecipe::open("card").unwrap();
        assert_eq!(card.dataset.to_string(), "Salesforce/wikitext:wikitext-2-raw-v1:test");
        assert_eq!((card.join, card.windows, card.seq_len, card.seed), (Join::Card, 128, 4096, 0));
        let clean = CalibrationRecipe::open("wikitext2").unwrap();
        assert_eq!(clean.dataset.to_string(), "Salesforce/wikitext:wikitext-2-v1:validation");
        assert_eq!((clean.join, clean.windows, clean.seq_len), (Join::Card, 128, 2048));
        for name in CalibrationRecipe::built_in_names() {
            assert_eq!(CalibrationRecipe::open(name).unwrap().name, name);
        }
    }

    #[test]
    fn a_file_takes_its_dataset_from_its_own_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.toml");
        fs::write(&path, RECIPE).unwrap();
        let recipe = CalibrationRecipe::open(path.to_str().unwrap()).unwrap();
        let expected = folder.path().join("text/own.txt");
        assert_eq!(recipe.dataset.to_string(), expected.to_str().unwrap());
        let json = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<CalibrationRecipe>(&json).unwrap(), recipe);
    }

    #[test]
    fn invalid_recipes_say_why() {
        for (from, to, reason) in [
            ("seed = 0", "sede = 0", "unknown field `sede`"),
            ("seed = 0", "", "missing field `seed`"),
            ("\"paragraphs\"", "\"lines\"", "unknown variant `lines`"),
            ("windows = 3", "windows = 0", "windows must be at least 1"),
            ("text/own.txt", "text/own.csv", "Dataset `text/own.csv` cannot be read"),
        ] {
            let error = CalibrationRecipe::parse(&RECIPE.replace(from, to), "own.toml");
            let error = error.unwrap_err().to_string();
            assert!(error.contains("`own.toml` is invalid") && error.contains(reason), "{error}");
        }
        let error = CalibrationRecipe::open("cards").unwrap_err().to_string();
        assert!(error.starts_with("Calibration recipe `cards` is neither built in (card, "));
        assert!(matches!(CalibrationRecipe::open("no.toml"), Err(Error::Read { .. })));
    }

    #[test]
    fn overrides_replace_only_what_they_name() {
        let recipe = CalibrationRecipe::parse(RECIPE, "own").unwrap();
        assert_eq!(recipe.clone().with(CalibrationOverrides::default()).unwrap(), recipe);
        let overrides = CalibrationOverrides {
            dataset: Some("b.txt".parse().unwrap()),
            join: Some(Join::Card),
            windows: Some(7),
            seq_len: Some(8),
            seed: Some(9),
        };
        let changed = recipe.clone().with(overrides).unwrap();
        assert_eq!((changed.windows, changed.seq_len, changed.seed), (7, 8, 9));
        assert_eq!((recipe.join, changed.join), (Join::Paragraphs, Join::Card));
        assert_eq!(changed.dataset.to_string(), "b.txt");
        let none = CalibrationOverrides { windows: Some(0), ..Default::default() };
        assert!(recipe.with(none).is_err());
    }

    #[test]
    fn a_text_must_exceed_a_window_by_one_token() {
        let recipe = CalibrationRecipe::parse(RECIPE, "own").unwrap();
        let drawn = recipe.draw(&[5, 6, 7, 8, 9], identity()).unwrap();
        assert_eq!(drawn.windows, vec![vec![5, 6, 7, 8]; 3]);
        assert_eq!((drawn.offsets, drawn.tokens_in_text), (vec![0; 3], 5));
        // python3 -c "import hashlib, struct;
        //   print(hashlib.sha256(struct.pack('<4I', 5, 6, 7, 8) * 3).hexdigest())"
        assert_eq!(
            drawn.sha256,
            "5b5b71a62e4e69e465ecc618f3820e449afd344a2d3a55c038d2a9299d82a4a0"
        );
        let error = recipe.draw(&[5, 6, 7, 8], identity()).unwrap_err();
        let text = "Dataset `own.txt` gives 4 tokens but one window needs 5";
        assert_eq!(error.to_string(), text);
        assert_eq!(error.hint().unwrap(), "use a longer text or a smaller seq_len");
    }

    /// The published branches' windows, cut from the real text by the real tokenizer.
    #[test]
    fn card_recipe_reproduces_the_published_windows() {
        let Some(shared) = crate::needs::shared() else { return };
        let hub = shared.join("hf/hub");
        let snapshot = |repo: &str| {
            let revision = fs::read_to_string(hub.join(repo).join("refs/main")).unwrap();
            hub.join(repo).join("snapshots").join(revision.trim())
        };
        let model = snapshot("models--stabilityai--StableBeluga2");
        let tokenizer = TextTokenizer::open(&model, 32_000).unwrap();
        assert_eq!(tokenizer.bos(), Some(1));
        // By the path of its file, so that the test does not depend on HF_HOME.
        let file = snapshot("datasets--Salesforce--wikitext")
            .join("wikitext-2-raw-v1/test-00000-of-00001.parquet");
        let dataset: DatasetSpec = file.to_str().unwrap().parse().unwrap();
        let overrides =
            CalibrationOverrides { dataset: Some(dataset.clone()), ..Default::default() };
        let card = CalibrationRecipe::open("card").unwrap().with(overrides).unwrap();

        let calibration = card.sample(&tokenizer).unwrap();
        assert_eq!(calibration.tokens_in_text, 335_688);
        assert_eq!(calibration.offsets[..6], [201979, 220500, 21225, 135746, 268055, 254766]);
        assert_eq!(calibration.offsets.iter().min(), Some(&599));
        assert_eq!(calibration.offsets.iter().max(), Some(&330_378));
        assert_eq!(
            calibration.sha256,
            "34b7533d44aeb79631ca1cc86b5032f75462a8580cb9086e067d08cf8b53cada"
        );

        let text = Join::Paragraphs.text(dataset.rows().unwrap());
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids.len(), 341_469);
        let windows = Protocol::Paper.windows(&ids, 2048, tokenizer.bos(), None).unwrap();
        assert_eq!(windows.len(), 166);
    }
}
