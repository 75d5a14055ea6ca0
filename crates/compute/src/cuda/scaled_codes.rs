//! Quantized weights under trained scales on the device, and the scales' gradients.
//!
//! Codes stay packed as in a file, and a weight is made of them by the kernel that reads files: what is trained is what
//! a loader makes of the file. dYᵀX is made some rows at a time, on tensor cores in fp16 with f32 sums.

use std::sync::Arc;

use cudarc::driver::PushKernelArg;
use half::f16;

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::int;
use super::elementwise::{block_per_row, to_f16};
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::gram::CHUNK_TOKENS as TOKENS;
use super::matrix::{Matrix, ensure_same_card};
use super::pack::{Packed, unpacked};
use crate::error::{Error, Result};
use crate::scaled_codes::PackedCodes;

/// Bytes of weight gradients that are held at a time: 4096 rows of 8192 columns, enough to fill a card.
const GRADIENTS: usize = 128 << 20;
/// Rows of a tile of the product: bands are whole ones, where they have as many.
const TILE_ROWS: usize = 128;

/// See [`crate::ScaledCodes`].
#[derive(Debug)]
pub(crate) struct ScaledCodes {
    cuda: Arc<Cuda>,
    bits: u8,
    shape: (usize, usize),
    groups: usize,
    words: Buffer<u32>,
    zeros: Buffer<u32>,
    scales: Buffer<f16>,
    g_idx: Buffer<i32>,
    /// Columns by group, and where each group's begin.
    columns: Buffer<u32>,
    starts: Buffer<u32>,
}

impl ScaledCodes {
    /// The caller has checked that the parts fit one another.
    pub(crate) fn new(cuda: &Arc<Cuda>, packed: &PackedCodes<'_>) -> Result<Self> {
        const OP: &str = "keeping codes";
        let &PackedCodes { bits, rows, cols, words, zero, scales, g_idx } = packed;
        let groups = packed.groups();
        let zeros = stored_zeros(bits, zero).repeat(groups * rows / 32);
        let g_idx: Vec<i32> = g_idx.iter().map(|&group| group as i32).collect();
        let (columns, starts) = packed.columns_by_group();
        Ok(Self {
            cuda: Arc::clone(cuda),
            bits,
            shape: (rows, cols),
            groups,
            words: cuda.copied(OP, words)?,
            zeros: cuda.copied(OP, &zeros)?,
            scales: cuda.copied(OP, scales)?,
            g_idx: cuda.copied(OP, &g_idx)?,
            columns: cuda.copied(OP, &columns)?,
            starts: cuda.copied(OP, &starts)?,
        })
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Scales `[groups, rows]` under log factors `[rows, groups]`.
    pub(crate) fn scales(&self, log_factors: &Matrix) -> Result<Vec<f16>> {
        const OP: &str = "file_scales";
        let scales = self.rescaled(OP, log_factors)?;
        self.cuda.read(OP, scales.slice(), self.groups * self.shape.0)
    }

    fn rescaled(&self, op: &'static str, log_factors: &Matrix) -> Result<Buffer<f16>> {
        let cuda = &self.cuda;
        if !Arc::ptr_eq(log_factors.cuda(), cuda) {
            return Err(Error::DeviceMismatch { op });
        }
        let count = self.groups * self.shape.0;
        let mut scales = cuda.uninit::<f16>(op, count)?;
        let (rows, groups) = (int(self.shape.0)?, int(self.groups)?);
        let max_code = ((1_u32 << self.bits) - 1) as f32;
        let kernel = cuda.kernel("scale_gradient.cu", "rescale")?;
        let mut launch = cuda.stream().launch_builder(&kernel);
        launch.arg(self.scales.slice()).arg(log_factors.f32(op)?).arg(scales.make_mut()?);
        launch.arg(&rows).arg(&groups).arg(&max_code);
        // SAFETY: the arguments are the kernel's; both scales and the factors hold rows × groups values.
        unsafe { launch.launch(cuda.spread(count)) }.stage(op)?;
        Ok(scales)
    }

    /// The weight under log factors `[rows, groups]`, in fp16.
    pub(crate) fn weight(&self, log_factors: &Matrix) -> Result<Matrix> {
        let scales = self.rescaled("rescaled", log_factors)?;
        let Self { words, zeros, g_idx, .. } = self;
        let parts = Packed { words, zeros, scales: &scales, g_idx };
        // SAFETY: the lengths and the groups of columns were checked when they were kept.
        unsafe { unpacked(&self.cuda, self.bits, self.shape, &parts) }
    }

    /// Adds the sums over groups of (dyᵀ x) · w to `sum`; the caller has checked shapes.
    pub(crate) fn add_gradient(
        &self,
        dy: &Matrix,
        x: &Matrix,
        w: &Matrix,
        sum: &mut Matrix,
    ) -> Result<()> {
        const OP: &str = "scale_gradient";
        ensure_same_card(OP, &[dy, x, w, sum])?;
        let cuda = &self.cuda;
        if !Arc::ptr_eq(dy.cuda(), cuda) {
            return Err(Error::DeviceMismatch { op: OP });
        }
        let (dy, x) = (to_f16(dy)?, to_f16(x)?);
        let (rows, cols) = self.shape;
        let band = (GRADIENTS / (cols * size_of::<f32>())).max(1);
        let band = if band < TILE_ROWS { band } else { band / TILE_ROWS * TILE_ROWS };
        let mut dw = cuda.uninit::<f32>(OP, band.min(rows) * cols)?;
        let (width, groups) = (int(cols)?, int(self.groups)?);
        let kernel = cuda.kernel("scale_gradient.cu", "scale_gradient")?;
        for first in (0..rows).step_by(band) {
            let count = band.min(rows - first);
            self.product((&dy, &x), first, count, &mut dw)?;
            let w = w.f16(OP)?.slice(first * cols..(first + count) * cols);
            let places = first * self.groups..(first + count) * self.groups;
            let mut sum = sum.f32_mut(OP)?.slice_mut(places);
            let mut launch = cuda.stream().launch_builder(&kernel);
            launch.arg(dw.slice()).arg(&w).arg(self.columns.slice()).arg(self.starts.slice());
            launch.arg(&mut sum).arg(&width).arg(&groups);
            // SAFETY: the arguments are the kernel's; dw, w and sum have a row for each block, and the columns by
            // group are columns of theirs.
            unsafe { launch.launch(block_per_row(count)) }.stage(OP)?;
        }
        Ok(())
    }

    /// `count` rows of dyᵀ x from row `first` on.
    fn product(
        &self,
        (dy, x): (&Matrix, &Matrix),
        first: usize,
        count: usize,
        dw: &mut Buffer<f32>,
    ) -> Result<()> {
        const OP: &str = "scale_gradient";
        let (cuda, (rows, cols)) = (&self.cuda, self.shape);
        let (dy_values, x_values, dw) = (dy.f16(OP)?, x.f16(OP)?, dw.make_mut()?);
        // Without tokens, the first product of none makes zeros.
        for token in (0..x.rows().max(1)).step_by(TOKENS) {
            let tokens = TOKENS.min(x.rows() - token);
            // Column-major: the transposed rows, xᵀ dy.
            let left = Operand::new(cuda, x_values, token * cols, cols, PLAIN);
            let right = Operand::new(cuda, dy_values, token * rows + first, rows, TRANSPOSED);
            let target = Operand::new(cuda, dw, 0, cols, PLAIN);
            let beta = if token == 0 { 0.0 } else { 1.0 };
            // SAFETY: the operands hold these tokens and rows, and dw was made for as many rows.
            unsafe { gemm(cuda, OP, (cols, count, tokens), (left, right), beta, target)? };
        }
        Ok(())
    }
}

/// The words of 32 zeros as files have them: less one, 0 being all ones.
fn stored_zeros(bits: u8, zero: u8) -> Vec<u32> {
    let width = usize::from(bits);
    let stored = zero.wrapping_sub(1) & (u8::MAX >> (8 - bits));
    let mut words = vec![0_u32; width];
    for at in 0..32 * width {
        words[at / 32] |= u32::from(stored >> (at % width) & 1) << (at % 32);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_stored_less_one() {
        assert_eq!(stored_zeros(4, 8), [0x7777_7777; 4]);
        assert_eq!(stored_zeros(8, 128), [0x7f7f_7f7f; 8]);
        assert_eq!(stored_zeros(2, 2), [0x5555_5555; 2]);
        assert_eq!(stored_zeros(4, 0), [u32::MAX; 4]);
        // 3 = 0b011 32 times: bits 0, 1 of three.
        let bit = |at: usize| stored_zeros(3, 4)[at / 32] >> (at % 32) & 1;
        assert!((0..96).all(|at| bit(at) == u32::from(at % 3 < 2)));
    }
}
