//! Matrix products on all cores: matrixmultiply's single-threaded kernel over fixed tiles.
//!
//! matrixmultiply has threads of its own, but at most four, and a pool beside rayon's; cutting the
//! product into tiles scales further and nests with every other parallel loop.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::tiles::tiles_mut;

/// Each tile packs its own operands again, which costs 1/(2·rows) + 1/(2·cols) of its arithmetic;
/// at this size that is under half a percent, and a window of 512 tokens still feeds two cores.
const TILE: (usize, usize) = (256, 768);

/// out = x · wᵀ + beta · out, for x `[m, k]`, w `[n, k]`, out `[m, n]`; beta is 0 or 1.
pub fn matmul_nt(
    x: ArrayView2<'_, f32>,
    w: ArrayView2<'_, f32>,
    beta: f32,
    out: ArrayViewMut2<'_, f32>,
) {
    tiles_mut(out, TILE.0, TILE.1).into_par_iter().for_each(|mut tile| {
        let (m, n) = tile.view.dim();
        let x = x.slice(s![tile.row..tile.row + m, ..]);
        let w = w.slice(s![tile.col..tile.col + n, ..]);
        general_mat_mul(1.0, &x, &w.t(), beta, &mut tile.view);
    });
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::testing::largest;

    #[test]
    fn ragged_products_match_f64() {
        let (m, n, k) = (261, 773, 37);
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let x = Array2::from_shape_fn((m, k), |(i, j)| value(i * k + j));
        let w = Array2::from_shape_fn((n, k), |(i, j)| value(7 + i * k + j));
        let mut out = Array2::from_elem((m, n), 1.0);
        matmul_nt(x.view(), w.view(), 1.0, out.view_mut());
        let exact = x.mapv(f64::from).dot(&w.mapv(f64::from).t()) + 1.0;
        let worst = largest(&(&out.mapv(f64::from) - &exact));
        assert!(worst < 1e-5, "worst error {worst:e}");
    }
}
