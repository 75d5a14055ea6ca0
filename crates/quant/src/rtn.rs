//! Round to nearest: every weight on its own, the baseline that calibration must beat.
//!
//! Codes are computed on the host: it is one pass over the weights. A measurement that only wants
//! the rounded weights, block after block, has them where they are.

use ndarray::Array2;
use rayon::prelude::*;

use crate::error::Result;
use crate::grid::{absmax_scale, code, file_scale};
use crate::solved::{Quantized, Stored};
use crate::spec::QuantSpec;
use gptq_compute::{Device, FloatType, HostMatrix, Tensor};

/// The weights of [`round_to_nearest`] alone, `[out, in]`, on the weight's device.
///
/// # Errors
/// As [`round_to_nearest`]; a GPU does not look for weights that no grid holds, which only values that
/// are not finite are.
pub fn rounded_weight(device: &Device, weight: &Tensor, spec: &QuantSpec) -> Result<Tensor> {
    spec.validate()?;
    match device {
        Device::Cpu => Ok(round_to_nearest(device, weight, spec)?.weight),
        Device::Cuda(_) => {
            let group = spec.group_columns(weight.cols());
            let grid = (f32::from(spec.zero()), spec.max_code());
            Ok(device.round_groups(weight, group, grid)?)
        }
    }
}

/// Quantizes `weight` `[out, in]` with the AutoGPTQ scale of each group and the nearest code on the
/// grid that the file will hold (fp16 scales).
pub fn round_to_nearest(device: &Device, weight: &Tensor, spec: &QuantSpec) -> Result<Quantized> {
    spec.validate()?;
    let w = weight.to_host()?;
    let (out_features, in_features) = w.dim();
    let group = spec.group_columns(in_features);
    let groups = in_features.div_ceil(group);
    let (zero, max_code) = (f32::from(spec.zero()), spec.max_code());

    let mut codes = vec![0_u8; out_features * in_features];
    let mut values = Array2::<f32>::zeros(w.dim());
    let mut rows: Vec<_> = values.rows_mut().into_iter().collect();
    let scales: Vec<Vec<f32>> = codes
        .par_chunks_mut(in_features)
        .zip(rows.par_iter_mut())
        .enumerate()
        .map(|(row, (codes, values))| {
            let row: Vec<f32> = w.row(row).to_vec();
            let mut scales = Vec::with_capacity(groups);
            for (g, columns) in row.chunks(group).enumerate() {
                let scale = file_scale(absmax_scale(columns, max_code), max_code, true);
                for (i, &v) in columns.iter().enumerate() {
                    let q = code(v, scale, zero, max_code);
                    codes[g * group + i] = q as u8;
                    values[g * group + i] = scale * (q - zero);
                }
                scales.push(scale);
            }
            scales
        })
        .collect();
    let flat = values.as_slice().unwrap_or_default();
    let g_idx = (0..in_features).map(|j| (j / group) as u32).collect();
    let stored = Stored::of_rows([out_features, in_features], codes, &scales, flat, g_idx)?;
    let bytes = bytemuck::cast_slice(flat);
    let matrix = HostMatrix::new(bytes, FloatType::F32, out_features, in_features);
    Ok(Quantized { stored, weight: device.upload(matrix)?, loss: None })
}
