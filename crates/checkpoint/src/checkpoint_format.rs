//! The two forms that zeros are stored in.

use crate::Bits;

/// How zeros are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointFormat {
    /// `gptq`, or v1: a zero is stored minus one. The only format that is written.
    Gptq,
    /// `gptq_v2`: a zero is stored as it is.
    GptqV2,
}

impl CheckpointFormat {
    /// The name in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
        }
    }

    /// The zero of a symmetric grid as it is stored.
    #[must_use]
    pub fn stored_middle(self, bits: Bits) -> u8 {
        match self {
            Self::Gptq => bits.symmetric_zero() - 1,
            Self::GptqV2 => bits.symmetric_zero(),
        }
    }

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Gptq => Self::GptqV2,
            Self::GptqV2 => Self::Gptq,
        }
    }
}
