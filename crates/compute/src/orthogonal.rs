//! Orthogonal matrices near others, and steps from one to the next, in f64.
//!
//! All by Newton–Schulz iterations X ← (3 X − X Xᵀ X) / 2, which bring every singular value nearer to 1 and leave singular
//! vectors as they are (Higham, Functions of Matrices, 2008, 8.3): products alone, so that the same device gives the same
//! bits.

use ndarray::Array2;

use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Result, ensure_shape};

/// Iterations after which singular values from 0.3 to 1.5 are 1 to the last digits of f64.
pub(crate) const NEAREST: usize = 9;
/// After which those are that a step of tangents up to 0.5 leaves, from 0.94 to 1.06.
pub(crate) const OF_STEP: usize = 5;
/// By which a direction is flattened: small singular values become five times as large, the largest stays.
pub(crate) const OF_DIRECTION: usize = 4;

impl Device {
    /// Products of a step.
    pub const STEP_PRODUCTS: usize = 1 + 2 * (OF_STEP + OF_DIRECTION);

    /// The orthogonal matrix nearest to one `[n, n]` whose singular values are from 0.3 to 1.5.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch), and those of the device.
    pub fn nearest_orthogonal(&self, matrix: &Array2<f64>) -> Result<Array2<f64>> {
        let (rows, order) = matrix.dim();
        ensure_shape(rows == order, "nearest_orthogonal", (rows, order), (order, order))?;
        match self {
            Self::Cpu => Ok(cpu::orthogonal::nearest(matrix)),
            Self::Cuda(cuda) => cuda::orthogonal::nearest(cuda, matrix),
        }
    }

    /// A step from an orthogonal r along a skew direction, both `[n, n]`: the orthogonal matrix nearest to r (1 − t F). F is
    /// the direction over `norm`, its largest singular value, flattened by four iterations; t is the tangent of the
    /// largest angle that a plane turns by, 0.5 at most.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch), and those of the device.
    pub fn orthogonal_step(
        &self,
        r: &Array2<f64>,
        direction: &Array2<f64>,
        norm: f64,
        tangent: f64,
    ) -> Result<Array2<f64>> {
        let order = r.nrows();
        ensure_shape(r.dim() == (order, order), "orthogonal_step", r.dim(), (order, order))?;
        ensure_shape(direction.dim() == r.dim(), "orthogonal_step", r.dim(), direction.dim())?;
        // Singular values of 1 − t F are from 1 to the root of 1 + t²; now around 1.
        let scale = (1.0 + tangent.powi(2) / 2.0).sqrt().recip();
        let by = if norm > 0.0 { norm.recip() } else { 0.0 };
        match self {
            Self::Cpu => Ok(cpu::orthogonal::step(r, direction, by, (tangent, scale))),
            Self::Cuda(cuda) => cuda::orthogonal::step(cuda, r, direction, by, (tangent, scale)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skew(order: usize) -> Array2<f64> {
        let value = |i: usize, j: usize| ((i * 31 + j * 17) % 23) as f64 / 23.0 - 0.5;
        Array2::from_shape_fn((order, order), |(i, j)| value(i, j) - value(j, i))
    }

    /// A bound of the largest singular value.
    fn bound(matrix: &Array2<f64>) -> f64 {
        matrix.columns().into_iter().map(|c| c.mapv(f64::abs).sum()).fold(0.0, f64::max)
    }

    #[test]
    fn a_step_is_orthogonal_and_of_the_length_asked_for() {
        for order in [2, 9, 40] {
            let mut r = Array2::eye(order);
            for tangent in [0.1, 0.5, 0.3] {
                let direction = skew(order);
                let norm = bound(&direction);
                let next = Device::Cpu.orthogonal_step(&r, &direction, norm, tangent).unwrap();
                let off = next.t().dot(&next) - Array2::<f64>::eye(order);
                assert!(off.iter().all(|v| v.abs() < 1e-13), "{order}: {off}");
                // No vector turns by more than the angle.
                let turned = bound(&(&next - &r)) / (order as f64).sqrt();
                assert!(turned > 1e-3 && turned < tangent * 1.01, "{order}: {turned}");
                r = next;
            }
        }
        let r = Array2::eye(3);
        let stays = Device::Cpu.orthogonal_step(&r, &Array2::zeros((3, 3)), 0.0, 0.4).unwrap();
        assert!((stays - &r).iter().all(|v| v.abs() < 1e-15));
    }

    /// A plane turns by the angle whose tangent the step is, the largest singular value being 1 however it is
    /// flattened; a plane whose is small turns by nearly five times its share.
    #[test]
    fn the_angles_of_planes_are_known() {
        let (t, small) = (0.4_f64, 1e-3);
        let mut direction = Array2::zeros((4, 4));
        for (at, size) in [(0, 7.0), (2, 7.0 * small)] {
            (direction[[at, at + 1]], direction[[at + 1, at]]) = (size, -size);
        }
        let r = Device::Cpu.orthogonal_step(&Array2::eye(4), &direction, 7.0, t).unwrap();
        let flattened = (0..4).fold(small, |x: f64, _| 1.5 * x - 0.5 * x.powi(3));
        assert!(flattened > 5.0 * small);
        for (at, angle) in [(0, t.atan()), (2, (t * flattened).atan())] {
            let found = [r[[at, at]], r[[at, at + 1]], r[[at + 1, at]]];
            let want = [angle.cos(), -angle.sin(), angle.sin()];
            assert!(found.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-14), "{r}");
        }
    }

    #[test]
    fn the_nearest_orthogonal_matrix_is_found() {
        let direction = skew(30);
        let r = Array2::eye(30);
        let r = Device::Cpu.orthogonal_step(&r, &direction, bound(&direction), 0.5).unwrap();
        // Singular values of one that is not orthogonal, along the axes that it turns to.
        let stretched = &r * &Array2::from_shape_fn((1, 30), |(_, j)| 0.3 + 0.04 * j as f64);
        let found = Device::Cpu.nearest_orthogonal(&stretched).unwrap();
        assert!((found - r).iter().all(|v| v.abs() < 1e-13));
        assert!(Device::Cpu.nearest_orthogonal(&Array2::zeros((2, 3))).is_err());
    }
}
