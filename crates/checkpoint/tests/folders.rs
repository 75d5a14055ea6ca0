//! Whole folders through the public API: written, opened again, damaged, refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

#[path = "../../../tests/util/needs.rs"]
mod needs;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{
    Bits, Checkpoint, CheckpointWriter, DType, Error, GptqLinear, Layout, LinearShape, ModelConfig,
    OutputError, QuantizeConfig, Sealed, plan_files, sum_of_pieces, weight_pieces,
};
use half::f16;
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const CONFIG: &str = r#"{"_name_or_path": "x", "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "rms_norm_eps": 1e-05, "tie_word_embeddings": TIED,
    "torch_dtype": "float32"}"#;

/// A dense source folder with F32 weights and a tokenizer.
fn source(tied: bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = CONFIG.replace("TIED", &tied.to_string());
    fs::write(dir.path().join("config.json"), &text).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.path().join("README.md"), "of the source").unwrap();
    let config = ModelConfig::parse(&text, Path::new("config.json")).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = dense_names(&config)
        .into_iter()
        .map(|(name, shape)| {
            let count: usize = shape.iter().product();
            let values = (0..count).map(|i| (i as f32 * 0.37).sin());
            (name, shape, values.flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    dir
}

fn dense_names(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut names = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !config.tie_word_embeddings {
        names.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    for block in 0..config.num_hidden_layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            names.push((format!("model.layers.{block}.{norm}.weight"), vec![hidden]));
        }
    }
    names
}

/// All linears of the model with arbitrary but reproducible contents.
fn linears(
    config: &ModelConfig,
    quantize: &QuantizeConfig,
) -> Vec<(String, LinearShape, GptqLinear)> {
    let mut all = Vec::new();
    for block in 0..config.num_hidden_layers {
        for shape in config.block_linears(0) {
            let seed = all.len();
            let name = format!("{}.{}", ModelConfig::block_prefix(block), shape.name);
            all.push((name, shape.clone(), linear(quantize, shape, seed)));
        }
    }
    all
}

fn linear(quantize: &QuantizeConfig, shape: LinearShape, seed: usize) -> GptqLinear {
    let (k, n) = (shape.in_features, shape.out_features);
    let (bits, groups) = (quantize.bits, quantize.groups(k));
    let max = usize::from(bits.max_code());
    let codes: Vec<u8> = (0..k * n).map(|i| ((i * 7 + seed) % (max + 1)) as u8).collect();
    let zeros: Vec<u8> = (0..groups * n).map(|i| (1 + (i + seed) % max) as u8).collect();
    let scales: Vec<f16> =
        (0..groups * n).map(|i| f16::from_f32(0.01 + (i % 13) as f32 * 0.003)).collect();
    let g_idx: Vec<u32> = (0..k).map(|i| ((i * 5 + seed) % groups) as u32).collect();
    GptqLinear::pack(bits, k, n, &codes, &zeros, &scales, &g_idx).unwrap()
}

fn create(
    out: &Path,
    source: &Checkpoint,
    quantize: &QuantizeConfig,
    layout: Layout,
    max: Option<u64>,
) -> Result<CheckpointWriter, Error> {
    CheckpointWriter::create(out, source, quantize, layout, &BTreeMap::new(), max)
}

/// Writes everything that the plan needs, linears last block first.
fn fill(writer: &mut CheckpointWriter, source: &Checkpoint, quantize: &QuantizeConfig) {
    for (name, _, linear) in linears(source.config(), quantize).iter().rev() {
        writer.write_linear(name, linear).unwrap();
    }
    for name in writer.missing() {
        writer.copy_dense(&name, &source.tensor(&name).unwrap()).unwrap();
    }
    assert!(writer.missing().is_empty());
}

fn written(dir: &TempDir, source: &Checkpoint, quantize: &QuantizeConfig) -> PathBuf {
    let out = dir.path().join("out");
    let mut writer = create(&out, source, quantize, Layout::Card, None).unwrap();
    fill(&mut writer, source, quantize);
    writer.seal().and_then(Sealed::publish).unwrap().dir
}

fn four_bits() -> QuantizeConfig {
    QuantizeConfig::new(Bits::Four, Some(32), 0.01, true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_written_is_planned_and_read_back(
        bits in 0..4_usize,
        group_size in prop::sample::select(vec![None, Some(32), Some(64), Some(128)]),
        layout in prop::sample::select(vec![Layout::Card, Layout::Modern]),
        tied: bool,
        max in prop::sample::select(vec![None, Some(1), Some(20_000), Some(1 << 40)]),
    ) {
        let folder = source(tied);
        let source = Checkpoint::open(folder.path()).unwrap();
        let quantize = QuantizeConfig::new(Bits::ALL[bits], group_size, 0.01, true);
        let plan = plan_files(source.config(), &quantize, layout, &BTreeMap::new(), max).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut writer = create(&dir.path().join("out"), &source, &quantize, layout, max).unwrap();
        fill(&mut writer, &source, &quantize);
        let done = writer.seal().and_then(Sealed::publish).unwrap();

        prop_assert_eq!(done.bytes, plan.total_bytes);
        for shard in &plan.shards {
            let path = done.dir.join(&shard.file_name);
            prop_assert_eq!(fs::metadata(&path).unwrap().len(), shard.size);
            // The reference implementation agrees that the file is well-formed.
            safetensors::SafeTensors::deserialize(&fs::read(&path).unwrap()).unwrap();
        }
        let read = Checkpoint::open(&done.dir).unwrap();
        prop_assert_eq!(read.total_bytes(), plan.total_bytes);
        prop_assert_eq!(read.quantize_config(), Some(&quantize));
        for (name, shape, linear) in linears(source.config(), &quantize) {
            prop_assert!(read.has_gptq_linear(&name));
            prop_assert_eq!(read.gptq_linear(&name, &shape).unwrap(), linear);
        }
        for (name, shape) in dense_names(source.config()) {
            let tensor = read.tensor_shaped(&name, &shape).unwrap();
            prop_assert_eq!(tensor.dtype, DType::F16);
            prop_assert_eq!(tensor.to_f16().unwrap(), source.tensor(&name).unwrap().to_f16().unwrap());
            read.release(&name);
            prop_assert_eq!(read.tensor(&name).unwrap().bytes.len(), tensor.bytes.len());
        }
        // A tied model's head is written, too, and is its embedding.
        prop_assert!(read.names().any(|name| name == "lm_head.weight"));
        prop_assert!(!read.config().tie_word_embeddings);
        let head = read.tensor("lm_head.weight").unwrap();
        prop_assert_eq!(
            head.to_f16().unwrap(),
            source.tensor("lm_head.weight").unwrap().to_f16().unwrap()
        );
        prop_assert_eq!(
            read.contains("model.layers.1.self_attn.rotary_emb.inv_freq"),
            layout == Layout::Card
        );
    }
}

#[test]
fn a_single_file_equals_the_reference_writer() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = written(&dir, &source, &four_bits());
    let ours = fs::read(out.join("model.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&ours).unwrap();
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    let theirs = safetensors::serialize(parsed.tensors(), metadata).unwrap();
    assert!(ours == theirs);
}

#[test]
fn the_folder_has_the_right_files_modes_and_config() {
    use std::os::unix::fs::PermissionsExt;
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = written(&dir, &source, &four_bits());
    let mut names: Vec<String> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "quantize_config.json", "tokenizer.json"]
    );
    // Whatever the umask is, weights get the mode of any other new file.
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let plain = dir.path().join("plain");
    fs::write(&plain, "").unwrap();
    assert!(names.iter().all(|name| mode(&out.join(name)) == mode(&plain)));
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.starts_with("{\n  \"_name_or_path\": \"x\",\n  \"model_type\""), "{config}");
    assert!(config.contains("\"rms_norm_eps\": 1e-05,"), "{config}");
    assert!(config.ends_with("\"quant_method\": \"gptq\"\n  }\n}"), "{config}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    // Published: the same name is refused from now on.
    let error = create(&out, &source, &four_bits(), Layout::Card, None).unwrap_err();
    assert!(matches!(error, Error::Output(OutputError::Exists { .. })), "{error}");
}

#[test]
fn frequencies_and_biases_of_the_card_layout_are_right() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let read = Checkpoint::open(&written(&dir, &source, &four_bits())).unwrap();
    let values = read.tensor("model.layers.1.self_attn.rotary_emb.inv_freq").unwrap().to_f32();
    let expected: Vec<f32> =
        (0..8).map(|i| 10_000_f64.powf(-2.0 * f64::from(i) / 16.0) as f32).collect();
    assert_eq!(values.len(), expected.len());
    for (value, expected) in values.iter().zip(expected) {
        assert!((value / expected - 1.0).abs() < 3e-7, "{value} {expected}");
    }
    let bias = read.tensor("model.layers.0.mlp.up_proj.bias").unwrap();
    assert!(bias.shape == [96] && bias.bytes.iter().all(|&b| b == 0));
}

#[test]
fn every_tensor_is_written_exactly_once_and_right() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let quantize = four_bits();
    let mut writer = create(&out, &source, &quantize, Layout::Modern, None).unwrap();
    let (name, _, linear) = linears(source.config(), &quantize).remove(1);

    let other = linears(source.config(), &QuantizeConfig::new(Bits::Three, Some(32), 0.01, true));
    let error = writer.write_linear(&name, &other[1].2).unwrap_err();
    assert!(
        matches!(&error, Error::Shape { tensor, .. } if tensor.ends_with(".qweight")),
        "{error}"
    );
    let error = writer.write_linear("model.layers.9.mlp.up_proj", &linear).unwrap_err();
    assert!(matches!(error, Error::Output(OutputError::UnplannedTensor { .. })), "{error}");
    let mut damaged = linear.clone();
    damaged.g_idx[0] = 99;
    assert!(matches!(writer.write_linear(&name, &damaged), Err(Error::GroupIndex { .. })));
    // Refusals wrote nothing, so the right one still fits; a second one does not.
    writer.write_linear(&name, &linear).unwrap();
    assert!(matches!(
        writer.write_linear(&name, &linear),
        Err(Error::Output(OutputError::WrittenTwice { .. }))
    ));

    let norm = source.tensor("model.norm.weight").unwrap();
    let error = writer.copy_dense("lm_head.weight", &norm).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert!(matches!(
        writer.write_f16("model.norm.weight", &[f16::ONE; 63]),
        Err(Error::Length { expected: 64, found: 63, .. })
    ));
    writer.write_f16("model.norm.weight", &[f16::ONE; 64]).unwrap();
    assert!(matches!(
        writer.copy_dense("model.norm.weight", &norm),
        Err(Error::Output(OutputError::WrittenTwice { .. }))
    ));

    let message = writer.seal().and_then(Sealed::publish).unwrap_err().to_string();
    assert!(message.contains("`lm_head.weight`") && message.contains("58 tensors"), "{message}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn written_linears_are_read_back_and_take_other_scales() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let quantize = four_bits();
    let out = dir.path().join("out");
    let mut writer = create(&out, &source, &quantize, Layout::Card, None).unwrap();
    let all = linears(source.config(), &quantize);
    let (name, shape, linear) = &all[1];
    let early = writer.read_linear(name).unwrap_err();
    assert!(matches!(early, Error::Output(OutputError::MissingTensors { .. })), "{early}");
    let none = writer.read_linear("model.layers.9.mlp.up_proj").unwrap_err();
    assert!(matches!(none, Error::Output(OutputError::UnplannedTensor { .. })), "{none}");
    let early = writer.replace_scales(name, &linear.scales).unwrap_err();
    assert!(matches!(early, Error::Output(OutputError::MissingTensors { .. })), "{early}");
    fill(&mut writer, &source, &quantize);
    assert_eq!(writer.read_linear(name).unwrap(), *linear);
    let mut scales: Vec<f16> = linear.scales.iter().map(|&s| s * f16::from_f32(1.5)).collect();
    let short = writer.replace_scales(name, &scales[1..]).unwrap_err();
    assert!(matches!(short, Error::Length { .. }), "{short}");
    scales[3] = f16::INFINITY;
    let infinite = writer.replace_scales(name, &scales).unwrap_err();
    assert!(matches!(infinite, Error::NonFinite { index: 3, .. }), "{infinite}");
    scales[3] = f16::NEG_ONE;
    writer.replace_scales(name, &scales).unwrap();
    let want = GptqLinear { scales, ..linear.clone() };
    assert_eq!(writer.read_linear(name).unwrap(), want);
    // The sum is that of the bytes that are there.
    let sealed = writer.seal().unwrap();
    let sealed_files = sealed.files.clone();
    let dir = sealed.publish().unwrap().dir;
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.gptq_linear(name, shape).unwrap(), want);
    for file in &sealed_files {
        let bytes = fs::read(dir.join(&file.file_name)).unwrap();
        let pieces = weight_pieces(&dir.join(&file.file_name)).unwrap().into_iter();
        let piece = |at: std::ops::Range<u64>| &bytes[at.start as usize..at.end as usize];
        let again = sum_of_pieces(pieces.map(|at| Sha256::digest(piece(at)).into()));
        assert_eq!(again, file.sum, "{}", file.file_name);
    }
}

#[test]
fn a_dropped_writer_leaves_nothing_and_may_cross_threads() {
    fn is_send<T: Send>(_: &T) {}
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let writer =
        create(&dir.path().join("out"), &source, &four_bits(), Layout::Card, None).unwrap();
    is_send(&writer);
    drop(source);
    std::thread::spawn(move || drop(writer)).join().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Damage done to a folder.
type Change = Box<dyn Fn(&Path)>;

/// Changes a written folder and says how opening it, or reading a linear of it, fails.
fn damage(change: impl Fn(&Path)) -> Error {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut writer = create(&out, &source, &four_bits(), Layout::Card, Some(20_000)).unwrap();
    fill(&mut writer, &source, &four_bits());
    writer.seal().and_then(Sealed::publish).unwrap();
    change(&out);
    let read = match Checkpoint::open(&out) {
        Ok(read) => read,
        Err(error) => return error,
    };
    let shape = read.config().block_linears(0)[0].clone();
    read.gptq_linear("model.layers.0.self_attn.q_proj", &shape).unwrap_err()
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

/// The first shard: it holds the embedding and the start of block 0.
fn first_shard(dir: &Path) -> PathBuf {
    let mut found = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    found.find(|p| p.to_string_lossy().contains("model-00001-of-")).unwrap()
}

/// Has an index name another shard for a tensor.
fn misplace(index: &Path, tensor: &str) {
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
    let map = json["weight_map"].as_object_mut().unwrap();
    let other = map.values().find(|shard| **shard != map[tensor]).unwrap().clone();
    map[tensor] = other;
    fs::write(index, json.to_string()).unwrap();
}

/// Bytes of a tensor in its shard, changed in place.
fn overwrite(dir: &Path, tensor: &str, bytes: &[u8]) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let mut file = fs::read(&path).unwrap();
        let start = safetensors::SafeTensors::deserialize(&file)
            .unwrap()
            .tensor(tensor)
            .map(|t| t.data().as_ptr() as usize - file.as_ptr() as usize);
        if let Ok(start) = start {
            file[start..start + bytes.len()].copy_from_slice(bytes);
            fs::write(&path, file).unwrap();
            return;
        }
    }
    panic!("no tensor `{tensor}`");
}

#[test]
fn damaged_folders_say_which_file_and_tensor() {
    let q = "model.layers.0.self_attn.q_proj";
    let index = |dir: &Path| dir.join("model.safetensors.index.json");
    let cases: Vec<(Change, &[&str])> = vec![
        (Box::new(|d| fs::remove_file(first_shard(d)).unwrap()), &["model-00001-of", "missing"]),
        (
            Box::new(|d| {
                let path = first_shard(d);
                let file = fs::read(&path).unwrap();
                fs::write(&path, &file[..file.len() - 1]).unwrap();
            }),
            &["model-00001-of", "truncated"],
        ),
        (Box::new(|d| fs::write(first_shard(d), "").unwrap()), &["model-00001-of", "truncated"]),
        (
            Box::new(move |d| misplace(&index(d), &format!("{q}.g_idx"))),
            &["model.safetensors.index.json", "q_proj.g_idx`", "which does not hold it"],
        ),
        (
            Box::new(move |d| edit(&index(d), "\"model-00001", "\"../model-00001")),
            &["index.json", "../model-00001", "file name"],
        ),
        (Box::new(move |d| fs::write(index(d), "{}").unwrap()), &["index.json", "weight_map"]),
        (
            Box::new(move |d| fs::remove_file(index(d)).unwrap()),
            &["safetensors files", "none is named"],
        ),
        (
            Box::new(move |d| overwrite(d, &format!("{q}.g_idx"), &[2, 0, 0, 0])),
            &["q_proj.g_idx", "column 0", "group 2"],
        ),
        (
            Box::new(move |d| overwrite(d, &format!("{q}.g_idx"), &[255; 4])),
            &["q_proj.g_idx", "column 0"],
        ),
        (
            Box::new(move |d| overwrite(d, &format!("{q}.scales"), &f16::NAN.to_le_bytes())),
            &["q_proj.scales", "index 0"],
        ),
        (
            Box::new(move |d| overwrite(d, &format!("{q}.bias"), &f16::ONE.to_le_bytes())),
            &["q_proj.bias", "no bias"],
        ),
        (
            Box::new(|d| edit(&d.join("quantize_config.json"), "\"bits\": 4", "\"bits\": 3")),
            &["quantize_config.json", "`bits` is `3`", "config.json is `4`"],
        ),
        (
            Box::new(|d| {
                for file in ["quantize_config.json", "config.json"] {
                    edit(&d.join(file), "\"bits\": 4", "\"bits\": 3");
                }
            }),
            &["q_proj.", "[8, 64]", "[6, 64]"],
        ),
        (
            Box::new(|d| {
                edit(&d.join("config.json"), "\"hidden_size\": 64", "\"hidden_size\": 128");
            }),
            &["q_proj.", "[2, 64]", "[4, 128]"],
        ),
        (Box::new(|d| fs::remove_file(d.join("config.json")).unwrap()), &["config.json"]),
    ];
    for (change, parts) in cases {
        let message = damage(change).to_string();
        for part in parts {
            assert!(message.contains(part), "`{message}` lacks `{part}`");
        }
    }
}

#[test]
fn weights_are_found_under_all_their_names() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = written(&dir, &source, &four_bits());
    let mut at = out.join("model.safetensors");
    for name in ["gptq_model-4bit-32g.safetensors", "anything.safetensors"] {
        fs::rename(&at, out.join(name)).unwrap();
        at = out.join(name);
        Checkpoint::open(&out).unwrap();
    }
    // Without quantize_config.json, config.json's copy serves.
    fs::remove_file(out.join("quantize_config.json")).unwrap();
    let read = Checkpoint::open(&out).unwrap();
    assert_eq!(read.quantize_config(), Some(&four_bits()));
    fs::remove_file(&at).unwrap();
    assert!(matches!(Checkpoint::open(&out), Err(Error::NoWeights { .. })));
}

#[test]
fn zeros_of_the_second_format_are_understood() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = written(&dir, &source, &four_bits());
    let (name, shape, linear) = linears(source.config(), &four_bits()).remove(0);
    edit(
        &out.join("quantize_config.json"),
        "\"bits\"",
        "\"checkpoint_format\": \"gptq_v2\", \"bits\"",
    );
    let zeros = Checkpoint::open(&out).unwrap().gptq_linear(&name, &shape).unwrap().unpack_zeros();
    let expected: Vec<u8> = linear.unpack_zeros().iter().map(|z| z - 1).collect();
    assert_eq!(zeros, expected);
}

#[test]
fn dense_checkpoints_have_no_quantized_linears() {
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let shape = source.config().block_linears(0)[0].clone();
    let name = "model.layers.0.self_attn.q_proj";
    assert!(!source.has_gptq_linear(name));
    assert!(matches!(source.gptq_linear(name, &shape), Err(Error::NotQuantized { .. })));
    assert!(matches!(source.tensor("x"), Err(Error::MissingTensor { .. })));
    let message = source.tensor_shaped("model.norm.weight", &[63]).unwrap_err().to_string();
    assert!(message.contains("[64]") && message.contains("[63]"), "{message}");
    source.release("x");
}

/// Needs a file system that fills up; only a privileged user can mount one.
#[test]
fn a_full_disk_is_an_error_that_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=96k", "tmpfs"])
        .arg(dir.path())
        .output();
    if !mounted.is_ok_and(|done| done.status.success()) {
        needs::Need::Mount.is_missing("not permitted to mount a small tmpfs");
        return;
    }
    let folder = source(false);
    let source = Checkpoint::open(folder.path()).unwrap();
    let error = fill_disk(dir.path(), &source);
    let left = fs::read_dir(dir.path()).unwrap().count();
    let ballast = fs::remove_file(dir.path().join("ballast"));
    std::process::Command::new("umount").arg(dir.path()).status().unwrap();
    ballast.unwrap();
    assert!(
        matches!(&error, Error::Io { path, .. } if path.ends_with("model.safetensors")),
        "{error}"
    );
    assert_eq!(left, 1, "only the ballast may stay");
}

/// The check passes because the files are sparse; then something else takes the disk.
fn fill_disk(dir: &Path, source: &Checkpoint) -> Error {
    let quantize = QuantizeConfig::new(Bits::Two, None, 0.01, true);
    let mut writer = create(&dir.join("out"), source, &quantize, Layout::Modern, None).unwrap();
    // Its end is the full disk, which is what it is for.
    fs::write(dir.join("ballast"), vec![1; 1 << 20]).unwrap_err();
    for (name, _, linear) in linears(source.config(), &quantize) {
        if let Err(error) = writer.write_linear(&name, &linear) {
            let again = writer.write_linear(&name, &linear).unwrap_err();
            assert!(matches!(again, Error::Output(OutputError::WriterFailed { .. })), "{again}");
            return error;
        }
    }
    panic!("the disk did not fill up");
}
