//! Steps on the orthogonal matrices in host memory.

use ndarray::Array2;

use super::matmul::matmul_nt;
use crate::orthogonal::ITERATIONS;

/// The polar factor of scale · r (1 − s).
pub(crate) fn step(r: &Array2<f64>, s: &Array2<f64>, scale: f64) -> Array2<f64> {
    // sᵀ = −s, so that r − r s = r + r sᵀ.
    let mut x = r.clone();
    matmul_nt(r.view(), s.view(), 1.0, x.view_mut());
    x.mapv_inplace(|v| v * scale);
    let mut square = Array2::zeros(x.dim());
    let mut product = Array2::zeros(x.dim());
    for _ in 0..ITERATIONS {
        matmul_nt(x.view(), x.view(), 0.0, square.view_mut());
        matmul_nt(square.view(), x.t(), 0.0, product.view_mut());
        x.zip_mut_with(&product, |x, product| *x = 1.5 * *x - 0.5 * product);
    }
    x
}
