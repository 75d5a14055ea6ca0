//! Shifts of a linear's target on the device: see [`crate::Device::over_hessian`].
//!
//! Products over tokens run on tensor cores in fp16 with f32 sums, as those of a Gram. B H⁻¹ and the
//! shifted weights are f32 throughout: TF32's rounding of U would be multiplied by the root of H's
//! condition number.

use std::sync::Arc;

use cudarc::driver::PushKernelArg;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::dense::{Block, Product, int, multiply, multiply_transposed};
use super::elementwise::{to_f16, to_f32};
use super::error::StageContext;
use super::factor::rows_launch;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::gram::CHUNK_TOKENS as TOKENS;
use super::matrix::{Matrix, ensure_same_card};
use super::permutation::inverse_of;
use crate::error::{Error, Result};

/// Columns of a panel of a product with a triangle, whose zeros beyond the panel are skipped.
const PANEL: usize = 2048;

/// An f32 matrix of zeros.
pub(crate) fn zeros(cuda: &Arc<Cuda>, shape: (usize, usize)) -> Result<Matrix> {
    Ok(Matrix::from_f32(cuda, shape, cuda.zeros("zeros", shape.0 * shape.1)?))
}

/// a − b in fp16; both are f32 or both fp16.
pub(crate) fn difference(a: &Matrix, b: &Matrix) -> Result<Matrix> {
    const OP: &str = "difference";
    ensure_same_card(OP, &[a, b])?;
    let cuda = a.cuda();
    let mut out = Matrix::uninit_f16(cuda, OP, a.shape())?;
    let count = a.rows() * a.cols();
    let n = count as i64;
    let name = match (a.values(), b.values()) {
        (Values::F32(_), Values::F32(_)) => "difference_f32",
        (Values::F16(_), Values::F16(_)) => "difference_f16",
        _ => return Err(Error::WrongType { op: OP, needs: "operands of one type" }),
    };
    let kernel = cuda.kernel("combine.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&kernel);
    for operand in [a, b] {
        operand.pass(&mut launch);
    }
    launch.arg(out.f16_mut(OP)?).arg(&n);
    // SAFETY: the arguments are the kernel's for the operands' type; all hold n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(out)
}

/// sum += aᵀb.
pub(crate) fn cross_add(sum: &mut Matrix, a: &Matrix, b: &Matrix) -> Result<()> {
    const OP: &str = "cross_add";
    ensure_same_card(OP, &[sum, a, b])?;
    let (a, b) = (to_f16(a)?, to_f16(b)?);
    let (cuda, m, n) = (Arc::clone(a.cuda()), a.cols(), b.cols());
    let (left, right, total) = (b.f16(OP)?, a.f16(OP)?, sum.f32_mut(OP)?);
    for token in (0..a.rows()).step_by(TOKENS) {
        let tokens = TOKENS.min(a.rows() - token);
        // Column-major: the transposed sum, bᵀa.
        let left = Operand::new(&cuda, left, token * n, n, PLAIN);
        let right = Operand::new(&cuda, right, token * m, m, TRANSPOSED);
        let target = Operand::new(&cuda, total, 0, n, PLAIN);
        // SAFETY: the operands hold these tokens, and the sum is [m, n].
        unsafe { gemm(&cuda, OP, (n, m, tokens), (left, right), 1.0, target)? };
    }
    Ok(())
}

/// B H⁻¹ from U.
pub(crate) fn over_hessian(b: &Matrix, upper: &Matrix, order: &[u32]) -> Result<Matrix> {
    const OP: &str = "over_hessian";
    ensure_same_card(OP, &[b, upper])?;
    let (cuda, (m, n)) = (b.cuda(), b.shape());
    let back = cuda.copied(OP, &inverse_of(order)?)?;
    let order = cuda.copied(OP, order)?;
    let mut whole = gathered(b, &order)?;
    let mut half = cuda.uninit::<f32>(OP, m * n)?;
    let triangle = Block::of(cuda, upper.f32(OP)?, n);
    let inner = Block::of_mut(cuda, half.make_mut()?, n);
    let outer = Block::of_mut(cuda, whole.f32_mut(OP)?, n);
    for start in (0..n).step_by(PANEL) {
        // These columns of B Uᵀ: U's rows are zero before their diagonal.
        let shape = Product { m, n: PANEL.min(n - start), k: n - start };
        let operands = (outer.at(0, start), triangle.at(start, start), inner.at(0, start));
        // SAFETY: the blocks lie within B and the half product, both [m, n], and U [n, n], which
        // live until the queue is through.
        unsafe { multiply_transposed(cuda, OP, shape, (1.0, 0.0), operands) }?;
    }
    for start in (0..n).step_by(PANEL) {
        // These columns of (B Uᵀ) U: U's columns are zero after their diagonal.
        let end = (start + PANEL).min(n);
        let shape = Product { m, n: end - start, k: end };
        let operands = (inner, triangle.at(0, start), outer.at(0, start));
        // SAFETY: as above; B has been used up.
        unsafe { multiply(cuda, OP, shape, (1.0, 0.0), operands) }?;
    }
    gathered(&whole, &back)
}

/// Column j of the result is column `order[j]` of x, whose entries are columns; f32.
fn gathered(x: &Matrix, order: &Buffer<u32>) -> Result<Matrix> {
    const OP: &str = "gathering columns";
    let (cuda, (rows, cols)) = (x.cuda(), x.shape());
    let none = cuda.zeros::<u8>(OP, cols)?;
    let mut out = Matrix::uninit_f32(cuda, OP, (rows, cols))?;
    let (m, n) = (int(rows)?, int(cols)?);
    let kernel = cuda.kernel("permute_columns.cu", "permute_columns_f32")?;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(x.f32(OP)?).arg(order.slice()).arg(none.slice()).arg(out.f32_mut(OP)?);
    launch.arg(&m).arg(&n);
    // SAFETY: the arguments are the kernel's; both matrices hold rows × cols values, the order cols
    // that are columns, and no column is dead.
    unsafe { launch.launch(rows_launch(rows)) }.stage(OP)?;
    Ok(out)
}

/// w + factor · shift.
pub(crate) fn shifted(w: &Matrix, shift: &Matrix, factor: f32) -> Result<Matrix> {
    const OP: &str = "shifted";
    ensure_same_card(OP, &[w, shift])?;
    let cuda = w.cuda();
    let (mut out, shift) = (to_f32(w)?, to_f32(shift)?);
    let count = w.rows() * w.cols();
    let n = count as i64;
    let kernel = cuda.kernel("combine.cu", "shift")?;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(out.f32_mut(OP)?).arg(shift.f32(OP)?).arg(&factor).arg(&n);
    // SAFETY: the arguments are the kernel's; both matrices hold n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(out)
}

/// w + factor · w · m.
pub(crate) fn shifted_by(w: &Matrix, m: &Matrix, factor: f32) -> Result<Matrix> {
    const OP: &str = "shifted_by";
    ensure_same_card(OP, &[w, m])?;
    let (cuda, (rows, n)) = (w.cuda(), w.shape());
    let w = to_f32(w)?;
    let mut out = w.clone();
    let target = Block::of_mut(cuda, out.f32_mut(OP)?, n);
    let operands = (Block::of(cuda, w.f32(OP)?, n), Block::of(cuda, m.f32(OP)?, n), target);
    let shape = Product { m: rows, n, k: n };
    // SAFETY: w and the result are [rows, n] in memory of their own, m is [n, n]; all live until the
    // queue is through.
    unsafe { multiply(cuda, OP, shape, (factor, 1.0), operands) }?;
    Ok(out)
}
