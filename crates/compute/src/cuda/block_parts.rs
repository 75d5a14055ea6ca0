//! Launches of the kernels that blocks of other families than Llama need besides.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::PushKernelArg;
use half::f16;

use super::buffer::Values;
use super::dense::int;
use super::elementwise::{block_per_row, block_per_run};
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use crate::error::Result;

/// (x − mean) / √(variance + eps) · gain as fp16 over every run of `features` values, from f32 or fp16; the
/// gain's runs are those of a row, or one.
pub(crate) fn layer_norm(x: &Matrix, gain: &[f32], features: usize, eps: f32) -> Result<Matrix> {
    const OP: &str = "layer_norm";
    let cuda = x.cuda();
    let mut out = Matrix::uninit_f16(cuda, OP, x.shape())?;
    if x.rows() == 0 {
        return Ok(out);
    }
    let config = block_per_run(x.rows() * (x.cols() / features), features);
    let (cols, gains) = (int(features)?, int(gain.len() / features)?);
    let gain = cuda.copied(OP, gain)?;
    let name = match x.values() {
        Values::F32(_) => "layer_norm_f32",
        Values::F16(_) => "layer_norm_f16",
    };
    let function = cuda.kernel("layer_norm.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    x.pass(&mut launch);
    launch.arg(gain.slice()).arg(out.f16_mut(OP)?).arg(&cols).arg(&gains).arg(&eps);
    // SAFETY: the arguments are the kernel's for the type of x; x and out hold a run for each block, the
    // gain its own runs of as many values.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(out)
}

/// gelu(gate) · up, in place of `gate`; the caller has checked that both are on one card.
pub(crate) fn gelu_mul(mut gate: Matrix, up: &Matrix) -> Result<Matrix> {
    const OP: &str = "gelu_mul";
    ensure_same_card(OP, &[&gate, up])?;
    let cuda = Arc::clone(gate.cuda());
    let count = gate.rows() * gate.cols();
    let n = count as i64;
    let function = cuda.kernel("gelu_mul.cu", "gelu_mul")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(gate.f16_mut(OP)?).arg(up.f16(OP)?).arg(&n);
    // SAFETY: the arguments are the kernel's, and both matrices hold n values.
    unsafe { launch.launch(cuda.spread(count.div_ceil(8))) }.stage(OP)?;
    Ok(gate)
}

/// Columns of x, in x's type; the caller has checked the range.
pub(crate) fn columns(x: &Matrix, columns: Range<usize>) -> Result<Matrix> {
    const OP: &str = "columns";
    let mut out = uninit_as(x, OP, (x.rows(), columns.len()))?;
    copy_columns(OP, x, columns, &mut out, 0)?;
    Ok(out)
}

/// Matrices of as many rows side by side, in the type of all; the caller has checked the rows.
pub(crate) fn joined(parts: &[&Matrix], cols: usize) -> Result<Matrix> {
    const OP: &str = "joined";
    ensure_same_card(OP, parts)?;
    let mut out = uninit_as(parts[0], OP, (parts[0].rows(), cols))?;
    let mut to = 0;
    for part in parts {
        copy_columns(OP, part, 0..part.cols(), &mut out, to)?;
        to += part.cols();
    }
    Ok(out)
}

/// A matrix of x's type, whose values the caller queues the writing of.
fn uninit_as(x: &Matrix, op: &'static str, shape: (usize, usize)) -> Result<Matrix> {
    match x.values() {
        Values::F16(_) => Matrix::uninit_f16(x.cuda(), op, shape),
        Values::F32(_) => Matrix::uninit_f32(x.cuda(), op, shape),
    }
}

/// Copies columns of x to those of `out` from `to` on; the caller has checked that both have them.
fn copy_columns(
    op: &'static str,
    x: &Matrix,
    columns: Range<usize>,
    out: &mut Matrix,
    to: usize,
) -> Result<()> {
    if x.rows() == 0 || columns.is_empty() {
        return Ok(());
    }
    let cuda = Arc::clone(x.cuda());
    let size = match x.values() {
        Values::F16(_) => size_of::<f16>(),
        Values::F32(_) => size_of::<f32>(),
    };
    let [stride, first, to_stride, to, bytes] =
        [x.cols(), columns.start, out.cols(), to, columns.len()].map(|n| (n * size) as i64);
    let function = cuda.kernel("select_columns.cu", "select_columns")?;
    let mut launch = cuda.stream().launch_builder(&function);
    match x.values() {
        Values::F16(values) => launch.arg(values.slice()).arg(out.f16_mut(op)?),
        Values::F32(values) => launch.arg(values.slice()).arg(out.f32_mut(op)?),
    };
    launch.arg(&stride).arg(&first).arg(&to_stride).arg(&to).arg(&bytes);
    // SAFETY: the arguments are the kernel's; x has these columns, and out, of the same type, has as many rows
    // and columns for them.
    unsafe { launch.launch(block_per_row(x.rows())) }.stage(op)?;
    Ok(())
}

/// x ·= factor.
pub(crate) fn scale(x: &mut Matrix, factor: f32) -> Result<()> {
    const OP: &str = "scale";
    let cuda = Arc::clone(x.cuda());
    let count = x.rows() * x.cols();
    let n = count as i64;
    let half = matches!(x.values(), Values::F16(_));
    let function = cuda.kernel("scaled_sum.cu", if half { "scale_f16" } else { "scale_f32" })?;
    let mut launch = cuda.stream().launch_builder(&function);
    match half {
        true => launch.arg(x.f16_mut(OP)?),
        false => launch.arg(x.f32_mut(OP)?),
    };
    launch.arg(&factor).arg(&n);
    // SAFETY: the arguments are the kernel's for the type of x, which holds n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(())
}

/// sum += factor · x.
pub(crate) fn add_scaled(sum: &mut Matrix, x: &Matrix, factor: f32) -> Result<()> {
    const OP: &str = "add_scaled";
    ensure_same_card(OP, &[sum, x])?;
    let cuda = x.cuda();
    let count = x.rows() * x.cols();
    let n = count as i64;
    let name = match x.values() {
        Values::F16(_) => "add_scaled_f16",
        Values::F32(_) => "add_scaled_f32",
    };
    let function = cuda.kernel("scaled_sum.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(sum.f32_mut(OP)?);
    x.pass(&mut launch);
    launch.arg(&factor).arg(&n);
    // SAFETY: the arguments are the kernel's for the type of x; both matrices hold n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(())
}

/// Row `rows[i]` of the sum += weights[i] · row i of x; the caller has checked that they are different rows of
/// it.
pub(crate) fn add_rows(sum: &mut Matrix, rows: &[u32], weights: &[f32], x: &Matrix) -> Result<()> {
    const OP: &str = "add_rows";
    ensure_same_card(OP, &[sum, x])?;
    if rows.is_empty() {
        return Ok(());
    }
    let cuda = x.cuda();
    let cols = int(x.cols())?;
    let (rows, weights) = (cuda.copied(OP, rows)?, cuda.copied(OP, weights)?);
    let name = match x.values() {
        Values::F16(_) => "add_rows_f16",
        Values::F32(_) => "add_rows_f32",
    };
    let function = cuda.kernel("scaled_sum.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(sum.f32_mut(OP)?);
    x.pass(&mut launch);
    launch.arg(rows.slice()).arg(weights.slice()).arg(&cols);
    // SAFETY: the arguments are the kernel's for the type of x, which has a row, as rows and weights have a
    // value, for each block; no two blocks write one row of the sum.
    unsafe { launch.launch(block_per_row(x.rows())) }.stage(OP)?;
    Ok(())
}

/// Each value v of f32 becomes cap · tanh(v / cap).
pub(crate) fn softcap(x: &mut Matrix, cap: f32) -> Result<()> {
    const OP: &str = "softcap";
    let cuda = Arc::clone(x.cuda());
    let count = x.rows() * x.cols();
    let n = count as i64;
    let function = cuda.kernel("softcap.cu", "softcap")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(x.f32_mut(OP)?).arg(&cap).arg(&n);
    // SAFETY: the arguments are the kernel's, and x holds n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(())
}
