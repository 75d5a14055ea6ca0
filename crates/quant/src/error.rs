//! What can go wrong while a linear is quantized.

use std::borrow::Cow;

use crate::choices::Choices;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of quantization; the caller adds the linear's name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bit width has no place in the file format.
    #[error("{bits} bits are not supported")]
    Bits {
        /// The width asked for.
        bits: u8,
    },
    /// Groups that no file can say.
    #[error(transparent)]
    GroupSize(#[from] gptq_checkpoint::BadGroupSize),
    /// Damping outside of the useful range.
    #[error("Damping {damp:?} is not supported")]
    Damp {
        /// The fraction asked for.
        damp: f64,
    },
    /// A choice that does not exist.
    #[error("`{setting}` is no choice")]
    UnknownChoice {
        /// What was asked for.
        setting: String,
        /// What is possible.
        possible: String,
    },
    /// A choice of a recipe that makes none.
    #[error("`{setting}` has no meaning for round to nearest")]
    NoChoice {
        /// What was asked for.
        setting: String,
    },
    /// A rate of tuning without tuning.
    #[error("`{}` has no meaning without `{}`", Choices::RATE, Choices::TUNE)]
    NothingTuned,
    /// The Hessian has no Cholesky factor at any damping that was tried.
    #[error("The Hessian is not positive definite even with damping {damp:?}")]
    NotPositiveDefinite {
        /// Largest fraction of mean(diag H) that was added.
        damp: f64,
        /// The failure at that damping.
        source: gptq_compute::Error,
    },
    /// A weight or Hessian holds NaN or infinities.
    #[error("{what} holds NaN or infinite values")]
    NotFinite {
        /// The operand.
        what: &'static str,
    },
    /// A scale does not fit fp16, the type of the file.
    #[error("A scale of {scale:e} (output {row}, group {group}) does not fit fp16")]
    ScaleRange {
        /// The scale in f32.
        scale: f32,
        /// Output feature.
        row: usize,
        /// Group of columns.
        group: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Compute(#[from] gptq_compute::Error),
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Bits { .. } => Some("use 2, 3, 4 or 8".into()),
            Self::Damp { .. } => Some("use a number above 0 and below 1".into()),
            Self::NothingTuned => Some("use the recipe tuned".into()),
            Self::UnknownChoice { possible, .. } => Some(format!("use {possible}").into()),
            Self::Compute(error) => error.hint(),
            _ => None,
        }
    }

    /// True for a fault of this program, see [`gptq_compute::Error::is_internal`].
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Compute(error) if error.is_internal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error = Error::Bits { bits: 5 };
        assert_eq!(error.to_string(), "5 bits are not supported");
        assert_eq!(error.hint().unwrap(), "use 2, 3, 4 or 8");
        assert_eq!(Error::NotFinite { what: "A weight" }.hint(), None);
    }
}
