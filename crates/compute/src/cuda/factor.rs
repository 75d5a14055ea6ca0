//! U, upper triangular with `UᵀU = H⁻¹`, from a Gram, on the device.
//!
//! With J the reversal of indices, U = J L⁻¹ J where L is the lower Cholesky factor of J H J. So the
//! Gram is written scaled, damped, in solve order and reversed (kernel `hessian_prep`), factored in
//! place by cuSOLVER, inverted in place, and turned round in memory (kernel `reverse`): one buffer of
//! n² beside the Gram, and a quarter of one while it is inverted.
//!
//! The triangular inverse is blocked here rather than left to a library: diagonal blocks of 32 come
//! from a kernel, and then halves are joined level by level,
//! `[A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹ C⁻¹]`, as two products whose panels skip the zeros. That is
//! n³/3 operations and 3 to 7 % for the panels' corners, nearly all in products of thousands a side.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::{Batch, Block, Product, Real, cholesky, int, multiply, multiply_batch};
use super::error::StageContext;
use super::matrix::Matrix;
use super::nccl::Communicator;
use super::permutation::SolveOrder;
use super::split;
use crate::error::{Error, Result, ensure_shape};
use crate::hessian_prep::{HessianPrep, Precision};
use crate::ranks::Ranks;
use crate::tensor::{Storage, Tensor};

/// Side of the diagonal blocks that the kernel inverts.
const BASE: usize = 32;
/// Columns or rows of a panel whose product skips the zeros of a triangle. 512 leaves 132
/// multiprocessors a full wave of 128 × 128 tiles from n = 8192 on.
const PANEL: usize = 512;
/// Most blocks of a grid-stride kernel.
const MAX_BLOCKS: usize = 1 << 16;

/// U `[n, n]` in f32 with `UᵀU = H⁻¹`, H being made from the upper triangle of `gram` as `prep` says.
///
/// When f32 meets a pivot that is not positive, the factorization is repeated in f64.
///
/// # Errors
/// [`Error::NotPositiveDefinite`] when f64 fails too, with the pivot in solve order and the value
/// that the library left there; [`Error::OutOfMemory`] when f64, which needs 2.5 times the memory,
/// does not fit.
pub fn upper_factor(gram: &Tensor, prep: &HessianPrep<'_>) -> Result<(Tensor, Precision)> {
    shared_upper_factor(gram, prep, &Ranks::alone())
}

/// As [`upper_factor`], by all of `ranks`, which hold the same Gram and get the same U.
pub(crate) fn shared_upper_factor(
    gram: &Tensor,
    prep: &HessianPrep<'_>,
    ranks: &Ranks,
) -> Result<(Tensor, Precision)> {
    const OP: &str = "upper_factor";
    let n = gram.rows();
    ensure_shape(gram.cols() == n && prep.order.len() == n, OP, gram.shape(), (n, n))?;
    let Storage::Cuda(gram) = &gram.0 else {
        return Err(Error::DeviceMismatch { op: OP });
    };
    let cuda = gram.cuda();
    let order = SolveOrder::upload(cuda, prep.order, prep.dead)?;
    let gram = gram.f32(OP)?;
    let card = ranks.card().filter(|_| n >= split::LEAST_ORDER);
    let outcome = inverse_of_factor::<f32>(cuda, "the Hessian", gram, n, &order, prep, |matrix| {
        match card {
            Some(card) => split::cholesky(cuda, card, matrix, n)?,
            None => cholesky(cuda, matrix, n)?,
        }
        invert_lower(cuda, matrix, n, card)
    });
    let (upper, precision) = match outcome {
        Ok(mut inverse) => {
            reverse(cuda, inverse.make_mut()?)?;
            (inverse, Precision::Usual)
        }
        Err(Error::NotPositiveDefinite { .. }) => {
            let stage = "the Hessian in f64, which f32 found not positive definite";
            let inverse = inverse_of_factor::<f64>(cuda, stage, gram, n, &order, prep, |matrix| {
                cholesky(cuda, matrix, n)?;
                invert_lower(cuda, matrix, n, None)
            })?;
            (reversed_narrow(cuda, inverse.slice(), n)?, Precision::RetriedInF64)
        }
        Err(other) => return Err(other),
    };
    Ok((Tensor(Storage::Cuda(Matrix::from_f32(cuda, (n, n), upper))), precision))
}

/// L⁻¹, L the lower Cholesky factor of J H J, which `invert` makes of that in place.
fn inverse_of_factor<T: Real>(
    cuda: &Arc<Cuda>,
    stage: &'static str,
    gram: &CudaSlice<f32>,
    n: usize,
    order: &SolveOrder,
    prep: &HessianPrep<'_>,
    invert: impl FnOnce(&mut CudaSlice<T>) -> Result<()>,
) -> Result<Buffer<T>> {
    let mut hessian = cuda.uninit::<T>(stage, n * n)?;
    let matrix = hessian.make_mut()?;
    let kernel = cuda.kernel("hessian_prep.cu", T::KERNELS.hessian_prep)?;
    let size = int(n)?;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(gram).arg(order.order.slice()).arg(order.dead.slice()).arg(&mut *matrix);
    launch.arg(&size).arg(&prep.scale).arg(&prep.damp);
    // SAFETY: the arguments are the kernel's; gram and matrix hold n × n values, order and dead n,
    // and `SolveOrder` has checked that the order is a permutation.
    unsafe { launch.launch(rows_launch(n)) }.stage(stage)?;
    invert(matrix).map_err(|error| match error {
        Error::NotPositiveDefinite { n, pivot, value } => {
            Error::NotPositiveDefinite { n, pivot: n - 1 - pivot, value }
        }
        other => other,
    })?;
    Ok(hessian)
}

/// Replaces the lower triangular matrix `a` by its inverse, zeros above the diagonal; together with
/// the other ranks of `card`, where there are some.
fn invert_lower<T: Real>(
    cuda: &Arc<Cuda>,
    a: &mut CudaSlice<T>,
    n: usize,
    card: Option<&Communicator>,
) -> Result<()> {
    const STAGE: &str = "the triangular inverse";
    let size = int(n)?;
    let zero = cuda.kernel("tri_inverse.cu", T::KERNELS.zero_upper)?;
    let base = cuda.kernel("tri_inverse.cu", T::KERNELS.tri_inverse)?;
    let mut launch = cuda.stream().launch_builder(&zero);
    launch.arg(&mut *a).arg(&size);
    // SAFETY: the arguments are the kernel's, and a holds n × n values.
    unsafe { launch.launch(rows_launch(n)) }.stage(STAGE)?;
    let mut launch = cuda.stream().launch_builder(&base);
    launch.arg(&mut *a).arg(&size);
    let blocks = LaunchConfig {
        grid_dim: (n.div_ceil(BASE) as u32, 1, 1),
        block_dim: (BASE as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: as above; the kernel cuts the ragged last block itself.
    unsafe { launch.launch(blocks) }.stage(STAGE)?;

    let levels = levels(n);
    let room = levels.iter().map(Level::room).max().unwrap_or(0);
    let mut scratch = cuda.uninit::<T>(STAGE, room)?;
    let scratch = scratch.make_mut()?;
    let a = Block::of_mut(cuda, a, n);
    for level in levels {
        let half = level.half;
        let scratch = Block::of_mut(cuda, scratch, half);
        if half <= PANEL {
            join_equal(cuda, a, n, &level, scratch)?;
        } else {
            for node in 0..level.full {
                let start = node * 2 * half;
                share_join(cuda, card, a.at(start, start), half, half, scratch)?;
            }
        }
        let start = level.full * 2 * half;
        share_join(cuda, card, a.at(start, start), half, level.ragged, scratch)?;
    }
    Ok(())
}

/// One level of the inversion: neighboring inverted blocks of `half` are joined.
#[derive(Debug, PartialEq, Eq)]
struct Level {
    half: usize,
    /// Pairs of two whole blocks.
    full: usize,
    /// Rows of the second block of the pair after those; 0 when there is none.
    ragged: usize,
}

impl Level {
    /// Values of scratch that the level needs.
    fn room(&self) -> usize {
        let equal = if self.half <= PANEL { self.full } else { self.full.min(1) };
        self.half * (self.half * equal).max(self.ragged)
    }
}

/// The levels for a matrix of order n, smallest blocks first.
fn levels(n: usize) -> Vec<Level> {
    std::iter::successors(Some(BASE), |half| Some(half * 2))
        .take_while(|&half| half < n)
        .map(|half| {
            let full = n / (2 * half);
            Level { half, full, ragged: (n - full * 2 * half).saturating_sub(half) }
        })
        .collect()
}

/// Joins all whole pairs of a level at once: B ← −C⁻¹ (B A⁻¹), zeros included.
fn join_equal<T: Real>(
    cuda: &Cuda,
    a: Block<T>,
    n: usize,
    level: &Level,
    scratch: Block<T>,
) -> Result<()> {
    const STAGE: &str = "the triangular inverse";
    let half = level.half;
    let shape = Product { m: half, n: half, k: half };
    let (step, room) = (2 * half * (n + 1), half * half);
    let (below, corner) = (a.at(half, 0), a.at(half, half));
    let inward = Batch { count: level.full, strides: [step, step, room] };
    let outward = Batch { count: level.full, strides: [step, room, step] };
    // SAFETY: the last pair ends within n; scratch has room for all products, and the operands of
    // each product are different blocks. The caller keeps both buffers until the queue is through.
    unsafe {
        multiply_batch(cuda, STAGE, shape, inward, T::ONE, (below, a, scratch))?;
        multiply_batch(cuda, STAGE, shape, outward, T::MINUS_ONE, (corner, scratch, below))
    }
}

/// Joins one pair at `a`; the columns of a large one are shared by the ranks of `card`.
fn share_join<T: Real>(
    cuda: &Cuda,
    card: Option<&Communicator>,
    a: Block<T>,
    half: usize,
    m: usize,
    scratch: Block<T>,
) -> Result<()> {
    let Some(card) = card.filter(|_| m > 0 && half >= split::LEAST_HALF) else {
        return join(cuda, a, half, m, scratch, 0..half);
    };
    let columns = split::columns(half, m, PANEL, card.size());
    join(cuda, a, half, m, scratch, columns[card.rank()].clone())?;
    // SAFETY: the pair lies within its matrix, and scratch has room for [m, half]; the caller keeps
    // both until the queue is through.
    unsafe { split::exchange_columns(cuda, card, (m, &columns), a.at(half, 0), scratch) }
}

/// Joins one pair at `a`: A⁻¹ of order `half`, C⁻¹ of order `m`, B between them `[m, half]`, of
/// which the columns `columns` are made.
fn join<T: Real>(
    cuda: &Cuda,
    a: Block<T>,
    half: usize,
    m: usize,
    scratch: Block<T>,
    columns: Range<usize>,
) -> Result<()> {
    const STAGE: &str = "the triangular inverse";
    let (below, corner) = (a.at(half, 0), a.at(half, half));
    for j in columns.clone().step_by(PANEL) {
        // Rows of A⁻¹ above the panel's first column are zero there.
        let shape = Product { m, n: PANEL.min(columns.end - j), k: half - j };
        let operands = (below.at(0, j), a.at(j, j), scratch.at(0, j));
        // SAFETY: the blocks lie within the pair and within scratch, which has room for [m, half].
        unsafe { multiply(cuda, STAGE, shape, (T::ONE, T::ZERO), operands) }?;
    }
    let (first, n) = (columns.start, columns.len());
    for i in (0..m).step_by(PANEL) {
        // Columns of C⁻¹ after the panel's last row are zero there.
        let rows = PANEL.min(m - i);
        let shape = Product { m: rows, n, k: i + rows };
        let operands = (corner.at(i, 0), scratch.at(0, first), below.at(i, first));
        // SAFETY: as above; B's rows are written, and scratch and C⁻¹ are read.
        unsafe { multiply(cuda, STAGE, shape, (T::MINUS_ONE, T::ZERO), operands) }?;
    }
    Ok(())
}

/// J X J in place: a row-major matrix read backwards.
fn reverse(cuda: &Arc<Cuda>, matrix: &mut CudaSlice<f32>) -> Result<()> {
    const STAGE: &str = "reversing the factor";
    let kernel = cuda.kernel("reverse.cu", "reverse_f32")?;
    let count = matrix.len() as i64;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(matrix).arg(&count);
    // SAFETY: the arguments are the kernel's, and the matrix holds `count` values.
    unsafe { launch.launch(values_launch(count as usize / 2)) }.stage(STAGE)?;
    Ok(())
}

/// J X J of an f64 matrix, in f32.
fn reversed_narrow(cuda: &Arc<Cuda>, matrix: &CudaSlice<f64>, n: usize) -> Result<Buffer<f32>> {
    const STAGE: &str = "rounding the f64 factor";
    let mut out = cuda.uninit::<f32>(STAGE, n * n)?;
    let kernel = cuda.kernel("reverse.cu", "reverse_narrow")?;
    let count = (n * n) as i64;
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(matrix).arg(out.make_mut()?).arg(&count);
    // SAFETY: the arguments are the kernel's, and both matrices hold `count` values.
    unsafe { launch.launch(values_launch(n * n)) }.stage(STAGE)?;
    Ok(out)
}

/// A block of 256 threads a row.
pub(super) fn rows_launch(rows: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (rows.clamp(1, MAX_BLOCKS) as u32, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// A thread a value.
fn values_launch(count: usize) -> LaunchConfig {
    rows_launch(count.div_ceil(256))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_cut_where_the_matrix_ends() {
        assert!(levels(32).is_empty());
        assert_eq!(levels(33), [Level { half: 32, full: 0, ragged: 1 }]);
        let first = Level { half: 32, full: 1, ragged: 0 };
        assert_eq!(levels(96), [first, Level { half: 64, full: 0, ragged: 32 }]);
    }

    /// Every block below the diagonal is made by one join, after all of the two triangles that it is
    /// made from.
    #[test]
    fn joins_make_every_block_once_and_in_order() {
        for n in [1_usize, 32, 33, 64, 65, 100, 160, 576, 1000, 1088, 2500] {
            let blocks = n.div_ceil(BASE);
            let mut made = vec![0; blocks * blocks];
            for Level { half, full, ragged } in levels(n) {
                let whole = (0..full).map(|pair| (pair * 2 * half, half));
                let last = Some((full * 2 * half, ragged)).filter(|&(_, rows)| rows > 0);
                for (start, rows) in whole.chain(last) {
                    let (from, middle) = (start / BASE, (start + half) / BASE);
                    let end = (start + half + rows).div_ceil(BASE);
                    assert!(start + half + rows <= n, "n = {n}: a join beyond the end");
                    for i in from..end {
                        for j in from..i {
                            let here = &mut made[i * blocks + j];
                            let joined = i >= middle && j < middle;
                            assert_eq!(*here, i32::from(!joined), "n = {n}: block {i}, {j}");
                            *here = 1;
                        }
                    }
                }
            }
            for (i, row) in made.chunks_exact(blocks).enumerate() {
                let below = row.iter().take(i).all(|&joins| joins == 1);
                assert!(below && row[i..].iter().all(|&joins| joins == 0), "n = {n}: row {i}");
            }
        }
    }

    #[test]
    fn scratch_is_a_quarter_of_the_matrix() {
        let room = levels(28672).iter().map(Level::room).max();
        assert_eq!(room, Some(16384 * 12288));
        assert!(levels(8192).iter().all(|l| l.room() <= 4096 * 4096));
    }
}
