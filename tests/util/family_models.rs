//! Small models of every family, as folders: config.json and weights, of tests/fixtures/families.
//!
//! The weights of some are stored. Those of the others follow from the names of their tensors, the same
//! way in tests/interop/families.py, which had transformers compute with them.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{HEAD, ModelConfig};

/// Models whose weights are stored, each with the name of these.
pub(crate) const STORED: [(&str, &str); 11] = [
    ("llama2", "plain"),
    ("llama3", "plain"),
    ("llama3-new", "plain"),
    ("linear", "plain"),
    ("dynamic", "plain"),
    ("mistral", "plain"),
    ("tinyllama", "plain"),
    ("smollm", "tied"),
    ("llama-biases", "biases"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
];

/// Models with other parts beside their language models, whose weights follow from names as those of the
/// next: WRAPPED of tests/interop/wrapped_models.py.
pub(crate) const WRAPPED: [&str; 14] = [
    "llava",
    "llava-mistral",
    "llava-next",
    "llava-onevision",
    "mistral3",
    "internvl",
    "internvl-qwen3",
    "gemma3-whole",
    "qwen2-vl",
    "qwen2-vl-nested",
    "qwen2.5-vl",
    "qwen3-vl",
    "idefics3",
    "smolvlm",
];

/// Models whose weights follow from names: SEEDED of tests/interop/family_configs.py.
pub(crate) const SEEDED: [&str; 46] = [
    "llama-yarn",
    "llama-yarn-mscale",
    "llama-yarn-factor",
    "llama-longrope",
    "mistral-sliding",
    "mistral-nemo",
    "qwen2-sliding",
    "qwen3-listed",
    "smollm3",
    "smollm3-sliding",
    "granite",
    "granite-yarn",
    "phi3",
    "phi3-partial",
    "phi3-short",
    "phi3-long",
    "gemma",
    "gemma-gelu",
    "gemma2",
    "gemma2-listed",
    "gemma3",
    "gemma3-nested",
    "olmo2",
    "olmo2-yarn",
    "olmo3",
    "olmo3-nested",
    "glm",
    "glm-whole",
    "glm4",
    "glm4-yarn",
    "cohere",
    "cohere-plain",
    "cohere2",
    "cohere2-pattern",
    "seed-oss",
    "seed-oss-plain",
    "mixtral",
    "mixtral-sliding",
    "qwen2-moe",
    "qwen2-moe-normed",
    "qwen3-moe",
    "qwen3-moe-sliding",
    "olmoe",
    "olmoe-normed",
    "glm4-moe",
    "glm4-moe-plain",
];

/// A file of tests/fixtures/families.
pub(crate) fn fixture(name: &str) -> PathBuf {
    // The crates whose tests these are lie two folders below the repository.
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    repository.join("tests/fixtures/families").join(name)
}

/// Every model's name.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    STORED.into_iter().map(|(name, _)| name).chain(SEEDED).chain(WRAPPED)
}

/// Makes a model's folder.
pub(crate) fn assemble(folder: &Path, name: &str) {
    fs::create_dir_all(folder).unwrap();
    fs::copy(fixture(&format!("{name}.json")), folder.join("config.json")).unwrap();
    let weights = folder.join("model.safetensors");
    match STORED.iter().find(|(stored, _)| *stored == name) {
        Some((_, stored)) => {
            fs::copy(fixture(&format!("{stored}.safetensors")), weights).unwrap();
        }
        None => fs::write(weights, seeded(&ModelConfig::load(folder).unwrap())).unwrap(),
    }
}

/// Tensors of other parts: names, types, shapes and bytes, also of types that nothing is computed with.
pub(crate) const PARTS: [(&str, &str, &[usize], &[u8]); 3] = [
    (
        "vision_tower.embeddings.position_ids",
        "I64",
        &[1, 2],
        &[7, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0],
    ),
    ("vision_tower.layers.0.self_attn.q_proj.weight", "BF16", &[2, 3], b"0?1@2A3B4C5D"),
    ("vision_tower.rotary_pos_emb.inv_freq", "F32", &[2], b"wxy?z{|@"),
];

/// A weight file of f32 values that are exact in fp16; of the parts around a language model [`PARTS`].
fn seeded(config: &ModelConfig) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    let entry = |name: &str, dtype: &str, shape: &[usize], start: usize, end: usize| {
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        )
    };
    for (name, dtype, shape, bytes) in PARTS.into_iter().filter(|_| config.wrapper().is_some()) {
        let start = data.len();
        data.extend(bytes);
        entries.push(entry(name, dtype, shape, start, data.len()));
    }
    let tied = config.tie_word_embeddings;
    for (name, shape) in config.dense_tensors().into_iter().filter(|(n, _)| !(tied && n == HEAD)) {
        let start = data.len();
        let (scale, offset) = spread(&name, &shape, config);
        let mut state = fnv1a(&name);
        for _ in 0..shape.iter().product() {
            let noise = (split_mix(&mut state) >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let value = half::f16::from_f32(offset + scale * noise).to_f32();
            data.extend(value.to_le_bytes());
        }
        entries.push(entry(&config.stored_name(&name), "F32", &shape, start, data.len()));
    }
    let mut header = format!("{{{}}}", entries.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// What a tensor's noise is multiplied by, and what is added.
fn spread(name: &str, shape: &[usize], config: &ModelConfig) -> (f32, f32) {
    let root = |scale: f64| (scale / (shape[shape.len() - 1] as f64).sqrt()) as f32;
    if name.ends_with("norm.weight") {
        (0.5, 1.0 - config.norm.offset())
    } else if name.ends_with(".bias") {
        (0.8, 0.0)
    } else if name.starts_with("model.embed_tokens") {
        (root(1.7), 0.0)
    } else {
        (root(2.2), 0.0)
    }
}

fn fnv1a(name: &str) -> u64 {
    let step = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
