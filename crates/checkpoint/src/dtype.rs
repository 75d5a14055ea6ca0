//! The four element types that Llama and GPTQ checkpoints hold.

use crate::{Error, Result};

/// An element type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Bfloat16, the upper half of a single.
    BF16,
    /// 32-bit integer; GPTQ files also hold packed words under this name.
    I32,
}

impl DType {
    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name used in safetensors headers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
        }
    }

    /// The safetensors crate's name for this type.
    #[must_use]
    pub const fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::F32 => safetensors::Dtype::F32,
            Self::F16 => safetensors::Dtype::F16,
            Self::BF16 => safetensors::Dtype::BF16,
            Self::I32 => safetensors::Dtype::I32,
        }
    }

    /// The type of `tensor`, as read from a header.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] naming `tensor` for every other type.
    pub fn from_safetensors(dtype: safetensors::Dtype, tensor: &str) -> Result<Self> {
        match dtype {
            safetensors::Dtype::F32 => Ok(Self::F32),
            safetensors::Dtype::F16 => Ok(Self::F16),
            safetensors::Dtype::BF16 => Ok(Self::BF16),
            safetensors::Dtype::I32 => Ok(Self::I32),
            other => {
                Err(Error::UnsupportedDType { tensor: tensor.to_owned(), dtype: other.to_string() })
            }
        }
    }

    /// Whether values of this type are floating point.
    pub(crate) const fn is_float(self) -> bool {
        !matches!(self, Self::I32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_agree_with_safetensors() {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::I32] {
            let theirs = dtype.to_safetensors();
            assert_eq!(theirs.bitsize(), 8 * dtype.size());
            assert_eq!(theirs.to_string(), dtype.name());
            assert_eq!(DType::from_safetensors(theirs, "t").unwrap(), dtype);
        }
    }

    #[test]
    fn other_types_name_the_tensor() {
        let error = DType::from_safetensors(safetensors::Dtype::I64, "a.b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "Tensor `a.b` is stored as `I64`; only F32, F16, BF16 and I32 are supported"
        );
    }
}
