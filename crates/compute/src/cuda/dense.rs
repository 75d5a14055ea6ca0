//! Products and Cholesky factors of blocks of row-major matrices, in f32 or f64.
//!
//! The libraries are column-major. A row-major matrix is the transpose of the column-major matrix in
//! the same memory, so C = A B is asked for as Cᵀ = Bᵀ Aᵀ, and the lower triangle of a row-major
//! matrix is the upper one of the library's: no copies. f32 products use the f32 units; TF32 is
//! never asked for.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use cudarc::cublas::{result as cublas, sys as blas};
use cudarc::cusolver::sys as dn;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, sys as driver};

use super::context::Cuda;
use super::error::StageContext;
use crate::error::{Error, Result};

/// A type that the solver computes in.
pub(super) trait Real: DeviceRepr + Copy + Into<f64> {
    const ONE: Self;
    const MINUS_ONE: Self;
    const ZERO: Self;
    /// Names of this type's kernels.
    const KERNELS: Names;
    const DATA: blas::cudaDataType;
    const COMPUTE: blas::cublasComputeType_t;

    /// Values of workspace that [`Real::potrf`] needs.
    ///
    /// # Safety
    /// The handle is valid and `a` points at an `n × n` matrix on its device, whose rows lie `ld`
    /// values apart.
    unsafe fn potrf_size(
        handle: dn::cusolverDnHandle_t,
        n: c_int,
        a: *mut Self,
        ld: c_int,
        size: &mut c_int,
    ) -> dn::cusolverStatus_t;

    /// Queues the factorization of the row-major lower triangle of `a` in place.
    ///
    /// # Safety
    /// As for [`Real::potrf_size`]; `work` holds `size` values, `info` one, all on the device.
    unsafe fn potrf(
        handle: dn::cusolverDnHandle_t,
        n: c_int,
        a: *mut Self,
        ld: c_int,
        work: *mut Self,
        size: c_int,
        info: *mut c_int,
    ) -> dn::cusolverStatus_t;
}

/// Kernels that exist once for each type.
pub(super) struct Names {
    pub(super) hessian_prep: &'static str,
    pub(super) tri_inverse: &'static str,
    pub(super) zero_upper: &'static str,
}

macro_rules! real {
    ($type:ty, $suffix:literal, $data:ident, $compute:ident, $size:ident, $potrf:ident) => {
        impl Real for $type {
            const ONE: Self = 1.0;
            const MINUS_ONE: Self = -1.0;
            const ZERO: Self = 0.0;
            const KERNELS: Names = Names {
                hessian_prep: concat!("hessian_prep_", $suffix),
                tri_inverse: concat!("tri_inverse_", $suffix),
                zero_upper: concat!("zero_upper_", $suffix),
            };
            const DATA: blas::cudaDataType = blas::cudaDataType::$data;
            const COMPUTE: blas::cublasComputeType_t = blas::cublasComputeType_t::$compute;

            unsafe fn potrf_size(
                handle: dn::cusolverDnHandle_t,
                n: c_int,
                a: *mut Self,
                ld: c_int,
                size: &mut c_int,
            ) -> dn::cusolverStatus_t {
                let triangle = dn::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
                // SAFETY: the caller's contract, and `size` is a valid place for the result.
                unsafe { dn::$size(handle, triangle, n, a, ld, size) }
            }

            unsafe fn potrf(
                handle: dn::cusolverDnHandle_t,
                n: c_int,
                a: *mut Self,
                ld: c_int,
                work: *mut Self,
                size: c_int,
                info: *mut c_int,
            ) -> dn::cusolverStatus_t {
                let triangle = dn::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
                // SAFETY: the caller's contract.
                unsafe { dn::$potrf(handle, triangle, n, a, ld, work, size, info) }
            }
        }
    };
}

real!(f32, "f32", CUDA_R_32F, CUBLAS_COMPUTE_32F, cusolverDnSpotrf_bufferSize, cusolverDnSpotrf);
real!(f64, "f64", CUDA_R_64F, CUBLAS_COMPUTE_64F, cusolverDnDpotrf_bufferSize, cusolverDnDpotrf);

/// A block of a row-major matrix on the device, by address: blocks of one matrix are read and
/// written in one product, which slices with lifetimes could not say.
#[derive(Debug)]
pub(super) struct Block<T> {
    address: u64,
    ld: usize,
    values: PhantomData<*mut T>,
}

impl<T> Clone for Block<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Block<T> {}

impl<T> Block<T> {
    /// The matrix in `slice`, whose rows are `ld` values, for reading.
    pub(super) fn of(cuda: &Cuda, slice: &CudaSlice<T>, ld: usize) -> Self {
        let (address, _record) = slice.device_ptr(cuda.stream());
        Self { address, ld, values: PhantomData }
    }

    /// The matrix in `slice`, whose rows are `ld` values, for writing.
    pub(super) fn of_mut(cuda: &Cuda, slice: &mut CudaSlice<T>, ld: usize) -> Self {
        let (address, _record) = slice.device_ptr_mut(cuda.stream());
        Self { address, ld, values: PhantomData }
    }

    /// The block whose first value is in this row and column.
    pub(super) fn at(self, row: usize, col: usize) -> Self {
        let offset = (row * self.ld + col) * size_of::<T>();
        Self { address: self.address + offset as u64, ..self }
    }

    /// The same memory as rows of `ld` values.
    pub(super) fn with_rows_of(self, ld: usize) -> Self {
        Self { ld, ..self }
    }

    /// Address of the first value, as a kernel's argument.
    pub(super) fn address(&self) -> &u64 {
        &self.address
    }
}

/// A product `[m, k] · [k, n]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Products of one shape whose operands lie at equal distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    pub(super) count: usize,
    /// Values from one product's operand to the next one's, for a, b and c.
    pub(super) strides: [usize; 3],
}

/// Queues c = alpha · a · b + beta · c.
///
/// # Safety
/// The blocks lie within live device memory of `cuda`, which stays allocated until the queue has
/// passed this product; c overlaps neither a nor b.
pub(super) unsafe fn multiply<T: Real>(
    cuda: &Cuda,
    stage: &'static str,
    shape: Product,
    factors: (T, T),
    operands: (Block<T>, Block<T>, Block<T>),
) -> Result<()> {
    // SAFETY: the caller's contract.
    unsafe { product(cuda, stage, shape, blas::cublasOperation_t::CUBLAS_OP_N, factors, operands) }
}

/// Queues c = alpha · a · bᵀ + beta · c, b being `[n, k]`.
///
/// # Safety
/// As for [`multiply`].
pub(super) unsafe fn multiply_transposed<T: Real>(
    cuda: &Cuda,
    stage: &'static str,
    shape: Product,
    factors: (T, T),
    operands: (Block<T>, Block<T>, Block<T>),
) -> Result<()> {
    // SAFETY: the caller's contract.
    unsafe { product(cuda, stage, shape, blas::cublasOperation_t::CUBLAS_OP_T, factors, operands) }
}

/// # Safety
/// As for [`multiply`]; `op` is applied to b.
unsafe fn product<T: Real>(
    cuda: &Cuda,
    stage: &'static str,
    shape: Product,
    op: blas::cublasOperation_t,
    (alpha, beta): (T, T),
    (a, b, c): (Block<T>, Block<T>, Block<T>),
) -> Result<()> {
    if shape.m == 0 || shape.n == 0 || shape.k == 0 {
        return Ok(());
    }
    let [m, n, k] = [int(shape.m)?, int(shape.n)?, int(shape.k)?];
    cuda.context().bind_to_thread().stage(stage)?;
    // SAFETY: the caller vouches for the blocks; the scalars outlive the call, which reads them.
    unsafe {
        cublas::gemm_ex(
            *cuda.blas().handle(),
            op,
            blas::cublasOperation_t::CUBLAS_OP_N,
            n,
            m,
            k,
            (&raw const alpha).cast(),
            b.address as *const c_void,
            T::DATA,
            int(b.ld)?,
            a.address as *const c_void,
            T::DATA,
            int(a.ld)?,
            (&raw const beta).cast(),
            c.address as *mut c_void,
            T::DATA,
            int(c.ld)?,
            T::COMPUTE,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .stage(stage)
}

/// Queues c = alpha · a · b for a batch of products.
///
/// # Safety
/// As for [`multiply`], for every product of the batch.
pub(super) unsafe fn multiply_batch<T: Real>(
    cuda: &Cuda,
    stage: &'static str,
    shape: Product,
    batch: Batch,
    alpha: T,
    (a, b, c): (Block<T>, Block<T>, Block<T>),
) -> Result<()> {
    if batch.count == 0 {
        return Ok(());
    }
    let [m, n, k] = [int(shape.m)?, int(shape.n)?, int(shape.k)?];
    let [stride_a, stride_b, stride_c] = batch.strides.map(|s| s as i64);
    let (none, zero) = (blas::cublasOperation_t::CUBLAS_OP_N, T::ZERO);
    cuda.context().bind_to_thread().stage(stage)?;
    // SAFETY: the caller vouches for the blocks; the scalars outlive the call, which reads them.
    unsafe {
        cublas::gemm_strided_batched_ex(
            *cuda.blas().handle(),
            none,
            none,
            n,
            m,
            k,
            (&raw const alpha).cast(),
            b.address as *const c_void,
            T::DATA,
            int(b.ld)?,
            stride_b,
            a.address as *const c_void,
            T::DATA,
            int(a.ld)?,
            stride_a,
            (&raw const zero).cast(),
            c.address as *mut c_void,
            T::DATA,
            int(c.ld)?,
            stride_c,
            int(batch.count)?,
            T::COMPUTE,
            blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .stage(stage)
}

/// Replaces the lower triangle of a symmetric `n × n` matrix by its lower Cholesky factor and waits
/// for it; what is above the diagonal is arbitrary afterwards.
///
/// # Errors
/// [`Error::NotPositiveDefinite`] with the pivot in the order of factorization.
pub(super) fn cholesky<T: Real>(cuda: &Cuda, a: &mut CudaSlice<T>, n: usize) -> Result<()> {
    let block = Block::of_mut(cuda, a, n);
    let room = cholesky_room(cuda, block, n)?;
    let mut work = cuda.uninit::<T>(CHOLESKY, room)?;
    let mut info = cuda.zeros::<i32>(CHOLESKY, 1)?;
    let work = Block::of_mut(cuda, work.make_mut()?, room);
    let report = Block::of_mut(cuda, info.make_mut()?, 1);
    // SAFETY: `a` holds n × n values; the workspace is as large as was asked for, and all buffers
    // live until the read of `info` below has waited for the queue.
    unsafe { queue_cholesky(cuda, block, n, work, report) }?;
    match cuda.read(CHOLESKY, info.slice(), 1)?.first() {
        Some(&failed) if failed != 0 => Err(failed_pivot(cuda, a, n, 0, failed)?),
        _ => Ok(()),
    }
}

const CHOLESKY: &str = "the Cholesky factorization";

/// Values of workspace that [`queue_cholesky`] needs for a block of order `n`.
pub(super) fn cholesky_room<T: Real>(cuda: &Cuda, a: Block<T>, n: usize) -> Result<usize> {
    let mut size = 0;
    cuda.context().bind_to_thread().stage(CHOLESKY)?;
    let (order, ld) = (int(n)?, int(a.ld)?);
    // SAFETY: the handle is valid; nothing is read through the address.
    unsafe { T::potrf_size(cuda.solver().cu(), order, a.address as *mut T, ld, &mut size) }
        .result()
        .stage(CHOLESKY)?;
    Ok(usize::try_from(size).unwrap_or(0))
}

/// Queues the factorization of the block of order `n` at `a`; `info` becomes 0, or one more than the
/// pivot that is not positive.
///
/// # Safety
/// As for [`multiply`]; `work` holds a row of [`cholesky_room`] values, `info` one.
pub(super) unsafe fn queue_cholesky<T: Real>(
    cuda: &Cuda,
    a: Block<T>,
    n: usize,
    work: Block<T>,
    info: Block<i32>,
) -> Result<()> {
    cuda.context().bind_to_thread().stage(CHOLESKY)?;
    let (order, ld, room) = (int(n)?, int(a.ld)?, int(work.ld)?);
    let (a, work) = (a.address as *mut T, work.address as *mut T);
    let info = info.address as *mut c_int;
    // SAFETY: the caller's contract.
    unsafe { T::potrf(cuda.solver().cu(), order, a, ld, work, room, info) }.result().stage(CHOLESKY)
}

/// The error of a block of an `n × n` matrix that begins at `start` and failed with `info`.
pub(super) fn failed_pivot<T: Real>(
    cuda: &Cuda,
    a: &CudaSlice<T>,
    n: usize,
    start: usize,
    info: i32,
) -> Result<Error> {
    let pivot = (start + usize::try_from(info - 1).unwrap_or(0)).min(n - 1);
    Ok(Error::NotPositiveDefinite { n, pivot, value: read(cuda, a, pivot * (n + 1))? })
}

/// Queues x ← x · l⁻ᵀ for x `[rows, n]` and the lower triangle l `[n, n]`.
///
/// # Safety
/// As for [`multiply`].
pub(super) unsafe fn divide_by_transposed(
    cuda: &Cuda,
    stage: &'static str,
    (rows, n): (usize, usize),
    l: Block<f32>,
    x: Block<f32>,
) -> Result<()> {
    let one = 1.0_f32;
    let [rows, n, l_ld, x_ld] = [int(rows)?, int(n)?, int(l.ld)?, int(x.ld)?];
    cuda.context().bind_to_thread().stage(stage)?;
    // Column-major: l · xᵀ is known, l being the transpose of the upper triangle in its memory.
    // SAFETY: the caller vouches for the blocks; the scalar outlives the call, which reads it.
    unsafe {
        blas::cublasStrsm_v2(
            *cuda.blas().handle(),
            blas::cublasSideMode_t::CUBLAS_SIDE_LEFT,
            blas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
            blas::cublasOperation_t::CUBLAS_OP_T,
            blas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
            n,
            rows,
            &raw const one,
            l.address as *const f32,
            l_ld,
            x.address as *mut f32,
            x_ld,
        )
    }
    .result()
    .stage(stage)
}

/// Queues a copy of `[rows, cols]` values.
///
/// # Safety
/// As for [`multiply`]; the blocks do not overlap.
pub(super) unsafe fn copy<T>(
    cuda: &Cuda,
    stage: &'static str,
    (rows, cols): (usize, usize),
    from: Block<T>,
    to: Block<T>,
) -> Result<()> {
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let there = driver::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    let plan = driver::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: there,
        srcHost: std::ptr::null(),
        srcDevice: from.address,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.ld * size_of::<T>(),
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: there,
        dstHost: std::ptr::null_mut(),
        dstDevice: to.address,
        dstArray: std::ptr::null_mut(),
        dstPitch: to.ld * size_of::<T>(),
        WidthInBytes: cols * size_of::<T>(),
        Height: rows,
    };
    cuda.context().bind_to_thread().stage(stage)?;
    // SAFETY: the caller vouches for the blocks; the plan outlives the call, which reads it.
    unsafe { driver::cuMemcpy2DAsync_v2(&raw const plan, cuda.stream().cu_stream()) }
        .result()
        .stage(stage)
}

/// One value of device memory; waits for the queue.
fn read<T: Real>(cuda: &Cuda, slice: &CudaSlice<T>, at: usize) -> Result<f64> {
    const STAGE: &str = "reading a pivot";
    let mut value = [T::ZERO];
    cuda.stream().memcpy_dtoh(&slice.slice(at..at + 1), &mut value).stage(STAGE)?;
    cuda.synchronize(STAGE)?;
    Ok(value[0].into())
}

/// A size as the libraries take it.
pub(super) fn int(value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(|_| Error::Unsupported {
        op: "matrix product",
        reason: format!("a side of {value} does not fit 32 bits"),
    })
}
