//! The base's weights row by row, in the checkpoint's coordinates.
//!
//! Where no rotation changes a linear its rows come from the mapped file as they are needed, so that
//! nothing of it is copied; one that is turned is brought to host memory, by itself. Rows that are divided
//! by what columns of another linear are multiplied with need that one as well, first.

use gptq_checkpoint::{LinearShape, TensorRef};
use gptq_model::{BlockParts, Linear, Model};
use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array2;
use rayon::prelude::*;

use crate::columns::ColumnFactors;
use crate::error::Result;
use crate::rotate::FusedRotations;

/// A linear's weights `[out, in]`, rounded to fp16 before they are turned.
pub(super) enum BaseWeight<'a> {
    /// As the file holds them.
    Stored(TensorRef<'a>),
    /// Turned, or of other columns or rows.
    Turned(Array2<f32>),
}

impl<'a> BaseWeight<'a> {
    /// Of a linear of a block.
    pub(super) fn read(
        model: &'a Model<'_>,
        rotations: Option<&FusedRotations>,
        linear: &Linear<LinearShape>,
        block: &BlockParts<LinearShape>,
    ) -> Result<Self> {
        let Some(rotations) = rotations else { return Self::stored(model, linear) };
        let id = linear.id;
        let pair = rotations.columns().and_then(|columns| {
            let (reader, writer) = ColumnFactors::pair_of(id, block)?;
            Some((columns, reader, writer))
        });
        let Some((columns, reader, writer)) = pair else {
            return match rotations.turns(id) {
                true => Ok(Self::Turned(turned(model, rotations, linear, block)?)),
                false => Self::stored(model, linear),
            };
        };
        let mut weight = turned(model, rotations, reader, block)?;
        let factors = columns.factors(reader.id, &weight);
        if id == reader.id {
            columns.multiply(&factors, &mut weight);
        } else {
            weight = turned(model, rotations, writer, block)?;
            columns.divide(&factors, id, &mut weight);
        }
        Ok(Self::Turned(weight))
    }

    /// As the file holds it.
    fn stored(model: &'a Model<'_>, linear: &Linear<LinearShape>) -> Result<Self> {
        let (out_features, in_features) = linear.weight.sides();
        let name = format!("{}.weight", linear.name);
        Ok(Self::Stored(model.checkpoint().tensor_shaped(&name, &[out_features, in_features])?))
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

/// A linear's weights, in host memory and turned.
fn turned(
    model: &Model<'_>,
    rotations: &FusedRotations,
    linear: &Linear<LinearShape>,
    block: &BlockParts<LinearShape>,
) -> Result<Array2<f32>> {
    let stored = BaseWeight::stored(model, linear)?;
    let (out_features, in_features) = linear.weight.sides();
    let mut weight = Array2::zeros((out_features, in_features));
    let rows = weight.as_slice_mut().unwrap_or_default().par_chunks_mut(in_features);
    let read = |halves: &mut Vec<f16>, (row, values)| stored.row(row, halves, values);
    let outcomes: Vec<Result<()>> = rows.enumerate().map_init(Vec::new, read).collect();
    // In order, so that the first fault is the one that is reported.
    outcomes.into_iter().collect::<Result<()>>()?;
    model.checkpoint().release(&format!("{}.weight", linear.name));
    rotations.weight(linear.id, &mut weight, Some(&block.gains));
    Ok(weight)
}
