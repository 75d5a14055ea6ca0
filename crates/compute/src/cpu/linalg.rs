//! Cholesky and triangular inverse in f64, blocked so that the bulk is matrix products.
//!
//! GPTQ needs U, the upper factor with UᵀU = H⁻¹. With J the reversal of indices and L the lower
//! Cholesky factor of J H J, U = J L⁻¹ J: one factorization and one triangular inverse, where the
//! textbook way (factor, invert, factor again) needs three passes and loses digits twice.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut1, Axis, s};
use rayon::prelude::*;

use super::tiles::tiles_mut;
use crate::error::{Error, Result};

/// Columns of a panel: its unblocked factorization is n·PANEL² of the n³/3 operations.
const PANEL: usize = 64;
/// Side of a tile of a trailing product.
const TILE: usize = 256;

/// U (upper, f32) with UᵀU = H⁻¹, computed in f64.
///
/// # Errors
/// [`Error::NotPositiveDefinite`], with the pivot in H's own order.
pub fn inverse_upper_factor(h: &Array2<f32>) -> Result<Array2<f32>> {
    let n = h.nrows();
    let mut a = Array2::from_shape_fn((n, n), |(i, j)| f64::from(h[[n - 1 - i, n - 1 - j]]));
    cholesky_lower(&mut a).map_err(|e| match e {
        Error::NotPositiveDefinite { n, pivot, value } => {
            Error::NotPositiveDefinite { n, pivot: n - 1 - pivot, value }
        }
        other => other,
    })?;
    invert_lower(&mut a);
    Ok(Array2::from_shape_fn(
        (n, n),
        |(i, j)| {
            if i <= j { a[[n - 1 - i, n - 1 - j]] as f32 } else { 0.0 }
        },
    ))
}

/// Replaces a symmetric matrix by its lower Cholesky factor, zeros above the diagonal.
///
/// # Errors
/// [`Error::NotPositiveDefinite`] names the first pivot that is not a positive number.
pub fn cholesky_lower(a: &mut Array2<f64>) -> Result<()> {
    let n = a.nrows();
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        factor_diagonal(a, start, end)?;
        let diagonal = a.slice(s![start..end, start..end]).to_owned();
        let mut below = a.slice_mut(s![end.., start..end]);
        let rows: Vec<_> = below.axis_iter_mut(Axis(0)).collect();
        rows.into_par_iter().with_min_len(16).for_each(|row| solve_row(row, diagonal.view()));
        let panel = a.slice(s![end.., start..end]).to_owned();
        let trailing = tiles_mut(a.slice_mut(s![end.., end..]), TILE, TILE);
        let lower: Vec<_> = trailing.into_iter().filter(|t| t.row >= t.col).collect();
        lower.into_par_iter().for_each(|mut tile| {
            let (m, k) = tile.view.dim();
            let left = panel.slice(s![tile.row..tile.row + m, ..]);
            let right = panel.slice(s![tile.col..tile.col + k, ..]);
            general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut tile.view);
        });
    }
    for (i, mut row) in a.rows_mut().into_iter().enumerate() {
        row.slice_mut(s![i + 1..]).fill(0.0);
    }
    Ok(())
}

/// Unblocked Cholesky of the diagonal block `start..end`.
fn factor_diagonal(a: &mut Array2<f64>, start: usize, end: usize) -> Result<()> {
    let n = a.nrows();
    for j in start..end {
        let value = a[[j, j]] - (start..j).map(|k| a[[j, k]] * a[[j, k]]).sum::<f64>();
        // NaN compares false, so it is refused here too.
        if !(value > 0.0 && value.is_finite()) {
            return Err(Error::NotPositiveDefinite { n, pivot: j, value });
        }
        let pivot = value.sqrt();
        a[[j, j]] = pivot;
        for i in j + 1..end {
            let dot: f64 = (start..j).map(|k| a[[i, k]] * a[[j, k]]).sum();
            a[[i, j]] = (a[[i, j]] - dot) / pivot;
        }
    }
    Ok(())
}

/// Solves y Lᵀ = row in place, L the lower factor of the panel's diagonal block.
fn solve_row(mut row: ArrayViewMut1<'_, f64>, l: ArrayView2<'_, f64>) {
    for j in 0..row.len() {
        let dot: f64 = (0..j).map(|k| row[k] * l[[j, k]]).sum();
        row[j] = (row[j] - dot) / l[[j, j]];
    }
}

/// Replaces a lower triangular matrix (zeros above) with positive diagonal by its inverse.
///
/// Row block i of the inverse is −L_ii⁻¹ · (L_i,<i · X_<i), where X_<i is finished already.
pub fn invert_lower(a: &mut Array2<f64>) {
    let n = a.nrows();
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        let inverse = inverse_of_block(a.slice(s![start..end, start..end]));
        let (done, mut rest) = a.view_mut().split_at(Axis(0), start);
        let mut block = rest.slice_mut(s![..end - start, ..end]);
        let left = block.slice(s![.., ..start]).to_owned();
        let tiles = tiles_mut(block.slice_mut(s![.., ..start]), PANEL, TILE);
        tiles.into_par_iter().for_each(|mut tile| {
            let cols = tile.col..tile.col + tile.view.ncols();
            // X_<i is lower triangular: rows above the tile's first column are zero there.
            let x = done.slice(s![tile.col.., cols]);
            let product = left.slice(s![.., tile.col..]).dot(&x);
            general_mat_mul(-1.0, &inverse, &product, 0.0, &mut tile.view);
        });
        block.slice_mut(s![.., start..]).assign(&inverse);
    }
}

/// Inverse of a small lower triangular matrix by forward substitution.
fn inverse_of_block(l: ArrayView2<'_, f64>) -> Array2<f64> {
    let n = l.nrows();
    let mut x = Array2::<f64>::zeros((n, n));
    for j in 0..n {
        x[[j, j]] = 1.0 / l[[j, j]];
        for i in j + 1..n {
            let dot: f64 = (j..i).map(|k| l[[i, k]] * x[[k, j]]).sum();
            x[[i, j]] = -dot / l[[i, i]];
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::largest;

    fn positive_definite(n: usize) -> Array2<f32> {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 500.0 - 1.0;
        let x = Array2::from_shape_fn((2 * n, n), |(i, j)| value(i * n + j * 7 + i * j));
        let mut h = x.t().dot(&x);
        h.diag_mut().mapv_inplace(|d| d + 1.0);
        h
    }

    #[test]
    fn the_factor_inverts_h() {
        for n in [1, 2, 63, 64, 65, 300, 515] {
            let h = positive_definite(n);
            let u = inverse_upper_factor(&h).unwrap().mapv(f64::from);
            // U H Uᵀ = I is equivalent to UᵀU = H⁻¹ and needs no second inverse.
            let identity = u.dot(&h.mapv(f64::from)).dot(&u.t());
            let worst = largest(&(identity - Array2::<f64>::eye(n)));
            assert!(worst < 2e-5, "n = {n}: worst error {worst:e}");
            assert!(u.indexed_iter().all(|((i, j), &v)| i <= j || v == 0.0));
        }
    }

    #[test]
    fn an_indefinite_matrix_names_the_pivot() {
        let mut h = positive_definite(100);
        h[[70, 70]] = -1.0;
        let Err(Error::NotPositiveDefinite { n: 100, pivot: 70, value }) = inverse_upper_factor(&h)
        else {
            panic!("an indefinite matrix was factored")
        };
        assert!(value < 0.0);
        h[[70, 70]] = f32::NAN;
        assert!(inverse_upper_factor(&h).is_err());
    }
}
