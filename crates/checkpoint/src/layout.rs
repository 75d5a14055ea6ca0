//! The two forms in which a quantized checkpoint is written.

use std::str::FromStr;

/// What a checkpoint holds beside the four tensors of each linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As the branches published in 2023: an fp16 bias for every linear, of zeros where the model
    /// has none, rotary inverse frequencies for every block, and `{"format":"pt"}` as the only
    /// metadata.
    Card,
    /// No biases but the model's own and no frequencies; metadata says how the file was made.
    Modern,
}

impl Layout {
    /// The name used on the command line and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Card => "card",
            Self::Modern => "modern",
        }
    }
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "card" => Ok(Self::Card),
            "modern" => Ok(Self::Modern),
            _ => Err(format!("Layout `{text}` does not exist; use `card` or `modern`")),
        }
    }
}
