//! GPTAQ's term on the device: the drift of a linear's inputs, and the correction made from it.
//!
//! Both operands of D = (X_fp − X)ᵀX are brought into solve order first (kernel `drift`), so that
//! panels of the product can start at the diagonal, as those of a Gram do. P = triu(D Uᵀ, 1) U is
//! made of panels that skip the triangles' zeros: some 0.8 n³ operations in f32 rather than 4 n³.

use std::sync::Arc;

use cudarc::driver::{LaunchConfig, PushKernelArg};
use half::f16;

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::{Block, Product, int, multiply, multiply_transposed};
use super::elementwise::to_f16;
use super::error::Stage;
use super::factor::rows_launch;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::{Matrix, ensure_same_card};
use crate::error::{Error, Result, ensure_shape};

/// Rows of a panel of D, and side of a tile of P: 256 tiles of a product, two waves of a card.
const PANEL: usize = 2048;
/// Tokens summed inside one product, as for Grams.
const TOKENS: usize = 16_384;

/// The upper triangle of D in solve order; some values below it are set too.
#[derive(Debug)]
pub(crate) struct Drift {
    order: Buffer<u32>,
    sum: Matrix,
}

impl Drift {
    /// An empty drift in an order that the caller has checked to be a permutation.
    pub(crate) fn zeros(cuda: &Arc<Cuda>, order: &[u32]) -> Result<Self> {
        const STAGE: &str = "drift";
        let n = order.len();
        let most = cuda.shared_memory() / size_of::<f16>();
        if n > most {
            let reason =
                format!("{n} columns; at most {most} fit on a multiprocessor of this card");
            return Err(Error::Unsupported { op: STAGE, reason });
        }
        let sum = Matrix::from_f32(cuda, (n, n), cuda.zeros(STAGE, n * n)?);
        Ok(Self { order: cuda.copied(STAGE, order)?, sum })
    }

    pub(crate) fn order(&self) -> usize {
        self.sum.cols()
    }

    /// D += (reference − x)ᵀx.
    pub(crate) fn add(&mut self, reference: &Matrix, x: &Matrix) -> Result<()> {
        const OP: &str = "drift_add";
        ensure_same_card(OP, &[&self.sum, reference, x])?;
        let (reference, x) = (to_f16(reference)?, to_f16(x)?);
        let (moved, gathered) = self.operands(&reference, &x)?;
        let (cuda, n) = (Arc::clone(x.cuda()), x.cols());
        let (moved, gathered) = (moved.f16(OP)?, gathered.f16(OP)?);
        let total = self.sum.f32_mut(OP)?;
        for token in (0..x.rows()).step_by(TOKENS) {
            let tokens = TOKENS.min(x.rows() - token);
            for row in (0..n).step_by(PANEL) {
                let rows = PANEL.min(n - row);
                // Column-major: columns row.. of the transposed result, from the diagonal down.
                let left = Operand::new(&cuda, gathered, token * n + row, n, PLAIN);
                let right = Operand::new(&cuda, moved, token * n + row, n, TRANSPOSED);
                let target = Operand::new(&cuda, total, row * n + row, n, PLAIN);
                // SAFETY: rows row..row+rows and columns row..n of the total, tokens and columns of
                // the operands; buffers are freed on the stream of all work.
                unsafe { gemm(&cuda, OP, (n - row, rows, tokens), (left, right), 1.0, target)? };
            }
        }
        Ok(())
    }

    /// (reference − x) and x with columns in solve order.
    fn operands(&self, reference: &Matrix, x: &Matrix) -> Result<(Matrix, Matrix)> {
        const OP: &str = "drift_operands";
        let (cuda, n) = (x.cuda(), x.cols());
        let mut moved = Matrix::uninit_f16(cuda, OP, x.shape())?;
        let mut gathered = Matrix::uninit_f16(cuda, OP, x.shape())?;
        if x.rows() == 0 {
            return Ok((moved, gathered));
        }
        let (rows, columns) = (int(x.rows())?, int(n)?);
        let kernel = cuda.kernel_with_shared("drift.cu", "drift_operands", cuda.shared_memory())?;
        let mut launch = cuda.stream().launch_builder(&kernel);
        launch.arg(reference.f16(OP)?).arg(x.f16(OP)?).arg(self.order.slice());
        launch.arg(moved.f16_mut(OP)?).arg(gathered.f16_mut(OP)?).arg(&rows).arg(&columns);
        let config = LaunchConfig {
            grid_dim: (x.rows() as u32, 1, 1),
            block_dim: (512, 1, 1),
            shared_mem_bytes: (n * size_of::<f16>()) as u32,
        };
        // SAFETY: the arguments are the kernel's; all matrices hold rows × n values, the order n
        // that are columns, and shared memory a value for each.
        unsafe { launch.launch(config) }.stage(OP)?;
        Ok((moved, gathered))
    }

    /// P `[n, n]`, D being `scale` times the accumulated one.
    pub(crate) fn correction(mut self, upper: &Matrix, scale: f32) -> Result<Matrix> {
        const OP: &str = "the drift's correction";
        ensure_same_card(OP, &[&self.sum, upper])?;
        let n = self.order();
        ensure_shape(upper.shape() == (n, n), OP, upper.shape(), (n, n))?;
        let cuda = Arc::clone(upper.cuda());
        let upper = Block::of(&cuda, upper.f32(OP)?, n);
        let mut masked = cuda.uninit::<f32>(OP, n * n)?;
        let drift = Block::of_mut(&cuda, self.sum.f32_mut(OP)?, n);
        let target = Block::of_mut(&cuda, masked.make_mut(&cuda)?, n);
        for start in (0..n).step_by(PANEL) {
            let end = (start + PANEL).min(n);
            // Columns start..end of D Uᵀ, down to the diagonal; U is zero before column `start`.
            let shape = Product { m: end, n: end - start, k: n - start };
            let operands = (drift.at(0, start), upper.at(start, start), target.at(0, start));
            // SAFETY: the blocks lie within three different [n, n] matrices, which live until the
            // queue is through.
            unsafe { multiply_transposed(&cuda, OP, shape, (scale, 0.0), operands) }?;
        }
        let (order, tile) = (int(n)?, int(PANEL)?);
        let kernel = cuda.kernel("strict_upper.cu", "strict_upper")?;
        let mut launch = cuda.stream().launch_builder(&kernel);
        launch.arg(masked.make_mut(&cuda)?).arg(&order).arg(&tile);
        // SAFETY: the arguments are the kernel's, and the matrix is [n, n].
        unsafe { launch.launch(rows_launch(n)) }.stage(OP)?;
        // D has been used up: P takes its place. Tiles below the diagonal are left over from D, and
        // the solver reads none of them.
        for row in (0..n).step_by(PANEL) {
            for column in (row..n).step_by(PANEL) {
                let (rows, columns) = (PANEL.min(n - row), PANEL.min(n - column));
                // Rows of T are zero before their diagonal, columns of U after theirs.
                let shape = Product { m: rows, n: columns, k: column + columns - row };
                let operands = (target.at(row, row), upper.at(row, column), drift.at(row, column));
                // SAFETY: as above.
                unsafe { multiply(&cuda, OP, shape, (1.0, 0.0), operands) }?;
            }
        }
        Ok(self.sum)
    }
}
