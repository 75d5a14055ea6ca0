//! config.json of a Llama model: its shape, checked before anything is allocated from it.
//!
//! Only what the engine computes with becomes a field. The rest is kept as it was read, in order,
//! because a quantised checkpoint carries the source's config on.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Larger than any Llama's, and small enough that no size computed from a config overflows `u64`.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_BLOCKS: u64 = 1 << 12;
const MAX_CONTEXT: u64 = 1 << 40;

/// The shape of a Llama model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
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
    /// Added to the mean square in norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest window that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Token that starts a text, where the model has one.
    pub bos_token_id: Option<u32>,
    raw: Map<String, Value>,
}

/// A linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Name inside the block, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// As [`ModelConfig::parse`], and [`Error::Io`] for a file that cannot be read.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("config.json");
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        Self::parse(&text, &file)
    }

    /// Parses the text of a config.json; `file` is for messages.
    ///
    /// Absent keys take the defaults of transformers. Both the older form of rotary settings
    /// (`rope_theta`, `rope_scaling`) and the newer one (`rope_parameters`) are read.
    ///
    /// # Errors
    /// [`Error::Json`], [`Error::InvalidConfig`] for sizes that cannot be, and
    /// [`Error::UnsupportedConfig`] for a model with parts that the engine does not have.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_str(text).map_err(Error::json(file))?;
        let fields = Fields { raw: &raw, file };
        fields.check_architecture()?;
        let hidden_size = fields.size("hidden_size", None, MAX_WIDTH)?;
        let heads = fields.size("num_attention_heads", None, MAX_WIDTH)?;
        let kv_heads = fields.size("num_key_value_heads", Some(heads), MAX_WIDTH)?;
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("is {kv_heads}, which does not divide {heads} attention heads");
            return Err(fields.invalid("num_key_value_heads", reason));
        }
        let head_dim = fields.head_dim(hidden_size, heads)?;
        let layers = fields.size("num_hidden_layers", None, MAX_BLOCKS)?;
        let context = fields.size("max_position_embeddings", Some(2048), MAX_CONTEXT)?;
        Ok(Self {
            hidden_size,
            intermediate_size: fields.size("intermediate_size", None, MAX_WIDTH)?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", None, MAX_VOCAB)?,
            rms_norm_eps: fields.positive(&raw, "rms_norm_eps", 1e-6)? as f32,
            rope_theta: fields.rope_theta()?,
            max_position_embeddings: context,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            bos_token_id: fields.bos_token_id()?,
            raw,
        })
    }

    /// The same model with a head of its own, equal to the embedding so far.
    #[must_use]
    pub fn untied(mut self) -> Self {
        if self.tie_word_embeddings {
            self.tie_word_embeddings = false;
            self.raw.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        }
        self
    }

    /// The file's own keys, in its order.
    #[must_use]
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The seven linears of a block: q, k, v, o, gate, up, down.
    #[must_use]
    pub fn block_linears(&self) -> [LinearShape; 7] {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        [
            ("self_attn.q_proj", hidden, queries),
            ("self_attn.k_proj", hidden, keys),
            ("self_attn.v_proj", hidden, keys),
            ("self_attn.o_proj", queries, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ]
        .map(|(name, in_features, out_features)| LinearShape {
            name,
            in_features,
            out_features,
        })
    }

    /// Every linear of the model with its full name, block by block.
    pub fn linears(&self) -> impl Iterator<Item = (String, LinearShape)> {
        let shapes = self.block_linears();
        (0..self.num_hidden_layers).flat_map(move |block| {
            let prefix = Self::block_prefix(block);
            shapes.map(|shape| (format!("{prefix}.{}", shape.name), shape))
        })
    }

    /// Prefix of a block's tensors, `model.layers.{block}`.
    #[must_use]
    pub fn block_prefix(block: usize) -> String {
        format!("model.layers.{block}")
    }
}

/// Typed access to the keys, with errors that name them.
struct Fields<'a> {
    raw: &'a Map<String, Value>,
    file: &'a Path,
}

impl Fields<'_> {
    fn invalid(&self, key: &str, reason: String) -> Error {
        Error::InvalidConfig { path: self.file.to_owned(), key: key.to_owned(), reason }
    }

    fn unsupported(&self, key: &str, value: &Value, supported: &'static str) -> Error {
        let (path, key) = (self.file.to_owned(), key.to_owned());
        Error::UnsupportedConfig { path, key, value: value.to_string(), supported }
    }

    /// A key that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, default: Option<usize>, max: u64) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.invalid(key, "is missing".to_owned()));
        };
        match value.as_u64() {
            Some(size) if (1..=max).contains(&size) => Ok(size as usize),
            _ => Err(self.invalid(key, format!("is `{value}`, expected 1 to {max}"))),
        }
    }

    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        if self.get("head_dim").is_none() && !hidden_size.is_multiple_of(heads) {
            let reason = format!("is {hidden_size}, which {heads} attention heads do not divide");
            return Err(self.invalid("hidden_size", reason));
        }
        let head_dim = self.size("head_dim", Some(hidden_size / heads), MAX_WIDTH)?;
        // Rotary embeddings turn pairs of features.
        if !head_dim.is_multiple_of(2) || (heads * head_dim) as u64 > MAX_WIDTH {
            let reason = format!("is {head_dim}, expected an even number that heads can have");
            return Err(self.invalid("head_dim", reason));
        }
        Ok(head_dim)
    }

    fn positive(&self, map: &Map<String, Value>, key: &str, default: f64) -> Result<f64> {
        let Some(value) = map.get(key).filter(|value| !value.is_null()) else { return Ok(default) };
        let number = value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        number.ok_or_else(|| self.invalid(key, format!("is `{value}`, expected a positive number")))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value
            .as_bool()
            .ok_or_else(|| self.invalid(key, format!("is `{value}`, expected a boolean")))
    }

    fn bos_token_id(&self) -> Result<Option<u32>> {
        let Some(value) = self.get("bos_token_id") else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some)
            .ok_or_else(|| self.invalid("bos_token_id", format!("is `{value}`, expected an id")))
    }

    /// `rope_parameters.rope_theta` in files of transformers 5, else `rope_theta`.
    fn rope_theta(&self) -> Result<f64> {
        let older = self.positive(self.raw, "rope_theta", 10_000.0)?;
        match self.get("rope_parameters").and_then(Value::as_object) {
            Some(nested) => self.positive(nested, "rope_theta", older),
            None => Ok(older),
        }
    }

    /// Refuses what would need another forward pass than the engine's.
    fn check_architecture(&self) -> Result<()> {
        let Some(model_type) = self.get("model_type") else {
            return Err(self.invalid("model_type", "is missing".to_owned()));
        };
        if model_type != "llama" {
            return Err(self.unsupported("model_type", model_type, "`llama`"));
        }
        if let Some(act) = self.get("hidden_act").filter(|act| *act != "silu") {
            return Err(self.unsupported("hidden_act", act, "`silu`"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? {
                return Err(self.unsupported(key, &Value::Bool(true), "`false`"));
            }
        }
        self.check_rope()?;
        let method = self.get("quantization_config").map(|q| &q["quant_method"]);
        match method {
            Some(method) if !method.is_null() && method != "gptq" => {
                Err(self.unsupported("quantization_config.quant_method", method, "`gptq`"))
            }
            _ => Ok(()),
        }
    }

    fn check_rope(&self) -> Result<()> {
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(key) else { continue };
            let kind = ["rope_type", "type"].iter().find_map(|k| value.get(k));
            // Parameters without a type are plain; scaling without one is an error in transformers.
            let plain = kind.is_some_and(|kind| kind == "default")
                || kind.is_none() && key == "rope_parameters" && value.is_object();
            if !plain {
                return Err(self.unsupported(key, value, "the type `default`"));
            }
        }
        let nested = self.get("rope_parameters").and_then(|p| p.get("partial_rotary_factor"));
        match nested.or_else(|| self.get("partial_rotary_factor")) {
            Some(factor) if factor.as_f64() != Some(1.0) => {
                Err(self.unsupported("partial_rotary_factor", factor, "`1.0`"))
            }
            _ => Ok(()),
        }
    }
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
        assert_eq!((c.rope_theta, c.rms_norm_eps), (10_000.0, 1e-6));
        assert_eq!((c.max_position_embeddings, c.tie_word_embeddings), (2048, false));
        assert_eq!(c.bos_token_id, None);
    }

    #[test]
    fn both_forms_of_rope_are_read() {
        let old = parse(&minimal(r#","rope_theta":500000.0,"rope_scaling":null"#)).unwrap();
        let new = r#","rope_parameters":{"rope_theta":500000.0,"rope_type":"default"}"#;
        let new = parse(&minimal(new)).unwrap();
        assert_eq!((old.rope_theta, new.rope_theta), (500_000.0, 500_000.0));
    }

    #[test]
    fn linears_follow_grouped_heads() {
        let c = parse(&minimal(r#","num_key_value_heads":2,"head_dim":32"#)).unwrap();
        let linears = c.block_linears().map(|l| (l.in_features, l.out_features));
        let expected = [(64, 128), (64, 64), (64, 64), (128, 64), (64, 128), (64, 128), (128, 64)];
        assert_eq!(linears, expected);
        assert_eq!(ModelConfig::block_prefix(7), "model.layers.7");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (extra, named) in [
            (r#","hidden_act":"gelu""#, "hidden_act"),
            (r#","attention_bias":true"#, "attention_bias"),
            (r#","mlp_bias":true"#, "mlp_bias"),
            (r#","rope_scaling":{"type":"linear","factor":2.0}"#, "rope_scaling"),
            (r#","rope_scaling":{"factor":2.0}"#, "rope_scaling"),
            (r#","rope_parameters":{"rope_type":"llama3"}"#, "rope_parameters"),
            (r#","rope_theta":0"#, "rope_theta"),
            (r#","partial_rotary_factor":0.5"#, "partial_rotary_factor"),
            (r#","num_key_value_heads":3"#, "num_key_value_heads"),
            (r#","num_key_value_heads":0"#, "num_key_value_heads"),
            (r#","head_dim":7"#, "head_dim"),
            (r#","head_dim":1048576"#, "head_dim"),
            (r#","rms_norm_eps":"x""#, "rms_norm_eps"),
            (r#","bos_token_id":-1"#, "bos_token_id"),
            (r#","quantization_config":{"quant_method":"awq"}"#, "quant_method"),
        ] {
            let message = parse(&minimal(extra)).unwrap_err().to_string();
            assert!(message.contains(named), "{extra}: {message}");
        }
        for (from, to) in [
            ("\"llama\"", "\"mamba\""),
            ("\"hidden_size\":64", "\"hidden_size\":18446744073709551615"),
            ("\"hidden_size\":64", "\"hidden_size\":66"),
            ("\"vocab_size\":96", "\"vocab_size\":0"),
            ("\"vocab_size\":96", "\"other\":1"),
        ] {
            assert!(parse(&minimal("").replace(from, to)).is_err(), "{to}");
        }
        assert!(matches!(parse("[]"), Err(Error::Json { .. })));
    }
}
