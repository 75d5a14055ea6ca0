//! Weights turned by a matrix of their own width: two products on tensor cores, of f32's exactness.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::PushKernelArg;

use super::context::Cuda;
use super::dense::int;
use super::elementwise::to_f16;
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::{Matrix, ensure_same_card};
use crate::error::Result;

const OP: &str = "turning weights";
/// Values of a product that are held in f32.
pub(crate) const VALUES: usize = 1 << 26;

/// diag(gain) · rotation in fp16, twice: rounded, and what that leaves; both over `scale`.
pub(crate) struct Halves {
    pub(crate) high: Matrix,
    pub(crate) low: Matrix,
    /// A power of two.
    pub(crate) scale: f32,
}

/// Splits a rotation `[n, n]` in f32 with a gain of `n` values, or of ones. The largest gain is brought to 2¹² or a
/// little less, as no entry of a rotation is above 1 and most are some n^-½, so that both halves stay above fp16's least.
pub(crate) fn halves(rotation: &Matrix, gain: Option<&[f32]>) -> Result<Halves> {
    let (cuda, order) = (rotation.cuda(), rotation.rows());
    let largest = gain.map_or(1.0, |gain| gain.iter().fold(0.0_f32, |most, g| most.max(g.abs())));
    let up =
        if largest > 0.0 && largest.is_finite() { 12 - largest.log2().ceil() as i32 } else { 0 };
    // Far from where powers of two end in f32.
    let up = up.clamp(-60, 60);
    let by = 2.0_f32.powi(up);
    let gain: Vec<f32> = match gain {
        Some(gain) => gain.iter().map(|gain| gain * by).collect(),
        None => vec![by; order],
    };
    let mut high = Matrix::uninit_f16(cuda, OP, rotation.shape())?;
    let mut low = Matrix::uninit_f16(cuda, OP, rotation.shape())?;
    let gain = cuda.copied(OP, &gain)?;
    let (side, n) = (int(order)?, (order * order) as i64);
    let kernel = cuda.kernel("turn.cu", "split_gained")?;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(rotation.f32(OP)?).arg(gain.slice()).arg(high.f16_mut(OP)?).arg(low.f16_mut(OP)?);
    launch.arg(&side).arg(&n);
    // SAFETY: the arguments are the kernel's; rotation, high and low hold n values, gain `order`.
    unsafe { launch.launch(cuda.spread(order * order)) }.stage(OP)?;
    Ok(Halves { high, low, scale: 2.0_f32.powi(-up) })
}

/// w · rotation of rows in fp16, given by its halves, in fp16; the caller has checked shapes.
pub(crate) fn inputs(w: &Matrix, halves: &Halves) -> Result<Matrix> {
    ensure_same_card(OP, &[w, &halves.high])?;
    let w = to_f16(w)?;
    let (cuda, (rows, order)) = (Arc::clone(w.cuda()), w.shape());
    let mut out = Matrix::uninit_f16(&cuda, OP, w.shape())?;
    let step = (VALUES / order.max(1)).clamp(1, rows.max(1));
    let mut sum = cuda.uninit::<f32>(OP, step * order)?;
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        for (half, beta) in [(&halves.high, 0.0), (&halves.low, 1.0)] {
            // Column-major: the transposed result, rotationᵀ · wᵀ.
            let left = Operand::new(&cuda, half.f16(OP)?, 0, order, PLAIN);
            let right = Operand::new(&cuda, w.f16(OP)?, first * order, order, PLAIN);
            let target = Operand::new(&cuda, sum.make_mut()?, 0, order, PLAIN);
            // SAFETY: w holds these rows of `order` values, a half is [order, order], and the sum has room.
            unsafe { gemm(&cuda, OP, (order, count, order), (left, right), beta, target)? };
        }
        let values = first * order..(first + count) * order;
        round_into(&cuda, sum.slice(), halves.scale, &mut out, values)?;
    }
    Ok(out)
}

/// rotationᵀ · w of columns, likewise.
pub(crate) fn outputs(w: &Matrix, halves: &Halves) -> Result<Matrix> {
    ensure_same_card(OP, &[w, &halves.high])?;
    let w = to_f16(w)?;
    let (cuda, (order, cols)) = (Arc::clone(w.cuda()), w.shape());
    let mut out = Matrix::uninit_f16(&cuda, OP, w.shape())?;
    let step = (VALUES / cols.max(1)).clamp(1, order);
    let mut sum = cuda.uninit::<f32>(OP, step * cols)?;
    for first in (0..order).step_by(step) {
        let count = step.min(order - first);
        for (half, beta) in [(&halves.high, 0.0), (&halves.low, 1.0)] {
            // Column-major: the transposed result, wᵀ · rotation, of some columns of the rotation.
            let left = Operand::new(&cuda, w.f16(OP)?, 0, cols, PLAIN);
            let right = Operand::new(&cuda, half.f16(OP)?, first, order, TRANSPOSED);
            let target = Operand::new(&cuda, sum.make_mut()?, 0, cols, PLAIN);
            // SAFETY: w is [order, cols], a half is [order, order] with these columns, and the sum has room.
            unsafe { gemm(&cuda, OP, (cols, count, order), (left, right), beta, target)? };
        }
        let values = first * cols..(first + count) * cols;
        round_into(&cuda, sum.slice(), halves.scale, &mut out, values)?;
    }
    Ok(out)
}

/// out[values] = the first of `sum` times `scale`, in fp16.
fn round_into(
    cuda: &Cuda,
    sum: &cudarc::driver::CudaSlice<f32>,
    scale: f32,
    out: &mut Matrix,
    values: Range<usize>,
) -> Result<()> {
    let n = values.len() as i64;
    let kernel = cuda.kernel("turn.cu", "round_scaled")?;
    let config = cuda.spread(values.len());
    let mut target = out.f16_mut(OP)?.slice_mut(values);
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(sum).arg(&mut target).arg(&scale).arg(&n);
    // SAFETY: the arguments are the kernel's; both hold n values.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(())
}
