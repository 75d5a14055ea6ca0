//! Quantizing and measuring a tiny model: what suites of odd and damaged sources share.

use std::path::Path;

use super::{Outcome, TinyLlama, Workdir, words};

/// The smallest calibrated run: 4 windows of 32 tokens.
pub(crate) const CALIBRATION: [&str; 8] = [
    "--device=cpu",
    "--calib-dataset",
    "text.txt",
    "--windows=4",
    "--seq-len",
    "32",
    "--seed",
    "0",
];
pub(crate) const EVALUATION: [&str; 5] =
    ["--device=cpu", "--dataset", "text.txt", "--seq-len", "32"];

/// A folder that holds `text.txt` and whatever `prepare` puts into `model`.
pub(crate) fn workdir(prepare: impl FnOnce(&Path)) -> Workdir {
    let dir = Workdir::new();
    dir.write("text.txt", &words(400));
    prepare(&dir.path("model"));
    dir
}

pub(crate) fn with_model(model: &TinyLlama) -> Workdir {
    workdir(|dir| model.write(dir))
}

pub(crate) fn quantize(dir: &Workdir, options: &[&str]) -> Outcome {
    let fixed = ["quantize", "model", "--out", "out"];
    dir.gptq(&[&fixed, &CALIBRATION[..], options].concat())
}

pub(crate) fn ppl(dir: &Workdir, model: &str, options: &[&str]) -> Outcome {
    dir.gptq(&[&["ppl", model], &EVALUATION[..], options].concat())
}

pub(crate) fn perplexity(dir: &Workdir, model: &str, options: &[&str]) -> f64 {
    let value = ppl(dir, model, &[&["--json"], options].concat()).json()["perplexity"].as_f64();
    let value = value.unwrap();
    assert!(value.is_finite() && value > 1.0, "{value}");
    value
}

#[track_caller]
pub(crate) fn leaves_nothing(dir: &Workdir) {
    for name in ["out", "out.partial"] {
        assert!(!dir.path(name).exists(), "{name} was left behind");
    }
}
