//! The base's weights row by row, in the checkpoint's coordinates.
//!
//! Where no rotation changes a linear its rows come from the mapped file as they are needed, so that
//! nothing of it is copied; one that is turned is brought to host memory, by itself.

use gptq_checkpoint::{LinearShape, TensorRef};
use gptq_model::{Gains, Linear, Model};
use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;
use rayon::prelude::*;

use crate::error::Result;
use crate::rotate::FusedRotations;

/// A linear's weights `[out, in]`, rounded to fp16 before they are turned.
pub(super) enum BaseWeight<'a> {
    /// As the file holds them.
    Stored(TensorRef<'a>),
    /// Turned.
    Turned(Array2<f32>),
}

impl<'a> BaseWeight<'a> {
    /// Of a linear; `gains` are those of its block's norms ([`FusedRotations::weight`]).
    pub(super) fn read(
        model: &'a Model<'_>,
        rotations: Option<&FusedRotations>,
        linear: &Linear<LinearShape>,
        gains: &Gains,
    ) -> Result<Self> {
        let (id, (out_features, in_features)) = (linear.id, linear.weight.sides());
        let name = format!("{}.weight", linear.name);
        let base = model.checkpoint();
        let stored = Self::Stored(base.tensor_shaped(&name, &[out_features, in_features])?);
        let Some(rotations) = rotations.filter(|rotations| rotations.turns(id)) else {
            return Ok(stored);
        };
        let mut weight = Array2::zeros((out_features, in_features));
        let rows = weight.as_slice_mut().unwrap_or_default().par_chunks_mut(in_features);
        let read = |halves: &mut Vec<f16>, (row, values)| stored.row(row, halves, values);
        let outcomes: Vec<Result<()>> = rows.enumerate().map_init(Vec::new, read).collect();
        // In order, so that the first fault is the one that is reported.
        outcomes.into_iter().collect::<Result<()>>()?;
        base.release(&name);
        rotations.weight(id, &mut weight, Some(gains));
        Ok(Self::Turned(weight))
    }

    /// Brings a row into `values`; `halves` is room for it.
    ///
    /// # Errors
    /// Values that are not finite, or not in fp16.
    pub(super) fn row(&self, row: usize, halves: &mut Vec<f16>, values: &mut [f32]) -> Result<()> {
        match self {
            Self::Stored(tensor) => {
                halves.resize(values.len(), f16::ZERO);
                tensor.read_f16(row * values.len(), halves)?;
                // Without a branch a value.
                if !halves.iter().fold(true, |all, half| all & half.is_finite()) {
                    tensor.check_finite()?;
                }
                halves.convert_to_f32_slice(values);
            }
            Self::Turned(weight) => {
                let row = weight.row(row);
                values.copy_from_slice(row.as_slice().unwrap_or_default());
            }
        }
        Ok(())
    }
}
