//! What can go wrong while a model is loaded or run.

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
        "Windows of {seq_len} tokens do not fit the model's context of {max} (max_position_embeddings); use --seq-len {max} or less"
    )]
    ContextExceeded {
        /// Tokens of a window.
        seq_len: usize,
        /// The model's limit.
        max: usize,
    },
    /// Windows longer than attention reaches.
    #[error(
        "Windows of {seq_len} tokens exceed the sliding window of {window} (sliding_window), beyond which attention is not available here; use --seq-len {window} or less"
    )]
    SlidingWindow {
        /// Tokens of a window.
        seq_len: usize,
        /// The model's sliding window.
        window: usize,
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
