//! What distinguishes the forward pass of blocks that have the same parts.

use gptq_checkpoint::{Activation as Gate, ModelConfig, NormKind, RopeKind};
use gptq_compute::{Activation, AttentionRule, Device, RopeLayout, RopeTable, Tensor};

use crate::error::Result;

/// What a block computes with its parts.
#[derive(Clone, Copy, Debug)]
pub struct BlockRule {
    /// What its norms compute.
    pub norm: Norm,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// How queries weigh keys.
    pub attention: AttentionRule,
    /// How queries and keys are rotated, if they are.
    pub rope: Option<RopeKind>,
    /// What the MLP does to its gate.
    pub activation: Activation,
    /// Attention and MLP read the same normed states.
    pub parallel: bool,
    /// What the products of o and down are multiplied by.
    pub residual: f32,
}

impl BlockRule {
    /// Llama's, with norms of such an `eps`.
    #[must_use]
    pub fn llama(heads: usize, kv_heads: usize, head_dim: usize, eps: f32) -> Self {
        Self {
            norm: Norm { layer: false, eps },
            heads,
            kv_heads,
            head_dim,
            attention: AttentionRule::llama(head_dim),
            rope: Some(RopeKind::Global),
            activation: Activation::Silu,
            parallel: false,
            residual: 1.0,
        }
    }

    /// That of a model's block in sequences of up to `context` tokens.
    #[must_use]
    pub fn of(config: &ModelConfig, block: usize, context: usize) -> Self {
        let attention = config.block_attention(block);
        Self {
            norm: Norm::of(config),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            attention: AttentionRule {
                scale: config.factors.attention,
                softcap: config.attention_softcap,
                window: attention.window.filter(|&window| window < context),
            },
            rope: attention.rope,
            activation: match config.activation {
                Gate::Silu => Activation::Silu,
                Gate::GeluTanh => Activation::GeluTanh,
            },
            parallel: config.is_parallel(),
            residual: config.factors.residual,
        }
    }

    /// True for what Llama's blocks compute.
    pub(crate) fn is_llama(&self) -> bool {
        !self.norm.layer
            && self.attention == AttentionRule::llama(self.head_dim)
            && self.rope == Some(RopeKind::Global)
            && self.activation == Activation::Silu
            && !self.parallel
            && self.residual == 1.0
    }
}

/// A kind of norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Means are taken off first.
    pub layer: bool,
    /// Added to mean squares.
    pub eps: f32,
}

impl Norm {
    /// That of a model.
    #[must_use]
    pub fn of(config: &ModelConfig) -> Self {
        Self { layer: config.norm == NormKind::Layer, eps: config.norm_eps }
    }

    /// Norms every run of `features` values of a row; the gain has as many, or with means taken off one
    /// for each column.
    ///
    /// # Errors
    /// Those of the device.
    pub fn apply(
        self,
        device: &Device,
        x: &Tensor,
        gain: &[f32],
        features: usize,
    ) -> Result<Tensor> {
        Ok(match self.layer {
            true => device.layer_norm(x, gain, features, self.eps)?,
            false => device.rms_norm(x, gain, self.eps)?,
        })
    }
}

/// Rotary angles for windows of some length.
#[derive(Clone, Debug)]
pub struct Ropes {
    global: RopeTable,
    local: Option<RopeTable>,
    /// Those of windows shorter than so many tokens, where they have others.
    shorter: Option<(usize, Box<Self>)>,
}

impl Ropes {
    /// These, for all blocks.
    #[must_use]
    pub fn shared(table: RopeTable) -> Self {
        Self { global: table, local: None, shorter: None }
    }

    /// A model's, for windows of up to `seq_len` tokens.
    #[must_use]
    pub fn of(config: &ModelConfig, seq_len: usize) -> Self {
        let layout =
            if config.is_interleaved() { RopeLayout::Interleaved } else { RopeLayout::Half };
        let table = |rope: &gptq_checkpoint::Rope| {
            let (frequencies, factor) = (rope.frequencies(seq_len), rope.attention_factor());
            RopeTable::with(&frequencies, seq_len, config.head_dim, layout, factor)
        };
        // Of windows shorter than those prepared for, only ones within the context differ, and only
        // where the scaling is `dynamic` or `longrope`.
        let changes = config.rope.changes_from().filter(|&from| seq_len >= from);
        Self {
            global: table(&config.rope),
            local: config.local_rope.as_ref().map(table),
            shorter: changes.map(|from| (from, Box::new(Self::of(config, from - 1)))),
        }
    }

    /// Those of windows of `seq_len` tokens, no longer than the longest they were made for: what
    /// transformers does after it has seen the longest.
    #[must_use]
    pub fn for_windows(&self, seq_len: usize) -> &Self {
        match &self.shorter {
            Some((from, ropes)) if seq_len < *from => ropes,
            _ => self,
        }
    }

    /// The angles of a kind of block.
    #[must_use]
    pub fn of_kind(&self, kind: RopeKind) -> &RopeTable {
        match (kind, &self.local) {
            (RopeKind::Local, Some(local)) => local,
            _ => &self.global,
        }
    }
}
