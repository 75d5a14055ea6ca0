//! The tensors of a block: its linears and norms, by name and size. A block is asked for by its number,
//! as not all blocks of a model need be alike.

use crate::names::BLOCKS;
use crate::{LinearId, LinearShape, ModelConfig, NormId, NormShape};

impl LinearId {
    /// Usual name of a linear inside its block.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

impl ModelConfig {
    /// The linears of a block, in the order in which they are used.
    #[must_use]
    pub fn block_linears(&self, _block: usize) -> Vec<LinearShape> {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        [
            (LinearId::Q, hidden, queries),
            (LinearId::K, hidden, keys),
            (LinearId::V, hidden, keys),
            (LinearId::O, queries, hidden),
            (LinearId::Gate, hidden, inner),
            (LinearId::Up, hidden, inner),
            (LinearId::Down, inner, hidden),
        ]
        .map(|(id, in_features, out_features)| {
            let bias = self.biases.of(id);
            LinearShape { bias, ..LinearShape::new(id, in_features, out_features) }
        })
        .into()
    }

    /// The norms of a block: before attention and the MLP, and those of heads.
    #[must_use]
    pub fn block_norms(&self, _block: usize) -> Vec<NormShape> {
        let (hidden, head) = (self.hidden_size, self.head_dim);
        let mut norms = vec![
            (NormId::BeforeAttention, "input_layernorm", hidden),
            (NormId::BeforeMlp, "post_attention_layernorm", hidden),
        ];
        if self.qk_norm {
            norms.push((NormId::Queries, "self_attn.q_norm", head));
            norms.push((NormId::Keys, "self_attn.k_norm", head));
        }
        norms.into_iter().map(|(id, name, size)| NormShape { id, name, size }).collect()
    }

    /// Every linear of the model with its full name, block by block.
    pub fn linears(&self) -> impl Iterator<Item = (String, LinearShape)> {
        (0..self.num_hidden_layers).flat_map(move |block| {
            let prefix = Self::block_prefix(block);
            let shapes = self.block_linears(block).into_iter();
            shapes.map(move |shape| (format!("{prefix}.{}", shape.name), shape))
        })
    }

    /// The linear of this full name.
    #[must_use]
    pub fn linear_named(&self, name: &str) -> Option<LinearShape> {
        let (block, part) = name.strip_prefix(BLOCKS)?.split_once('.')?;
        let block = block.parse().ok().filter(|&block| block < self.num_hidden_layers)?;
        self.block_linears(block).into_iter().find(|shape| shape.name == part)
    }

    /// Prefix of a block's tensors, `model.layers.{block}`.
    #[must_use]
    pub fn block_prefix(block: usize) -> String {
        format!("{BLOCKS}{block}")
    }
}
