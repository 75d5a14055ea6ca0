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
    /// Gate of an expert, by its number.
    ExpertGate(u16),
    /// Up projection of an expert.
    ExpertUp(u16),
    /// Down projection of an expert.
    ExpertDown(u16),
    /// Gate of the expert that every token goes through.
    SharedGate,
    /// Its up projection.
    SharedUp,
    /// Its down projection.
    SharedDown,
}

impl LinearId {
    /// The linears of Llama's block.
    pub const LLAMA: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The expert that it is a part of, if it is of one.
    #[must_use]
    pub fn expert(self) -> Option<Expert> {
        match self {
            Self::ExpertGate(expert) | Self::ExpertUp(expert) | Self::ExpertDown(expert) => {
                Some(Expert::Routed(expert))
            }
            Self::SharedGate | Self::SharedUp | Self::SharedDown => Some(Expert::Shared),
            Self::Q | Self::K | Self::V | Self::O | Self::Qkv => None,
            Self::Gate | Self::Up | Self::Down | Self::GateUp => None,
        }
    }
}

/// An MLP of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Expert {
    /// One that a router sends tokens to, by its number.
    Routed(u16),
    /// The one that every token goes through.
    Shared,
}

impl Expert {
    /// Its gate.
    #[must_use]
    pub fn gate(self) -> LinearId {
        match self {
            Self::Routed(expert) => LinearId::ExpertGate(expert),
            Self::Shared => LinearId::SharedGate,
        }
    }

    /// Its up projection.
    #[must_use]
    pub fn up(self) -> LinearId {
        match self {
            Self::Routed(expert) => LinearId::ExpertUp(expert),
            Self::Shared => LinearId::SharedUp,
        }
    }

    /// Its down projection.
    #[must_use]
    pub fn down(self) -> LinearId {
        match self {
            Self::Routed(expert) => LinearId::ExpertDown(expert),
            Self::Shared => LinearId::SharedDown,
        }
    }
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
        Self { id, name: id.name(), in_features, out_features, bias: false }
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

/// A tensor of a block that is neither a linear nor a norm, and is never quantized: what decides how much of
/// which expert a token gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseId {
    /// The router's weights.
    Router,
    /// What is added to the router's scores while experts are chosen.
    Correction,
    /// The weights of the shared expert's own gate.
    SharedGate,
}

/// Such a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseShape {
    /// Which one.
    pub id: DenseId,
    /// Name inside the block with its last part, such as `mlp.gate.weight`.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Written as f32, and not as fp16: values that are compared with each other.
    pub exact: bool,
}
