//! The shape of a linear.

/// A linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Name inside the block, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Whether a bias of `out_features` values is added to its outputs.
    pub bias: bool,
}
