//! Sweep configurations and calibration recipes: the same text as either.
#![no_main]

mod folder;

use std::fs;

use gptq_text::calibration::CalibrationRecipe;
use gptq_pipeline::sweep::config::SweepConfig;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let path = folder::folder().join("input.toml");
    fs::write(&path, data).expect("the input's file");
    let path = path.to_str().expect("a path in ASCII");
    if let Ok(sweep) = SweepConfig::open(path) {
        for branch in &sweep.branches {
            branch.spec.validate().expect("a validated branch");
            sweep.branch(&branch.name).expect("a branch by its name");
        }
    }
    let _ = CalibrationRecipe::open(path);
});
