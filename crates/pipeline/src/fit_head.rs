//! The head, fitted to the states that reach it.
//!
//! The head stays fp16, so it can make up for part of what the quantized blocks have lost: with X the
//! normed last states and X_fp the unquantized model's, W + share · W (X_fp − X)ᵀX H⁻¹ brings the
//! logits closest to the unquantized ones in the least-squares sense.

use gptq_checkpoint::HEAD;
use gptq_compute::{Device, FloatType, HostMatrix, Tensor};
use gptq_model::{FinalNorm, Model};
use gptq_quant::{QuantSpec, factor};
use gptq_records::branch_report::LinearRecord;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::calibrate::Streams;
use crate::error::{Error, Result};
use crate::head_rows::{RowSums, head_fit};
use crate::memory::HEAD_ROWS;
use crate::recording::solved;
use crate::rotate::{FusedRotations, dense_head, final_gain};

/// The head `[vocab, hidden]` as the file should hold it, on rank 0 alone, and what its Hessian needed.
pub(crate) fn fitted(
    model: &Model<'_>,
    rotations: Option<&FusedRotations>,
    spec: &QuantSpec,
    windows: usize,
    streams: &mut Streams,
) -> Result<(Option<Vec<f16>>, LinearRecord)> {
    let gain = final_gain(model.checkpoint(), rotations)?;
    let norm = FinalNorm::new(model.config(), gain);
    let (map, mut report) = map(model, &norm, spec, windows, streams)?;
    if !model.ranks().is_first() {
        return Ok((None, report));
    }
    let mut head = dense_head(model.checkpoint(), rotations)?;
    let width = model.config().hidden_size;
    let share = spec.choices.head * 2.0 / windows as f32;
    let mut sums = Vec::with_capacity(head.len() / width);
    for rows in head.chunks_mut(HEAD_ROWS * width) {
        move_rows(model.device(), rows, &map, share, &mut sums)?;
    }
    report.fit = head_fit(&sums);
    Ok((Some(head), report))
}

/// (X_fp − X)ᵀX H⁻¹ `[hidden, hidden]`.
fn map(
    model: &Model<'_>,
    norm: &FinalNorm,
    spec: &QuantSpec,
    windows: usize,
    streams: &mut Streams,
) -> Result<(Tensor, LinearRecord)> {
    let (device, width) = (model.device(), model.config().hidden_size);
    let activations = || Error::Activations { linear: HEAD.to_owned() };
    let mut gram = device.gram(width)?;
    let mut lacking = device.zeros(width, width)?;
    if let Some(reference) = &mut streams.reference {
        for chunk in 0..reference.seq_lens.len() {
            let norm = |hidden: &Tensor| Ok(norm.apply(device, hidden)?);
            let input = streams.quantized.hidden.read(chunk, norm)?;
            let drift = device.difference(&reference.hidden.read(chunk, norm)?, &input)?;
            device.gram_add(&mut gram, &input)?;
            device.cross_add(&mut lacking, &drift, &input)?;
        }
    }
    gram.sum_over(model.ranks())?;
    model.ranks().sum(&mut lacking)?;
    let factored = factor(&gram, 2.0 / windows as f32, spec).map_err(|source| match source {
        gptq_quant::Error::NotFinite { .. } => activations(),
        source => Error::Solve { linear: HEAD.to_owned(), source },
    })?;
    let map = device.over_hessian(&lacking, &factored.upper, &factored.order)?;
    let report = solved(HEAD.to_owned(), None, &factored);
    if device.all_finite(&map)? { Ok((map, report)) } else { Err(activations()) }
}

/// Rows W ← W + share · W · map, and beside what they were.
fn move_rows(
    device: &Device,
    rows: &mut [f16],
    map: &Tensor,
    share: f32,
    sums: &mut Vec<RowSums>,
) -> Result<()> {
    let width = map.cols();
    let shape = (rows.len() / width, width);
    let matrix = HostMatrix::new(bytemuck::cast_slice(rows), FloatType::F16, shape.0, shape.1);
    let moved = device.shifted_by(&device.upload(matrix)?, map, share)?.to_host()?;
    // Tensors in host memory are in standard layout.
    let moved = moved.as_slice().unwrap_or_default();
    let of_row = |(moved, base): (&[f32], &[f16])| {
        RowSums::new(moved.iter().map(|&value| f16::from_f32(value).to_f32()), base)
    };
    sums.par_extend(moved.par_chunks(width).zip(rows.par_chunks(width)).map(of_row));
    rows.convert_from_f32_slice(moved);
    if rows.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(Error::Fitted { tensor: HEAD.to_owned() })
}
