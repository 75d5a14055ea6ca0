//! The tensors of a block: its linears and norms, by name and size. A block is asked for by its number,
//! as not all blocks of a model need be alike.

use std::borrow::Cow;

use serde_json::Value;

use crate::experts::{Experts, LLAMA_NAMES};
use crate::family::HeadNorms;
use crate::names::BLOCKS;
use crate::{DenseShape, LinearId, LinearShape, ModelConfig, NormId, NormShape};

impl LinearId {
    /// Usual name of a linear inside its block.
    pub(crate) fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
            Self::Qkv => "self_attn.qkv_proj",
            Self::GateUp => "mlp.gate_up_proj",
            Self::ExpertGate(_)
            | Self::ExpertUp(_)
            | Self::ExpertDown(_)
            | Self::SharedGate
            | Self::SharedUp
            | Self::SharedDown => return LLAMA_NAMES.linear(self).into(),
        })
    }
}

impl ModelConfig {
    /// The linears of a block, in the order in which they are used: those of experts one expert after the
    /// other, the shared one last.
    #[must_use]
    pub fn block_linears(&self, block: usize) -> Vec<LinearShape> {
        let mut linears = self.attention_linears();
        match self.experts(block) {
            None => linears.extend(self.mlp_linears()),
            Some(experts) => linears.extend(experts.linears(self.hidden_size)),
        }
        linears
    }

    fn attention_linears(&self) -> Vec<LinearShape> {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let hidden = self.hidden_size;
        let mut linears = match self.rules.fused_qkv {
            true => vec![(LinearId::Qkv, hidden, queries + 2 * keys)],
            false => vec![
                (LinearId::Q, hidden, queries),
                (LinearId::K, hidden, keys),
                (LinearId::V, hidden, keys),
            ],
        };
        linears.push((LinearId::O, queries, hidden));
        self.shapes(linears)
    }

    fn mlp_linears(&self) -> Vec<LinearShape> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let mut linears = match self.rules.fused_gate_up {
            true => vec![(LinearId::GateUp, hidden, 2 * inner)],
            false => vec![(LinearId::Gate, hidden, inner), (LinearId::Up, hidden, inner)],
        };
        linears.push((LinearId::Down, inner, hidden));
        self.shapes(linears)
    }

    fn shapes(&self, of: Vec<(LinearId, usize, usize)>) -> Vec<LinearShape> {
        let shape = |(id, in_features, out_features)| {
            let bias = self.biases.of(id);
            LinearShape { bias, ..LinearShape::new(id, in_features, out_features) }
        };
        of.into_iter().map(shape).collect()
    }

    /// The experts of a block; `None` for one that has one MLP for all tokens.
    #[must_use]
    pub fn experts(&self, block: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.are_in(block))
    }

    /// The experts of the first block that has them: all such blocks of a model have the same.
    #[must_use]
    pub fn any_experts(&self) -> Option<&Experts> {
        (0..self.num_hidden_layers).find_map(|block| self.experts(block))
    }

    /// Layers behind the blocks that predict one more token each, which nothing else needs.
    pub(crate) fn prediction_layers(&self) -> usize {
        let layers = self.raw().get("num_nextn_predict_layers").and_then(Value::as_u64);
        layers.and_then(|layers| usize::try_from(layers).ok()).unwrap_or(0)
    }

    /// The tensors of a block that are neither linears nor norms: what routes tokens to experts.
    #[must_use]
    pub fn block_dense(&self, block: usize) -> Vec<DenseShape> {
        self.experts(block).map_or_else(Vec::new, |experts| experts.dense(self.hidden_size))
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
            HeadNorms::Heads | HeadNorms::HeadsIf(_) => [vec![head], vec![head]],
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
        let (block, part) = self.part_of_block(name)?;
        self.block_linear(block, part)
    }

    /// The linear of this name inside a block, found without a list of all: there are thousands.
    pub(crate) fn block_linear(&self, block: usize, part: &str) -> Option<LinearShape> {
        let named = |linears: Vec<LinearShape>| linears.into_iter().find(|l| l.name == part);
        match self.experts(block) {
            None => named(self.attention_linears()).or_else(|| named(self.mlp_linears())),
            Some(experts) => named(self.attention_linears())
                .or_else(|| experts.linear_named(self.hidden_size, part)),
        }
    }

    /// The tensor of this full name, if it is one of [`Self::block_dense`].
    #[must_use]
    pub fn dense_named(&self, name: &str) -> Option<DenseShape> {
        let (block, part) = self.part_of_block(name)?;
        self.block_dense(block).into_iter().find(|dense| dense.name == part)
    }

    /// The block of a full name, and the name inside it.
    fn part_of_block<'a>(&self, name: &'a str) -> Option<(usize, &'a str)> {
        let (block, part) = name.strip_prefix(BLOCKS)?.split_once('.')?;
        let block = block.parse().ok().filter(|&block| block < self.num_hidden_layers)?;
        Some((block, part))
    }

    /// Prefix of a block's tensors, `model.layers.{block}`.
    #[must_use]
    pub fn block_prefix(block: usize) -> String {
        format!("{BLOCKS}{block}")
    }
}
