//! Sweep configurations: the branches of a table, as TOML.
//!
//! Top-level values are the branches' defaults. `configs/stablebeluga2.toml` and `configs/nine.toml`
//! are built in, so that `--branch` and `gptq plan` work from any folder.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{GroupSize, Layout, ModelConfig, PARTIAL_END};
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::source_dtype::SourceDtype;
use gptq_report::card_facts::CardFacts;
use gptq_text::calibration::{CalibrationOverrides, CalibrationRecipe};
use gptq_text::dataset::DatasetSpec;
use gptq_text::evaluation::EvaluationSpec;
use gptq_text::home::expand_home;
use gptq_text::protocol::Protocol;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::recipe_fit;

/// Name of the configuration that `--branch` uses when no file is given.
pub const BUILT_IN: &str = "stablebeluga2";
/// Name of the configuration of any model: it names none.
pub const ANY_MODEL: &str = "nine";
/// Configurations that need no file.
const BUILT_IN_TEXTS: [(&str, &str); 2] = [
    (BUILT_IN, include_str!("../../configs/stablebeluga2.toml")),
    (ANY_MODEL, include_str!("../../configs/nine.toml")),
];
const BUILT_IN_CARD: &str = include_str!("../../configs/cards/stablebeluga2.toml");

/// Bytes of a branch's name: file systems take 255, and a folder that is being made has a longer one.
const LONGEST_NAME: usize = 255 - PARTIAL_END.len();

/// A configuration file, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    model: Option<String>,
    calibration: String,
    #[serde(default)]
    calibration_overrides: CalibrationOverrides,
    #[serde(default = "modern")]
    layout: String,
    #[serde(default)]
    source_dtype: SourceDtype,
    recipe: Recipe,
    damp: Option<f64>,
    /// Single choices of every branch, as `KEY=VALUE`.
    #[serde(default)]
    set: Vec<String>,
    /// File with the facts of the model's cards.
    card: Option<String>,
    evaluation: Option<RawEvaluation>,
    branch: Vec<RawBranch>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEvaluation {
    dataset: DatasetSpec,
    protocol: Protocol,
    seq_len: Option<usize>,
    max_windows: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBranch {
    name: String,
    bits: u8,
    group_size: GroupSize,
    act_order: bool,
    damp: Option<f64>,
    recipe: Option<Recipe>,
    #[serde(default)]
    set: Vec<String>,
}

fn modern() -> String {
    "modern".to_owned()
}

/// A sweep: one source, one calibration, several branches.
#[derive(Clone, Debug)]
pub struct SweepConfig {
    /// Where it was read from, for messages.
    pub file: String,
    /// Hub id or folder of the dense model; none where any will do.
    pub model: Option<String>,
    /// What to calibrate on.
    pub calibration: CalibrationRecipe,
    /// File layout of every branch.
    pub layout: Layout,
    /// What is quantized of the source's weights.
    pub source_dtype: SourceDtype,
    /// What to measure each branch on.
    pub evaluation: Option<EvaluationSpec>,
    /// What the model's cards say, where there are to be cards.
    pub card: Option<CardFacts>,
    /// The branches, in order.
    pub branches: Vec<Branch>,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Folder and Hub branch name.
    pub name: String,
    /// Solver choices.
    pub spec: QuantSpec,
    /// The damping is the configuration's, not the recipe's default.
    pub own_damp: bool,
}

impl SweepConfig {
    /// Leaves out of every branch what the model does not allow ([`recipe_fit::fit`]); a sentence on each thing.
    pub fn fit(&mut self, model: &ModelConfig, arriving: bool) -> Vec<String> {
        let mut notes = Vec::new();
        for branch in &mut self.branches {
            for note in recipe_fit::fit(model, arriving, &mut branch.spec) {
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
        notes
    }

    /// Reads a configuration file, or the built-in one of that name.
    ///
    /// # Errors
    /// A file that cannot be read, unknown keys, and values that no branch can have.
    pub fn open(name_or_path: &str) -> Result<Self> {
        if let Some((name, text)) = BUILT_IN_TEXTS.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(text, name, Path::new(""));
        }
        let path = Path::new(name_or_path);
        let text = gptq_checkpoint::read_small_text(path)
            .map_err(gptq_records::Error::io("read", path))?;
        Self::parse(&text, name_or_path, path.parent().unwrap_or(Path::new("")))
    }

    fn parse(text: &str, file: &str, folder: &Path) -> Result<Self> {
        let advised = |message, advice| Error::Config { file: file.to_owned(), message, advice };
        let invalid = |message: String| advised(message, None);
        let raw: RawConfig =
            toml::from_str(text).map_err(|e| invalid(e.to_string().trim_end().to_owned()))?;
        let mut branches: Vec<Branch> = Vec::with_capacity(raw.branch.len());
        for branch in &raw.branch {
            let at = |message: String| invalid(format!("branch `{}`: {message}", branch.name));
            let spec = branch_spec(branch, &raw).map_err(|error| {
                let advice = error.hint().map(Cow::into_owned);
                advised(format!("branch `{}`: {error}", branch.name), advice)
            })?;
            check_name(&branch.name, &branches).map_err(at)?;
            let own_damp = branch.damp.or(raw.damp).is_some();
            branches.push(Branch { name: branch.name.clone(), spec, own_damp });
        }
        if branches.is_empty() {
            return Err(invalid("it has no [[branch]]".to_owned()));
        }
        let layout = raw.layout.parse().map_err(invalid)?;
        let home = |path| expand_home(path).map_err(|e| advised(e.to_string(), Some(e.hint())));
        let calibration = home(&raw.calibration)?;
        let local = folder.join(calibration.as_ref());
        let calibration = if calibration.ends_with(".toml") && local.is_file() {
            CalibrationRecipe::open(&local.to_string_lossy())?
        } else {
            CalibrationRecipe::open(&calibration)?
        };
        let card = match &raw.card {
            Some(path) if file == BUILT_IN => {
                Some(CardFacts::parse(BUILT_IN_CARD, Path::new(path))?)
            }
            Some(path) => {
                let path = home(path)?;
                Some(CardFacts::open(&folder.join(path.as_ref()), None)?)
            }
            None => None,
        };
        let model = raw.model.as_deref().map(home).transpose()?;
        let mut overrides = raw.calibration_overrides;
        overrides.dataset = overrides.dataset.map(|dataset| dataset.relative_to(folder));
        Ok(Self {
            file: file.to_owned(),
            model: model.map(|model| local_model(&model, folder)),
            calibration: calibration.with(overrides)?,
            layout,
            source_dtype: raw.source_dtype,
            card,
            evaluation: raw.evaluation.map(|e| EvaluationSpec {
                dataset: e.dataset.relative_to(folder),
                protocol: e.protocol,
                seq_len: e.seq_len,
                max_windows: e.max_windows,
            }),
            branches,
        })
    }

    /// First Grams that a sweep of these branches keeps: one of each rotation.
    #[must_use]
    pub fn shared_grams(&self) -> usize {
        let mut rotations = Vec::new();
        for spec in self.branches.iter().map(|b| &b.spec).filter(|s| s.recipe.calibrates()) {
            if !rotations.contains(&spec.choices.rotate) {
                rotations.push(spec.choices.rotate);
            }
        }
        rotations.len()
    }

    /// The branch of that name.
    pub fn branch(&self, name: &str) -> Result<&Branch> {
        self.branches.iter().find(|b| b.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.branches.iter().map(|b| b.name.as_str()).collect();
            Error::UnknownBranch {
                branch: name.to_owned(),
                file: self.file.clone(),
                known: known.join(", "),
            }
        })
    }
}

fn branch_spec(branch: &RawBranch, defaults: &RawConfig) -> gptq_quant::Result<QuantSpec> {
    let GroupSize(group_size) = branch.group_size;
    let recipe = branch.recipe.unwrap_or(defaults.recipe);
    let damp = branch.damp.or(defaults.damp).unwrap_or(recipe.damp());
    let mut spec = QuantSpec::new(branch.bits, group_size, branch.act_order, damp, recipe);
    for settings in [&defaults.set, &branch.set] {
        spec.set(settings)?;
    }
    spec.validate()?;
    Ok(spec)
}

/// Branch names become folders and Hub branches.
fn check_name(name: &str, before: &[Branch]) -> std::result::Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err("the name may hold letters, digits, `-`, `_` and `.` only".to_owned());
    }
    // Whatever the case: not every file system distinguishes `Sweep.json` from `sweep.json`.
    let lower = name.to_ascii_lowercase();
    if ["sweep.json", "readme.md"].contains(&lower.as_str()) || lower.ends_with(PARTIAL_END) {
        return Err("a sweep has files and working folders of that name".to_owned());
    }
    if name.len() > LONGEST_NAME {
        return Err(format!("the name has {} letters, more than {LONGEST_NAME}", name.len()));
    }
    if let Some(other) = before.iter().find(|b| b.name.eq_ignore_ascii_case(name)) {
        return Err(match other.name == name {
            true => "the name is used twice".to_owned(),
            false => {
                format!(
                    "`{}` differs in case only, which not every file system distinguishes",
                    other.name
                )
            }
        });
    }
    Ok(())
}

/// A model path in a file counts from that file's folder; anything else is a Hub id.
fn local_model(model: &str, folder: &Path) -> String {
    let local: PathBuf = folder.join(model);
    if local.is_dir() { local.to_string_lossy().into_owned() } else { model.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_has_the_nine_published_branches() {
        let config = SweepConfig::open(BUILT_IN).unwrap();
        let rows: Vec<(u8, Option<usize>, bool)> = config
            .branches
            .iter()
            .map(|b| (b.spec.bits, b.spec.group_size, b.spec.act_order))
            .collect();
        assert_eq!(
            rows,
            [
                (4, Some(32), true),
                (4, Some(64), true),
                (4, Some(128), true),
                (4, Some(128), false),
                (4, None, true),
                (3, Some(64), true),
                (3, Some(128), true),
                (3, Some(128), false),
                (3, None, true),
            ]
        );
        assert!(config.branches.iter().all(|b| b.spec.damp == 0.01));
        assert!(config.branches.iter().all(|b| b.spec.recipe == Recipe::AutoGptq));
        assert_eq!(config.layout, Layout::Card);
        assert_eq!(config.branch("main").unwrap().spec.group_size, None);
        assert_eq!(config.card.as_ref().unwrap().name, "StableBeluga2");
        assert!(config.branch("nain").unwrap_err().to_string().contains("main"));
    }

    /// What is planned for any model is what was published for one, by the better recipe.
    #[test]
    fn any_model_has_the_settings_of_the_published_table() {
        let (any, published) =
            (SweepConfig::open(ANY_MODEL).unwrap(), SweepConfig::open(BUILT_IN).unwrap());
        let settings = |config: &SweepConfig| {
            let setting = |b: &Branch| (b.spec.bits, b.spec.group_size, b.spec.act_order);
            config.branches.iter().map(setting).collect::<Vec<_>>()
        };
        assert_eq!(settings(&any), settings(&published));
        assert!(any.branches.iter().all(|b| b.spec.recipe == Recipe::Best));
        assert_eq!(any.model, None);
        let evaluation = any.evaluation.unwrap();
        assert_ne!(evaluation.dataset.to_string(), any.calibration.unread().name);
    }

    #[test]
    fn mistakes_name_the_branch() {
        let parse = |branch: &str| {
            let text = format!(
                "model = \"m\"\ncalibration = \"card\"\nrecipe = \"autogptq\"\ndamp = 0.01\n{branch}"
            );
            SweepConfig::parse(&text, "x.toml", Path::new("")).unwrap_err().to_string()
        };
        let branch = |name: &str, bits: u8, group: &str| {
            format!(
                "[[branch]]\nname = \"{name}\"\nbits = {bits}\ngroup_size = {group}\nact_order = true\n"
            )
        };
        assert!(parse(&branch("a", 5, "32")).contains("branch `a`: 5 bits"));
        for wrong in ["\"all\"", "0", "-2", "1.5", "true", "300000000"] {
            let error = parse(&branch("a", 4, wrong));
            assert!(
                error.contains("268435456, or none") && error.contains("group_size"),
                "{error}"
            );
        }
        assert!(parse(&branch("a/b", 4, "32")).contains("letters, digits"));
        for taken in ["sweep.json", "README.md", "a.partial"] {
            let error = parse(&branch(taken, 4, "32"));
            assert!(error.contains(&format!("branch `{taken}`: a sweep has files")), "{error}");
        }
        let twice = branch("a", 4, "32") + &branch("a", 3, "32");
        assert!(parse(&twice).contains("used twice"));
        let cased = branch("Ab", 4, "32") + &branch("aB", 3, "32");
        assert!(parse(&cased).contains("branch `aB`: `Ab` differs in case only"));
        let long = parse(&branch(&"a".repeat(248), 4, "32"));
        assert!(long.contains("has 248 letters, more than 247"), "{long}");
        assert!(parse(&format!("typo = 1\n{}", branch("a", 4, "32"))).contains("typo"));
    }
}
