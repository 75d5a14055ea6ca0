//! Matrix products on all cores: matrixmultiply's single-threaded kernel over fixed tiles.
//!
//! matrixmultiply has threads of its own, but at most four, and a pool beside rayon's; cutting the
//! product into tiles scales further and nests with every other parallel loop.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, LinalgScalar, s};
use rayon::prelude::*;

use super::tiles::tiles_mut;

/// Columns of a tile.
const COLS: usize = 768;
/// Rows of the tallest tile. Each tile packs its own operands again, and a packed value costs as much
/// as some ten multiply-adds: 256 rows lose 4 to 7 % against one call, and four times as many about
/// half of that.
const MOST_ROWS: usize = 1024;
/// Rows below which packing costs more than a better balance of the threads gains, and rows below
/// which it costs more than another thread does.
const BALANCED_ROWS: usize = 256;
const LEAST_ROWS: usize = 64;

/// out = x · wᵀ + beta · out, for x `[m, k]`, w `[n, k]`, out `[m, n]`; beta is 0 or 1. In f32 or f64.
pub(crate) fn matmul_nt<T: LinalgScalar + Send + Sync>(
    x: ArrayView2<'_, T>,
    w: ArrayView2<'_, T>,
    beta: T,
    out: ArrayViewMut2<'_, T>,
) {
    // Sums run along k, which no tile cuts: results do not depend on the number of threads.
    let rows = tile_rows(out.dim(), rayon::current_num_threads());
    tiles_mut(out, rows, COLS).into_par_iter().for_each(|mut tile| {
        let (m, n) = tile.view.dim();
        let x = x.slice(s![tile.row..tile.row + m, ..]);
        let w = w.slice(s![tile.col..tile.col + n, ..]);
        general_mat_mul(T::one(), &x, &w.t(), beta, &mut tile.view);
    });
}

/// Rows of the tiles of an `[m, n]` product: as many as leave each thread two tiles, so that none
/// waits long for the last; where those would be low, each thread one.
fn tile_rows((m, n): (usize, usize), threads: usize) -> usize {
    let across = n.div_ceil(COLS).max(1);
    let rows_for = |tiles: usize| m.div_ceil(tiles.div_ceil(across).max(1));
    let rows = match rows_for(2 * threads) {
        rows if rows >= BALANCED_ROWS => rows.min(MOST_ROWS),
        _ => rows_for(threads).clamp(LEAST_ROWS, BALANCED_ROWS),
    };
    // Bands of equal height, in whole rows of matrixmultiply's kernel.
    m.div_ceil(m.div_ceil(rows).max(1)).next_multiple_of(8).max(8)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use rayon::ThreadPoolBuilder;

    use super::*;
    use crate::testing::largest;

    /// x `[m, k]` and w `[n, k]`.
    fn operands((m, n, k): (usize, usize, usize)) -> (Array2<f32>, Array2<f32>) {
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let x = Array2::from_shape_fn((m, k), |(i, j)| value(i * k + j));
        let w = Array2::from_shape_fn((n, k), |(i, j)| value(7 + i * k + j));
        (x, w)
    }

    #[test]
    fn ragged_products_match_f64() {
        let (m, n, k) = (261, 773, 37);
        let (x, w) = operands((m, n, k));
        let mut out = Array2::from_elem((m, n), 1.0);
        matmul_nt(x.view(), w.view(), 1.0, out.view_mut());
        let exact = x.mapv(f64::from).dot(&w.mapv(f64::from).t()) + 1.0;
        let worst = largest(&(&out.mapv(f64::from) - &exact));
        assert!(worst < 1e-5, "worst error {worst:e}");
    }

    #[test]
    fn tiles_are_tall_and_feed_every_thread() {
        for (shape, threads, tiles) in [
            // Enough for two tall tiles a thread, and for two low ones.
            ((4096, 576), 2, 4),
            ((4096, 1536), 2, 8),
            ((4096, 8192), 64, 132),
            // Two a thread would be too low: one each, or as many as there is work for.
            ((512, 576), 2, 2),
            ((512, 576), 8, 8),
            ((512, 576), 64, 8),
            ((1, 1), 64, 1),
        ] {
            let rows = tile_rows(shape, threads);
            assert!(rows <= MOST_ROWS);
            let found = shape.0.div_ceil(rows) * shape.1.div_ceil(COLS);
            assert_eq!(found, tiles, "{shape:?} on {threads} threads: tiles of {rows} rows");
        }
    }

    /// Of a length that matrixmultiply itself cuts, and so tall that tiles differ.
    #[test]
    fn products_do_not_depend_on_the_number_of_threads() {
        let (m, n, k) = (1100, 70, 600);
        let (x, w) = operands((m, n, k));
        let product = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = Array2::from_elem((m, n), 0.3);
            pool.install(|| matmul_nt(x.view(), w.view(), 1.0, out.view_mut()));
            out
        };
        let one = product(1);
        for threads in [3, 16] {
            assert_ne!(tile_rows((m, n), threads), tile_rows((m, n), 1));
            assert_eq!(product(threads), one, "{threads} threads");
        }
    }
}
