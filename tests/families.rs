//! Every supported family against transformers, on small random models.
//!
//! The logits in tests/fixtures/families are those of transformers 5.24 in f32, made by
//! `tests/interop/families.py fixtures`; norm gains and biases are random too, so that none can be
//! left out unnoticed, and windows of attention are shorter than the texts. Models of the same weights
//! differ by their config.json alone.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

#[path = "util/family_models.rs"]
mod family_models;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{Checkpoint, DType, DenseId, LinearId, ModelConfig, NormId};
use gptq_compute::Device;
use gptq_model::{Model, SourcePrecision};
use gptq_pipeline::recipe_fit::unrotatable;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use util::weight_file::add_tensor;
use util::{TinyLlama, Workdir, words};

/// Tokens of the windows that transformers ran.
const SEQ_LEN: usize = 48;
const TOLERANCE: f32 = 1e-4;
/// Of a GPU, which computes in fp16.
const ON_A_GPU: f32 = 0.03;
/// Rotary settings differ by more than so much.
const DIFFERENT: f32 = 0.1;

/// Puts a model's folder together, with a tokenizer.
fn assemble(dir: &Workdir, name: &str) -> PathBuf {
    let folder = dir.path(name);
    family_models::assemble(&folder, name);
    fs::write(folder.join("tokenizer.json"), util::tokenizer().to_string()).unwrap();
    folder
}

/// What transformers computed for windows of `seq_len` tokens: ids, and logits row by row.
fn expected(name: &str, seq_len: usize) -> Option<(Vec<u32>, Vec<f32>)> {
    let bytes = fs::read(family_models::fixture(&format!("{name}.expected.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |tensor: &str| -> Option<Vec<u32>> {
        let bytes = file.tensor(&format!("{tensor}.{seq_len}")).ok()?.data().to_vec();
        Some(bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
    };
    Some((words("ids")?, words("logits")?.into_iter().map(f32::from_bits).collect()))
}

/// Logits of a window by this engine, row by row; the model is prepared for windows of `longest`.
fn logits(device: &Device, folder: &Path, ids: &[u32], longest: usize) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = Model::new(&checkpoint, device.clone(), SourcePrecision::Stored, longest).unwrap();
    let mut hidden = model.embed(ids).unwrap();
    for index in 0..model.config().num_hidden_layers {
        let block = model.load_block(index).unwrap();
        block.forward(device, &mut hidden, model.ropes(ids.len()), ids.len()).unwrap();
    }
    let head = model.load_head().unwrap();
    let normed = head.norm(device, &hidden).unwrap();
    let mut logits = device.linear(&normed, head.weight()).unwrap();
    if let Some(cap) = model.config().logit_softcap {
        logits = device.upload_f32(logits.to_host().unwrap()).unwrap();
        device.softcap(&mut logits, cap).unwrap();
    }
    logits.to_host().unwrap().into_iter().collect()
}

/// How far a model's logits are from transformers'.
struct Difference {
    family: &'static str,
    /// The largest of each token's logits.
    tokens: Vec<f32>,
    /// Whether tokens are routed to experts.
    routed: bool,
}

impl Difference {
    fn largest(&self) -> f32 {
        worst(&self.tokens, &vec![0.0; self.tokens.len()])
    }

    /// Of the token in the middle, by size.
    fn median(&self) -> f32 {
        let mut sorted = self.tokens.clone();
        sorted.sort_by(f32::total_cmp);
        sorted[sorted.len() / 2]
    }
}

/// Those of every family and window.
fn differences(device: &Device) -> Vec<Difference> {
    let dir = Workdir::new();
    let mut all = Vec::new();
    for name in family_models::names() {
        let folder = assemble(&dir, name);
        // Windows of 24 lie within the context of `dynamic` and `longrope`, longer ones beyond it.
        for seq_len in [24, SEQ_LEN] {
            let Some((ids, there)) = expected(name, seq_len) else { continue };
            for longest in [seq_len, SEQ_LEN] {
                let here = logits(device, &folder, &ids, longest);
                let row = there.len() / seq_len;
                let tokens = here.chunks(row).zip(there.chunks(row)).map(|(a, b)| worst(a, b));
                let routed = Checkpoint::open(&folder).unwrap().config().any_experts().is_some();
                assert_eq!(here.len(), there.len());
                let found = Difference { family: name, tokens: tokens.collect(), routed };
                let (most, middle) = (found.largest(), found.median());
                println!(
                    "{name:>17}, {seq_len} tokens: largest difference {most:.1e}, of the median token {middle:.1e}"
                );
                all.push(found);
            }
        }
    }
    all
}

/// The largest difference, or NaN where one is: a bound must not hold for logits of NaN, which a
/// fold with `max` would drop.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap()
}

#[test]
fn logits_of_nan_are_not_close() {
    assert!(worst(&[1.0, f32::NAN, 2.0], &[1.0; 3]).is_nan());
    assert_eq!(worst(&[1.0, 4.0, 2.0], &[1.0; 3]), 3.0);
}

#[test]
fn logits_are_those_of_transformers() {
    for found in differences(&Device::Cpu) {
        assert!(found.largest() < TOLERANCE, "{}: {}", found.family, found.largest());
    }
}

/// In fp16, so less close, but closer than any two of the rotary settings are to each other. A token to
/// which two experts are as good as each other may go through the other one, which changes its logits
/// by as much as it likes and those behind it a little; so a mixture is judged by its median token.
#[test]
fn logits_on_a_gpu_are_those_of_transformers() {
    let Some(device) = util::gpus::gpu() else { return };
    for found in differences(&device) {
        let error = if found.routed { found.median() } else { found.largest() };
        assert!(error < ON_A_GPU, "{}: {error}", found.family);
    }
}

/// Otherwise agreement would say nothing of them.
#[test]
fn rotary_settings_change_the_logits() {
    let stored = family_models::STORED.iter();
    let plain: Vec<&str> = stored.filter(|f| f.1 == "plain").map(|f| f.0).collect();
    for (i, a) in plain.iter().enumerate() {
        for b in &plain[..i] {
            let of = |name| expected(name, SEQ_LEN).unwrap().1;
            let difference = worst(&of(a), &of(b));
            let same = a.starts_with("llama3") && b.starts_with("llama3");
            assert_eq!(difference > DIFFERENT, !same, "{a} and {b}: {difference}");
        }
    }
}

/// Perplexity, and KL from the dense model.
fn measured(dir: &Workdir, model: &str, base: &str) -> (f64, f64) {
    let fixed = ["--device=cpu", "--dataset", "held.txt", "--seq-len=48", "--json"];
    let report = dir.gptq(&[&["ppl", model, "--base", base], &fixed[..]].concat()).json();
    (report["perplexity"].as_f64().unwrap(), report["base"]["kl"].as_f64().unwrap())
}

/// Quantized by the command to 8 bits, read back, and as near the dense model as only a right forward
/// is; what is not quantized is carried.
#[test]
fn quantized_families_stay_near_the_dense_model() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(1700));
    dir.write("held.txt", &words(2200).split_inclusive(' ').skip(1700).collect::<String>());
    for name in family_models::names() {
        let source = assemble(&dir, name);
        for (recipe, layout) in [("autogptq", "card"), ("best", "modern"), ("best", "card")] {
            let out = format!("{name}-{recipe}-{layout}");
            let fixed = "--device=cpu --calib-dataset text.txt --windows=32 --seq-len=48 --seed 0";
            let ours = format!("quantize {name} --out {out} --bits 8 --group-size 32 --json");
            let choices = format!("--recipe {recipe} --layout {layout}");
            let args = format!("{ours} {choices} {fixed}");
            dir.gptq(&args.split(' ').collect::<Vec<_>>()).ok();
            let (perplexity, kl) = measured(&dir, &out, name);
            println!("{out:>28}: perplexity {perplexity:.3}, KL {kl:.4}");
            // Of two experts that are next to equal for a token the smallest rounding takes the other: half
            // of the tokens of the models with experts move by less than 0.02 nats, a hundredth by more
            // than 0.2, with 8 bits of any recipe.
            let most = if has_experts(&source) { 1e-2 } else { 1e-3 };
            assert!(perplexity.is_finite() && kl < most, "{out}: {perplexity}, KL {kl}");
            carried(&source, &dir.path(&out), recipe == "best", layout == "card");
            if layout == "modern" {
                let verify = ["verify", out.as_str(), "--base", name, "--json"];
                dir.gptq(&verify).ok();
            }
        }
    }
}

fn has_experts(folder: &Path) -> bool {
    let config = ModelConfig::load(folder).unwrap();
    (0..config.num_hidden_layers).any(|block| config.experts(block).is_some())
}

/// Biases and norms lie in a made folder as they are in the source, but for those that a rotation turns
/// or folds; where the model has no bias, the card layout holds zeros and the other nothing.
fn carried(source: &Path, made: &Path, best: bool, card: bool) {
    let (source, made) = (Checkpoint::open(source).unwrap(), Checkpoint::open(made).unwrap());
    let config = source.config();
    let rotated = best && unrotatable(config).is_none();
    let values = |checkpoint: &Checkpoint, name: &str| checkpoint.tensor(name).unwrap().to_f32();
    for block in 0..config.num_hidden_layers {
        for linear in config.block_linears(block) {
            let name = format!("model.layers.{block}.{}.bias", linear.name);
            assert_eq!(made.contains(&name), linear.bias || card, "{name}");
            if !made.contains(&name) {
                continue;
            }
            assert_eq!(made.tensor(&name).unwrap().dtype, DType::F16, "{name}");
            let turns = match linear.id {
                LinearId::V => best,
                LinearId::O | LinearId::Down => rotated,
                _ => false,
            };
            if !linear.bias {
                assert!(values(&made, &name).iter().all(|&v| v == 0.0), "{name}");
            } else if turns {
                let norm = |c: &Checkpoint| values(c, &name).iter().map(|v| v * v).sum::<f32>();
                assert_ne!(values(&made, &name), values(&source, &name), "{name}");
                assert!((norm(&made) / norm(&source) - 1.0).abs() < 1e-3, "{name}");
            } else {
                assert_eq!(values(&made, &name), values(&source, &name), "{name}");
            }
        }
        for dense in config.block_dense(block) {
            let name = format!("model.layers.{block}.{}", dense.name);
            let found = made.tensor(&name).unwrap();
            let dtype = if dense.exact { DType::F32 } else { DType::F16 };
            assert_eq!((found.shape, found.dtype), (dense.shape.as_slice(), dtype), "{name}");
            let same = values(&made, &name) == values(&source, &name);
            assert_eq!(same, !rotated || dense.id == DenseId::Correction, "{name}");
        }
        for norm in config.block_norms(block) {
            let name = format!("model.layers.{block}.{}.weight", norm.name);
            let found = made.tensor(&name).unwrap();
            assert_eq!((found.shape, found.dtype), (norm.shape.as_slice(), DType::F16), "{name}");
            if rotated && matches!(norm.id, NormId::BeforeAttention | NormId::BeforeMlp) {
                let one = 1.0 - config.norm.offset();
                assert!(values(&made, &name).iter().all(|&v| v == one), "{name}");
            } else {
                assert_eq!(values(&made, &name), values(&source, &name), "{name}");
            }
        }
    }
}

/// Layers behind the blocks, of published files, and experts as transformers has them in memory.
#[test]
fn what_mixtures_hold_besides_is_said_or_refused() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(110));
    let ppl = |model: &str| {
        dir.gptq(&["ppl", model, "--device=cpu", "--dataset", "text.txt", "--seq-len=48"])
    };
    let with = |tensor: &str, values: usize, name: &str| {
        add_tensor(&assemble(&dir, name), tensor, &vec![0.0; values]);
    };
    // The config says one layer of these.
    with("model.layers.3.enorm.weight", 64, "glm4-moe");
    let run = ppl("glm4-moe");
    run.ok();
    let said =
        "1 tensor of layers that predict further tokens, such as `model.layers.3.enorm.weight`";
    assert!(run.stderr.contains(said), "{}", run.stderr);
    let inspected = dir.gptq(&["inspect", "glm4-moe", "--json"]).json();
    assert_eq!(inspected["left_out"], json!(["model.layers.3.enorm.weight"]));
    with("model.layers.4.enorm.weight", 64, "glm4-moe");
    assert!(ppl("glm4-moe").stderr.contains("of blocks beyond"));

    let fused = "model.layers.1.mlp.experts.gate_up_proj";
    with(fused, 64, "qwen3-moe");
    let run = ppl("qwen3-moe");
    run.refused(&[fused, "holds all experts of a block"]);
    assert!(!run.stderr.contains("left out"), "{}", run.stderr);
}

/// What holds for which family is what the code decides by.
#[test]
fn the_readme_has_the_table_of_families() {
    let readme = fs::read_to_string(util::repository().join("README.md")).unwrap();
    for table in
        [gptq_pipeline::families::table().unwrap(), gptq_pipeline::families::wrapper_table()]
    {
        assert!(readme.contains(&table), "README.md lacks this table:\n{table}");
    }
}

#[test]
fn losses_of_tokens_are_written_on_demand() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(110));
    assemble(&dir, "qwen2");
    let fixed = ["--device=cpu", "--dataset", "text.txt", "--seq-len", "48"];
    let ppl = |more: &[&str]| dir.gptq(&[&["ppl", "qwen2"], &fixed[..], more].concat());
    let report = ppl(&["--per-token", "losses.csv", "--base", "qwen2", "--json"]).json();
    let table = fs::read_to_string(dir.path("losses.csv")).unwrap();
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some("window,position,token,nll,base_nll"));
    let rows: Vec<Vec<f64>> =
        lines.map(|l| l.split(',').map(|v| v.parse().unwrap()).collect()).collect();
    assert_eq!(rows.len(), 2 * 47);
    assert_eq!(rows[0][..2], [0.0, 1.0]);
    assert_eq!(rows[47][..2], [1.0, 1.0]);
    let mean = rows.iter().map(|row| row[3]).sum::<f64>() / rows.len() as f64;
    assert!((mean - report["mean_nll"].as_f64().unwrap()).abs() < 1e-6);
    assert!(rows.iter().all(|row| row[3] == row[4]));
    let second: f64 = words(110).split(' ').nth(1).unwrap()[1..].parse().unwrap();
    assert_eq!(rows[0][2], second);
    ppl(&["--per-token", "no/such/losses.csv"]).refused(&["no/such/losses.csv"]);
}

#[test]
fn what_is_not_supported_is_named() {
    let dir = Workdir::new();
    dir.write("text.txt", &words(110));
    let ppl = |model: &str, seq_len: &str| {
        let fixed = ["--device=cpu", "--dataset", "text.txt", "--seq-len"];
        dir.gptq(&[&["ppl", model], &fixed[..], &[seq_len]].concat())
    };
    assemble(&dir, "dynamic");
    ppl("dynamic", "65").refused(&["65 tokens", "context of 64"]);

    let refused = |change: &dyn Fn(&mut TinyLlama), names: &[&str]| {
        let mut model = TinyLlama::new();
        change(&mut model);
        model.write(&dir.path("model"));
        ppl("model", "32").refused(names);
    };
    for model_type in ["gemma3n_text", "phi", "deepseek_v3", "llama4_text", "gpt_neox"] {
        let change = |m: &mut TinyLlama| m.config["model_type"] = json!(model_type);
        refused(
            &change,
            &["model_type", model_type, "one of `llama`, `mistral`, `qwen2`, `qwen3`"],
        );
    }
    let keys: [(&str, Value, &str); 6] = [
        ("rope_scaling", json!({"type": "mrope", "factor": 4.0}), "mrope"),
        ("rope_scaling", json!({"type": "longrope"}), "short_factor"),
        ("partial_rotary_factor", json!(0.5), "0.5"),
        ("hidden_act", json!("gelu"), "gelu"),
        ("num_local_experts", json!(8), "8"),
        ("layer_types", json!(["linear_attention", "full_attention"]), "linear_attention"),
    ];
    for (key, value, named) in keys {
        refused(&|m| m.config[key] = value.clone(), &[key, named]);
    }
    // Parts that the configuration does not speak of.
    let norm = "model.layers.1.self_attn.q_norm.weight";
    let copied = |m: &mut TinyLlama| m.tensor("model.layers.1.input_layernorm.weight").clone();
    let change = |m: &mut TinyLlama| {
        let gain = copied(m);
        m.tensors.insert(norm.to_owned(), gain);
    };
    refused(&change, &[norm, "`llama`"]);
    let bias = "model.layers.1.self_attn.q_proj.bias";
    let change = |m: &mut TinyLlama| {
        let values = copied(m);
        m.tensors.insert(bias.to_owned(), values);
    };
    refused(&change, &[bias, "no bias"]);
    // A bias that the configuration promises has to be there.
    let change = |m: &mut TinyLlama| m.config["attention_bias"] = json!(true);
    refused(&change, &["model.layers.0.self_attn.q_proj.bias"]);
}
