//! A stored tensor's values in the precision asked for, without a copy where none is needed.

use std::borrow::Cow;

use gptq_checkpoint::{DType, TensorRef};
use gptq_compute::{FloatType, HostMatrix};
use half::{bf16, f16};

use crate::error::{Error, Result};

/// What a dense checkpoint's weights become on their way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourcePrecision {
    /// The stored values.
    Stored,
    /// Rounded to fp16, the type of a GPTQ file and of the models that the published branches were
    /// made from; a finite value beyond fp16 is an error.
    Half,
}

/// Values of a dense tensor.
#[derive(Debug)]
pub(crate) enum Values<'a> {
    /// As the file holds them.
    Stored(Cow<'a, [u8]>, FloatType),
    /// Rounded to fp16.
    Half(Vec<f16>),
}

impl<'a> Values<'a> {
    /// Takes a tensor as it is, or rounded when the precision asks for it.
    pub(crate) fn read(tensor: TensorRef<'a>, precision: SourcePrecision) -> Result<Self> {
        let stored = match tensor.dtype {
            DType::F32 => FloatType::F32,
            DType::F16 => FloatType::F16,
            DType::BF16 => FloatType::BF16,
            DType::I32 => return Err(Error::IntegerWeight { tensor: tensor.name.to_string() }),
        };
        if precision == SourcePrecision::Half && stored != FloatType::F16 {
            return Ok(Self::Half(tensor.to_f16()?));
        }
        Ok(Self::Stored(tensor.bytes, stored))
    }

    /// A factor in the precision of the values.
    pub(crate) fn rounded(&self, factor: f32) -> f32 {
        match self {
            Self::Stored(_, FloatType::F32) => factor,
            Self::Stored(_, FloatType::BF16) => bf16::from_f32(factor).to_f32(),
            Self::Stored(_, FloatType::F16) | Self::Half(_) => f16::from_f32(factor).to_f32(),
        }
    }

    /// The values as a `[rows, cols]` matrix; the tensor's shape was checked when it was read.
    pub(crate) fn matrix(&self, rows: usize, cols: usize) -> HostMatrix<'_> {
        match self {
            Self::Stored(bytes, dtype) => HostMatrix::new(bytes, *dtype, rows, cols),
            Self::Half(values) => {
                HostMatrix::new(bytemuck::cast_slice(values), FloatType::F16, rows, cols)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gemma's factor of 3072 features, √3072 = 55.4256, as transformers has it in each type.
    #[test]
    fn factors_have_the_precision_of_the_values() {
        let factor = 3072.0_f32.sqrt();
        let stored = |dtype| Values::Stored(Cow::Borrowed(&[]), dtype).rounded(factor);
        assert_eq!(stored(FloatType::F32), factor);
        assert_eq!(stored(FloatType::BF16), 55.5);
        assert_eq!(stored(FloatType::F16), 55.4375);
        assert_eq!(Values::Half(Vec::new()).rounded(factor), 55.4375);
    }
}
