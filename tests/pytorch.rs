//! PyTorch's `.bin` folders as sources of the commands: the same bytes come out as from safetensors.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use util::runs::{CALIBRATION, workdir};
use util::torch_file::TorchFile;
use util::{Noise, TinyLlama, Weights, listing};

/// Values of [`TinyLlama::new`]: embeddings and head, norms, and the linears of two blocks.
const PARAMETERS: usize = 2 * 64 * 64 + 5 * 64 + 2 * (3 * 64 * 64 + 3 * 64 * 96);

/// Names and contents of a folder's files.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    listing(dir).into_iter().map(|name| (name.clone(), fs::read(dir.join(name)).unwrap())).collect()
}

#[test]
fn bin_sources_make_the_bytes_that_safetensors_make() {
    let dir = workdir(|_| {});
    let model = TinyLlama::new();
    // Reports name the folder, which is called the same.
    model.write(&dir.path("safe/tiny"));
    // What Llama's `.bin` files carry beside the weights.
    let mut with_frequencies = model.clone();
    for block in 0..2 {
        let name = format!("model.layers.{block}.self_attn.rotary_emb.inv_freq");
        let values = (0..8).map(|i| 10_000_f32.powf(-(i as f32) / 8.0)).collect();
        with_frequencies
            .tensors
            .insert(name, Weights { dtype: Dtype::F32, shape: vec![8], values });
    }
    with_frequencies.write_bin(&dir.path("bin/tiny"));
    with_frequencies.write_bin_sharded(&dir.path("shards/tiny"), 3);
    for options in [&["--recipe=autogptq"][..], &["--recipe=best"], &["--recipe=rtn"]] {
        let made = |model: &str| {
            let (out, model) = (format!("{model}-out"), format!("{model}/tiny"));
            dir.gptq(&[&["quantize", &model, "--out", &out], &CALIBRATION[..], options].concat())
                .ok();
            let made = contents(&dir.path(&out));
            fs::remove_dir_all(dir.path(&out)).unwrap();
            made
        };
        let expected = made("safe");
        assert!(expected.iter().any(|(name, _)| name == "model.safetensors"));
        for model in ["bin", "shards"] {
            assert!(made(model) == expected, "{model} {options:?}");
        }
    }
    let measured = |model: &str| {
        let model = format!("{model}/tiny");
        let args = ["ppl", &model, "--device=cpu", "--dataset=text.txt", "--seq-len=32", "--json"];
        dir.gptq(&args).json()["perplexity"].as_f64().unwrap()
    };
    assert_eq!(measured("safe"), measured("bin"));
    assert_eq!(measured("safe"), measured("shards"));
}

#[test]
fn checksums_are_of_tensors_and_not_of_files() {
    let dir = workdir(|_| {});
    let mut model = TinyLlama::new();
    model.write(&dir.path("safe"));
    model.write_sharded(&dir.path("shards"), 2);
    model.write_bin(&dir.path("bin"));
    model.tensor("model.norm.weight").values[0] += 1e-6;
    model.write(&dir.path("other"));
    let checksum = |model: &str| {
        let shown = dir.gptq(&["inspect", model, "--checksum", "--json"]).json();
        assert_eq!(shown["checksum"]["bytes"], 4 * PARAMETERS);
        assert!(dir.gptq(&["inspect", model]).ok().lines().all(|l| !l.starts_with("SHA-256")));
        shown["checksum"]["sha256"].as_str().unwrap().to_owned()
    };
    let expected = checksum("safe");
    // By Python's hashlib, from the same tensors (tests/fixtures/torch_oracle.py states the form).
    assert_eq!(expected, "d41fb648cadf7a960ed35bcfd796fd9badea9d7752da31337322c3cd05b52cc1");
    assert_eq!(checksum("shards"), expected);
    assert_eq!(checksum("bin"), expected);
    assert_ne!(checksum("other"), expected);
}

/// Blocks of 2.6 MB in f32, each in a shard of its own, all with the same weights.
fn deep_model(dir: &Path, blocks: usize) {
    const HIDDEN: usize = 256;
    const MLP: usize = 512;
    let mut model = TinyLlama::new();
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", MLP),
        ("num_key_value_heads", 4),
        ("num_hidden_layers", blocks),
    ] {
        model.config[key] = value.into();
    }
    let mut noise = Noise::new(3);
    let mut weights = |shape: [usize; 2]| -> Vec<u8> {
        (0..shape[0] * shape[1]).flat_map(|_| (0.1 * noise.next()).to_le_bytes()).collect()
    };
    let block: Vec<_> = [
        ("self_attn.q_proj", [HIDDEN, HIDDEN]),
        ("self_attn.k_proj", [HIDDEN, HIDDEN]),
        ("self_attn.v_proj", [HIDDEN, HIDDEN]),
        ("self_attn.o_proj", [HIDDEN, HIDDEN]),
        ("mlp.gate_proj", [MLP, HIDDEN]),
        ("mlp.up_proj", [MLP, HIDDEN]),
        ("mlp.down_proj", [HIDDEN, MLP]),
    ]
    .map(|(name, shape)| (name, shape, weights(shape)))
    .into();
    let ones = |n: usize| 1_f32.to_le_bytes().repeat(n);
    let table = weights([64, HIDDEN]);
    let mut places = serde_json::Map::new();
    let mut write = |file: &TorchFile, index: usize| {
        let shard = format!("pytorch_model-{index:05}-of-{:05}.bin", blocks + 1);
        places.extend(file.views.iter().map(|view| (view.name.clone(), shard.clone().into())));
        fs::write(dir.join(shard), file.bytes()).unwrap();
    };
    model.write_small_files(dir);
    for index in 0..blocks {
        let mut file = TorchFile::default();
        for (name, shape, bytes) in &block {
            let name = format!("model.layers.{index}.{name}.weight");
            file.tensor(&name, "FloatStorage", 4, shape, bytes.clone());
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{index}.{name}.weight");
            file.tensor(&name, "FloatStorage", 4, &[HIDDEN], ones(HIDDEN));
        }
        write(&file, index + 1);
    }
    let mut outside = TorchFile::default();
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        outside.tensor(name, "FloatStorage", 4, &[64, HIDDEN], table.clone());
    }
    outside.tensor("model.norm.weight", "FloatStorage", 4, &[HIDDEN], ones(HIDDEN));
    write(&outside, blocks + 1);
    let index = serde_json::json!({ "weight_map": places }).to_string();
    fs::write(dir.join("pytorch_model.bin.index.json"), index).unwrap();
}

/// Memory is that of two blocks, the states and one solve, however many blocks there are.
#[test]
fn memory_does_not_grow_with_the_number_of_blocks() {
    const FEW: usize = 3;
    const MANY: usize = 18;
    const BLOCK: u64 = 4 * (4 * 256 * 256 + 3 * 256 * 512);
    let dir = workdir(|_| {});
    deep_model(&dir.path("few"), FEW);
    deep_model(&dir.path("many"), MANY);
    for options in [&["--recipe=rtn"][..], &["--recipe=autogptq", "--source-dtype=fp32"]] {
        let peak = |model: &str| {
            let args = ["quantize", model, "--out", "out", "--group-size=128", "--json"];
            // One thread, so that allocators keep no more than one arena's worth of freed memory.
            let env = [("RAYON_NUM_THREADS", "1"), ("MALLOC_ARENA_MAX", "1")];
            let made = dir.gptq_env(&[&args, &CALIBRATION[..], options].concat(), &env).json();
            fs::remove_dir_all(dir.path("out")).unwrap();
            made["peak_memory_bytes"].as_u64().unwrap()
        };
        let (few, many) = (peak("few"), peak("many"));
        println!("{options:?}: {few} bytes for {FEW} blocks, {many} for {MANY} of {BLOCK}");
        // What is read ahead and written behind depends on chance: up to two blocks each. The source is 15
        // blocks larger.
        assert!(many < few + 4 * BLOCK, "{options:?}: {few}, {many}");
    }
}

#[test]
fn a_missing_bin_shard_and_a_hostile_pickle_are_named() {
    let dir = workdir(|_| {});
    let shards = TinyLlama::new().write_bin_sharded(&dir.path("model"), 3);
    let quantize =
        || dir.gptq(&[&["quantize", "model", "--out", "out"], &CALIBRATION[..]].concat());
    let bytes = fs::read(&shards[1]).unwrap();
    let global = b"ctorch._utils\n_rebuild_tensor_v2\n";
    let at = bytes.windows(global.len()).position(|w| w == global).unwrap();
    let mut hostile = bytes.clone();
    // As long as the name that it replaces.
    hostile[at..at + global.len()].copy_from_slice(b"cposix\nsystem___________________\n");
    fs::write(&shards[1], &hostile).unwrap();
    quantize().refused(&["pytorch_model-00002-of-00003.bin", "posix.system"]);
    fs::remove_file(&shards[1]).unwrap();
    quantize().refused(&["pytorch_model.bin.index.json", "pytorch_model-00002-of-00003.bin"]);
    dir.gptq(&["inspect", "model"]).refused(&["pytorch_model-00002-of-00003.bin"]);
    assert!(!dir.path("out").exists() && !dir.path("out.partial").exists());
}

#[test]
fn a_folder_without_weights_says_what_is_missing() {
    let dir = workdir(|_| {});
    TinyLlama::new().write(&dir.path("model"));
    fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    let names = ["`model`", "no weights", "model.safetensors", "pytorch_model.bin", "index.json"];
    dir.gptq(&["quantize", "model", "--out", "out"]).refused(&names);
    dir.gptq(&["inspect", "model"]).refused(&names);
    dir.gptq(&["ppl", "model", "--dataset", "text.txt"]).refused(&names);
    assert!(!dir.path("out").exists());
}
