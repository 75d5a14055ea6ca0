//! Which tensors a quantized checkpoint holds, where they lie, and so how large its files are.
//!
//! Everything follows from the configuration alone, so a checkpoint can be planned to the byte, and
//! its headers written before the first weight is solved.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::gptq::check_sides;
use crate::json::python_float;
use crate::names::{
    EMBEDDING, FINAL_NORM, G_IDX, HEAD, QUANTIZE_CONFIG_FILE, QWEIGHT, QZEROS, SAFETENSORS_END,
    SCALES, is_file_name,
};
use crate::{
    CheckpointFormat, DType, DenseShape, Error, Layout, ModelConfig, OutputError, QuantizeConfig,
    Result, header,
};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name; of a tensor of the language model that in a model by itself.
    pub name: String,
    /// Type of its values.
    pub dtype: safetensors::Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the values.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }

    /// Whether it is stored as one of the types that values are computed with.
    #[must_use]
    pub fn is(&self, dtype: DType) -> bool {
        self.dtype == dtype.to_safetensors()
    }
}

/// A tensor with its place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// The tensor.
    pub spec: TensorSpec,
    /// Where its values begin, from the start of the file.
    pub offset: u64,
}

/// One weight file.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    /// `model.safetensors`, or `model-00001-of-00002.safetensors`.
    pub file_name: String,
    /// Length prefix and padded JSON.
    pub header: Vec<u8>,
    /// The tensors, in order of position.
    pub tensors: Vec<PlacedTensor>,
    /// Bytes of the file.
    pub size: u64,
}

/// The weight files of a checkpoint.
#[derive(Debug, Clone)]
pub struct FilePlan {
    /// The files.
    pub shards: Vec<ShardPlan>,
    /// Bytes of all files, headers included.
    pub total_bytes: u64,
}

/// Every tensor of a quantized checkpoint in the order of a single safetensors file: wider types
/// first (F32, I32, F16), then by name, byte for byte; with those of other parts, as far as they are known.
#[must_use]
pub fn tensor_specs(
    config: &ModelConfig,
    quantize: &QuantizeConfig,
    layout: Layout,
) -> Vec<TensorSpec> {
    let mut specs = model_order(config, quantize, layout);
    sort_for_file(config, &mut specs);
    specs
}

/// Plans the weight files: one, unless `max_shard_bytes` asks for more.
///
/// A shard's values take at most `max_shard_bytes`, except that a single larger tensor gets a shard
/// of its own; its header comes on top. Shards follow the model's order, so that a block lies in
/// one or two files. `extra_metadata` is what the `modern` layout carries beside its own keys; the
/// `card` layout carries none.
///
/// # Errors
/// [`Error::LinearSize`] naming a linear that the format cannot hold,
/// [`OutputError::ReservedMetadata`], and [`Error::InvalidConfig`] for settings that cannot be
/// written.
pub fn plan_files(
    config: &ModelConfig,
    quantize: &QuantizeConfig,
    layout: Layout,
    extra_metadata: &BTreeMap<String, String>,
    max_shard_bytes: Option<u64>,
) -> Result<FilePlan> {
    quantize.check_writable()?;
    for (name, linear) in config.linears() {
        check_sides(&name, linear.in_features, linear.out_features)?;
    }
    let metadata = metadata(quantize, layout, extra_metadata)?;
    let parts = split(model_order(config, quantize, layout), max_shard_bytes);
    let (stem, count) = (quantize.file_stem(), parts.len());
    let mut shards = Vec::with_capacity(count);
    for (index, specs) in parts.into_iter().enumerate() {
        let file_name = if count == 1 {
            format!("{stem}{SAFETENSORS_END}")
        } else {
            format!("{stem}-{:05}-of-{count:05}{SAFETENSORS_END}", index + 1)
        };
        shards.push(place(config, file_name, specs, &metadata));
    }
    let total_bytes = shards.iter().map(|s| s.size).sum();
    Ok(FilePlan { shards, total_bytes })
}

/// The tensors as the model uses them: embedding, blocks, final norm, head; other parts behind. A tied
/// model's head is written, too ([`Head`](crate::Head) says why).
fn model_order(config: &ModelConfig, quantize: &QuantizeConfig, layout: Layout) -> Vec<TensorSpec> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut specs = vec![f16(EMBEDDING.to_owned(), &[vocab, hidden])];
    for block in 0..config.num_hidden_layers {
        block_specs(config, quantize, layout, block, &mut specs);
    }
    specs.push(f16(FINAL_NORM.to_owned(), &[hidden]));
    specs.push(f16(HEAD.to_owned(), &[vocab, hidden]));
    specs.extend_from_slice(config.carried().unwrap_or_default());
    specs
}

fn block_specs(
    config: &ModelConfig,
    quantize: &QuantizeConfig,
    layout: Layout,
    block: usize,
    specs: &mut Vec<TensorSpec>,
) {
    let prefix = ModelConfig::block_prefix(block);
    for norm in config.block_norms(block) {
        specs.push(f16(format!("{prefix}.{}.weight", norm.name), &norm.shape));
    }
    for DenseShape { name, shape, exact, .. } in config.block_dense(block) {
        let dtype = if exact { DType::F32 } else { DType::F16 };
        specs.push(spec(format!("{prefix}.{name}"), dtype, &shape));
    }
    if layout == Layout::Card {
        let name = format!("{prefix}.self_attn.rotary_emb.inv_freq");
        specs.push(spec(name, DType::F32, &[config.rope.dims / 2]));
    }
    for linear in config.block_linears(block) {
        let name = format!("{prefix}.{}", linear.name);
        let (rows, cols) = (linear.in_features, linear.out_features);
        if !quantize.quantizes(&linear.name) {
            specs.push(f16(format!("{name}.weight"), &[cols, rows]));
            specs.extend(linear.bias.then(|| f16(format!("{name}.bias"), &[cols])));
            continue;
        }
        let (bits, groups) = (quantize.bits, quantize.groups(rows));
        specs.push(i32(format!("{name}.{QWEIGHT}"), &[bits.words(rows), cols]));
        specs.push(i32(format!("{name}.{QZEROS}"), &[groups, bits.words(cols)]));
        specs.push(f16(format!("{name}.{SCALES}"), &[groups, cols]));
        specs.push(i32(format!("{name}.{G_IDX}"), &[rows]));
        if linear.bias || layout == Layout::Card {
            specs.push(f16(format!("{name}.bias"), &[cols]));
        }
    }
}

fn f16(name: String, shape: &[usize]) -> TensorSpec {
    spec(name, DType::F16, shape)
}

fn i32(name: String, shape: &[usize]) -> TensorSpec {
    spec(name, DType::I32, shape)
}

fn spec(name: String, dtype: DType, shape: &[usize]) -> TensorSpec {
    TensorSpec { name, dtype: dtype.to_safetensors(), shape: shape.to_vec() }
}

/// The order of the safetensors library, so that our files equal those that it writes.
fn sort_for_file(config: &ModelConfig, specs: &mut [TensorSpec]) {
    specs.sort_by(|a, b| {
        let by_type = b.dtype.cmp(&a.dtype);
        by_type.then_with(|| config.stored_name(&a.name).cmp(&config.stored_name(&b.name)))
    });
}

/// Cuts the tensors, in order, into files whose values take at most `max` bytes.
fn split(specs: Vec<TensorSpec>, max: Option<u64>) -> Vec<Vec<TensorSpec>> {
    let Some(max) = max else { return vec![specs] };
    let mut parts: Vec<Vec<TensorSpec>> = Vec::new();
    let mut used = 0;
    for spec in specs {
        let bytes = spec.bytes();
        match parts.last_mut() {
            Some(part) if used + bytes <= max => {
                used += bytes;
                part.push(spec);
            }
            _ => {
                used = bytes;
                parts.push(vec![spec]);
            }
        }
    }
    parts
}

fn place(
    config: &ModelConfig,
    file_name: String,
    mut specs: Vec<TensorSpec>,
    metadata: &Map<String, Value>,
) -> ShardPlan {
    sort_for_file(config, &mut specs);
    let mut json = Map::new();
    json.insert("__metadata__".to_owned(), Value::Object(metadata.clone()));
    let mut end = 0;
    for spec in &specs {
        let begin = end;
        end += spec.bytes();
        let dtype = spec.dtype.to_string();
        let entry = json!({"dtype": dtype, "shape": spec.shape, "data_offsets": [begin, end]});
        json.insert(config.stored_name(&spec.name).into_owned(), entry);
    }
    let header = header::compose(Value::Object(json).to_string().into_bytes());
    let mut offset = header.len() as u64;
    let size = offset + end;
    let mut tensors = Vec::with_capacity(specs.len());
    for spec in specs {
        let next = offset + spec.bytes();
        tensors.push(PlacedTensor { spec, offset });
        offset = next;
    }
    ShardPlan { file_name, header, tensors, size }
}

/// Metadata of every file. transformers requires `format`; the other keys are AutoGPTQ's, without
/// its version, which did not make the file.
fn metadata(
    quantize: &QuantizeConfig,
    layout: Layout,
    extra: &BTreeMap<String, String>,
) -> Result<Map<String, Value>> {
    let mut map = Map::new();
    map.insert("format".to_owned(), json!("pt"));
    if layout == Layout::Card {
        return Ok(map);
    }
    let act = if quantize.desc_act { "True" } else { "False" };
    map.insert("gptq_bits".to_owned(), json!(quantize.bits.to_string()));
    map.insert("gptq_group_size".to_owned(), json!(quantize.stored_group_size().to_string()));
    map.insert("gptq_desc_act".to_owned(), json!(act));
    map.insert("gptq_damp_percent".to_owned(), json!(python_float(quantize.damp_percent)));
    for (key, value) in extra {
        if map.insert(key.clone(), json!(value)).is_some() {
            return Err(OutputError::ReservedMetadata { key: key.clone() }.into());
        }
    }
    Ok(map)
}

impl QuantizeConfig {
    /// Refuses settings that files of this program cannot carry.
    fn check_writable(&self) -> Result<()> {
        let invalid = |key: &str, reason: &str| Error::InvalidConfig {
            path: QUANTIZE_CONFIG_FILE.into(),
            key: key.to_owned(),
            reason: reason.to_owned(),
        };
        if self.checkpoint_format != CheckpointFormat::Gptq {
            return Err(invalid("checkpoint_format", "is `gptq_v2`, but only `gptq` is written"));
        }
        if self.modules_in_block.is_some() {
            return Err(invalid("modules_in_block_to_quantize", "is set, but all are quantized"));
        }
        if self.group_size == Some(0) {
            return Err(invalid("group_size", "is 0, expected -1 or positive"));
        }
        if !self.damp_percent.is_finite() {
            return Err(invalid("damp_percent", "is not a finite number"));
        }
        if !is_file_name(&self.file_stem()) {
            return Err(invalid("model_file_base_name", "is not a plain file name"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::Bits;

    const STABLE_BELUGA_2: &str = r#"{"architectures":["LlamaForCausalLM"],"bos_token_id":1,
        "eos_token_id":2,"hidden_act":"silu","hidden_size":8192,"intermediate_size":28672,
        "max_position_embeddings":4096,"model_type":"llama","num_attention_heads":64,
        "num_hidden_layers":80,"num_key_value_heads":8,"rms_norm_eps":1e-05,"rope_scaling":null,
        "tie_word_embeddings":false,"torch_dtype":"float32","vocab_size":32000}"#;

    fn config() -> ModelConfig {
        ModelConfig::parse(STABLE_BELUGA_2, Path::new("config.json")).unwrap()
    }

    fn plan(bits: u8, group_size: Option<usize>, max: Option<u64>) -> FilePlan {
        let quantize = QuantizeConfig::new(Bits::new(bits).unwrap(), group_size, 0.01, true);
        plan_files(&config(), &quantize, Layout::Card, &BTreeMap::new(), max).unwrap()
    }

    #[test]
    fn published_sizes_are_reproduced_to_the_byte() {
        for (bits, group_size, size) in [
            (4, Some(32), 40_663_178_576),
            (4, Some(64), 37_989_309_744),
            (4, Some(128), 36_652_374_384),
            (4, None, 35_332_232_296),
            (3, Some(64), 29_299_234_912),
            (3, Some(128), 28_029_146_264),
            (3, None, 26_775_011_200_u64),
        ] {
            let plan = plan(bits, group_size, None);
            assert_eq!(plan.total_bytes, size, "{bits} bits, {group_size:?}");
            assert_eq!(plan.shards[0].tensors.len(), 3043);
            assert_eq!(plan.shards[0].file_name, "model.safetensors");
        }
    }

    #[test]
    fn shards_keep_the_limit_and_every_tensor() {
        let mut whole: Vec<_> = plan(4, Some(128), None).shards.remove(0).tensors;
        let max = 5_000_000_000;
        let sharded = plan(4, Some(128), Some(max));
        assert_eq!(sharded.shards.len(), 8);
        assert_eq!(sharded.shards[7].file_name, "model-00008-of-00008.safetensors");
        for shard in &sharded.shards {
            assert!(shard.size - shard.header.len() as u64 <= max);
        }
        let mut found: Vec<_> = sharded.shards.into_iter().flat_map(|s| s.tensors).collect();
        whole.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        found.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        assert!(whole.iter().zip(&found).all(|(a, b)| a.spec == b.spec));
        assert_eq!(whole.len(), found.len());
        // Smaller than any tensor: one each.
        assert_eq!(plan(4, None, Some(1)).shards.len(), 3043);
    }

    #[test]
    fn order_and_presence_follow_the_layout() {
        let quantize = QuantizeConfig::new(Bits::Four, Some(128), 0.01, true);
        let specs = tensor_specs(&config(), &quantize, Layout::Card);
        assert_eq!(specs[0].name, "model.layers.0.self_attn.rotary_emb.inv_freq");
        assert_eq!(specs[2].name, "model.layers.10.self_attn.rotary_emb.inv_freq");
        assert!(specs[80].is(DType::I32) && specs[600].is(DType::I32));
        assert_eq!(specs[3042].name, "model.norm.weight");
        let modern = tensor_specs(&config(), &quantize, Layout::Modern);
        assert_eq!(specs.len() - modern.len(), 80 * 8);
        let tied = STABLE_BELUGA_2
            .replace("\"tie_word_embeddings\":false", "\"tie_word_embeddings\":true");
        let tied = ModelConfig::parse(&tied, Path::new("config.json")).unwrap();
        assert_eq!(tensor_specs(&tied, &quantize, Layout::Modern), modern);
    }

    #[test]
    fn biases_and_norms_of_heads_are_planned() {
        let quantize = QuantizeConfig::new(Bits::Four, Some(128), 0.01, true);
        let of = |family: &str, extra: &str, layout| {
            let text = STABLE_BELUGA_2
                .replace("\"llama\"", &format!("\"{family}\""))
                .replace("\"vocab_size\"", &format!("{extra}\"vocab_size\""));
            let config = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
            let specs = tensor_specs(&config, &quantize, layout);
            (specs.len(), specs.iter().map(TensorSpec::bytes).sum::<u64>())
        };
        let (tensors, bytes) = of("llama", "", Layout::Modern);
        // 80 blocks: q of 8192 outputs, k and v of 1024, heads of 128, in fp16.
        let biases = 80 * 2 * (8192 + 2 * 1024);
        assert_eq!(of("qwen2", "", Layout::Modern), (tensors + 80 * 3, bytes + biases));
        assert_eq!(of("qwen3", "", Layout::Modern), (tensors + 80 * 2, bytes + 80 * 2 * 256));
        let all = of("llama", r#""attention_bias":true,"mlp_bias":true,"#, Layout::Modern);
        assert_eq!(all, (tensors + 80 * 7, bytes + biases + 80 * 2 * (2 * 8192 + 2 * 28672)));
        // The card layout has a place for every bias already.
        assert_eq!(of("qwen2", "", Layout::Card), of("llama", "", Layout::Card));
    }

    #[test]
    fn metadata_is_truthful_and_its_keys_are_reserved() {
        let quantize = QuantizeConfig::new(Bits::Four, None, 0.01, true);
        let extra = BTreeMap::from([("recipe".to_owned(), "x".to_owned())]);
        let map = metadata(&quantize, Layout::Modern, &extra).unwrap();
        assert_eq!(
            Value::Object(map).to_string(),
            r#"{"format":"pt","gptq_bits":"4","gptq_group_size":"-1","gptq_desc_act":"True","gptq_damp_percent":"0.01","recipe":"x"}"#
        );
        let card = metadata(&quantize, Layout::Card, &extra).unwrap();
        assert_eq!(Value::Object(card).to_string(), r#"{"format":"pt"}"#);
        let taken = BTreeMap::from([("format".to_owned(), "x".to_owned())]);
        let error = metadata(&quantize, Layout::Modern, &taken).unwrap_err();
        assert!(matches!(error, Error::Output(OutputError::ReservedMetadata { .. })));
    }

    #[test]
    fn what_cannot_be_written_is_refused_by_name() {
        let quantize = QuantizeConfig::new(Bits::Four, None, 0.01, true);
        let odd = STABLE_BELUGA_2.replace("28672", "28680");
        let odd = ModelConfig::parse(&odd, Path::new("config.json")).unwrap();
        let plan = |config: &ModelConfig, quantize: &QuantizeConfig| {
            plan_files(config, quantize, Layout::Card, &BTreeMap::new(), None).unwrap_err()
        };
        let message = plan(&odd, &quantize).to_string();
        assert!(message.contains("model.layers.0.mlp.gate_proj"), "{message}");
        let v2 = QuantizeConfig { checkpoint_format: CheckpointFormat::GptqV2, ..quantize.clone() };
        assert!(plan(&config(), &v2).to_string().contains("checkpoint_format"));
        let out = QuantizeConfig { model_file_base_name: Some("../x".to_owned()), ..quantize };
        assert!(plan(&config(), &out).to_string().contains("model_file_base_name"));
        assert_eq!("card".parse(), Ok(Layout::Card));
        assert!("cards".parse::<Layout>().is_err());
    }
}
