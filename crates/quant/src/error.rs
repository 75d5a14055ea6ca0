//! What can go wrong while a linear is quantised.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of quantisation; the caller adds the linear's name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bit width has no place in the file format.
    #[error("{bits} bits are not supported; use 2, 3, 4 or 8")]
    Bits {
        /// The width asked for.
        bits: u8,
    },
    /// Groups that no file can say.
    #[error(transparent)]
    GroupSize(#[from] gptq_checkpoint::BadGroupSize),
    /// Damping outside of the useful range.
    #[error("Damping {damp:?} is not supported; use a number above 0 and below 1")]
    Damp {
        /// The fraction asked for.
        damp: f64,
    },
    /// A choice that does not exist, or has no meaning here.
    #[error("{message}")]
    Choice {
        /// What is wrong, and what is possible.
        message: String,
    },
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
