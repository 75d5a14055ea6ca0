//! Calibration recipes as they are written: sources of text, how each becomes windows, how many.
//!
//! A recipe of one source has its keys at the top; one of several has a `[[source]]` table for each,
//! with the number of its windows or its share of the recipe's (see `calib/README.md`).

use std::path::Path;

use gptq_records::dataset_identity::DatasetIdentity;
use serde::Deserialize;

use crate::dataset::{DatasetSpec, Join};
use crate::error::{Error, Result};

/// Recipes that need no file, by the name they are asked for.
const BUILT_IN: [(&str, &str); 3] = [
    ("wikitext2", include_str!("../calib/wikitext2.toml")),
    ("mix", include_str!("../calib/mix.toml")),
    ("card", include_str!("../calib/card.toml")),
];

/// More than any calibration takes, and little enough to have a list of.
const MOST_WINDOWS: usize = 1 << 24;
/// More than any text has, and little enough to count work with.
pub const MOST_TOKENS: usize = 1 << 40;
/// Most sources of a recipe.
const MOST_SOURCES: usize = 64;

/// What to calibrate on.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationRecipe {
    /// The name shown in reports.
    pub name: String,
    /// Where the windows come from; at least one.
    pub sources: Vec<RecipeSource>,
    /// Length of a window, in tokens; the most that one has where a source's are rows.
    pub seq_len: usize,
    /// Seed of the windows' places, as given to Python's `random.seed`: source i, counted from 0, has
    /// `seed + i`.
    pub seed: u64,
}

/// One text, or set of conversations, of a recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct RecipeSource {
    /// Where its rows come from.
    pub dataset: DatasetSpec,
    /// How they become windows.
    pub cut: Cut,
    /// How many windows; of text they may overlap.
    pub windows: usize,
    /// Its part of all windows, over the sum of all parts.
    share: f64,
}

/// How rows become windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The rows are joined to one text, in which windows begin anywhere.
    Text(Join),
    /// Each window is the beginning of a row.
    Rows,
    /// Rows in random order, in the model's chat template, one after the other; window follows window.
    Chats,
    /// Each window is the beginning of a row in the model's chat template.
    ChatRows,
}

impl Cut {
    /// Whether rows are conversations, for a chat template.
    #[must_use]
    pub fn is_chat(self) -> bool {
        matches!(self, Self::Chats | Self::ChatRows)
    }

    /// Whether all windows have the recipe's length.
    #[must_use]
    pub fn is_packed(self) -> bool {
        matches!(self, Self::Text(_) | Self::Chats)
    }
}

/// Parts of a recipe replaced for one run; None keeps the recipe's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationOverrides {
    /// Another dataset, in place of all sources and cut as the first of them.
    pub dataset: Option<DatasetSpec>,
    /// Another way to make one text of its rows.
    pub join: Option<Join>,
    /// Another number of windows, of which each source keeps its share.
    pub windows: Option<usize>,
    /// Another window length, in tokens.
    pub seq_len: Option<usize>,
    /// Another seed.
    pub seed: Option<u64>,
}

/// A recipe's file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRecipe {
    name: String,
    dataset: Option<DatasetSpec>,
    join: Option<Join>,
    rows: Option<RawRows>,
    template: Option<RawTemplate>,
    windows: Option<usize>,
    seq_len: usize,
    seed: u64,
    #[serde(default)]
    source: Vec<RawSource>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSource {
    dataset: DatasetSpec,
    join: Option<Join>,
    rows: Option<RawRows>,
    template: Option<RawTemplate>,
    windows: Option<usize>,
    share: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawRows {
    Packed,
    Padded,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawTemplate {
    /// The model's own chat template.
    Chat,
}

impl CalibrationRecipe {
    /// The recipe of runs that name none.
    pub const DEFAULT: &'static str = "mix";

    /// The names that [`open`](Self::open) knows without a file.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|&(name, _)| name)
    }

    /// Finds a recipe by built-in name or by the path of a `.toml` file. Relative dataset paths in a
    /// file are taken from that file's folder.
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
            for source in &mut recipe.sources {
                source.dataset = source.dataset.clone().relative_to(folder);
            }
        }
        Ok(recipe)
    }

    /// The recipe with some of its parts replaced.
    ///
    /// # Errors
    /// When no windows, or windows of no use, would remain; and for a join where nothing is joined.
    pub fn with(mut self, overrides: CalibrationOverrides) -> Result<Self> {
        let windows = overrides.windows.unwrap_or(self.windows());
        if let Some(dataset) = overrides.dataset {
            let cut = match overrides.join {
                Some(join) => Cut::Text(join),
                None => self.sources[0].cut,
            };
            self.sources = vec![RecipeSource { dataset, cut, windows, share: 1.0 }];
        } else if let Some(join) = overrides.join {
            let joined = self.sources.iter_mut().filter(|s| matches!(s.cut, Cut::Text(_)));
            if joined.map(|source| source.cut = Cut::Text(join)).count() == 0 {
                return Err(self.invalid("none of its sources joins rows".to_owned()));
            }
        }
        self.seq_len = overrides.seq_len.unwrap_or(self.seq_len);
        self.seed = overrides.seed.unwrap_or(self.seed);
        self.spread(windows)?;
        Ok(self)
    }

    /// Windows of all sources.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.sources.iter().map(|source| source.windows).sum()
    }

    /// What it calibrates on, by name alone: nothing is read.
    #[must_use]
    pub fn unread(&self) -> DatasetIdentity {
        let unread = self.sources.iter().map(|source| source.dataset.unread());
        DatasetIdentity::of_sources(unread.collect())
    }

    /// Whether a source needs the model's chat template.
    #[must_use]
    pub fn is_chat(&self) -> bool {
        self.sources.iter().any(|source| source.cut.is_chat())
    }

    /// Gives each source its share of `windows`, so that they add up: the whole part of what it is
    /// due first, then one more to those that lack most (the method of largest remainders; of equal
    /// remainders the earlier source's).
    fn spread(&mut self, windows: usize) -> Result<()> {
        self.check(windows)?;
        // Over the largest, so that no sum overflows; and in billionths of a window, as 0.7 and 0.6 are no
        // binary fractions and equal remainders must be equal.
        let most = self.sources.iter().map(|source| source.share).fold(0.0, f64::max);
        let sum: f64 = self.sources.iter().map(|source| source.share / most).sum();
        let due = |share: f64| (windows as f64 * (share / most) / sum * 1e9).round() / 1e9;
        let due: Vec<f64> = self.sources.iter().map(|source| due(source.share)).collect();
        let mut left = windows;
        for (source, due) in self.sources.iter_mut().zip(&due) {
            source.windows = (due.floor() as usize).min(left);
            left -= source.windows;
        }
        let mut order: Vec<usize> = (0..due.len()).collect();
        let lacks = |index: usize| (due[index].fract() * 1e9).round() as u64;
        order.sort_by_key(|&index| std::cmp::Reverse(lacks(index)));
        for index in order.into_iter().cycle().take(left) {
            self.sources[index].windows += 1;
        }
        match self.sources.iter().find(|source| source.windows == 0) {
            Some(source) => Err(self.invalid(format!(
                "source `{}` gets none of the {windows} windows: ask for more of them",
                source.dataset
            ))),
            None => Ok(()),
        }
    }

    fn parse(text: &str, origin: &str) -> Result<Self> {
        let invalid = |reason| Error::RecipeInvalid { origin: origin.to_owned(), reason };
        // The message alone: the excerpt that toml adds takes several lines.
        let raw: RawRecipe =
            toml::from_str(text).map_err(|error| invalid(error.message().to_owned()))?;
        let (mut recipe, windows) = raw.recipe().map_err(invalid)?;
        recipe.spread(windows).map_err(|error| match error {
            Error::RecipeInvalid { reason, .. } => invalid(reason),
            other => other,
        })?;
        Ok(recipe)
    }

    fn check(&self, windows: usize) -> Result<()> {
        let reason = if windows == 0 {
            "windows must be at least 1"
        } else if self.seq_len == 0 {
            "seq_len must be at least 1"
        } else if windows > MOST_WINDOWS {
            "windows is more than 2^24"
        } else if windows.checked_mul(self.seq_len).is_none_or(|n| n > MOST_TOKENS) {
            "windows × seq_len is more than 2^40 tokens"
        } else {
            return Ok(());
        };
        Err(self.invalid(reason.to_owned()))
    }

    fn invalid(&self, reason: String) -> Error {
        Error::RecipeInvalid { origin: self.name.clone(), reason }
    }
}

impl RawRecipe {
    /// The recipe, its windows not given to its sources yet, and how many there are.
    fn recipe(self) -> Result<(CalibrationRecipe, usize), String> {
        let Self { name, dataset, join, rows, template, windows, seq_len, seed, source } = self;
        let recipe = |sources| CalibrationRecipe { name, sources, seq_len, seed };
        if source.is_empty() {
            let dataset = dataset.ok_or("missing field `dataset`")?;
            let cut = cut(join, rows, template)?;
            let windows = windows.ok_or("missing field `windows`")?;
            return Ok((recipe(vec![RecipeSource { dataset, cut, windows, share: 1.0 }]), windows));
        }
        if dataset.is_some() || join.is_some() || rows.is_some() || template.is_some() {
            return Err("dataset, join, rows and template belong into its [[source]] tables".into());
        }
        if source.len() > MOST_SOURCES {
            return Err(format!("it has more than {MOST_SOURCES} sources"));
        }
        let by_share = source.iter().all(|s| s.share.is_some() && s.windows.is_none());
        let by_count = source.iter().all(|s| s.share.is_none() && s.windows.is_some());
        let windows = match (by_share, by_count, windows) {
            (true, _, Some(windows)) => windows,
            (true, _, None) => {
                return Err("its sources have shares of windows, and it has no windows".into());
            }
            (_, true, None) => source
                .iter()
                .filter_map(|source| source.windows)
                .try_fold(0_usize, usize::checked_add)
                .ok_or("its windows are more than any text has")?,
            (_, true, Some(_)) => {
                return Err("windows stand in its sources and at its top: one of them".into());
            }
            _ => return Err("either each of its sources has a share, or each has windows".into()),
        };
        let sources = source.into_iter().map(RawSource::source).collect::<Result<_, String>>()?;
        Ok((recipe(sources), windows))
    }
}

impl RawSource {
    fn source(self) -> Result<RecipeSource, String> {
        let dataset = self.dataset;
        let at = |reason: String| format!("source `{dataset}`: {reason}");
        let cut = cut(self.join, self.rows, self.template).map_err(at)?;
        let share = self.share.unwrap_or(self.windows.unwrap_or(0) as f64);
        if !(share > 0.0 && share.is_finite()) {
            return Err(at(match self.share {
                Some(_) => "share must be more than 0".to_owned(),
                None => "windows must be at least 1".to_owned(),
            }));
        }
        Ok(RecipeSource { dataset, cut, windows: 0, share })
    }
}

/// What the keys of a source say.
fn cut(
    join: Option<Join>,
    rows: Option<RawRows>,
    template: Option<RawTemplate>,
) -> Result<Cut, String> {
    Ok(match (template, rows, join) {
        (None, None | Some(RawRows::Packed), Some(join)) => Cut::Text(join),
        (None, None, None) => return Err("missing field `join`".to_owned()),
        (None, Some(RawRows::Packed), None) => {
            return Err("packed rows of text need a `join`".to_owned());
        }
        (None, Some(RawRows::Padded), None) => Cut::Rows,
        (Some(RawTemplate::Chat), None | Some(RawRows::Packed), None) => Cut::Chats,
        (Some(RawTemplate::Chat), Some(RawRows::Padded), None) => Cut::ChatRows,
        (Some(_), _, Some(_)) => return Err("join and template exclude each other".to_owned()),
        (None, Some(RawRows::Padded), Some(_)) => {
            return Err("padded rows are not joined".to_owned());
        }
    })
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
