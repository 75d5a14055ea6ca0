//! What can go wrong while a model is loaded or run.

use std::borrow::Cow;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the forward pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] gptq_checkpoint::Error),
    /// The device failed.
    #[error(transparent)]
    Compute(#[from] gptq_compute::Error),
    /// Windows longer than the model's context.
    #[error(
        "Windows of {seq_len} tokens do not fit the model's context of {max} (max_position_embeddings)"
    )]
    ContextExceeded {
        /// Tokens of a window.
        seq_len: usize,
        /// The model's limit.
        max: usize,
    },
    /// A sequence would outgrow its cache.
    #[error("The context of {capacity} tokens is full")]
    ContextFull {
        /// Tokens that a sequence may have.
        capacity: usize,
    },
    /// A context longer than the model can be read with.
    #[error("A context of {context} tokens is more than the {most} that {why}")]
    ContextTooLong {
        /// Tokens asked for.
        context: usize,
        /// The most there can be.
        most: usize,
        /// What says so.
        why: &'static str,
    },
    /// More devices than there is work for.
    #[error("{devices} devices were named for a model of {blocks} blocks")]
    TooManyDevices {
        /// How many were named.
        devices: usize,
        /// Blocks of the model.
        blocks: usize,
    },
    /// A part of a model that nothing can be trained through.
    #[error("{what} has no backward pass: {why}")]
    NoBackward {
        /// A block, or the head.
        what: String,
        /// What of it has none.
        why: &'static str,
    },
    /// A weight holds integers.
    #[error("Tensor `{tensor}` holds I32 values where a floating-point weight is needed")]
    IntegerWeight {
        /// The tensor's name.
        tensor: String,
    },
    /// A weight that is not finite in fp16.
    #[error("Tensor `{tensor}` does not fit fp16")]
    Overflow {
        /// The tensor's name.
        tensor: String,
        /// What the device found.
        source: gptq_compute::Error,
    },
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Checkpoint(error) => error.hint(),
            Self::Compute(error) => error.hint(),
            Self::ContextExceeded { max: most, .. } => {
                Some(format!("use --seq-len {most} or less").into())
            }
            Self::ContextTooLong { most, .. } => {
                Some(format!("use --context {most} or less").into())
            }
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
        let error = Error::ContextExceeded { seq_len: 9, max: 8 };
        assert_eq!(error.hint().unwrap(), "use --seq-len 8 or less");
        assert!(!error.to_string().contains("--seq-len"), "{error}");
        let below = gptq_compute::Error::RankLost { rank: None };
        assert_eq!(
            Error::Compute(below).hint().unwrap(),
            "see its own message, and start the run again"
        );
    }
}
