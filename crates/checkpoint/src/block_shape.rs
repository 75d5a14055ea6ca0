//! The tensors of a block: its linears and norms, by name and size. A block is asked for by its number,
//! as not all blocks of a model need be alike.

use crate::family::HeadNorms;
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
            Self::Qkv => "self_attn.qkv_proj",
            Self::GateUp => "mlp.gate_up_proj",
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
        let mut linears = match self.rules.fused_qkv {
            true => vec![(LinearId::Qkv, hidden, queries + 2 * keys)],
            false => vec![
                (LinearId::Q, hidden, queries),
                (LinearId::K, hidden, keys),
                (LinearId::V, hidden, keys),
            ],
        };
        linears.push((LinearId::O, queries, hidden));
        match self.rules.fused_gate_up {
            true => linears.push((LinearId::GateUp, hidden, 2 * inner)),
            false => {
                linears.extend([(LinearId::Gate, hidden, inner), (LinearId::Up, hidden, inner)]);
            }
        }
        linears.push((LinearId::Down, inner, hidden));
        let shape = |(id, in_features, out_features)| {
            let bias = self.biases.of(id);
            LinearShape { bias, ..LinearShape::new(id, in_features, out_features) }
        };
        linears.into_iter().map(shape).collect()
    }

    /// The norms of a block: those of hidden states, then those of queries and keys.
    #[must_use]
    pub fn block_norms(&self, _block: usize) -> Vec<NormShape> {
        let (heads, kv_heads, head) =
            (self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        let of_states =
            self.rules.norms.iter().map(|&(id, name)| (id, name, vec![self.hidden_size]));
        let [queries, keys] = match self.head_norms {
            HeadNorms::None => [vec![], vec![]],
            HeadNorms::Heads => [vec![head], vec![head]],
            HeadNorms::Whole => [vec![heads * head], vec![kv_heads * head]],
            HeadNorms::EachIf(_) => [vec![heads, head], vec![kv_heads, head]],
        };
        let of_heads = [
            (NormId::Queries, "self_attn.q_norm", queries),
            (NormId::Keys, "self_attn.k_norm", keys),
        ];
        let norms = of_states.chain(of_heads).filter(|(.., shape)| !shape.is_empty());
        norms.map(|(id, name, shape)| NormShape { id, name, shape }).collect()
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
