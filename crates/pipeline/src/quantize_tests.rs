//! Calibration walks what the file will hold.

use std::fs;
use std::path::Path;

use gptq_checkpoint::{Checkpoint, Layout};
use gptq_compute::{Device, Ranks};
use gptq_model::SourcePrecision;
use gptq_quant::{QuantSpec, Recipe, Rotate};
use gptq_records::dataset_identity::DatasetIdentity;
use gptq_text::calibration::{Calibration, CalibrationOverrides, CalibrationRecipe};
use gptq_text::tokens::TextTokenizer;
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
    spec: QuantSpec,
    out: &Path,
) -> QuantizeJob<'a> {
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

#[test]
fn the_file_gives_the_states_that_calibration_propagated() {
    let source = Checkpoint::open(&fixtures().join("demo-llama")).unwrap();
    let demo = fixtures().join("../../calib/demo.toml");
    let overrides = CalibrationOverrides {
        windows: Some(6),
        seq_len: Some(96),
        ..CalibrationOverrides::default()
    };
    let recipe = CalibrationRecipe::open(&demo.to_string_lossy()).unwrap().with(overrides).unwrap();
    let tokenizer = TextTokenizer::open(source.dir(), source.config().vocab_size).unwrap();
    let calibration = recipe.sample(&tokenizer, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (bits, group, act_order) in [(3, Some(128), true), (4, None, false)] {
        let spec = QuantSpec::new(bits, group, act_order, 0.03, Recipe::Best);
        let out = folder.path().join(bits.to_string());
        assert_walked_alike(&job(&source, &calibration, spec, &out));
    }
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
