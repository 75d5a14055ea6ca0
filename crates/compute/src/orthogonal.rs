//! Steps on the orthogonal matrices, in f64.

use ndarray::Array2;

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Result, ensure_shape};

/// Newton–Schulz iterations: singular values from 0.6 to 1.3 are 1 to the last digits of f64 after seven.
pub(crate) const ITERATIONS: usize = 8;

impl Device {
    /// Products of a step.
    pub const STEP_PRODUCTS: usize = 1 + 2 * ITERATIONS;

    /// The orthogonal matrix nearest to r (1 − s): a step from an orthogonal r along a skew s, both `[n, n]`, whose
    /// largest singular value is about `norm`, 1.5 at most. The polar factor by Newton–Schulz, X ← (3 X − X Xᵀ X) / 2
    /// (Higham, Functions of Matrices, 2008, 8.3): products alone, so that the same device gives the same bits.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch), and those of the device.
    pub fn orthogonal_step(
        &self,
        r: &Array2<f64>,
        s: &Array2<f64>,
        norm: f64,
    ) -> Result<Array2<f64>> {
        let order = r.nrows();
        ensure_shape(r.dim() == (order, order), "orthogonal_step", r.dim(), (order, order))?;
        ensure_shape(s.dim() == r.dim(), "orthogonal_step", r.dim(), s.dim())?;
        // Singular values of 1 − s are from 1 to the root of 1 + norm²; now around 1.
        let scale = (1.0 + norm.min(1.5).powi(2) / 2.0).sqrt().recip();
        match self {
            Self::Cpu => Ok(cpu::orthogonal::step(r, s, scale)),
            Self::Cuda(cuda) => cuda::orthogonal::step(cuda, r, s, scale),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skew(order: usize, size: f64) -> Array2<f64> {
        let value = |i: usize, j: usize| ((i * 31 + j * 17) % 23) as f64 / 23.0 - 0.5;
        Array2::from_shape_fn((order, order), |(i, j)| size * (value(i, j) - value(j, i)))
    }

    #[test]
    fn a_step_is_orthogonal_and_goes_along_its_direction() {
        for order in [2, 9, 40] {
            let mut r = Array2::eye(order);
            for _ in 0..3 {
                // Norms of some 1: the largest column sum of two entries a row is a bound for order 2 only.
                r = Device::Cpu.orthogonal_step(&r, &skew(order, 1.0 / order as f64), 1.0).unwrap();
                let off = r.t().dot(&r) - Array2::<f64>::eye(order);
                assert!(off.iter().all(|v| v.abs() < 1e-13), "{order}: {off}");
            }
            // Of small steps the polar factor of 1 − s is 1 − s but for s² / 2.
            let s = skew(order, 1e-4 / order as f64);
            let r = Device::Cpu.orthogonal_step(&Array2::eye(order), &s, 1e-4).unwrap();
            let off = r - (Array2::<f64>::eye(order) - &s + s.dot(&s) / 2.0);
            assert!(off.iter().all(|v| v.abs() < 1e-11), "{order}: {off}");
        }
    }

    /// A plane turns by the angle whose tangent the step is.
    #[test]
    fn the_angle_of_a_plane_is_known() {
        let t = 0.7;
        let s = ndarray::array![[0.0, t], [-t, 0.0]];
        let r = Device::Cpu.orthogonal_step(&Array2::eye(2), &s, t).unwrap();
        let angle = t.atan();
        let want = ndarray::array![[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]];
        assert!((r - want).iter().all(|v| v.abs() < 1e-14));
    }
}
