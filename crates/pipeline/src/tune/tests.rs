//! Tuned branches, made as the command makes them.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, Tensor};
use gptq_model::{Head, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe, split_mix};
use gptq_text::calibration::{Calibration, CalibrationOverrides, CalibrationRecipe};
use gptq_text::tokens::TextTokenizer;

use super::*;
use crate::progress::Silent;
use crate::quantize::quantize;
use crate::quantize::tests::{job_on, of_windows};
use crate::rotate::family_models;
use crate::states::{embed, forward};
use crate::verify::{Limits, VerifyJob, verify};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn job<'a>(
    source: &'a Checkpoint,
    calibration: &'a Calibration,
    spec: QuantSpec,
    out: &Path,
) -> QuantizeJob<'a> {
    job_on(Device::Cpu, source, calibration, spec, out)
}

/// Last states of a model, normed, and its head.
fn last_states(dir: &Path, windows: &[Vec<u32>]) -> (Vec<Tensor>, Head) {
    let file = Checkpoint::open(dir).unwrap();
    let precision = SourcePrecision::Half;
    let model = Model::new(&file, Device::Cpu, precision, windows[0].len()).unwrap();
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let mut states = embed(&model, &windows, 0.0).unwrap();
    for index in 0..file.config().num_hidden_layers {
        forward(&model, &model.load_block(index).unwrap(), &mut states).unwrap();
    }
    let head = model.load_head().unwrap();
    let chunks = 0..states.seq_lens.len();
    let normed =
        chunks.map(|chunk| head.norm(&Device::Cpu, &states.hidden.take(chunk).unwrap()).unwrap());
    (normed.collect(), head)
}

/// Mean KL(base ‖ file) over all tokens of the windows.
fn kl(base: &Path, file: &Path, windows: &[Vec<u32>]) -> f64 {
    let (base, file) = (last_states(base, windows), last_states(file, windows));
    let of_chunk = |(p, q)| {
        let (p, q) = ((p, base.1.weight()), (q, file.1.weight()));
        Device::Cpu.token_kl(p, q, None).unwrap()
    };
    let all: Vec<f32> = base.0.iter().zip(&file.0).flat_map(of_chunk).collect();
    all.iter().map(|&kl| f64::from(kl)).sum::<f64>() / all.len() as f64
}

#[test]
fn a_tuned_file_is_nearer_to_its_base_on_text_that_it_has_not_seen() {
    let base = repository().join("tests/fixtures/demo-llama");
    let source = Checkpoint::open(&base).unwrap();
    let demo = repository().join("calib/demo.toml");
    let recipe = |windows, seed| {
        let overrides = CalibrationOverrides {
            windows: Some(windows),
            seq_len: Some(128),
            seed: Some(seed),
            ..CalibrationOverrides::default()
        };
        let recipe = CalibrationRecipe::open(&demo.to_string_lossy()).unwrap();
        let tokenizer = TextTokenizer::open(source.dir(), source.config().vocab_size).unwrap();
        recipe.with(overrides).unwrap().sample(&tokenizer, None).unwrap()
    };
    let calibration = recipe(64, 0);
    let folder = tempfile::tempdir().unwrap();
    let mut spec = QuantSpec::new(3, Some(64), true, 0.03, Recipe::Tuned);
    spec.choices.tune = 14;
    let out = folder.path().join("tuned");
    let tuned = quantize(&job(&source, &calibration, spec, &out), &Silent).unwrap().unwrap();
    let record = tuned.tuned.unwrap().record;
    assert_eq!((record.steps, record.windows, record.held_out), (14, 64, 8));
    assert!(record.unseen, "{record:?}");
    assert!(record.kl_after < record.kl_before && record.best_step > 0, "{record:?}");

    // What was trained is what the file holds, and the start is `best`.
    let best = folder.path().join("best");
    let spec = QuantSpec::new(3, Some(64), true, 0.03, Recipe::Best);
    quantize(&job(&source, &calibration, spec, &best), &Silent).unwrap();
    for (dir, said) in [(&best, record.kl_before), (&out, record.kl_after)] {
        let measured = kl(&base, dir, &calibration.held_out);
        assert!((measured / said - 1.0).abs() < 0.02, "{}: {measured}, {said}", dir.display());
    }
    // The solver did not see what is held out.
    let files = [&out, &best].map(|dir| Checkpoint::open(dir).unwrap());
    for (name, shape) in source.config().linears() {
        let [tuned, best] = files.each_ref().map(|file| file.gptq_linear(&name, &shape).unwrap());
        assert!(tuned.qweight == best.qweight, "{name}");
    }

    // Of what was trained on most is learnt: there the solver has fitted all that it sees.
    let trained = &calibration.windows;
    let (before, after) = (kl(&base, &best, trained), kl(&base, &out, trained));
    assert!(after < 0.95 * before, "{before} to {after} on what was trained on");

    let text = repository().join("calib/demo/heldout.txt");
    let tokenizer = TextTokenizer::open(&base, source.config().vocab_size).unwrap();
    let unseen: String = fs::read_to_string(text).unwrap().chars().take(16_000).collect();
    let ids = tokenizer.encode(&unseen).unwrap();
    let windows: Vec<Vec<u32>> = ids.chunks_exact(128).take(24).map(<[u32]>::to_vec).collect();
    let (before, after) = (kl(&base, &best, &windows), kl(&base, &out, &windows));
    assert!(after < before, "{before} to {after}");

    let job = VerifyJob {
        dir: &out,
        base: Some(&source),
        text: None,
        device: Device::Cpu,
        limits: Limits::default(),
    };
    let report = verify(&job, &Silent).unwrap();
    assert!(report.passed, "{:?}", report.findings);
}

/// Fused and separate linears, biases, norms of heads, factors, norms behind sublayers; codes are those of `best`.
#[test]
fn the_same_windows_give_the_same_scales_and_no_other_codes() {
    let mut state = 1;
    let mut token = || (split_mix(&mut state) % 64) as u32;
    let windows = (0..64).map(|_| (0..24).map(|_| token()).collect());
    let calibration = of_windows(windows.collect());
    for name in ["llama-biases", "qwen3", "phi3", "granite", "gemma2", "olmo2"] {
        let folder = tempfile::tempdir().unwrap();
        family_models::assemble(&folder.path().join("source"), name);
        let source = Checkpoint::open(&folder.path().join("source")).unwrap();
        let made = |recipe, out: &str| {
            let mut spec = QuantSpec::new(3, Some(32), true, 0.1, recipe);
            // What the solver sees of the whole would fit the few windows, and leave little to tune.
            (spec.choices.residual, spec.choices.head) = (0.0, 0.0);
            if recipe == Recipe::Tuned {
                spec.choices.tune = 7;
                spec.choices.tune_rate = 1e-3;
            }
            crate::recipe_fit::fit(source.config(), false, &mut spec);
            let out = folder.path().join(out);
            let done = quantize(&job(&source, &calibration, spec, &out), &Silent).unwrap().unwrap();
            (fs::read(out.join(&done.written.files[0])).unwrap(), out, done.tuned)
        };
        let (first, dir, tuned) = made(Recipe::Tuned, "first");
        let (second, ..) = made(Recipe::Tuned, "second");
        assert!(first == second, "{name}: two runs differ");
        let record = tuned.unwrap().record;
        assert!(record.kl_after < record.kl_before && !record.unseen, "{name}: {record:?}");
        assert_eq!((record.windows, record.held_out), (56, 8), "{name}");
        let (_, best, none) = made(Recipe::Best, "best");
        assert!(none.is_none());
        let (tuned, best) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&best).unwrap());
        let mut moved = 0;
        for (name, shape) in source.config().linears() {
            let [tuned, best] =
                [&tuned, &best].map(|file| file.gptq_linear(&name, &shape).unwrap());
            assert!(tuned.qweight == best.qweight && tuned.g_idx == best.g_idx, "{name}");
            for (tuned, best) in tuned.scales.iter().zip(&best.scales) {
                let ratio = tuned.to_f32() / best.to_f32();
                assert!((ratio.ln()).abs() < 0.02, "{name}: {best} to {tuned}");
                moved += usize::from(tuned != best);
            }
        }
        assert!(moved > 0, "{name}");
    }
}

#[test]
fn what_cannot_be_tuned_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let windows = |count| of_windows(vec![(0..48).map(|i| i * 7 % 64).collect(); count]);
    for (name, count, why) in [
        (
            "cohere",
            4,
            "cohere model cannot be tuned, as its blocks have no backward pass: norms take means off",
        ),
        (
            "qwen3",
            1,
            "one calibration window at least is to train on and one to judge by, and there are 1",
        ),
    ] {
        let dir = folder.path().join(name);
        family_models::assemble(&dir, name);
        let source = Checkpoint::open(&dir).unwrap();
        let mut spec = QuantSpec::new(4, Some(32), true, 0.1, Recipe::Tuned);
        crate::recipe_fit::fit(source.config(), false, &mut spec);
        let (calibration, out) = (windows(count), folder.path().join("out"));
        let refused = quantize(&job(&source, &calibration, spec, &out), &Silent).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.contains("tune=0 (or the recipe best) instead of 64") && said.contains(why),
            "{said}"
        );
        assert!(!out.exists());
    }
}

/// On a machine with a card: the same scales twice, and what the CPU's are worth.
#[test]
fn a_gpu_tunes_as_the_cpu_does() {
    let gpu = Device::best().unwrap();
    if !matches!(gpu, Device::Cuda(_)) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut state = 2;
    let mut token = || (split_mix(&mut state) % 64) as u32;
    let windows = (0..64).map(|_| (0..24).map(|_| token()).collect());
    let calibration = of_windows(windows.collect());
    for name in ["llama3", "qwen3", "phi3", "gemma2"] {
        let source = folder.path().join(name);
        family_models::assemble(&source, name);
        let source = Checkpoint::open(&source).unwrap();
        let made = |device: &Device, out: &str| {
            let mut spec = QuantSpec::new(3, Some(32), true, 0.1, Recipe::Tuned);
            (spec.choices.residual, spec.choices.head) = (0.0, 0.0);
            (spec.choices.tune, spec.choices.tune_rate) = (14, 1e-3);
            crate::recipe_fit::fit(source.config(), false, &mut spec);
            let out = folder.path().join(format!("{name}-{out}"));
            let job = job(&source, &calibration, spec, &out);
            let job = QuantizeJob { device: device.clone(), ..job };
            let done = quantize(&job, &Silent).unwrap().unwrap();
            (fs::read(out.join(&done.written.files[0])).unwrap(), done.tuned.unwrap().record)
        };
        let (first, there) = made(&gpu, "first");
        let (second, _) = made(&gpu, "second");
        assert!(first == second, "{name}: two runs differ");
        let (_, here) = made(&Device::Cpu, "cpu");
        // Codes differ where fp16 decides; what tuning gains is the same.
        let gain = |record: &TuningRecord| record.kl_after / record.kl_before;
        assert!(gain(&there) < 1.0, "{name}: {there:?}");
        assert!((gain(&there) - gain(&here)).abs() < 0.05, "{name}: {there:?}, {here:?}");
    }
}
