//! Gram matrices of a linear's inputs, and the Hessians made from them.

use ndarray::Array2;

use crate::error::Result;
use crate::tensor::{Storage, Tensor};
use crate::{Device, cpu};

/// XᵀX of the inputs of one or several linears, accumulated in f32 over chunks of tokens.
///
/// Only the upper triangle is kept up to date; [`Gram::hessian`] reads nothing else.
#[derive(Clone, Debug)]
pub struct Gram {
    pub(crate) sum: Storage,
}

/// How a damped, reordered Hessian is made from a [`Gram`].
#[derive(Clone, Copy, Debug)]
pub struct HessianPrep<'a> {
    /// Factor on the Gram: 2 / windows in GPTQ.
    pub scale: f32,
    /// Column j of the result is column `order[j]` of the Gram.
    pub order: &'a [u32],
    /// Columns (in the Gram's order) that no token ever used: their diagonal becomes 1.
    pub dead: &'a [bool],
    /// Added to the whole diagonal, after the dead columns are set.
    pub damp: f32,
}

impl Gram {
    /// Order of the matrix: in_features.
    pub fn order(&self) -> usize {
        match &self.sum {
            Storage::Cpu(a) => a.nrows(),
        }
    }

    /// The diagonal, unscaled.
    pub fn diagonal(&self) -> Result<Vec<f32>> {
        match &self.sum {
            Storage::Cpu(a) => Ok(a.diag().to_vec()),
        }
    }

    /// The symmetric, damped, reordered Hessian `[n, n]` in f32.
    pub fn hessian(&self, prep: &HessianPrep<'_>) -> Result<Tensor> {
        match &self.sum {
            Storage::Cpu(a) => Ok(Tensor(Storage::Cpu(cpu::gram::hessian(a, prep)))),
        }
    }

    /// A Gram from a full symmetric matrix in host memory: tests and golden files.
    pub fn from_host(sum: Array2<f32>) -> Self {
        Self { sum: Storage::Cpu(sum) }
    }
}

impl Device {
    /// An empty Gram of order `n`.
    #[expect(clippy::unnecessary_wraps, reason = "allocation can fail on other devices")]
    pub fn gram(&self, n: usize) -> Result<Gram> {
        match self {
            Self::Cpu => Ok(Gram { sum: Storage::Cpu(Array2::zeros((n, n))) }),
        }
    }

    /// Adds xᵀx of activations `[tokens, n]` to `gram`.
    pub fn gram_add(&self, gram: &mut Gram, x: &Tensor) -> Result<()> {
        match (&mut gram.sum, &x.0) {
            (Storage::Cpu(sum), Storage::Cpu(x)) => cpu::gram::accumulate(sum, x.view()),
        }
    }
}
