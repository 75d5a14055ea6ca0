//! Steps on the orthogonal matrices by cuBLAS in f64.

use std::sync::Arc;

use ndarray::Array2;

use super::context::Cuda;
use super::dense::{self, Block, Product};
use crate::error::{Error, Result};
use crate::orthogonal::ITERATIONS;

const OP: &str = "orthogonal_step";

/// The polar factor of scale · r (1 − s).
pub(crate) fn step(
    cuda: &Arc<Cuda>,
    r: &Array2<f64>,
    s: &Array2<f64>,
    scale: f64,
) -> Result<Array2<f64>> {
    let order = r.nrows();
    let upload = |values: &Array2<f64>| {
        let standard = values.as_standard_layout();
        cuda.copied(OP, standard.as_slice().unwrap_or_default())
    };
    let shape = Product { m: order, n: order, k: order };
    let (r, s) = (upload(r)?, upload(s)?);
    let mut x = cuda.uninit::<f64>(OP, order * order)?;
    let mut square = cuda.uninit::<f64>(OP, order * order)?;
    let mut next = cuda.uninit::<f64>(OP, order * order)?;
    let whole = (order, order);
    let (from, skew) = (Block::of(cuda, r.slice(), order), Block::of(cuda, s.slice(), order));
    let mut x_at = Block::of_mut(cuda, x.make_mut()?, order);
    let mut next_at = Block::of_mut(cuda, next.make_mut()?, order);
    let square_at = Block::of_mut(cuda, square.make_mut()?, order);
    // SAFETY: every block is order × order values of a buffer of its own, all of which live until the read below has
    // waited for the queue; targets are never operands.
    unsafe {
        dense::copy(cuda, OP, whole, from, x_at)?;
        dense::multiply(cuda, OP, shape, (-scale, scale), (from, skew, x_at))?;
        for _ in 0..ITERATIONS {
            dense::multiply_transposed(cuda, OP, shape, (1.0, 0.0), (x_at, x_at, square_at))?;
            dense::copy(cuda, OP, whole, x_at, next_at)?;
            dense::multiply(cuda, OP, shape, (-0.5, 1.5), (square_at, x_at, next_at))?;
            std::mem::swap(&mut x_at, &mut next_at);
        }
    }
    let last = if ITERATIONS.is_multiple_of(2) { &x } else { &next };
    let values = cuda.read(OP, last.slice(), order * order)?;
    let mismatch = |_| Error::ShapeMismatch { op: OP, left: whole, right: whole };
    Array2::from_shape_vec(whole, values).map_err(mismatch)
}
