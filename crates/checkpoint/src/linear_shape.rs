//! What a block is made of, by name and size.

use std::borrow::Cow;

/// A linear of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearId {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
    /// Queries, keys and values, one after the other.
    Qkv,
    /// Gate and up projection of the MLP, one after the other.
    GateUp,
}

impl LinearId {
    /// The linears of Llama's block.
    pub const LLAMA: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
}

/// A linear of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearShape {
    /// Which one.
    pub id: LinearId,
    /// Name inside the block, such as `self_attn.q_proj`.
    pub name: Cow<'static, str>,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// Whether a bias of `out_features` values is added to its outputs.
    pub bias: bool,
}

impl LinearShape {
    /// A linear of its usual name, without a bias.
    #[must_use]
    pub fn new(id: LinearId, in_features: usize, out_features: usize) -> Self {
        Self { id, name: id.name().into(), in_features, out_features, bias: false }
    }

    /// Rows and columns of the weight.
    #[must_use]
    pub fn sides(&self) -> (usize, usize) {
        (self.out_features, self.in_features)
    }
}

/// A norm of a block, by where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormId {
    /// Of the hidden states before attention.
    BeforeAttention,
    /// Of what attention gives, before it is added to the hidden states.
    AfterAttention,
    /// Of the hidden states before the MLP.
    BeforeMlp,
    /// Of what the MLP gives, before it is added to the hidden states.
    AfterMlp,
    /// Of queries.
    Queries,
    /// Of keys.
    Keys,
}

/// A norm of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormShape {
    /// Which one.
    pub id: NormId,
    /// Name inside the block, such as `input_layernorm`.
    pub name: &'static str,
    /// Dimensions of its gain.
    pub shape: Vec<usize>,
}

impl NormShape {
    /// Values of its gain.
    #[must_use]
    pub fn size(&self) -> usize {
        self.shape.iter().product()
    }
}
