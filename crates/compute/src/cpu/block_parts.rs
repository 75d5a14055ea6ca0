//! Parts of matrices, scaled sums and capped values.

use ndarray::{Array2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::elementwise::ROWS_PER_TASK;
use super::rows::{slice, slice_mut};
use super::simd;

/// Columns `columns` of a matrix.
pub(crate) fn columns(x: &Array2<f32>, columns: std::ops::Range<usize>) -> Array2<f32> {
    x.slice(s![.., columns]).as_standard_layout().into_owned()
}

/// Matrices of as many rows side by side.
pub(crate) fn joined(parts: &[&Array2<f32>], cols: usize) -> Array2<f32> {
    let mut out = Array2::zeros((parts[0].nrows(), cols));
    let mut to = 0;
    for part in parts {
        out.slice_mut(s![.., to..to + part.ncols()]).assign(part);
        to += part.ncols();
    }
    out
}

/// x ·= factor.
pub(crate) fn scale(x: &mut Array2<f32>, factor: f32) {
    by_rows(x.view_mut(), |_, row| row.iter_mut().for_each(|v| *v *= factor));
}

/// sum += factor · x.
pub(crate) fn add_scaled(sum: &mut Array2<f32>, x: &Array2<f32>, factor: f32) {
    by_rows(sum.view_mut(), |i, row| add(row, factor, slice(x.row(i))));
}

/// Row `rows[i]` of the sum += weights[i] · row i of x; the caller has checked that they are different rows of
/// it.
pub(crate) fn add_rows(sum: &mut Array2<f32>, rows: &[u32], weights: &[f32], x: &Array2<f32>) {
    for ((&row, &weight), x) in rows.iter().zip(weights).zip(x.rows()) {
        add(slice_mut(&mut sum.row_mut(row as usize)), weight, slice(x));
    }
}

/// Each value v becomes cap · tanh(v / cap).
pub(crate) fn softcap(x: ArrayViewMut2<'_, f32>, cap: f32) {
    by_rows(x, |_, row| simd::softcap(row, cap));
}

fn add(sum: &mut [f32], factor: f32, x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += factor * x);
}

fn by_rows(mut x: ArrayViewMut2<'_, f32>, change: impl Fn(usize, &mut [f32]) + Sync) {
    let mut rows: Vec<_> = x.axis_iter_mut(Axis(0)).collect();
    let rows = rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate();
    rows.for_each(|(i, row)| change(i, slice_mut(row)));
}
