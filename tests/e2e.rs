//! The main job on the embedded model: all nine settings of the published table are made by one
//! `sweep` and read back from their files.
//!
//! Expected perplexities are not the program's own word. Each branch that this test's configuration
//! writes was dequantized by an independent Python reader and evaluated by transformers on the same
//! windows; it agreed with `gptq` to all four decimals printed (0.0003 %), and the values below are
//! its. Another CPU rounds differently, which may move a code to the neighboring one: hence the
//! tolerance of 0.5 %.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::path::Path;

use serde_json::Value;
use util::{Workdir, repository};

/// Branch, bits, group size (0: none), act-order, perplexity by transformers.
const BRANCHES: [(&str, u8, usize, bool, f64); 9] = [
    ("4bit-32g-act", 4, 32, true, 20.6723),
    ("4bit-64g-act", 4, 64, true, 20.7587),
    ("4bit-128g-act", 4, 128, true, 20.9209),
    ("4bit-128g", 4, 128, false, 20.8278),
    ("4bit-none-act", 4, 0, true, 20.9352),
    ("3bit-64g-act", 3, 64, true, 21.4403),
    ("3bit-128g-act", 3, 128, true, 21.7827),
    ("3bit-128g", 3, 128, false, 21.3742),
    ("3bit-none-act", 3, 0, true, 21.8454),
];
/// The fp16 model on the same 8 windows, by transformers.
const DENSE: f64 = 20.5133;
/// Relative.
const TOLERANCE: f64 = 0.005;

/// Half of the demo's calibration and a fifth of its evaluation: a minute without optimization.
fn configuration() -> String {
    let root = repository();
    let at = |file: &str| root.join(file).display().to_string();
    let mut text = format!(
        "model = \"{}\"\ncalibration = \"{}\"\ncalibration_overrides = {{ windows = 16 }}\n\
         recipe = \"autogptq\"\ndamp = 0.01\n\
         [evaluation]\ndataset = \"{}\"\nprotocol = \"paper\"\nseq_len = 512\nmax_windows = 8\n",
        at("tests/fixtures/demo-llama"),
        at("calib/demo.toml"),
        at("calib/demo/heldout.txt"),
    );
    for (name, bits, group, act_order, _) in BRANCHES {
        let group = if group == 0 { "\"none\"".to_owned() } else { group.to_string() };
        text.push_str(&format!(
            "[[branch]]\nname = \"{name}\"\nbits = {bits}\ngroup_size = {group}\n\
             act_order = {act_order}\n"
        ));
    }
    text
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64) {
    let error = (found / expected - 1.0).abs();
    println!(
        "{what:>14}  {found:.4}, expected {expected:.4}: {:.2} of tolerance",
        error / TOLERANCE
    );
    assert!(error < TOLERANCE, "{what}: {found}, expected {expected}");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

#[test]
fn nine_branches_have_the_perplexities_that_transformers_measures() {
    let dir = Workdir::new();
    dir.write("sweep.toml", &configuration());
    let args = ["sweep", "sweep.toml", "--out", "branches", "--device", "cpu", "--json"];
    let report = dir.gptq(&args).json();
    close("fp16", number(&report["baseline"]["perplexity"]), DENSE);
    assert_eq!(report["baseline"]["tokens"], 8 * 511);
    assert_eq!(report["evaluation"]["contaminated"], false);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), BRANCHES.len());
    for (row, (name, bits, group, act_order, expected)) in rows.iter().zip(BRANCHES) {
        assert_eq!(row["branch"], name);
        assert_eq!(row["bits"], bits);
        assert_eq!(row["act_order"], act_order);
        assert_eq!(row["group_size"].as_u64().unwrap_or(0), group as u64);
        assert_eq!(row["damp_retries"], 0);
        close(name, number(&row["result"]["perplexity"]), expected);
        let (kl, rounded) = (number(&row["result"]["kl"]), number(&row["rtn"]["kl"]));
        assert!(kl < 0.9 * rounded, "{name}: KL {kl}, {rounded} by rounding");
        let file = dir.path("branches").join(name).join("model.safetensors");
        assert_eq!(row["file_bytes"], std::fs::metadata(file).unwrap().len());
    }
    ordered(rows);
}

/// Smaller groups and more bits are nearer to the fp16 model.
fn ordered(rows: &[Value]) {
    let kl = |name: &str| {
        let row = rows.iter().find(|row| row["branch"] == name).unwrap();
        number(&row["result"]["kl"])
    };
    for order in [
        ["4bit-32g-act", "4bit-64g-act", "4bit-128g-act", "4bit-none-act"].as_slice(),
        ["3bit-64g-act", "3bit-128g-act", "3bit-none-act"].as_slice(),
    ] {
        for pair in order.windows(2) {
            assert!(kl(pair[0]) < kl(pair[1]), "{pair:?}");
        }
    }
    let of = |bits: u8| BRANCHES.into_iter().filter(move |b| b.1 == bits).map(|b| b.0);
    for four in of(4) {
        for three in of(3) {
            assert!(2.0 * kl(four) < kl(three), "{four} and {three}");
        }
    }
}

#[test]
fn the_dense_model_has_the_perplexity_of_its_training_record() {
    let root = repository();
    let model = root.join("tests/fixtures/demo-llama");
    let text = root.join("calib/demo/heldout.txt");
    let made = ppl(&model, &["--dataset", text.to_str().unwrap(), "--seq-len", "512"], &[]);
    assert_eq!(made["windows"], 108);
    // calib/demo/README.md: by transformers, when the model was trained.
    assert!((number(&made["perplexity"]) - 20.986).abs() < 0.01, "{made}");
}

/// A published model, where `GPTQ_SMOLLM2` names its folder and `HF_HOME` a cache with wikitext-2.
#[test]
fn smollm2_has_the_perplexity_that_transformers_measures() {
    let (Some(model), Some(cache)) =
        (std::env::var_os("GPTQ_SMOLLM2"), std::env::var("HF_HOME").ok())
    else {
        util::needs::Need::SmolLm2.is_missing("GPTQ_SMOLLM2 and HF_HOME are not set");
        return;
    };
    let made = ppl(Path::new(&model), &["--max-windows", "2"], &[("HF_HOME", &cache)]);
    assert_eq!(made["seq_len"], 2048);
    assert_eq!(made["tokens"], 4094);
    // transformers on the first two windows of the test split.
    assert!((number(&made["perplexity"]) - 18.8379).abs() < 0.01, "{made}");
}

fn ppl(model: &Path, options: &[&str], env: &[(&str, &str)]) -> Value {
    let fixed = ["ppl", model.to_str().unwrap(), "--device", "cpu", "--json"];
    Workdir::new().gptq_env(&[&fixed, options].concat(), env).json()
}
