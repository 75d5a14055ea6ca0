//! config.json of a model of Llama's architecture: its shape, checked before anything is allocated
//! from it.
//!
//! Only what the engine computes with becomes a field. The rest is kept as it was read, in order,
//! because a quantized checkpoint carries the source's config on. What distinguishes the families is
//! a table in `families`; what would need another forward pass is refused by name.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};

use crate::block_attention::{self, BlockAttention};
use crate::experts::Experts;
use crate::family::{Activation, Biases, Factor, Family, HeadNorms, NormKind};
use crate::fields::Fields;
use crate::names::{CONFIG_FILE, EMBEDDING, FINAL_NORM, HEAD, TEXT_CONFIG};
use crate::rope::{Rope, RopeScaling};
use crate::rope_settings::Reader;
use crate::stored_names::StoredNames;
use crate::wrappers::{Language, Sizes, TIED, Wrapper};
use crate::{Error, Result, TensorSpec, foreign, json};

/// Larger than any Llama's, and small enough that no size computed from a config overflows `u64`.
pub(crate) const MAX_WIDTH: u64 = 1 << 20;
const MAX_VOCAB: u64 = 1 << 24;
pub(crate) const MAX_BLOCKS: u64 = 1 << 12;
const MAX_CONTEXT: u64 = 1 << 40;

/// The shape of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the language model: one of `FAMILIES`, or what one of `WRAPPERS` has in it.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP, in blocks that have one for all tokens.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// What norms compute.
    pub norm: NormKind,
    /// Added to the mean square in norms.
    pub norm_eps: f32,
    /// Rotary position embeddings.
    pub rope: Rope,
    /// Those of blocks whose attention slides, where they have others.
    pub local_rope: Option<Rope>,
    /// Longest window that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// What the MLP does to its gate.
    pub activation: Activation,
    /// What embeddings, scores, what blocks add to the stream, and logits are multiplied by.
    pub factors: Factors,
    /// What scores of attention stay below.
    pub attention_softcap: Option<f32>,
    /// What logits stay below.
    pub logit_softcap: Option<f32>,
    /// The head is the embedding, unless the weights hold another: [`Checkpoint::head`] knows.
    ///
    /// [`Checkpoint::head`]: crate::Checkpoint::head
    pub tie_word_embeddings: bool,
    /// Mixtures of experts in the place of MLPs, in the blocks that have them.
    pub(crate) experts: Option<Experts>,
    pub(crate) biases: Biases,
    pub(crate) head_norms: HeadNorms,
    pub(crate) rules: &'static Family,
    /// What the language model is a part of, if it is not all.
    pub(crate) wrapper: Option<&'static Wrapper>,
    /// How the weights call its tensors.
    pub(crate) names: StoredNames,
    /// The tensors of the other parts; `None` where no weights are known.
    pub(crate) carried: Option<Vec<TensorSpec>>,
    blocks: Vec<BlockAttention>,
    pub(crate) raw: Map<String, Value>,
}

/// Constants that parts of a forward pass are multiplied by; 1 where a family has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    /// Embeddings. Gemma's files mean it rounded to the type of the embedding: see
    /// [`ModelConfig::embedding_factor_is_rounded`].
    pub embedding: f32,
    /// Products of queries and keys.
    pub attention: f32,
    /// Products of o and down, before they are added to the hidden states.
    pub residual: f32,
    /// Logits.
    pub logits: f32,
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// As [`ModelConfig::parse`], and [`Error::Io`] for a file that cannot be read.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join(CONFIG_FILE);
        let text = json::text(&file).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => {
                let found = foreign::recognize(dir).or_else(|| foreign::without_config(dir));
                found.unwrap_or_else(|| Error::io("read", &file)(error))
            }
            _ => Error::io("read", &file)(error),
        })?;
        Self::parse(&text, &file)
    }

    /// Parses the text of a config.json; `file` is for messages.
    ///
    /// Absent keys take the defaults of transformers for the family. Both the older form of rotary
    /// settings (`rope_theta`, `rope_scaling`) and the newer one (`rope_parameters`) are read.
    ///
    /// # Errors
    /// [`Error::Json`], [`Error::InvalidConfig`] for sizes that cannot be, and
    /// [`Error::UnsupportedConfig`] for a model with parts that the engine does not have.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_str(text).map_err(Error::json(file))?;
        let language = Language::of(&raw, file)?;
        let Language { wrapper, family, fields, sizes } = &language;
        family.check(fields)?;
        let size = |key, default: fn(&Sizes) -> usize, max| {
            fields.size(key, sizes.as_ref().map(default), max)
        };
        let hidden_size = size("hidden_size", |sizes| sizes.hidden, MAX_WIDTH)?;
        let heads = size("num_attention_heads", |sizes| sizes.heads, MAX_WIDTH)?;
        let kv_heads = kv_heads(fields, family, heads)?;
        let head_dim = head_dim(fields, family, hidden_size, heads)?;
        let layers = size("num_hidden_layers", |sizes| sizes.blocks, MAX_BLOCKS)?;
        // It is read again where it is needed; what is no token shows now.
        fields.token("bos_token_id")?;
        let context = fields.size("max_position_embeddings", Some(family.context), MAX_CONTEXT)?;
        let factor = |factor: Factor| factor.read(fields, hidden_size, head_dim);
        let (rope, local_rope) = Reader { fields, family, context, head_dim }.read()?;
        let (eps_key, eps) = family.norm_eps;
        let tie_word_embeddings = language.tied(&Fields::new(&raw, file))?;
        let intermediate_size = size("intermediate_size", |sizes| sizes.intermediate, MAX_WIDTH)?;
        let experts = family.experts.map(|rules| rules.read(fields, intermediate_size, layers));
        Ok(Self {
            family: family.name,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            vocab_size: size("vocab_size", |sizes| sizes.vocabulary, MAX_VOCAB)?,
            norm: family.norm,
            norm_eps: fields.positive(eps_key)?.unwrap_or(eps) as f32,
            rope,
            local_rope,
            max_position_embeddings: context,
            activation: family.activation(fields)?,
            factors: Factors {
                embedding: factor(family.embedding)?,
                attention: factor(family.attention)?,
                residual: factor(family.residual)?,
                logits: factor(family.logits)?,
            },
            attention_softcap: Family::cap(fields, family.attention_cap)?,
            logit_softcap: Family::cap(fields, family.logit_cap)?,
            tie_word_embeddings,
            experts: experts.transpose()?,
            biases: family.biases(fields)?,
            head_norms: family.head_norms(fields)?,
            rules: family,
            wrapper: *wrapper,
            names: wrapper.map_or(StoredNames::PLAIN, |wrapper| wrapper.names[0]),
            carried: wrapper.is_none().then(Vec::new),
            blocks: block_attention::read(fields, family, layers)?,
            raw,
        })
    }

    /// The same model with a head of its own.
    #[must_use]
    pub fn untied(mut self) -> Self {
        // Of a wrapper's two places readers look at either.
        if self.tie_word_embeddings || self.wrapper.is_some() {
            self.tie_word_embeddings = false;
            self.raw.insert(TIED.to_owned(), Value::Bool(false));
        }
        if let (Some(_), Some(Value::Object(text))) = (self.wrapper, self.raw.get_mut(TEXT_CONFIG))
        {
            text.insert(TIED.to_owned(), Value::Bool(false));
        }
        self
    }

    /// The file's own keys, in its order.
    #[must_use]
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// How a block attends.
    ///
    /// # Panics
    /// For a block that the model does not have.
    #[must_use]
    pub fn block_attention(&self, block: usize) -> BlockAttention {
        self.blocks[block]
    }

    /// Tokens that a token attends to at most in the blocks of [`Self::sliding_blocks`]; `None` where
    /// all attend to all before it.
    #[must_use]
    pub fn sliding_window(&self) -> Option<usize> {
        self.blocks.iter().find_map(|block| block.window)
    }

    /// The blocks whose attention slides.
    #[must_use]
    pub fn sliding_blocks(&self) -> Vec<usize> {
        let blocks = self.blocks.iter().enumerate();
        blocks.filter(|(_, block)| block.window.is_some()).map(|(index, _)| index).collect()
    }

    /// Attention and the MLP of a block read the same normed states.
    #[must_use]
    pub fn is_parallel(&self) -> bool {
        self.rules.parallel
    }

    /// Rotated pairs of features lie beside each other, and not half the rotated features apart.
    #[must_use]
    pub fn is_interleaved(&self) -> bool {
        self.rules.interleaved
    }

    /// The factor of embeddings is rounded to the type of the embedding.
    #[must_use]
    pub fn embedding_factor_is_rounded(&self) -> bool {
        matches!(self.rules.embedding, Factor::RootOfWidth)
    }

    /// Tokens that rotary positions reach: the context, times the factor of a scaling whose config
    /// states the context before it (`linear` and `dynamic`, and `yarn` in some files).
    #[must_use]
    pub fn positions(&self) -> usize {
        let context = self.max_position_embeddings;
        match &self.rope.scaling {
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => {
                (context as f64 * factor) as usize
            }
            RopeScaling::Yarn(yarn) => {
                context.max((yarn.original_context as f64 * yarn.factor) as usize)
            }
            RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::LongRope(_) => context,
        }
    }

    /// Every tensor of the dense model with its shape: embedding, blocks, final norm and head.
    #[must_use]
    pub fn dense_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, vocab) = (self.hidden_size, self.vocab_size);
        let mut tensors = vec![(EMBEDDING.to_owned(), vec![vocab, hidden])];
        for block in 0..self.num_hidden_layers {
            let prefix = Self::block_prefix(block);
            for norm in self.block_norms(block) {
                tensors.push((format!("{prefix}.{}.weight", norm.name), norm.shape));
            }
            for dense in self.block_dense(block) {
                tensors.push((format!("{prefix}.{}", dense.name), dense.shape));
            }
            for linear in self.block_linears(block) {
                let (name, rows) = (format!("{prefix}.{}", linear.name), linear.out_features);
                tensors.push((format!("{name}.weight"), vec![rows, linear.in_features]));
                if linear.bias {
                    tensors.push((format!("{name}.bias"), vec![rows]));
                }
            }
        }
        tensors.push((FINAL_NORM.to_owned(), vec![hidden]));
        tensors.push((HEAD.to_owned(), vec![vocab, hidden]));
        tensors
    }
}

/// Key and value heads, which divide the query heads.
fn kv_heads(fields: &Fields<'_>, family: &Family, heads: usize) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    let absent = !fields.raw.contains_key(KEY);
    let default = family.kv_heads.filter(|_| absent).unwrap_or(heads);
    let kv_heads = fields.size(KEY, Some(default), MAX_WIDTH)?;
    if heads.is_multiple_of(kv_heads) {
        return Ok(kv_heads);
    }
    let reason = format!("is {kv_heads}, which does not divide {heads} attention heads");
    Err(fields.invalid(KEY, reason))
}

fn head_dim(
    fields: &Fields<'_>,
    family: &Family,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    const KEY: &str = "head_dim";
    let default = family.head_dim.unwrap_or(hidden_size / heads);
    let derived = fields.get(KEY).is_none() && family.head_dim.is_none();
    if derived && !hidden_size.is_multiple_of(heads) {
        let reason = format!("is {hidden_size}, which {heads} attention heads do not divide");
        return Err(fields.invalid("hidden_size", reason));
    }
    let head_dim = fields.size(KEY, Some(default), MAX_WIDTH)?;
    // Rotary embeddings turn pairs of features.
    if !head_dim.is_multiple_of(2) || (heads * head_dim) as u64 > MAX_WIDTH {
        let reason = format!("is {head_dim}, expected an even number that heads can have");
        return Err(fields.invalid(KEY, reason));
    }
    Ok(head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelConfig> {
        ModelConfig::parse(text, Path::new("config.json"))
    }

    fn minimal(extra: &str) -> String {
        format!(
            r#"{{"model_type":"llama","hidden_size":64,"intermediate_size":128,
            "num_hidden_layers":2,"num_attention_heads":4,"vocab_size":96{extra}}}"#
        )
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let c = parse(&minimal("")).unwrap();
        assert_eq!((c.num_key_value_heads, c.head_dim), (4, 16));
        assert_eq!((c.rope.theta, c.rope.dims, c.norm_eps), (10_000.0, 16, 1e-6));
        assert_eq!((&c.rope.scaling, c.sliding_window()), (&RopeScaling::None, None));
        assert_eq!(c.block_norms(0).len(), 2);
        assert_eq!((c.max_position_embeddings, c.tie_word_embeddings), (2048, false));
    }

    #[test]
    fn both_forms_of_rope_are_read() {
        let rope = |extra: &str| parse(&minimal(extra)).unwrap().rope;
        let of = |theta, scaling| Rope { theta, dims: 16, scaling };
        let plain = of(500_000.0, RopeScaling::None);
        for extra in [
            r#","rope_theta":500000.0,"rope_scaling":null"#,
            r#","rope_parameters":{"rope_theta":500000.0,"rope_type":"default"}"#,
            r#","rope_parameters":{"rope_theta":500000.0}"#,
            r#","rope_theta":500000.0,"rope_parameters":{}"#,
        ] {
            assert_eq!(rope(extra), plain, "{extra}");
        }
        let linear = of(10_000.0, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(rope(r#","rope_scaling":{"type":"linear","factor":2}"#), linear);
        let both = r#","rope_scaling":{"rope_type":"linear","factor":2.0},"rope_parameters":{}"#;
        assert_eq!(rope(both), linear);
        let dynamic = r#","rope_theta":7.0,"rope_scaling":{"type":"dynamic","factor":4.0}"#;
        let scaling = RopeScaling::Dynamic { factor: 4.0, context: 2048 };
        assert_eq!(rope(dynamic), of(7.0, scaling));
        // As in Llama 3.1's file, whose original context may lie beside the settings, or be left out.
        let llama3 = r#"{"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"rope_type":"llama3"ORIGINAL}"#;
        for (inner, outer, original_context) in [
            (r#","original_max_position_embeddings":512"#, "", 512),
            (
                r#","original_max_position_embeddings":512"#,
                r#","original_max_position_embeddings":64"#,
                64,
            ),
            ("", "", 2048),
        ] {
            let settings = llama3.replace("ORIGINAL", inner);
            let (factor, low_freq_factor, high_freq_factor) = (8.0, 1.0, 4.0);
            let expected =
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context };
            assert_eq!(rope(&format!(r#","rope_scaling":{settings}{outer}"#)).scaling, expected);
            assert_eq!(rope(&format!(r#","rope_parameters":{settings}{outer}"#)).scaling, expected);
        }
    }

    #[test]
    fn families_differ_by_their_defaults_and_parts() {
        let family = |name: &str, extra: &str| {
            let text = minimal(extra).replace("\"llama\"", &format!("\"{name}\""));
            parse(&text.replace("\"num_attention_heads\":4", "\"num_attention_heads\":32")).unwrap()
        };
        let biased = |c: &ModelConfig| {
            c.block_linears(0).iter().map(|l| u8::from(l.bias)).collect::<Vec<_>>()
        };
        let llama = family("llama", r#","attention_bias":true"#);
        assert_eq!(biased(&llama), [1, 1, 1, 1, 0, 0, 0]);
        assert_eq!(biased(&family("llama", r#","mlp_bias":true"#)), [0, 0, 0, 0, 1, 1, 1]);
        let mistral = family("mistral", "");
        assert_eq!((mistral.num_key_value_heads, mistral.max_position_embeddings), (8, 131_072));
        assert_eq!((mistral.sliding_window(), mistral.sliding_blocks()), (Some(4096), vec![0, 1]));
        assert_eq!(family("mistral", r#","sliding_window":null"#).sliding_window(), None);
        // transformers' model of these reads no such key.
        for name in ["llama", "granite", "gemma", "olmo2", "glm", "cohere", "seed_oss"] {
            assert_eq!(family(name, r#","sliding_window":8"#).sliding_window(), None, "{name}");
        }
        for name in ["phi3", "mixtral"] {
            let of = |extra: &str| family(name, extra).sliding_window();
            assert_eq!((of(""), of(r#","sliding_window":8"#)), (None, Some(8)), "{name}");
        }
        assert_eq!(family("mistral", r#","num_key_value_heads":null"#).num_key_value_heads, 32);
        assert_eq!(biased(&mistral), vec![0; 7]);
        let qwen2 = family("qwen2", "");
        assert_eq!((biased(&qwen2), qwen2.block_norms(0).len()), (vec![1, 1, 1, 0, 0, 0, 0], 2));
        assert_eq!((qwen2.head_dim, qwen2.sliding_window()), (2, None));
        assert_eq!(qwen2.max_position_embeddings, 32_768);
        let qwen3 = family("qwen3", "");
        assert_eq!((biased(&qwen3), qwen3.head_dim), (vec![0; 7], 128));
        let norms: Vec<&str> = qwen3.block_norms(1).iter().map(|n| n.name).collect();
        assert_eq!(norms[2..], ["self_attn.q_norm", "self_attn.k_norm"]);
        // Qwen's attention slides from a block on, if at all.
        for (extra, sliding) in [
            (r#","use_sliding_window":true"#, None),
            (r#","use_sliding_window":true,"max_window_layers":1"#, Some(4096)),
            (r#","use_sliding_window":true,"max_window_layers":1,"sliding_window":64"#, Some(64)),
            (r#","use_sliding_window":false,"max_window_layers":1"#, None),
            (
                r#","use_sliding_window":true,"sliding_window":64,
                "layer_types":["full_attention","sliding_attention"]"#,
                Some(64),
            ),
            (r#","layer_types":["full_attention","full_attention"]"#, None),
        ] {
            assert_eq!(family("qwen2", extra).sliding_window(), sliding, "{extra}");
        }
        // Windows beyond the context are what linear and dynamic scaling are for.
        let positions = |extra: &str| family("llama", extra).positions();
        assert_eq!(positions(r#","rope_scaling":{"type":"linear","factor":4.0}"#), 8192);
        assert_eq!(positions(r#","rope_scaling":{"type":"dynamic","factor":1.5}"#), 3072);
        assert_eq!(positions(""), 2048);
    }

    #[test]
    fn linears_follow_grouped_heads() {
        let c = parse(&minimal(r#","num_key_value_heads":2,"head_dim":32"#)).unwrap();
        let linears: Vec<_> =
            c.block_linears(1).iter().map(|l| (l.in_features, l.out_features)).collect();
        let expected = [(64, 128), (64, 64), (64, 64), (128, 64), (64, 128), (64, 128), (128, 64)];
        assert_eq!(linears, expected);
        assert_eq!(ModelConfig::block_prefix(7), "model.layers.7");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (extra, named) in [
            (r#","hidden_act":"gelu""#, "hidden_act"),
            (r#","attention_bias":1"#, "attention_bias"),
            (r#","mlp_bias":"yes""#, "mlp_bias"),
            (r#","rope_scaling":{"factor":2.0}"#, "rope_scaling"),
            (r#","rope_scaling":"linear""#, "rope_scaling"),
            (r#","rope_scaling":{"type":"linear"}"#, "rope_scaling.factor"),
            (r#","rope_scaling":{"type":"linear","factor":0.5}"#, "rope_scaling.factor"),
            (
                r#","rope_scaling":{"type":"ntk","factor":4.0}"#,
                "`rope_scaling.rope_type` is `\"ntk\"`",
            ),
            (r#","rope_parameters":{"rope_type":"longrope"}"#, "rope_parameters.short_factor"),
            (
                r#","rope_parameters":{"rope_type":"longrope","short_factor":[1.0,2.0]}"#,
                "list of 8 positive numbers",
            ),
            (r#","rope_parameters":{"rope_type":3}"#, "rope_parameters.rope_type"),
            (r#","rope_parameters":{"full_attention":{"rope_type":"default"}}"#, "rope_parameters"),
            (r#","rope_parameters":{"rope_type":"llama3","factor":8.0}"#, "low_freq_factor"),
            (
                r#","rope_parameters":{"rope_type":"llama3","factor":8.0,"low_freq_factor":4.0,
                "high_freq_factor":4.0}"#,
                "high_freq_factor",
            ),
            (r#","rope_theta":0"#, "rope_theta"),
            (r#","rope_parameters":{"partial_rotary_factor":0.25}"#, "partial_rotary_factor"),
            (r#","num_local_experts":8"#, "num_local_experts"),
            (
                r#","use_qk_norm":true"#,
                "`use_qk_norm` is `true`, which is not supported; only `false`",
            ),
            (r#","layer_types":["chunked_attention"]"#, "chunked_attention"),
            (r#","layer_types":"all""#, "layer_types"),
            (r#","partial_rotary_factor":0.5"#, "partial_rotary_factor"),
            (r#","num_key_value_heads":3"#, "num_key_value_heads"),
            (r#","num_key_value_heads":0"#, "num_key_value_heads"),
            (r#","head_dim":7"#, "head_dim"),
            (r#","head_dim":1048576"#, "head_dim"),
            (r#","rms_norm_eps":"x""#, "rms_norm_eps"),
            (r#","bos_token_id":-1"#, "bos_token_id"),
            (r#","is_causal":false"#, "`is_causal` is `false`"),
        ] {
            let message = parse(&minimal(extra)).unwrap_err().to_string();
            assert!(message.contains(named), "{extra}: {message}");
        }
        for (from, to) in [
            ("\"llama\"", "\"mamba\""),
            ("\"llama\"", "\"gemma3n_text\""),
            ("\"llama\"", "\"phi\""),
            ("\"llama\"", "\"qwen3_next\""),
            ("\"llama\"", "7"),
            ("\"hidden_size\":64", "\"hidden_size\":18446744073709551615"),
            ("\"hidden_size\":64", "\"hidden_size\":66"),
            ("\"vocab_size\":96", "\"vocab_size\":0"),
            ("\"vocab_size\":96", "\"other\":1"),
        ] {
            assert!(parse(&minimal("").replace(from, to)).is_err(), "{to}");
        }
        assert!(matches!(parse("[]"), Err(Error::Json { .. })));
        for (family, extra, named) in [
            (
                "gemma3_text",
                r#","rope_parameters":{"rope_theta":7.0}"#,
                "for each of `full_attention`",
            ),
            ("gemma3_text", r#","rope_parameters":{"sliding_attention":7}"#, "rope_parameters"),
            ("gemma3_text", r#","attn_logit_softcapping":50.0"#, "attn_logit_softcapping"),
            ("gemma2", r#","attn_logit_softcapping":-1"#, "attn_logit_softcapping"),
            ("gemma2", r#","query_pre_attn_scalar":1e300"#, "query_pre_attn_scalar"),
            ("gemma2", r#","use_bidirectional_attention":true"#, "use_bidirectional_attention"),
            ("gemma2", r#","hidden_activation":"gelu""#, "only `gelu_pytorch_tanh` is"),
            ("phi3", r#","partial_rotary_factor":1.5"#, "partial_rotary_factor"),
            ("phi3", r#","partial_rotary_factor":0.2"#, "rotates 3 of 16 features"),
            ("phi3", r#","rope_scaling":{"type":"yarn","factor":4.0}"#, "short_factor"),
            ("smollm3", r#","no_rope_layers":[1]"#, "0 or 1 for each of 2 blocks"),
            ("smollm3", r#","no_rope_layers":[1,2]"#, "no_rope_layers"),
            ("smollm3", r#","no_rope_layer_interval":0"#, "no_rope_layer_interval"),
            ("granite", r#","residual_multiplier":0"#, "residual_multiplier"),
            ("cohere", r#","use_qk_norm":"yes""#, "use_qk_norm"),
            ("cohere2", r#","use_qk_norm":true"#, "use_qk_norm"),
        ] {
            let text = minimal(extra).replace("\"llama\"", &format!("\"{family}\""));
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.contains(named), "{family}, {extra}: {message}");
        }
    }
}
