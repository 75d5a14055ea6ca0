//! Gram matrices of a linear's inputs, and the Hessians made from them.

use ndarray::Array2;

use crate::error::{Error, Result, ensure_shape};
use crate::hessian_prep::{HessianPrep, Precision};
use crate::ranks::Ranks;
use crate::tensor::{Storage, Tensor};
use crate::{Device, cpu, cuda};

/// XᵀX of the inputs of one or several linears, accumulated in f32 over chunks of tokens.
///
/// Only the upper triangle is kept up to date; [`Gram::upper_factor`] reads nothing else.
#[derive(Clone, Debug)]
pub struct Gram {
    pub(crate) sum: Storage,
    /// The ranks that hold the same sum, and may share the work of factoring it.
    pub(crate) ranks: Ranks,
}

impl Gram {
    /// Order of the matrix: in_features.
    pub fn order(&self) -> usize {
        match &self.sum {
            Storage::Cpu(a) => a.nrows(),
            Storage::Cuda(m) => m.rows(),
        }
    }

    /// Adds the Grams of all `ranks` up; each gets the sum, and factors it together with the others.
    pub fn sum_over(&mut self, ranks: &Ranks) -> Result<()> {
        ranks.sum_storage(&mut self.sum)?;
        self.ranks = ranks.clone();
        Ok(())
    }

    /// The diagonal, unscaled.
    pub fn diagonal(&self) -> Result<Vec<f32>> {
        match &self.sum {
            Storage::Cpu(a) => Ok(a.diag().to_vec()),
            Storage::Cuda(m) => cuda::gram::diagonal(m),
        }
    }

    /// U, upper triangular with `UᵀU = H⁻¹`, of the Hessian H that `prep` describes, in solve order,
    /// and how it was computed.
    ///
    /// The CPU factors in f64; a GPU in f32, and in f64 when f32 finds a pivot that is not positive.
    /// Cards that hold the same sum (see [`Gram::sum_over`]) factor a large one together, and must
    /// all call this.
    ///
    /// # Errors
    /// [`Error::NotPositiveDefinite`] when the Cholesky factor does not exist.
    pub fn upper_factor(&self, prep: &HessianPrep<'_>) -> Result<(Tensor, Precision)> {
        match &self.sum {
            Storage::Cpu(a) => {
                let hessian = cpu::gram::hessian(a, prep);
                let upper = cpu::linalg::inverse_upper_factor(&hessian)?;
                Ok((Tensor(Storage::Cpu(upper)), Precision::Usual))
            }
            Storage::Cuda(m) => {
                let sum = Tensor(Storage::Cuda(m.clone()));
                cuda::shared_upper_factor(&sum, prep, &self.ranks)
            }
        }
    }

    /// Σ over rows r of w of r G rᵀ: the energy of the outputs x · wᵀ over all accumulated tokens.
    pub fn quadratic_form(&self, w: &Tensor) -> Result<f64> {
        ensure_shape(
            w.cols() == self.order(),
            "quadratic_form",
            w.shape(),
            (self.order(), self.order()),
        )?;
        match (&self.sum, &w.0) {
            (Storage::Cpu(sum), Storage::Cpu(w)) => Ok(cpu::gram::quadratic_form(sum, w)),
            (Storage::Cuda(sum), Storage::Cuda(w)) => cuda::gram::quadratic_form(sum, w),
            _ => Err(Error::DeviceMismatch { op: "quadratic_form" }),
        }
    }

    /// The full symmetric matrix in host memory, unscaled.
    pub fn to_host(&self) -> Result<Array2<f32>> {
        let mut full = match &self.sum {
            Storage::Cpu(a) => a.clone(),
            Storage::Cuda(m) => m.to_host()?,
        };
        for i in 1..full.nrows() {
            for j in 0..i {
                full[[i, j]] = full[[j, i]];
            }
        }
        Ok(full)
    }

    fn new(sum: Storage) -> Self {
        Self { sum, ranks: Ranks::alone() }
    }

    /// A Gram on the CPU from a full symmetric matrix: tests and golden files.
    pub fn from_host(sum: Array2<f32>) -> Self {
        Self::new(Storage::Cpu(sum))
    }
}

impl Device {
    /// An empty Gram of order `n`.
    pub fn gram(&self, n: usize) -> Result<Gram> {
        match self {
            Self::Cpu => Ok(Gram::new(Storage::Cpu(Array2::zeros((n, n))))),
            Self::Cuda(cuda) => Ok(Gram::new(Storage::Cuda(cuda::gram::zeros(cuda, n)?))),
        }
    }

    /// Adds xᵀx of activations `[tokens, n]` to `gram`.
    pub fn gram_add(&self, gram: &mut Gram, x: &Tensor) -> Result<()> {
        match (&mut gram.sum, &x.0) {
            (Storage::Cpu(sum), Storage::Cpu(x)) => cpu::gram::accumulate(sum, x.view()),
            (Storage::Cuda(sum), Storage::Cuda(x)) => cuda::gram::accumulate(sum, x),
            _ => Err(Error::DeviceMismatch { op: "gram_add" }),
        }
    }
}
