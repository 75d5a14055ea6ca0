//! What a branch asks of the solver.

use gptq_checkpoint::GroupSize;
use serde::{Deserialize, Serialize};

use crate::choices::{Choices, Rotate, Signs};
use crate::error::{Error, Result};

/// A named set of solver choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// The lowest loss that the same file can hold.
    Best,
    /// That, with scales tuned by the whole model's KL to the unquantized one.
    Tuned,
    /// AutoGPTQ 0.3–0.7's numerics, oddities included.
    AutoGptq,
    /// Round to nearest: no calibration.
    Rtn,
}

impl Recipe {
    /// The name used on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::Tuned => "tuned",
            Self::AutoGptq => "autogptq",
            Self::Rtn => "rtn",
        }
    }

    /// The choices that the name stands for; round to nearest takes AutoGPTQ's scales.
    pub fn choices(self) -> Choices {
        match self {
            Self::Best => Choices::BEST,
            Self::Tuned => Choices::TUNED,
            Self::AutoGptq | Self::Rtn => Choices::AUTOGPTQ,
        }
    }

    /// Damping where none is asked for: a fraction of mean(diag H). A target that was shifted by
    /// H⁻¹ bears more than AutoGPTQ's 0.01 (tests/bench/2026-11-24-best.md).
    pub fn damp(self) -> f64 {
        match self {
            Self::Best | Self::Tuned => 0.03,
            Self::AutoGptq | Self::Rtn => 0.01,
        }
    }

    /// True when the recipe needs the Hessians of calibration windows.
    pub fn calibrates(self) -> bool {
        self != Self::Rtn
    }
}

impl std::str::FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "best" => Ok(Self::Best),
            "tuned" => Ok(Self::Tuned),
            "autogptq" => Ok(Self::AutoGptq),
            "rtn" => Ok(Self::Rtn),
            _ => Err(format!("`{text}` is no recipe; use best, tuned, autogptq or rtn")),
        }
    }
}

/// Bits, groups, order and damping of one branch.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantSpec {
    /// Width of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Consecutive columns that share a scale; `None` is all of in_features.
    pub group_size: Option<usize>,
    /// Solve columns by descending diag(H).
    pub act_order: bool,
    /// Fraction of mean(diag H) added to the diagonal.
    pub damp: f64,
    /// The named set that the choices started from.
    pub recipe: Recipe,
    /// The solver's choices.
    pub choices: Choices,
    /// The rotation was asked for by name, and is not the recipe's default.
    pub own_rotate: bool,
}

impl QuantSpec {
    /// A branch with a recipe's own choices.
    pub fn new(
        bits: u8,
        group_size: Option<usize>,
        act_order: bool,
        damp: f64,
        recipe: Recipe,
    ) -> Self {
        let choices = recipe.choices();
        Self { bits, group_size, act_order, damp, recipe, choices, own_rotate: false }
    }

    /// Sets choices given as `KEY=VALUE`.
    ///
    /// # Errors
    /// [`Error::UnknownChoice`], and [`Error::NoChoice`] for any with round to nearest, which makes
    /// none.
    pub fn set(&mut self, settings: &[String]) -> Result<()> {
        for setting in settings {
            if !self.recipe.calibrates() {
                return Err(Error::NoChoice { setting: setting.clone() });
            }
            self.choices.set(setting)?;
            self.own_rotate |= setting.split('=').next() == Some(Rotate::KEY);
        }
        Ok(())
    }

    /// Checks every field.
    pub fn validate(&self) -> Result<()> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            return Err(Error::Bits { bits: self.bits });
        }
        GroupSize(self.group_size).check()?;
        if !(self.damp > 0.0 && self.damp < 1.0) {
            return Err(Error::Damp { damp: self.damp });
        }
        if self.choices.tune == 0 && self.choices.tune_rate != Choices::TUNE_RATE {
            return Err(Error::NothingTuned);
        }
        Ok(())
    }

    /// Largest code.
    pub fn max_code(&self) -> f32 {
        ((1_u32 << self.bits) - 1) as f32
    }

    /// Signs that a search for scales tries: of 8 bits, where a step is 1 in 255, positive ones.
    pub fn signs(&self) -> Signs {
        if self.bits == 8 { Signs::Positive } else { self.choices.signs }
    }

    /// Code of 0.0 on the symmetric grid.
    pub fn zero(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Columns of a group for a linear of `in_features`.
    pub fn group_columns(&self, in_features: usize) -> usize {
        self.group_size.unwrap_or(in_features).min(in_features)
    }
}

#[cfg(test)]
mod tests {
    use gptq_checkpoint::MAX_GROUP_SIZE;

    use super::*;

    #[test]
    fn a_rate_needs_something_to_tune() {
        let mut spec = QuantSpec::new(4, None, true, 0.01, Recipe::Tuned);
        spec.set(&["tune-rate=0.01".to_owned()]).unwrap();
        spec.validate().unwrap();
        spec.set(&["tune=0".to_owned()]).unwrap();
        assert!(matches!(spec.validate(), Err(Error::NothingTuned)));
    }

    #[test]
    fn groups_that_no_file_can_say_are_refused() {
        let spec = |size| QuantSpec::new(4, size, true, 0.01, Recipe::Rtn);
        for size in [None, Some(1), Some(MAX_GROUP_SIZE)] {
            spec(size).validate().unwrap();
        }
        for size in [0, MAX_GROUP_SIZE + 1, usize::MAX] {
            assert!(matches!(spec(Some(size)).validate(), Err(Error::GroupSize(_))), "{size}");
        }
    }
}
