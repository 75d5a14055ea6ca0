//! What is quantized of a source whose weights are wider than fp16.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The type in which a source's weights reach the solver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceDtype {
    /// Rounded to fp16 first: what the published branches were made from.
    #[default]
    Fp16,
    /// The stored values, F32 or BF16, without loss. On a GPU the forward runs in fp16 all the same.
    Fp32,
}

impl SourceDtype {
    /// The name used on the command line, in files and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Fp32 => "fp32",
        }
    }
}

impl FromStr for SourceDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fp16" => Ok(Self::Fp16),
            "fp32" => Ok(Self::Fp32),
            _ => Err(format!("`{text}` is no source type; use fp16 or fp32")),
        }
    }
}
