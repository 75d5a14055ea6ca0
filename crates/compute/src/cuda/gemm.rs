//! Matrix products by cuBLAS on row-major operands.
//!
//! cuBLAS is column-major: a row-major `[m, k]` matrix is its `[k, m]`. So x · wᵀ is asked for as
//! its transpose, w · xᵀ, with w transposed. Sums are always f32, as the handle's math mode demands
//! (see `context`); TF32 is never asked for.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublas::result::gemm_ex;
use cudarc::cublas::sys::{
    cublasComputeType_t, cublasFillMode_t, cublasGemmAlgo_t, cublasOperation_t, cublasSideMode_t,
    cublasSsymm_v2, cudaDataType,
};
use cudarc::driver::{CudaSlice, DevicePtr};

use super::buffer::Values;
use super::context::Cuda;
use super::elementwise::to_f16;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use crate::error::Result;

pub(crate) use cublasOperation_t::{CUBLAS_OP_N as PLAIN, CUBLAS_OP_T as TRANSPOSED};
pub(crate) use cudaDataType::{CUDA_R_16F as F16, CUDA_R_32F as F32};

/// An operand as cuBLAS sees it: column-major, with the distance of its columns.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) address: u64,
    pub(crate) kind: cudaDataType,
    pub(crate) stride: usize,
    pub(crate) op: cublasOperation_t,
}

impl Operand {
    /// `slice` from value `offset` on.
    pub(crate) fn new<T>(
        cuda: &Cuda,
        slice: &CudaSlice<T>,
        offset: usize,
        stride: usize,
        op: cublasOperation_t,
    ) -> Self {
        let kind = if size_of::<T>() == 2 { F16 } else { F32 };
        let address = slice.device_ptr(cuda.stream()).0 + (offset * size_of::<T>()) as u64;
        Self { address, kind, stride, op }
    }
}

/// c = a · b + beta · c with f32 sums, column-major; `size` is m, n, k of `[m, k] · [k, n]`.
///
/// # Safety
/// The operands, seen with their strides, lie within allocations that live until the work queued
/// here is done (which freeing on the stream of all work guarantees), and `c` overlaps neither.
pub(crate) unsafe fn gemm(
    cuda: &Cuda,
    op: &'static str,
    size: (usize, usize, usize),
    (a, b): (Operand, Operand),
    beta: f32,
    c: Operand,
) -> Result<()> {
    let (m, n, k) = size;
    if m == 0 || n == 0 {
        return Ok(());
    }
    let one = 1.0_f32;
    cuda.context().bind_to_thread().stage(op)?;
    let blas = cuda.blas();
    // SAFETY: the caller's contract; the handle is ours while `blas` is held, and the scalars are
    // f32, as the compute type asks, and read before the call returns.
    unsafe {
        gemm_ex(
            *blas.handle(),
            a.op,
            b.op,
            m as i32,
            n as i32,
            k as i32,
            (&raw const one).cast(),
            a.address as *const c_void,
            a.kind,
            a.stride as i32,
            b.address as *const c_void,
            b.kind,
            b.stride as i32,
            (&raw const beta).cast(),
            c.address as *mut c_void,
            c.kind,
            c.stride as i32,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .stage(op)
}

/// c = s · b for symmetric s `[n, n]` (its lower triangle, column-major) and b `[n, cols]`, in f32.
///
/// # Safety
/// As for [`gemm`]; all operands are f32.
pub(crate) unsafe fn symmetric(
    cuda: &Cuda,
    op: &'static str,
    (n, cols): (usize, usize),
    s: Operand,
    b: Operand,
    c: Operand,
) -> Result<()> {
    let (one, zero) = (1.0_f32, 0.0_f32);
    cuda.context().bind_to_thread().stage(op)?;
    let blas = cuda.blas();
    // SAFETY: the caller's contract; the scalars are read before the call returns.
    unsafe {
        cublasSsymm_v2(
            *blas.handle(),
            cublasSideMode_t::CUBLAS_SIDE_LEFT,
            cublasFillMode_t::CUBLAS_FILL_MODE_LOWER,
            n as i32,
            cols as i32,
            &raw const one,
            s.address as *const f32,
            s.stride as i32,
            b.address as *const f32,
            b.stride as i32,
            &raw const zero,
            c.address as *mut f32,
            c.stride as i32,
        )
    }
    .result()
    .stage(op)
}

/// x · wᵀ as fp16; f32 operands are converted to fp16 first.
pub(crate) fn linear(x: &Matrix, w: &Matrix) -> Result<Matrix> {
    const OP: &str = "linear";
    ensure_same_card(OP, &[x, w])?;
    let mut out = Matrix::uninit_f16(x.cuda(), OP, (x.rows(), w.rows()))?;
    let target = Operand::new(x.cuda(), out.f16_mut(OP)?, 0, w.rows(), PLAIN);
    multiply(OP, x, w, 0.0, target)?;
    Ok(out)
}

/// residual += x · wᵀ; the residual is f32 or fp16.
pub(crate) fn linear_add(x: &Matrix, w: &Matrix, residual: &mut Matrix) -> Result<()> {
    const OP: &str = "linear_add";
    ensure_same_card(OP, &[x, w, residual])?;
    let cuda = Arc::clone(x.cuda());
    let target = match residual.values() {
        Values::F16(_) => Operand::new(&cuda, residual.f16_mut(OP)?, 0, w.rows(), PLAIN),
        Values::F32(_) => Operand::new(&cuda, residual.f32_mut(OP)?, 0, w.rows(), PLAIN),
    };
    multiply(OP, x, w, 1.0, target)
}

/// Rows `rows` of x times wᵀ in f32: a chunk of logits.
pub(crate) fn logits(x: &Matrix, w: &Matrix, rows: std::ops::Range<usize>) -> Result<Matrix> {
    const OP: &str = "logits";
    ensure_same_card(OP, &[x, w])?;
    let cuda = x.cuda();
    let mut out = Matrix::uninit_f32(cuda, OP, (rows.len(), w.rows()))?;
    let target = Operand::new(cuda, out.f32_mut(OP)?, 0, w.rows(), PLAIN);
    let k = x.cols();
    let left = Operand::new(cuda, w.f16(OP)?, 0, k, TRANSPOSED);
    let right = Operand::new(cuda, x.f16(OP)?, rows.start * k, k, PLAIN);
    // SAFETY: x holds these rows, and the target was made for the product.
    unsafe { gemm(cuda, OP, (w.rows(), rows.len(), k), (left, right), 0.0, target)? };
    Ok(out)
}

fn multiply(op: &'static str, x: &Matrix, w: &Matrix, beta: f32, target: Operand) -> Result<()> {
    let (x, w) = (to_f16(x)?, to_f16(w)?);
    let (cuda, k) = (x.cuda(), x.cols());
    let left = Operand::new(cuda, w.f16(op)?, 0, k, TRANSPOSED);
    let right = Operand::new(cuda, x.f16(op)?, 0, k, PLAIN);
    // SAFETY: the caller has checked that w has x's columns and made the target [x.rows, w.rows].
    unsafe { gemm(cuda, op, (w.rows(), x.rows(), k), (left, right), beta, target) }
}
