//! Quantizing one linear along a factored Hessian, on the device that holds its weights.

use gptq_compute::Tensor;

use crate::error::Result;
use crate::hessian::Factored;
use crate::solved::Quantized;
use crate::spec::QuantSpec;
use crate::{gpu, host};

/// Quantizes `weight` `[out, in]` given the factored Hessian of its inputs.
///
/// # Errors
/// [`Error::NotFinite`](crate::Error::NotFinite) for NaN or infinite weights,
/// [`Error::ScaleRange`](crate::Error::ScaleRange) for a scale beyond fp16.
pub fn solve(weight: &Tensor, factored: &Factored, spec: &QuantSpec) -> Result<Quantized> {
    spec.validate()?;
    if weight.is_host() {
        host::solve(weight, factored, spec)
    } else {
        gpu::solve(weight, factored, spec)
    }
}
