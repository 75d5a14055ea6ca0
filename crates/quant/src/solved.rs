//! What a solver gives back: codes, scales and groups as the file holds them.

use gptq_compute::Tensor;
use half::f16;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Codes of a linear.
#[derive(Clone, Debug)]
pub enum Codes {
    /// One byte a code `[out, in]`, row-major.
    Plain(Vec<u8>),
    /// The file's `qweight` `[in / 32 · bits, out]`: a GPU packs before it copies.
    Packed(Vec<u32>),
}

/// What a file holds of a quantized linear, columns in the weights' own order.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The codes, in the form the device gives them.
    pub codes: Codes,
    /// Scales `[groups, out]`.
    pub scales: Vec<f16>,
    /// Number of groups.
    pub groups: usize,
    /// Group of each column `[in]`.
    pub g_idx: Vec<u32>,
}

impl Stored {
    /// Codes and scales `[rows][groups]` of rows that the host solved, whose `values` `[out, in]`
    /// they mean.
    ///
    /// # Errors
    /// [`Error::ScaleRange`], and [`Error::NotFinite`] for values that are not.
    pub(crate) fn of_rows(
        [out_features, in_features]: [usize; 2],
        codes: Vec<u8>,
        scales: &[Vec<f32>],
        values: &[f32],
        g_idx: Vec<u32>,
    ) -> Result<Self> {
        let groups = scales.first().map_or(0, Vec::len);
        // Before the values: what a scale beyond fp16 makes of them is not the weight's fault.
        let scales = stored_scales(&by_group(scales, groups), out_features)?;
        if values.par_iter().any(|v| !v.is_finite()) {
            return Err(Error::NotFinite { what: "The weight" });
        }
        let codes = Codes::Plain(codes);
        Ok(Self { out_features, in_features, codes, scales, groups, g_idx })
    }
}

/// A quantized linear.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// What goes into the file.
    pub stored: Stored,
    /// The weights `[out, in]` that later stages of calibration see.
    pub weight: Tensor,
    /// tr((W − Ŵ) H (W − Ŵ)ᵀ) with the damped Hessian; `None` without calibration.
    pub loss: Option<f64>,
}

/// Group of each column, where groups are consecutive columns in solve order.
pub(crate) fn group_index(order: &[u32], group: usize) -> Vec<u32> {
    let mut g_idx = vec![0; order.len()];
    for (j, &column) in order.iter().enumerate() {
        g_idx[column as usize] = (j / group) as u32;
    }
    g_idx
}

/// f32 scales `[groups, rows]` as the file's fp16. Infinite ones are of infinite weights.
pub(crate) fn stored_scales(scales: &[f32], rows: usize) -> Result<Vec<f16>> {
    let stored: Vec<f16> = scales.iter().map(|&scale| f16::from_f32(scale)).collect();
    match stored.iter().position(|half| !half.is_finite()) {
        None => Ok(stored),
        Some(at) if !scales[at].is_finite() => Err(Error::NotFinite { what: "The weight" }),
        Some(at) => Err(Error::ScaleRange { scale: scales[at], row: at % rows, group: at / rows }),
    }
}

/// Scales `[rows][groups]`, as rows were solved, in the file's order `[groups, rows]`.
fn by_group(scales: &[Vec<f32>], groups: usize) -> Vec<f32> {
    (0..groups).flat_map(|group| scales.iter().map(move |row| row[group])).collect()
}
