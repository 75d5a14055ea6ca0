//! The families of models that share Llama's block, as data: what their config.json leaves unsaid,
//! and which optional parts their linears and heads have.

use std::sync::LazyLock;

use serde_json::Value;

use crate::fields::Fields;
use crate::{LinearId, Result};

/// A `model_type` of transformers.
#[derive(Debug)]
pub(crate) struct Family {
    /// `model_type`.
    pub(crate) name: &'static str,
    /// Default of `max_position_embeddings`.
    pub(crate) context: usize,
    /// Default of `num_key_value_heads`; `None`: as many as query heads.
    pub(crate) kv_heads: Option<usize>,
    /// Default of `head_dim`; `None`: the width over the heads.
    pub(crate) head_dim: Option<usize>,
    /// Biases of q, k and v.
    qkv_bias: Part,
    /// Bias of o.
    output_bias: Part,
    /// Biases of gate, up and down.
    mlp_bias: Part,
    /// Norms of every query and key head before they are rotated.
    pub(crate) qk_norm: bool,
    /// Default of `sliding_window`.
    sliding_window: Option<usize>,
    /// Attention slides only if `use_sliding_window` says so, and from block `max_window_layers`
    /// (by default 28) on.
    sliding_is_optional: bool,
}

/// Whether a part is there.
#[derive(Debug, Clone, Copy)]
enum Part {
    Never,
    Always,
    /// If this key is true.
    Flag(&'static str),
}

const FAMILIES: [Family; 4] = [
    Family {
        name: "llama",
        context: 2048,
        kv_heads: None,
        head_dim: None,
        qkv_bias: Part::Flag("attention_bias"),
        output_bias: Part::Flag("attention_bias"),
        mlp_bias: Part::Flag("mlp_bias"),
        qk_norm: false,
        sliding_window: None,
        sliding_is_optional: false,
    },
    Family {
        name: "mistral",
        context: 4096 * 32,
        kv_heads: Some(8),
        head_dim: None,
        qkv_bias: Part::Never,
        output_bias: Part::Never,
        mlp_bias: Part::Never,
        qk_norm: false,
        sliding_window: Some(4096),
        sliding_is_optional: false,
    },
    Family {
        name: "qwen2",
        context: 32_768,
        kv_heads: Some(32),
        head_dim: None,
        qkv_bias: Part::Always,
        output_bias: Part::Never,
        mlp_bias: Part::Never,
        qk_norm: false,
        sliding_window: Some(4096),
        sliding_is_optional: true,
    },
    Family {
        name: "qwen3",
        context: 32_768,
        kv_heads: Some(32),
        head_dim: Some(128),
        qkv_bias: Part::Flag("attention_bias"),
        output_bias: Part::Flag("attention_bias"),
        mlp_bias: Part::Never,
        qk_norm: true,
        sliding_window: Some(4096),
        sliding_is_optional: true,
    },
];

/// Keys by which relatives of these families change the forward pass, and the number that changes
/// nothing. transformers would ignore them in a Llama's config; a model that has one needs it.
const NEUTRAL: [(&str, f64); 13] = [
    ("partial_rotary_factor", 1.0),
    ("rope_interleaved", 0.0),
    ("clip_qkv", 0.0),
    ("qk_layernorm", 0.0),
    ("use_qk_norm", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("n_routed_experts", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("logits_scaling", 1.0),
];

/// Which linears of a block have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

impl Biases {
    /// Whether a linear has one.
    pub(crate) fn of(self, id: LinearId) -> bool {
        match id {
            LinearId::Q | LinearId::K | LinearId::V => self.qkv,
            LinearId::O => self.output,
            LinearId::Gate | LinearId::Up | LinearId::Down => self.mlp,
        }
    }
}

impl Family {
    /// The family that a config belongs to.
    pub(crate) fn of(fields: &Fields<'_>) -> Result<&'static Self> {
        let Some(model_type) = fields.get("model_type") else {
            return Err(fields.invalid("model_type", "is missing".to_owned()));
        };
        FAMILIES.iter().find(|f| model_type == f.name).ok_or_else(|| {
            static NAMES: LazyLock<String> = LazyLock::new(|| {
                let [others @ .., last] =
                    FAMILIES.each_ref().map(|family| format!("`{}`", family.name));
                format!("one of {} and {last}", others.join(", "))
            });
            fields.unsupported("model_type", model_type, &NAMES)
        })
    }

    /// Refuses what would need another forward pass than the engine's.
    pub(crate) fn check(&self, fields: &Fields<'_>) -> Result<()> {
        if let Some(act) = fields.get("hidden_act").filter(|act| *act != "silu") {
            return Err(fields.unsupported("hidden_act", act, "`silu`"));
        }
        let nested = fields.get("rope_parameters").and_then(Value::as_object);
        for (key, neutral) in NEUTRAL {
            let value = fields.get(key).or_else(|| nested.and_then(|map| map.get(key)));
            let changes = |value: &Value| value != false && value.as_f64() != Some(neutral);
            if let Some(value) = value.filter(|v| !v.is_null() && changes(v)) {
                let supported = match neutral {
                    _ if value.is_boolean() => "`false`",
                    0.0 => "`0`",
                    _ => "`1`",
                };
                return Err(fields.unsupported(key, value, supported));
            }
        }
        Ok(())
    }

    /// The linears that have biases.
    pub(crate) fn biases(&self, fields: &Fields<'_>) -> Result<Biases> {
        let part = |part| match part {
            Part::Never => Ok(false),
            Part::Always => Ok(true),
            Part::Flag(key) => fields.flag(key),
        };
        Ok(Biases {
            qkv: part(self.qkv_bias)?,
            output: part(self.output_bias)?,
            mlp: part(self.mlp_bias)?,
        })
    }

    /// Tokens that a token attends to at most, itself included, in the blocks that have a limit.
    pub(crate) fn sliding_window(
        &self,
        fields: &Fields<'_>,
        blocks: usize,
    ) -> Result<Option<usize>> {
        const KEY: &str = "sliding_window";
        let kinds = layer_types(fields)?;
        if self.sliding_is_optional {
            let slides = match kinds {
                Some(slides) => slides.contains(&true),
                None => first_sliding(fields) < blocks,
            };
            if !fields.flag("use_sliding_window")? || !slides {
                return Ok(None);
            }
        }
        match fields.raw.get(KEY) {
            None => Ok(self.sliding_window),
            Some(Value::Null) => Ok(None),
            Some(_) => fields.size(KEY, None, 1 << 40).map(Some),
        }
    }

    /// The blocks that the limit of [`Self::sliding_window`] holds for, where there is one.
    pub(crate) fn sliding_blocks(&self, fields: &Fields<'_>, blocks: usize) -> Result<Vec<usize>> {
        if !self.sliding_is_optional {
            return Ok((0..blocks).collect());
        }
        Ok(match layer_types(fields)? {
            Some(slides) => (0..blocks).filter(|&b| slides.get(b) == Some(&true)).collect(),
            None => (first_sliding(fields)..blocks).collect(),
        })
    }
}

/// The block from which attention slides, where the config lists no kinds of attention.
fn first_sliding(fields: &Fields<'_>) -> usize {
    let first = fields.raw.get("max_window_layers").and_then(Value::as_u64);
    first.map_or(28, |first| first as usize)
}

/// Whether each block slides, where the config lists kinds of attention.
fn layer_types(fields: &Fields<'_>) -> Result<Option<Vec<bool>>> {
    const KEY: &str = "layer_types";
    let Some(value) = fields.get(KEY) else { return Ok(None) };
    let supported = "a list of `full_attention` and `sliding_attention`";
    let Some(kinds) = value.as_array() else {
        return Err(fields.unsupported(KEY, value, supported));
    };
    let known = |kind: &Value| kind == "full_attention" || kind == "sliding_attention";
    if let Some(kind) = kinds.iter().find(|kind| !known(kind)) {
        return Err(fields.unsupported(KEY, kind, supported));
    }
    Ok(Some(kinds.iter().map(|kind| kind == "sliding_attention").collect()))
}
