//! Least squares in f64, by normal equations that are added up from parts.

use ndarray::{Array2, ArrayView2};

use super::linalg::{cholesky_lower, invert_lower};
use super::matmul::matmul_nt;

/// Pivots, over the mean diagonal, below which a system is called singular: f64 leaves nothing of directions that are
/// weaker.
const LEAST_PIVOT: f64 = 1e-11;

/// AᵀA and AᵀB of min ‖A X − B‖², for A and B of n columns whose rows come in parts.
#[derive(Debug)]
pub struct NormalEquations {
    square: Array2<f64>,
    product: Array2<f64>,
}

impl NormalEquations {
    /// No rows yet.
    #[must_use]
    pub fn new(n: usize) -> Self {
        Self { square: Array2::zeros((n, n)), product: Array2::zeros((n, n)) }
    }

    /// Adds rows of A and B, both `[rows, n]`.
    ///
    /// # Panics
    /// When either has other sides.
    pub fn add(&mut self, a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) {
        matmul_nt(a.t(), a.t(), 1.0, self.square.view_mut());
        matmul_nt(a.t(), b.t(), 1.0, self.product.view_mut());
    }

    /// X `[n, n]` that minimizes ‖A X − B‖² + damp · m ‖X‖², m being the mean of AᵀA's diagonal; `None` where the
    /// rows of A do not span all columns.
    #[must_use]
    pub fn solve(self, damp: f64) -> Option<Array2<f64>> {
        let Self { mut square, product } = self;
        let n = square.nrows();
        let mean = square.diag().sum() / n as f64;
        let mut damped = square.clone();
        damped.diag_mut().mapv_inplace(|value| value + damp * mean);
        cholesky_lower(&mut square).ok()?;
        if square.diag().iter().any(|pivot| pivot * pivot < LEAST_PIVOT * mean) {
            return None;
        }
        let mut square = damped;
        cholesky_lower(&mut square).ok()?;
        invert_lower(&mut square);
        // X = L⁻ᵀ L⁻¹ AᵀB.
        let mut halfway = Array2::zeros((n, n));
        matmul_nt(square.view(), product.t(), 0.0, halfway.view_mut());
        let mut solution = product;
        matmul_nt(square.t(), halfway.t(), 0.0, solution.view_mut());
        Some(solution)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::testing::largest;

    fn noise(rows: usize, cols: usize, salt: u64) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            let mixed = ((i * cols + j + 1) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15 + salt);
            let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed >> 40) as f64 / f64::from(1 << 23) - 1.0
        })
    }

    #[test]
    fn a_solution_that_fits_is_found_from_parts() {
        let (a, x) = (noise(300, 70, 1), noise(70, 70, 2));
        let b = a.dot(&x);
        let mut equations = NormalEquations::new(70);
        for rows in [0..100, 100..300] {
            equations.add(a.slice(s![rows.clone(), ..]), b.slice(s![rows, ..]));
        }
        let off = equations.solve(0.0).unwrap() - &x;
        assert!(largest(&off) < 1e-9, "{}", largest(&off));
    }

    /// Residuals of the least squares are orthogonal to the columns.
    #[test]
    fn a_solution_that_does_not_fit_is_the_nearest() {
        let (a, b) = (noise(50, 8, 1), noise(50, 8, 7));
        let mut equations = NormalEquations::new(8);
        equations.add(a.view(), b.view());
        let left = b - a.dot(&equations.solve(0.0).unwrap());
        assert!(largest(&a.t().dot(&left)) < 1e-9);
    }

    /// Of A with orthogonal columns of length √g, X is g / (g + damp · mean) times what it is without.
    #[test]
    fn damping_takes_weak_directions_back() {
        let a = Array2::from_diag(&ndarray::arr1(&[3.0, 1.0, 0.1]));
        let b = noise(3, 3, 5);
        let mut equations = NormalEquations::new(3);
        equations.add(a.view(), b.view());
        let found = equations.solve(0.5).unwrap();
        let mean = (9.0 + 1.0 + 0.01) / 3.0;
        for (i, g) in [9.0_f64, 1.0, 0.01].into_iter().enumerate() {
            for j in 0..3 {
                let want = b[[i, j]] / g.sqrt() * g / (g + 0.5 * mean);
                assert!((found[[i, j]] - want).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn what_does_not_span_all_columns_has_none() {
        let mut a = noise(60, 9, 3);
        for column in [0, 5] {
            let b = a.clone();
            let kept = a.clone();
            a.column_mut(column).fill(0.0);
            let mut equations = NormalEquations::new(9);
            equations.add(a.view(), b.view());
            assert!(equations.solve(0.1).is_none());
            a = kept;
        }
        assert!(NormalEquations::new(9).solve(0.1).is_none());
    }
}
