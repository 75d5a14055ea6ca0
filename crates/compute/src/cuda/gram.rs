//! Accumulating Gram matrices on tensor cores, the upper triangle only.
//!
//! The product of two fp16 values is exact in f32, so only the sums round. The triangle is cut into
//! panels of rows, each a product of its own that starts at the diagonal: 9/16 of the work for 8
//! panels. Panels are wide enough that the last ones still fill a card with tiles.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, PushKernelArg};

use super::buffer::Buffer;
use super::context::Cuda;
use super::elementwise::{to_f16, to_f32};
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm, symmetric};
use super::matrix::{Matrix, ensure_same_card};
use crate::error::{Result, ensure_shape};

/// Rows of a panel.
const PANEL: usize = 2048;
/// Tokens summed inside one product, before the sum is added to the total in f32, and tokens of a
/// caller's chunk. A fixed number makes the result independent of the chunks that callers use, when
/// those are multiples of it.
pub(crate) const CHUNK_TOKENS: usize = 16_384;

/// An empty Gram `[n, n]`.
pub(crate) fn zeros(cuda: &Arc<Cuda>, n: usize) -> Result<Matrix> {
    Ok(Matrix::from_f32(cuda, (n, n), cuda.zeros("gram", n * n)?))
}

/// sum += xᵀx on the upper triangle; some values below it are written too.
pub(crate) fn accumulate(sum: &mut Matrix, x: &Matrix) -> Result<()> {
    const OP: &str = "gram_add";
    ensure_shape(sum.cols() == x.cols(), OP, sum.shape(), x.shape())?;
    ensure_same_card(OP, &[sum, x])?;
    let x = to_f16(x)?;
    let (cuda, n) = (x.cuda(), x.cols());
    let (total, inputs) = (sum.f32_mut(OP)?, x.f16(OP)?);
    for token in (0..x.rows()).step_by(CHUNK_TOKENS) {
        let tokens = CHUNK_TOKENS.min(x.rows() - token);
        for row in (0..n).step_by(PANEL) {
            let rows = PANEL.min(n - row);
            // Column-major: columns row.. of the transposed result, from the diagonal down.
            let left = Operand::new(cuda, inputs, token * n + row, n, PLAIN);
            let right = Operand { op: TRANSPOSED, ..left };
            let target = Operand::new(cuda, total, row * n + row, n, PLAIN);
            // SAFETY: rows row..row+rows and columns row..n of the total, tokens and columns of x.
            unsafe { gemm(cuda, OP, (n - row, rows, tokens), (left, right), 1.0, target)? };
        }
    }
    Ok(())
}

/// The diagonal of a Gram; waits for all queued work.
pub(crate) fn diagonal(sum: &Matrix) -> Result<Vec<f32>> {
    const OP: &str = "diagonal";
    let (cuda, n) = (sum.cuda(), sum.cols());
    let mut out = cuda.uninit::<f32>(OP, n)?;
    let order = n as i32;
    let function = cuda.kernel("diagonal.cu", "diagonal")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(sum.f32(OP)?).arg(out.make_mut()?).arg(&order);
    // SAFETY: the arguments are the kernel's; the matrix is [n, n], and out holds n values.
    unsafe { launch.launch(cuda.spread(n)) }.stage(OP)?;
    cuda.read(OP, out.slice(), n)
}

/// Σ over rows r of w of r G rᵀ, from the upper triangle of G; waits for all queued work.
pub(crate) fn quadratic_form(sum: &Matrix, w: &Matrix) -> Result<f64> {
    const OP: &str = "quadratic_form";
    ensure_same_card(OP, &[sum, w])?;
    /// Rows of w at a time: the product needs as much room as they do.
    const BAND: usize = 4096;
    let (cuda, n) = (sum.cuda(), sum.cols());
    let w = to_f32(w)?;
    let weights = w.f32(OP)?;
    let gram = Operand::new(cuda, sum.f32(OP)?, 0, n, PLAIN);
    let mut total = 0.0;
    for start in (0..w.rows()).step_by(BAND) {
        let rows = BAND.min(w.rows() - start);
        let mut product = cuda.uninit::<f32>(OP, rows * n)?;
        let from = Operand::new(cuda, weights, start * n, n, PLAIN);
        let target = Operand::new(cuda, product.make_mut()?, 0, n, PLAIN);
        // SAFETY: the Gram is [n, n]; w holds these rows of n values, and product was made for them.
        unsafe { symmetric(cuda, OP, (n, rows), gram, from, target)? };
        total += dot(cuda, &product, weights, start * n, rows * n)?;
    }
    Ok(total)
}

/// Σ a[i] · b[offset + i] over `count` values, in f64; waits for all queued work.
fn dot(
    cuda: &Cuda,
    a: &Buffer<f32>,
    b: &CudaSlice<f32>,
    offset: usize,
    count: usize,
) -> Result<f64> {
    const OP: &str = "dot";
    let config = cuda.spread(count);
    let blocks = config.grid_dim.0 as usize;
    let mut partial = cuda.uninit::<f64>(OP, blocks)?;
    let (b, n) = (b.slice(offset..offset + count), count as i64);
    let function = cuda.kernel("dot.cu", "dot")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(a.slice()).arg(&b).arg(partial.make_mut()?).arg(&n);
    // SAFETY: the arguments are the kernel's; a and b hold n values, partial one a block.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(cuda.read(OP, partial.slice(), blocks)?.iter().sum())
}
