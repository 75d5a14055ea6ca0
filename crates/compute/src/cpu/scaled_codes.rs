//! Weights under trained scales, and the scales' gradients.

use half::f16;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

use super::rows::{into_matrix, slice, slice_mut};
use crate::scaled_codes::PackedCodes;

/// Output rows whose weight gradients are held at a time by one task: a fixed number, and 8 MiB of 8192 columns.
const ROWS: usize = 256;

/// See [`crate::ScaledCodes`].
#[derive(Debug)]
pub(crate) struct ScaledCodes {
    /// `[rows, cols]`.
    codes: Vec<u8>,
    shape: (usize, usize),
    bits: u8,
    zero: u8,
    /// `[groups, rows]`.
    scales: Vec<f16>,
    g_idx: Vec<u32>,
}

impl ScaledCodes {
    /// The caller has checked that the parts fit one another.
    pub(crate) fn new(packed: &PackedCodes<'_>) -> Self {
        let &PackedCodes { bits, rows, cols, words, zero, scales, g_idx } = packed;
        let width = usize::from(bits);
        let mut codes = vec![0_u8; rows * cols];
        codes.par_chunks_mut(cols).enumerate().for_each(|(row, codes)| {
            for (column, code) in codes.iter_mut().enumerate() {
                let (word, shift) = (column * width / 32, column * width % 32);
                let mut pair = u64::from(words[word * rows + row]);
                if shift + width > 32 {
                    pair |= u64::from(words[(word + 1) * rows + row]) << 32;
                }
                *code = (pair >> shift) as u8 & (u8::MAX >> (8 - width));
            }
        });
        let (scales, g_idx) = (scales.to_vec(), g_idx.to_vec());
        Self { codes, shape: (rows, cols), bits, zero, scales, g_idx }
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn groups(&self) -> usize {
        self.scales.len() / self.shape.0
    }

    /// Scales `[groups, rows]` under log factors `[rows, groups]`.
    pub(crate) fn scales(&self, log_factors: &Array2<f32>) -> Vec<f16> {
        let rows = self.shape.0;
        let scale = |at: usize| self.scale(log_factors, at % rows, at / rows);
        (0..self.scales.len()).map(scale).collect()
    }

    fn scale(&self, log_factors: &Array2<f32>, row: usize, group: usize) -> f16 {
        let start = self.scales[group * self.shape.0 + row].to_f32();
        file_scale(start * log_factors[[row, group]].exp(), self.bits)
    }

    /// The weight under log factors `[rows, groups]`.
    pub(crate) fn weight(&self, log_factors: &Array2<f32>) -> Array2<f32> {
        let (rows, cols) = self.shape;
        let mut out = vec![0.0_f32; rows * cols];
        out.par_chunks_mut(cols).zip(self.codes.par_chunks(cols)).enumerate().for_each(
            |(row, (out, codes))| {
                let scales: Vec<f32> =
                    (0..self.groups()).map(|g| self.scale(log_factors, row, g).to_f32()).collect();
                for ((o, &code), &group) in out.iter_mut().zip(codes).zip(&self.g_idx) {
                    *o = scales[group as usize] * (f32::from(code) - f32::from(self.zero));
                }
            },
        );
        into_matrix(out, rows, cols)
    }

    /// Adds the sums over groups of (dyᵀ x) · w to `sum`; columns in their order, in f64.
    pub(crate) fn add_gradient(
        &self,
        dy: &Array2<f32>,
        x: &Array2<f32>,
        w: &Array2<f32>,
        sum: &mut Array2<f32>,
    ) {
        let bands: Vec<_> = sum.axis_chunks_iter_mut(Axis(0), ROWS).collect();
        bands.into_par_iter().enumerate().for_each(|(band, mut sums)| {
            let first = band * ROWS;
            let mut dw = Array2::<f32>::zeros((sums.nrows(), x.ncols()));
            let dy = dy.slice(s![.., first..first + sums.nrows()]);
            general_mat_mul(1.0, &dy.t(), x, 0.0, &mut dw);
            let mut totals = vec![0.0_f64; self.groups()];
            for (i, mut sums) in sums.rows_mut().into_iter().enumerate() {
                totals.fill(0.0);
                let products = slice(dw.row(i)).iter().zip(slice(w.row(first + i)));
                for ((&dw, &w), &group) in products.zip(&self.g_idx) {
                    totals[group as usize] += f64::from(dw) * f64::from(w);
                }
                slice_mut(&mut sums).iter_mut().zip(&totals).for_each(|(s, &t)| *s += t as f32);
            }
        });
    }
}

/// A scale in fp16 that a file can hold: not rounded to 0, and not so large that a code means more than fp16's
/// largest number. One that is beyond fp16 becomes infinite.
pub(crate) fn file_scale(scale: f32, bits: u8) -> f16 {
    let rounded = f16::from_f32(scale);
    if rounded == f16::ZERO {
        return f16::from_f32(f16::MIN_POSITIVE_SUBNORMAL.to_f32().copysign(scale));
    }
    if !rounded.is_finite() {
        return rounded;
    }
    // The lowest code is 2^(bits − 1) steps below 0; a power of two, so fp16 holds the quotient.
    let most = f16::MAX.to_f32() / f32::from(1_u16 << (bits - 1));
    f16::from_f32(rounded.to_f32().clamp(-most, most))
}
