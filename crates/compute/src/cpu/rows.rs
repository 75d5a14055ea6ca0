//! Bringing rows of stored matrices to f32.

use ndarray::{Array2, ArrayView1, ArrayViewMut1, Axis};
use rayon::prelude::*;

use crate::host::HostMatrix;

/// The whole matrix as f32.
pub(crate) fn upload(matrix: HostMatrix<'_>) -> Array2<f32> {
    let mut out = vec![0.0; matrix.rows() * matrix.cols()];
    out.par_chunks_mut(matrix.cols().max(1))
        .enumerate()
        .for_each(|(row, values)| matrix.read_row(row, values));
    into_matrix(out, matrix.rows(), matrix.cols())
}

/// Rows `ids`, in that order; the caller has checked the range.
pub(crate) fn gather(table: HostMatrix<'_>, ids: &[u32]) -> Array2<f32> {
    let mut out = Array2::zeros((ids.len(), table.cols()));
    for (mut row, &id) in out.axis_iter_mut(Axis(0)).zip(ids) {
        table.read_row(id as usize, slice_mut(&mut row));
    }
    out
}

/// Rows of a matrix in host memory; the caller has checked the range.
pub(crate) fn select(x: &Array2<f32>, rows: &[u32]) -> Array2<f32> {
    let mut out = Array2::zeros((rows.len(), x.ncols()));
    for (mut to, &from) in out.axis_iter_mut(Axis(0)).zip(rows) {
        to.assign(&x.row(from as usize));
    }
    out
}

/// A row's values, which lie side by side: [`crate::Tensor`] makes every matrix row-major.
pub(crate) fn slice<'a>(row: ArrayView1<'a, f32>) -> &'a [f32] {
    #[expect(clippy::expect_used, reason = "a wrong result otherwise, and tensors are row-major")]
    row.to_slice().expect("a row of a row-major matrix")
}

/// As [`slice()`], for writing.
pub(crate) fn slice_mut<'a>(row: &'a mut ArrayViewMut1<'_, f32>) -> &'a mut [f32] {
    #[expect(clippy::expect_used, reason = "a wrong result otherwise, and tensors are row-major")]
    row.as_slice_mut().expect("a row of a row-major matrix")
}

/// `values` as a matrix; the lengths agree by construction at each call.
pub(crate) fn into_matrix(values: Vec<f32>, rows: usize, cols: usize) -> Array2<f32> {
    #[expect(clippy::expect_used, reason = "every caller allocates rows × cols values")]
    Array2::from_shape_vec((rows, cols), values).expect("rows × cols values")
}
