//! Blocks of named models, as benchmarks make them: their shapes, and blocks of any weights.

use gptq_checkpoint::{Expert, LinearShape, ModelConfig};
use gptq_model::{Block, BlockParts, BlockRule, Gains, Linear, LinearId, Mixture, NormId};
use serde::Serialize;

use crate::operations::{BlockKind, Routing};

/// Shapes of a named model's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Width {
    /// The name on the command line.
    pub name: &'static str,
    hidden: usize,
    pub(crate) intermediate: usize,
    heads: usize,
    kv_heads: usize,
    #[serde(skip)]
    head_dim: usize,
    /// The experts that such an MLP is one of; all tokens go through it where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) experts: Option<WidthExperts>,
    /// Blocks of the model that it is of.
    #[serde(skip)]
    blocks: usize,
    /// Words that the model knows.
    #[serde(skip)]
    vocabulary: usize,
}

/// Experts of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WidthExperts {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub per_token: usize,
}

const WIDTHS: [Width; 8] = [
    Width {
        name: "tiny",
        hidden: 256,
        intermediate: 768,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        experts: None,
        blocks: 5,
        vocabulary: 2048,
    },
    Width {
        name: "smollm2",
        hidden: 576,
        intermediate: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        experts: None,
        blocks: 30,
        vocabulary: 49_152,
    },
    Width {
        name: "7b",
        hidden: 4096,
        intermediate: 11008,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        experts: None,
        blocks: 32,
        vocabulary: 32_000,
    },
    Width {
        name: "13b",
        hidden: 5120,
        intermediate: 13824,
        heads: 40,
        kv_heads: 40,
        head_dim: 128,
        experts: None,
        blocks: 40,
        vocabulary: 32_000,
    },
    Width {
        name: "70b",
        hidden: 8192,
        intermediate: 28672,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        experts: None,
        blocks: 80,
        vocabulary: 32_000,
    },
    Width {
        name: "tiny-moe",
        hidden: 256,
        intermediate: 128,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        experts: Some(WidthExperts { count: 8, per_token: 2 }),
        blocks: 5,
        vocabulary: 2048,
    },
    Width {
        name: "mixtral-8x7b",
        hidden: 4096,
        intermediate: 14336,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        experts: Some(WidthExperts { count: 8, per_token: 2 }),
        blocks: 32,
        vocabulary: 32_000,
    },
    Width {
        name: "qwen3-30b-a3b",
        hidden: 2048,
        intermediate: 768,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        experts: Some(WidthExperts { count: 128, per_token: 8 }),
        blocks: 48,
        vocabulary: 151_936,
    },
];

impl std::str::FromStr for Width {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        WIDTHS.into_iter().find(|w| w.name == text).ok_or_else(|| {
            let names: Vec<&str> = WIDTHS.iter().map(|w| w.name).collect();
            format!("use one of {}", names.join(", "))
        })
    }
}

impl Width {
    /// The one that cards are compared on.
    pub(crate) const LARGEST: Self = WIDTHS[4];

    /// Width of the residual stream.
    pub(crate) fn hidden(self) -> usize {
        self.hidden
    }

    /// Whether its MLP is a mixture of experts.
    pub(crate) fn has_experts(self) -> bool {
        self.experts.is_some()
    }

    /// The linears of the block: Llama's, or of experts each one's gate, up and down.
    pub(crate) fn ids(self) -> Vec<LinearId> {
        let Some(WidthExperts { count, .. }) = self.experts else {
            return LinearId::LLAMA.to_vec();
        };
        let of_expert = |number| {
            let expert = Expert::Routed(number);
            [expert.gate(), expert.up(), expert.down()]
        };
        let attention = [LinearId::Q, LinearId::K, LinearId::V, LinearId::O];
        attention.into_iter().chain((0..count as u16).flat_map(of_expert)).collect()
    }

    /// Their shapes.
    pub(crate) fn linears(self) -> Vec<LinearShape> {
        let shape = |id| {
            let (rows, cols) = self.linear(id);
            LinearShape::new(id, cols, rows)
        };
        self.ids().into_iter().map(shape).collect()
    }

    /// Rows and columns of the same.
    pub(crate) fn sides(self) -> Vec<(usize, usize)> {
        self.ids().into_iter().map(|id| self.linear(id)).collect()
    }

    /// What its operations follow from.
    pub(crate) fn kind(self) -> BlockKind {
        let routing = self.experts.map(|WidthExperts { count, per_token }| Routing {
            count,
            per_token,
            rows: count,
        });
        BlockKind { linears: self.linears(), window: None, routing, kv_heads: self.kv_heads }
    }

    /// A block of these weights, in the order of [`Self::ids`], and of what routes tokens.
    pub(crate) fn block<W>(self, weights: Vec<W>, mixture: Option<Mixture>) -> Block<W> {
        let linear = |(shape, weight): (LinearShape, W)| {
            let name = format!("{}.{}", ModelConfig::block_prefix(0), shape.name);
            Linear { id: shape.id, name, weight, bias: None }
        };
        let ones = || vec![1.0; self.hidden];
        Block::new(BlockParts {
            index: 0,
            linears: self.linears().into_iter().zip(weights).map(linear).collect(),
            gains: Gains::new(
                vec![(NormId::BeforeAttention, ones()), (NormId::BeforeMlp, ones())],
                0.0,
            ),
            mixture,
            rule: BlockRule::llama(self.heads, self.kv_heads, self.head_dim, 1e-5),
        })
    }

    /// A model of one such block, and of next to no words: its config.json.
    pub(crate) fn config_text(self) -> String {
        let Self { hidden, intermediate, heads, kv_heads, head_dim, .. } = self;
        let mlp = match self.experts {
            None => format!(r#""model_type":"llama","intermediate_size":{intermediate}"#),
            Some(WidthExperts { count, per_token }) => format!(
                r#""model_type":"qwen3_moe","intermediate_size":{intermediate},
                "moe_intermediate_size":{intermediate},"num_experts":{count},
                "num_experts_per_tok":{per_token},"norm_topk_prob":true"#
            ),
        };
        format!(
            r#"{{{mlp},"hidden_size":{hidden},"head_dim":{head_dim},
            "num_hidden_layers":1,"num_attention_heads":{heads},"num_key_value_heads":{kv_heads},
            "vocab_size":32,"max_position_embeddings":2048,"torch_dtype":"float16"}}"#
        )
    }

    /// Blocks and words of a model of this width.
    pub(crate) fn depth(self) -> (usize, usize) {
        (self.blocks, self.vocabulary)
    }

    /// Query heads.
    pub(crate) fn heads(self) -> usize {
        self.heads
    }

    /// Key and value heads.
    pub(crate) fn kv_heads(self) -> usize {
        self.kv_heads
    }

    pub(crate) fn head_dim(self) -> usize {
        self.head_dim
    }

    /// Rows and columns of a linear.
    pub(crate) fn linear(self, id: LinearId) -> (usize, usize) {
        let (h, i, kv) = (self.hidden, self.intermediate, self.kv_heads * self.head_dim);
        let q = self.heads * self.head_dim;
        match id {
            LinearId::Q => (q, h),
            LinearId::O => (h, q),
            LinearId::K | LinearId::V => (kv, h),
            LinearId::Qkv => (q + 2 * kv, h),
            LinearId::Gate | LinearId::Up => (i, h),
            LinearId::ExpertGate(_) | LinearId::ExpertUp(_) => (i, h),
            LinearId::SharedGate | LinearId::SharedUp => (i, h),
            LinearId::GateUp => (2 * i, h),
            LinearId::Down | LinearId::ExpertDown(_) | LinearId::SharedDown => (h, i),
        }
    }
}
