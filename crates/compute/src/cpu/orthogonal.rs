//! Newton–Schulz iterations in host memory.

use ndarray::Array2;

use super::matmul::matmul_nt;
use crate::orthogonal::{NEAREST, OF_DIRECTION, OF_STEP};

/// The orthogonal matrix nearest to one.
pub(crate) fn nearest(matrix: &Array2<f64>) -> Array2<f64> {
    iterated(matrix.clone(), NEAREST)
}

/// The one nearest to scale · r (1 − tangent · F), F being by · direction, flattened.
pub(crate) fn step(
    r: &Array2<f64>,
    direction: &Array2<f64>,
    by: f64,
    (tangent, scale): (f64, f64),
) -> Array2<f64> {
    let flat = iterated(direction * by, OF_DIRECTION);
    let mut turned = Array2::zeros(r.dim());
    matmul_nt(r.view(), flat.t(), 0.0, turned.view_mut());
    turned.zip_mut_with(r, |turned, r| *turned = scale * (r - tangent * *turned));
    iterated(turned, OF_STEP)
}

/// X ← (3 X − X Xᵀ X) / 2, so often.
fn iterated(mut x: Array2<f64>, iterations: usize) -> Array2<f64> {
    let mut square = Array2::zeros(x.dim());
    let mut product = Array2::zeros(x.dim());
    for _ in 0..iterations {
        matmul_nt(x.view(), x.view(), 0.0, square.view_mut());
        matmul_nt(square.view(), x.t(), 0.0, product.view_mut());
        x.zip_mut_with(&product, |x, product| *x = 1.5 * *x - 0.5 * product);
    }
    x
}
