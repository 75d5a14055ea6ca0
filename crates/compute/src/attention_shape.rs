//! The sizes that attention is computed by.

/// Heads and window length of a causal attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head.
    pub head_dim: usize,
    /// Tokens of one window; rows of the operands are whole windows.
    pub seq_len: usize,
}
