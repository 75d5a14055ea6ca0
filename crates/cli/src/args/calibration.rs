//! `--calib` and the options that replace one value of a calibration recipe.

use clap::Args;
use gptq_text::calibration::CalibrationOverrides;
use gptq_text::dataset::{DatasetSpec, Join};

use super::values::{parse_count, parse_whole};

/// What to calibrate on.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Calibration recipe: mix, wikitext2, card, or a TOML file [default: the configuration's, or
    /// mix without one]; `gptq calib` shows what it holds
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) calib: Option<String>,
    #[command(flatten)]
    pub(crate) changes: RecipeChanges,
}

/// What to change in a recipe.
#[derive(Debug, Args)]
pub(crate) struct RecipeChanges {
    /// Text instead of all of the recipe's, cut as its first: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl,
    /// .parquet, or builtin:addresses
    #[arg(long, value_name = "DATASET")]
    pub(crate) calib_dataset: Option<DatasetSpec>,
    /// How the text's rows are joined, instead of the recipe's way: card (nothing between rows;
    /// wikitext2 and card do so) or paragraphs (a blank line between)
    #[arg(long, value_name = "JOIN")]
    pub(crate) calib_join: Option<Join>,
    /// Number of calibration windows instead of the recipe's, of which each source keeps its share
    #[arg(long, value_name = "N", alias = "nsamples", alias = "num-samples", value_parser = parse_count)]
    pub(crate) windows: Option<usize>,
    /// Tokens of a calibration window instead of the recipe's
    #[arg(long, value_name = "N", alias = "seqlen", value_parser = parse_count)]
    pub(crate) seq_len: Option<usize>,
    /// Seed of the windows' positions instead of the recipe's
    #[arg(long, value_name = "N", value_parser = parse_whole::<u64>)]
    pub(crate) seed: Option<u64>,
}

impl CalibrationArgs {
    /// Whether any of them was given.
    pub(crate) fn is_given(&self) -> bool {
        self.calib.is_some() || self.overrides() != CalibrationOverrides::default()
    }

    /// The values that replace a recipe's.
    pub(crate) fn overrides(&self) -> CalibrationOverrides {
        self.changes.overrides()
    }
}

impl RecipeChanges {
    /// The values that replace a recipe's.
    pub(crate) fn overrides(&self) -> CalibrationOverrides {
        CalibrationOverrides {
            dataset: self.calib_dataset.clone(),
            join: self.calib_join,
            windows: self.windows,
            seq_len: self.seq_len,
            seed: self.seed,
        }
    }
}
