//! Steps along a gradient.

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};

/// A step of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1): with g the gradient,
/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², x ← x − rate · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ) and
/// v̂ = v / (1 − β₂ᵗ) for step t.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// How far values move at most, about.
    pub learning_rate: f32,
    /// Decay of the mean of gradients, β₁; below 1.
    pub beta1: f32,
    /// Decay of the mean of their squares, β₂; below 1.
    pub beta2: f32,
    /// ε.
    pub epsilon: f32,
    /// t, from 1 on.
    pub step: u32,
    /// What gradients are multiplied by first: one over what the loss was multiplied by.
    pub gradient_factor: f32,
}

impl Adam {
    /// 1 / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ).
    pub(crate) fn corrections(&self) -> (f32, f32) {
        let left = |beta: f32| 1.0 - f64::from(beta).powf(f64::from(self.step.max(1)));
        ((1.0 / left(self.beta1)) as f32, (1.0 / left(self.beta2).sqrt()) as f32)
    }
}

impl Device {
    /// Moves `values` against `gradient`, whose moments (means of gradients and of their squares) are kept from step
    /// to step and are zeros before the first; all of one shape, in f32.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`], [`Error::WrongType`], and [`Error::Unsupported`] for
    /// decays that are none.
    pub fn adam_step(
        &self,
        gradient: &Tensor,
        [mean, square]: [&mut Tensor; 2],
        values: &mut Tensor,
        adam: &Adam,
    ) -> Result<()> {
        const OP: &str = "adam_step";
        let shape = gradient.shape();
        for other in [mean.shape(), square.shape(), values.shape()] {
            ensure_shape(other == shape, OP, shape, other)?;
        }
        if ![adam.beta1, adam.beta2].iter().all(|beta| (0.0..1.0).contains(beta)) {
            let reason = format!("decays have to be below 1 in {adam:?}");
            return Err(Error::Unsupported { op: OP, reason });
        }
        match (&gradient.0, &mut mean.0, &mut square.0, &mut values.0) {
            (Storage::Cpu(g), Storage::Cpu(m), Storage::Cpu(v), Storage::Cpu(x)) => {
                cpu::backward::adam_step(g, (m, v), x, adam);
                Ok(())
            }
            (Storage::Cuda(g), Storage::Cuda(m), Storage::Cuda(v), Storage::Cuda(x)) => {
                cuda::backward::adam_step(g, (m, v), x, adam)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}
