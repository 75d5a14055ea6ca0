//! What is asked of a verification.

use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;

use gptq_text::evaluation::EvaluationSpec;

/// A checkpoint to verify.
#[derive(Debug)]
pub struct VerifyJob<'a> {
    /// Its folder.
    pub dir: &'a Path,
    /// The dense model that it was made from.
    pub base: Option<&'a Checkpoint>,
    /// The text to run both on.
    pub text: Option<&'a EvaluationSpec>,
    /// Where to compute.
    pub device: Device,
    /// What the outputs may at most differ by.
    pub limits: Limits,
}

/// Limits on the outputs; none where there is no number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Perplexity.
    pub perplexity: Option<f64>,
    /// Perplexity over the base's.
    pub ratio: Option<f64>,
    /// Mean KL divergence from the base, in nats a token.
    pub kl: Option<f64>,
    /// Energy of a linear's output error over the energy of its outputs.
    pub output_error: Option<f64>,
}
