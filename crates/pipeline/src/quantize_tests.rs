//! Calibration walks what the file will hold.

use std::fs;
use std::path::Path;

use gptq_checkpoint::{Checkpoint, Layout};
use gptq_compute::{Device, Ranks, Tensor};
use gptq_model::{LinearId, SourcePrecision, Stage};
use gptq_quant::{QuantSpec, Recipe, Rotate};
use gptq_records::dataset_identity::DatasetIdentity;
use gptq_text::calibration::{Calibration, CalibrationOverrides, CalibrationRecipe};
use gptq_text::tokens::TextTokenizer;
use ndarray::s;
use serde_json::{Map, json};

use super::*;
use crate::rotate::family_models;
use crate::states::{States, forward};

#[path = "quantize_experts_tests.rs"]
mod experts;

struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _: &str, _: usize) {}
    fn begin_steps(&self, _: &str, _: usize) {}
    fn step(&self) {}
    fn block(&self, _: &BlockReport) {}
    fn block_of(&self, _: &str, _: &BlockReport, _: usize) {}
    fn end(&self) {}
    fn note(&self, _: &str) {}
    fn warn(&self, message: &str) {
        panic!("{message}");
    }
}

fn values(states: &mut States) -> Vec<Vec<f32>> {
    (0..states.seq_lens.len())
        .map(|chunk| {
            let hidden = states.hidden.take(chunk).unwrap().to_host().unwrap();
            hidden.iter().copied().collect()
        })
        .collect()
}

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// A job on the best device.
fn job<'a>(
    source: &'a Checkpoint,
    calibration: &'a Calibration,
    spec: QuantSpec,
    out: &Path,
) -> QuantizeJob<'a> {
    job_on(Device::best().unwrap(), source, calibration, spec, out)
}

pub(crate) fn job_on<'a>(
    device: Device,
    source: &'a Checkpoint,
    calibration: &'a Calibration,
    mut spec: QuantSpec,
    out: &Path,
) -> QuantizeJob<'a> {
    crate::recipe_fit::fit(source.config(), false, &mut spec);
    QuantizeJob {
        source,
        model: "model".to_owned(),
        branch: "branch".to_owned(),
        source_dtype: SourceDtype::Fp16,
        device,
        ranks: Ranks::alone(),
        spec,
        calibration: Some(calibration),
        layout: Layout::Modern,
        out: out.to_owned(),
        max_shard_bytes: None,
        strict: true,
        shared: None,
        beside: None,
    }
}

/// What calibration saw is what the file holds: to the last bit, because both walk the same
/// operations over the same values.
#[track_caller]
fn assert_walked_alike(job: &QuantizeJob<'_>) {
    let windows = &job.calibration.unwrap().windows;
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let progress: &dyn Progress = if job.strict { &Quiet } else { &Silent };
    let Made { sealed, streams, .. } = make(job, progress).unwrap().unwrap();
    let file = Checkpoint::open(&sealed.publish().unwrap().dir).unwrap();
    let seq_len = windows.iter().map(|window| window.len()).max().unwrap();
    let model = Model::new(&file, job.device.clone(), SourcePrecision::Stored, seq_len).unwrap();
    let mut reloaded = embed(&model, &windows, 0.0).unwrap();
    for index in 0..model.config().num_hidden_layers {
        forward(&model, &model.load_block(index).unwrap(), &mut reloaded).unwrap();
    }
    assert_eq!(values(&mut streams.unwrap().quantized), values(&mut reloaded));
}

/// The demo's calibration.
fn of_the_demo(source: &Checkpoint, windows: usize) -> Calibration {
    let demo = fixtures().join("../../calib/demo.toml");
    let overrides = CalibrationOverrides {
        windows: Some(windows),
        seq_len: Some(96),
        ..CalibrationOverrides::default()
    };
    let recipe = CalibrationRecipe::open(&demo.to_string_lossy()).unwrap().with(overrides).unwrap();
    let tokenizer = TextTokenizer::open(source.dir(), source.config().vocab_size).unwrap();
    recipe.sample(&tokenizer, None).unwrap()
}

#[test]
fn the_file_gives_the_states_that_calibration_propagated() {
    let source = Checkpoint::open(&fixtures().join("demo-llama")).unwrap();
    let calibration = of_the_demo(&source, 6);
    let folder = tempfile::tempdir().unwrap();
    for (bits, group, act_order) in [(3, Some(128), true), (4, None, false)] {
        let spec = QuantSpec::new(bits, group, act_order, 0.03, Recipe::Best);
        let out = folder.path().join(bits.to_string());
        assert_walked_alike(&job(&source, &calibration, spec, &out));
    }
    let mut spec = QuantSpec::new(3, Some(64), true, 0.03, Recipe::Best);
    spec.set(&["values=attended".to_owned()]).unwrap();
    assert_walked_alike(&job(&source, &calibration, spec, &folder.path().join("attended")));
}

/// Σ over heads and tokens of |A X (Ŵ − W)ᵀ|² in the first block, in f64 from queries and keys on: what an
/// error of v does to the contexts.
fn error_of_contexts(source: &Checkpoint, file: &Checkpoint, windows: &[Vec<u32>]) -> f64 {
    let seq_len = windows[0].len();
    let open =
        |checkpoint| Model::new(checkpoint, Device::Cpu, SourcePrecision::Stored, seq_len).unwrap();
    let (dense, quantized) = (open(source), open(file));
    let (block, other) = (dense.load_block(0).unwrap(), quantized.load_block(0).unwrap());
    let wide = |weight: &Tensor| weight.to_host().unwrap().mapv(f64::from);
    let v = LinearId::V;
    let error = wide(&other.linear(v).weight) - wide(&block.linear(v).weight);
    let (rule, device, ropes) = (block.rule(), &Device::Cpu, dense.ropes(seq_len));
    let width = rule.head_dim;
    let mut sum = 0.0;
    for ids in windows {
        let hidden = dense.embed(ids).unwrap();
        let input = block.stage_input(device, Stage::Qkv, &hidden, ropes, seq_len).unwrap();
        let [q, k] = block.queries_keys(device, &input, ropes, seq_len).unwrap();
        let (x, q, k) = (wide(&input), wide(&q), wide(&k));
        for head in 0..rule.heads {
            let kv = head / (rule.heads / rule.kv_heads);
            let off = x.dot(&error.slice(s![kv * width..(kv + 1) * width, ..]).t());
            for t in 0..seq_len {
                let query = q.slice(s![t, head * width..(head + 1) * width]);
                let score = |u: usize| {
                    query.dot(&k.slice(s![u, kv * width..(kv + 1) * width])) / (width as f64).sqrt()
                };
                let weights: Vec<f64> = (0..=t).map(|u| score(u).exp()).collect();
                let whole: f64 = weights.iter().sum();
                let context = (0..=t).map(|u| &off.row(u) * (weights[u] / whole));
                let context = context.reduce(|a, b| a + b).unwrap();
                sum += context.dot(&context);
            }
        }
    }
    sum
}

#[test]
fn a_hessian_of_attended_inputs_leaves_less_error_in_contexts() {
    let source = Checkpoint::open(&fixtures().join("demo-llama")).unwrap();
    let calibration = of_the_demo(&source, 24);
    let folder = tempfile::tempdir().unwrap();
    let made = |name: &str, settings: &[String]| {
        let mut spec = QuantSpec::new(3, Some(64), true, 0.03, Recipe::AutoGptq);
        spec.set(settings).unwrap();
        let job = job_on(Device::Cpu, &source, &calibration, spec, &folder.path().join(name));
        let Made { sealed, .. } = make(&job, &Quiet).unwrap().unwrap();
        Checkpoint::open(&sealed.publish().unwrap().dir).unwrap()
    };
    let plain = made("plain", &[]);
    let attended = made("attended", &["values=attended".to_owned()]);
    // Everything else of the first block reads what it has read before v was solved.
    let of = |file: &Checkpoint, name: &str| file.tensor(name).unwrap().bytes.to_vec();
    for (linear, alike) in [("q", true), ("k", true), ("v", false)] {
        let codes = format!("model.layers.0.self_attn.{linear}_proj.qweight");
        assert_eq!(of(&plain, &codes) == of(&attended, &codes), alike, "{linear}");
        let groups = format!("model.layers.0.self_attn.{linear}_proj.g_idx");
        assert_eq!(of(&plain, &groups), of(&attended, &groups), "{linear}");
    }
    let error = |file| error_of_contexts(&source, file, &calibration.windows);
    let (before, now) = (error(&plain), error(&attended));
    assert!(now < 0.95 * before, "{now} of {before}");
}

/// A family of tests/fixtures/families as a folder of F32 tensors, none of whose values fp16 holds.
fn widened(dir: &Path, name: &str) -> Checkpoint {
    changed(dir, name, |_, values| values.iter_mut().for_each(|v| *v *= 1.0 + 1.0 / 8192.0))
}

/// A family of tests/fixtures/families as a folder of F32 tensors, each of which was given to `change`.
fn changed(dir: &Path, name: &str, change: impl Fn(&str, &mut [f32])) -> Checkpoint {
    family_models::assemble(dir, name);
    let path = dir.join("model.safetensors");
    let narrow = Checkpoint::open(dir).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::new());
    for name in narrow.names() {
        let tensor = narrow.tensor(name).unwrap();
        let start = data.len();
        let mut values = tensor.to_f32();
        change(name, &mut values);
        data.extend(values.into_iter().flat_map(f32::to_le_bytes));
        let offsets = [start, data.len()];
        let entry = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets});
        header.insert(name.to_owned(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], &header, &data].concat()).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// Windows of 48 tokens of 64.
fn calibration(windows: usize) -> Calibration {
    of_lengths(&vec![48; windows])
}

/// A calibration on windows of these lengths.
fn of_lengths(lengths: &[u32]) -> Calibration {
    let window =
        |start: u32, length| (0..length).map(|i| (start + i * 7 + i * i * start) % 64).collect();
    let starts = (0..).step_by(5);
    let windows = starts.zip(lengths).map(|(start, &length)| window(start, length));
    Calibration { seq_len: 48, ..of_windows(windows.collect()) }
}

/// A calibration on these windows.
pub(crate) fn of_windows(windows: Vec<Vec<u32>>) -> Calibration {
    Calibration {
        seq_len: windows.iter().map(Vec::len).max().unwrap(),
        windows,
        places: Vec::new(),
        held_out: Vec::new(),
        sha256: String::new(),
        seed: 0,
        dataset: DatasetIdentity::new("text".to_owned(), None, &[]),
        sources: Vec::new(),
    }
}

/// Rows are windows of their own, each as long as it is: nothing stands in for what a batch would pad,
/// and each has the angles of its length where scaling goes by that.
#[test]
fn windows_of_unequal_length_are_walked_as_they_are() {
    for name in ["llama2", "dynamic", "llama-longrope"] {
        let folder = tempfile::tempdir().unwrap();
        let source = widened(folder.path(), name);
        let from = source.config().rope.changes_from().unwrap_or(24);
        let (long, short) = (from as u32 + 16, from as u32 - 5);
        let calibration = of_lengths(&[long, short, short, 1, long, 7, long - 1, 2, short]);
        let spec = QuantSpec::new(4, Some(32), true, 0.1, Recipe::Best);
        let job = job(&source, &calibration, spec, &folder.path().join("out"));
        assert_eq!(job.seq_len(), long as usize);
        assert_eq!(job.workload().tokens as u32, 3 * long - 1 + 3 * short + 10);
        assert_walked_alike(&QuantizeJob { source_dtype: SourceDtype::Fp32, ..job });
    }
}

/// Embeddings, gains and biases are fp16 in the file, whatever the source has.
#[test]
fn a_wider_source_is_walked_as_the_file_holds_it() {
    let calibration = calibration(8);
    for name in ["qwen2", "qwen3", "llama-biases", "qwen2-moe", "glm4-moe"] {
        let folder = tempfile::tempdir().unwrap();
        let source = widened(folder.path(), name);
        for rotate in [Rotate::None, Rotate::Heads, Rotate::Full] {
            let mut spec = QuantSpec::new(4, Some(32), true, 0.1, Recipe::Best);
            spec.choices.rotate = rotate;
            let out = folder.path().join(format!("{rotate:?}"));
            let job = job(&source, &calibration, spec, &out);
            let strict = !recipe_fit::has_experts(source.config());
            assert_walked_alike(&QuantizeJob { source_dtype: SourceDtype::Fp32, strict, ..job });
        }
    }
}
