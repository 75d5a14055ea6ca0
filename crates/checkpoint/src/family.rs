//! What a family of models is, beside numbers: the types of which `families` has one row for each.

use std::sync::LazyLock;

use serde_json::Value;

use crate::expert_rules::ExpertRules;
use crate::families::FAMILIES;
use crate::fields::Fields;
use crate::wrappers::wrapper_names;
use crate::{LinearId, NormId, Result};

/// A `model_type` of transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Family {
    /// `model_type`.
    pub(crate) name: &'static str,
    /// Default of `max_position_embeddings`.
    pub(crate) context: usize,
    /// Default of `num_key_value_heads`; `None`: as many as query heads.
    pub(crate) kv_heads: Option<usize>,
    /// Default of `head_dim`; `None`: the width over the heads.
    pub(crate) head_dim: Option<usize>,
    /// Default of `tie_word_embeddings`.
    pub(crate) tied: bool,
    /// Key of the activation.
    pub(crate) act_key: &'static str,
    /// What its values mean; the first is the default.
    pub(crate) acts: &'static [(&'static str, Activation)],
    /// Biases of q, k and v.
    pub(crate) qkv_bias: Part,
    /// Bias of o.
    pub(crate) output_bias: Part,
    /// Biases of gate, up and down.
    pub(crate) mlp_bias: Part,
    /// Mixtures of experts in the place of MLPs.
    pub(crate) experts: Option<&'static ExpertRules>,
    /// q, k and v are one linear.
    pub(crate) fused_qkv: bool,
    /// gate and up are one linear.
    pub(crate) fused_gate_up: bool,
    /// What norms compute.
    pub(crate) norm: NormKind,
    /// Key of what is added to mean squares, and its default.
    pub(crate) norm_eps: (&'static str, f64),
    /// The norms of hidden states in a block, by name.
    pub(crate) norms: &'static [(NormId, &'static str)],
    /// The norms of queries and keys.
    pub(crate) head_norms: HeadNorms,
    /// Attention and MLP read the same normed states, and both are added to the stream.
    pub(crate) parallel: bool,
    /// Which blocks attend to how much.
    pub(crate) window: Window,
    /// Which blocks rotate queries and keys.
    pub(crate) rotates: Rotates,
    /// Base of rotary frequencies where the config has none.
    pub(crate) theta: f64,
    /// Default of `partial_rotary_factor`; `None`: all of a head is rotated.
    pub(crate) partial: Option<f64>,
    /// Pairs of features that are rotated lie beside each other.
    pub(crate) interleaved: bool,
    /// Blocks that slide have rotary settings of their own.
    pub(crate) local_rope: Option<LocalRope>,
    /// Default of `original_max_position_embeddings` beside the rotary settings.
    pub(crate) original_context: Option<usize>,
    /// `yarn` is what its files once called `longrope`.
    pub(crate) yarn_is_longrope: bool,
    /// Rotary positions have three parts, which are equal for text.
    pub(crate) mrope: Option<Mrope>,
    /// What embeddings are multiplied by.
    pub(crate) embedding: Factor,
    /// What products of queries and keys are multiplied by.
    pub(crate) attention: Factor,
    /// What the products of o and down are multiplied by.
    pub(crate) residual: Factor,
    /// What logits are multiplied by.
    pub(crate) logits: Factor,
    /// Key of the cap on products of queries and keys, and its default.
    pub(crate) attention_cap: Option<(&'static str, Option<f64>)>,
    /// Key of the cap on logits, and its default.
    pub(crate) logit_cap: Option<(&'static str, Option<f64>)>,
}

/// Whether a part is there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Part {
    Never,
    Always,
    /// If this key is true; the default, too.
    Flag(&'static str, bool),
}

impl Part {
    /// Whether a model has it.
    pub(crate) fn read(self, fields: &Fields<'_>) -> Result<bool> {
        match self {
            Self::Never => Ok(false),
            Self::Always => Ok(true),
            Self::Flag(key, default) => match fields.get(key) {
                None => Ok(default),
                Some(_) => fields.flag(key),
            },
        }
    }
}

/// What the norms of a model compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) · gain (arXiv 1910.07467).
    Rms,
    /// The same with a gain that is stored less 1.
    RmsPlusOne,
    /// (x − mean) / deviation · gain, without a bias (arXiv 1607.06450).
    Layer,
}

impl NormKind {
    /// What is added to stored gains.
    #[must_use]
    pub fn offset(self) -> f32 {
        if self == Self::RmsPlusOne { 1.0 } else { 0.0 }
    }
}

/// What an MLP does to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// The tanh form of x · Φ(x) (arXiv 1606.08415).
    GeluTanh,
}

/// The norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadNorms {
    None,
    /// Every head by itself, all with one gain.
    Heads,
    /// The same, if this key is true.
    HeadsIf(&'static str),
    /// All heads together.
    Whole,
    /// Every head by itself, each with a gain of its own, if this key is true.
    EachIf(&'static str),
}

/// Which blocks attend to so many tokens only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Window {
    /// None, whatever the configuration says: transformers' model of the family knows no window.
    None,
    /// All, where there is a window.
    All { default: Option<usize> },
    /// The same, but for those that `layer_types` has as full.
    AllUnlisted { default: usize },
    /// All, if `use_sliding_window` says so.
    AllIf { default: usize },
    /// If `use_sliding_window` says so every other one, from the first on, before `max_window_layers` (by
    /// default 28).
    OddBefore { default: usize },
    /// If `use_sliding_window` says so those from `max_window_layers` (by default `first`) on.
    From { default: usize, first: usize },
    /// All but every so many-th.
    Pattern { default: usize, every: usize },
    /// If `use_sliding_window` says so those that do not rotate.
    Unrotated,
}

impl Window {
    /// Without a flag there is none.
    pub(crate) fn is_optional(self) -> bool {
        !matches!(
            self,
            Self::None | Self::All { .. } | Self::AllUnlisted { .. } | Self::Pattern { .. }
        )
    }

    /// Tokens where the config says nothing.
    pub(crate) fn default(self) -> Option<usize> {
        match self {
            Self::All { default } => default,
            Self::AllUnlisted { default }
            | Self::AllIf { default }
            | Self::OddBefore { default }
            | Self::From { default, .. }
            | Self::Pattern { default, .. } => Some(default),
            Self::None | Self::Unrotated => None,
        }
    }
}

/// Which blocks rotate queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rotates {
    All,
    /// Those that `no_rope_layers` has a 1 for.
    Listed,
    /// Those that slide.
    Sliding,
}

/// Rotary settings of blocks that slide, where they lie beside the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum LocalRope {
    /// Of a base of their own: the key and its default.
    Base(&'static str, f64),
    /// Of the same base, but never stretched.
    Unscaled,
}

/// Which pairs of rotated features turn by which of three positions: `mrope_section` has a number of pairs
/// for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mrope {
    /// So many pairs beside each other; the default.
    Beside([usize; 3]),
    /// In turn, as long as there are so many.
    Interleaved,
}

/// What something is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Factor {
    /// A number.
    Number(f64),
    /// The value of a key, and its default.
    Key(&'static str, f64),
    /// 1 over that.
    Over(&'static str, f64),
    /// 1 over the root of that.
    OverRoot(&'static str, f64),
    /// The root of the width.
    RootOfWidth,
    /// 1 over the root of a head's features.
    OverRootOfHead,
}

impl Factor {
    /// The key that it is read from.
    fn key(self) -> Option<&'static str> {
        match self {
            Self::Key(key, _) | Self::Over(key, _) | Self::OverRoot(key, _) => Some(key),
            Self::Number(_) | Self::RootOfWidth | Self::OverRootOfHead => None,
        }
    }

    /// The factor of a model of such a width and such heads.
    pub(crate) fn read(self, fields: &Fields<'_>, width: usize, head_dim: usize) -> Result<f32> {
        let value = |key, default: f64| -> Result<f64> {
            let value = fields.positive(key)?.unwrap_or(default);
            match (value as f32).is_normal() && (1.0 / value as f32).is_normal() {
                true => Ok(value),
                false => Err(fields.invalid(key, format!("is {value}, which is out of range"))),
            }
        };
        Ok(match self {
            Self::Number(number) => number,
            Self::Key(key, default) => value(key, default)?,
            Self::Over(key, default) => 1.0 / value(key, default)?,
            Self::OverRoot(key, default) => 1.0 / value(key, default)?.sqrt(),
            Self::RootOfWidth => (width as f64).sqrt(),
            // As kernels have it that know of no other.
            Self::OverRootOfHead => return Ok(1.0 / (head_dim as f32).sqrt()),
        } as f32)
    }
}

/// Keys by which relatives of these families change the forward pass, and the number that changes
/// nothing (of one that is not a number, none does). transformers would ignore them in a Llama's config; a model that has one needs it.
const NEUTRAL: [(&str, f64); 16] = [
    ("partial_rotary_factor", 1.0),
    ("rope_interleaved", 0.0),
    ("clip_qkv", f64::NAN),
    ("qk_layernorm", 0.0),
    ("use_qk_norm", 0.0),
    ("use_bidirectional_attention", 0.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("n_routed_experts", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_multiplier", 1.0),
    ("attention_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("logit_scale", 1.0),
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
            LinearId::Q | LinearId::K | LinearId::V | LinearId::Qkv => self.qkv,
            LinearId::O => self.output,
            LinearId::Gate | LinearId::Up | LinearId::GateUp | LinearId::Down => self.mlp,
            // No family has any there.
            LinearId::ExpertGate(_) | LinearId::ExpertUp(_) | LinearId::ExpertDown(_) => false,
            LinearId::SharedGate | LinearId::SharedUp | LinearId::SharedDown => false,
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
                let wrappers: Vec<String> =
                    wrapper_names().map(|(name, _)| format!("`{name}`")).collect();
                format!(
                    "one of {} and {last}, and of models with other parts the language model of {}",
                    others.join(", "),
                    wrappers.join(", ")
                )
            });
            fields.unsupported("model_type", model_type, &NAMES)
        })
    }

    /// Refuses what would need another forward pass than the engine's.
    pub(crate) fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let nested = fields.get("rope_parameters").and_then(Value::as_object);
        for (key, neutral) in NEUTRAL.into_iter().filter(|(key, _)| !self.reads(key)) {
            let value = fields.get(key).or_else(|| nested.and_then(|map| map.get(key)));
            let changes = |value: &Value| value != false && value.as_f64() != Some(neutral);
            if let Some(value) = value.filter(|v| !v.is_null() && changes(v)) {
                let supported = match neutral {
                    _ if value.is_boolean() => "`false`",
                    0.0 => "`0`",
                    _ if neutral.is_nan() => "`null`",
                    _ => "`1`",
                };
                return Err(fields.unsupported(key, value, supported));
            }
        }
        // transformers attends to later tokens then, whatever the family.
        match fields.get("is_causal") {
            Some(value @ Value::Bool(false)) => {
                Err(fields.unsupported("is_causal", value, "`true`"))
            }
            _ => Ok(()),
        }
    }

    /// Whether a key changes the forward pass of this family in a way that the engine has.
    fn reads(&self, key: &str) -> bool {
        let factors = [self.embedding, self.attention, self.residual, self.logits];
        let caps = [self.attention_cap, self.logit_cap];
        (key == "partial_rotary_factor" && self.partial.is_some())
            || matches!(self.head_norms, HeadNorms::EachIf(read) | HeadNorms::HeadsIf(read) if read == key)
            || self.experts.is_some_and(|experts| experts.reads(key))
            || factors.into_iter().filter_map(Factor::key).any(|read| read == key)
            || caps.into_iter().flatten().any(|(read, _)| read == key)
    }

    /// What the MLP does to its gate.
    pub(crate) fn activation(&self, fields: &Fields<'_>) -> Result<Activation> {
        let [(_, default), ..] = self.acts else { return Ok(Activation::Silu) };
        let Some(value) = fields.get(self.act_key) else { return Ok(*default) };
        match self.acts.iter().find(|(name, _)| value == *name) {
            Some((_, activation)) => Ok(*activation),
            None => {
                let supported = match default {
                    Activation::Silu => "`silu`",
                    Activation::GeluTanh => "`gelu_pytorch_tanh`",
                };
                Err(fields.unsupported(self.act_key, value, supported))
            }
        }
    }

    /// The linears that have biases.
    pub(crate) fn biases(&self, fields: &Fields<'_>) -> Result<Biases> {
        Ok(Biases {
            qkv: self.qkv_bias.read(fields)?,
            output: self.output_bias.read(fields)?,
            mlp: self.mlp_bias.read(fields)?,
        })
    }

    /// The norms of queries and keys that the model has.
    pub(crate) fn head_norms(&self, fields: &Fields<'_>) -> Result<HeadNorms> {
        match self.head_norms {
            HeadNorms::EachIf(key) | HeadNorms::HeadsIf(key) if !fields.flag(key)? => {
                Ok(HeadNorms::None)
            }
            norms => Ok(norms),
        }
    }

    /// A cap on values, where the model has one.
    pub(crate) fn cap(
        fields: &Fields<'_>,
        cap: Option<(&'static str, Option<f64>)>,
    ) -> Result<Option<f32>> {
        let Some((key, default)) = cap else { return Ok(None) };
        let read = match fields.raw.get(key) {
            None => default,
            Some(_) => fields.positive(key)?,
        };
        Ok(read.map(|cap| cap as f32))
    }
}
