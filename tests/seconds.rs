//! Predictions of time: from benchmarks, for runs and sweeps, and held against what they took.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;

use serde_json::Value;
use util::{TinyLlama, Workdir, words};

/// A folder with a tiny model and a text.
fn tiny() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("text.txt", &words(400));
    dir
}

/// What bench has measured predicts runs on this machine, and runs say how far that was off.
#[test]
fn runs_are_held_against_what_bench_measured() {
    let dir = tiny();
    let cache = dir.path("cache").display().to_string();
    let gptq = |args: &[&str]| dir.gptq_env(args, &[("XDG_CACHE_HOME", &cache)]);
    let cpu = ["--device", "cpu"];
    let calibration = ["--calib-dataset", "text.txt", "--windows", "4", "--seq-len", "32"];
    let quantize = |out: &str, more: &[&str]| {
        let fixed = ["quantize", "model", "--recipe", "autogptq", "--out", out];
        gptq(&[&fixed[..], &cpu, &calibration, more].concat())
    };
    assert!(!quantize("unknown", &[]).ok().contains("predicted"));
    let bench = |seq_len: &str| {
        let fixed = ["bench", "--width", "tiny", "--windows", "1", "--recipe", "autogptq"];
        gptq(&[&fixed[..], &["--seq-len", seq_len], &cpu].concat())
    };
    // As little as says nothing of a run is not kept.
    assert!(!bench("64").stderr.contains("rates"));
    assert!(!dir.path("cache/gptq/rates.json").exists());
    assert!(bench("1024").stderr.contains("rates for predictions: [DIR]/cache/gptq/rates.json"));
    let stored = fs::read_to_string(dir.path("cache/gptq/rates.json")).unwrap();
    let stored: Value = serde_json::from_str(&stored).unwrap();
    assert_eq!(stored["records"][0]["width"], "tiny");
    assert!(stored["records"][0]["rates"]["solve"].as_f64().unwrap() > 0.0, "{stored}");
    let made = quantize("known", &[]);
    let said = made.ok().lines().find(|line| line.starts_with("predicted ")).unwrap();
    // The model is a quarter as wide as the block.
    let parts = [" s, estimated from a block of another shape; took ", " s ("];
    assert!(parts.iter().all(|part| said.contains(part)) && said.ends_with(" %)"), "{said}");
    let made = quantize("json", &["--json"]).json();
    assert!(made["predicted_seconds"].as_f64().unwrap() > 0.3, "{made}");
    assert_eq!(made["predicted_from"], "other-width");
    // Bytes of a report do not depend on what is known of a machine.
    let report = |out: &str| fs::read(dir.path(out).join("gptq_report.json")).unwrap();
    assert!(report("known") == report("unknown"));
    // Nor does a run depend on what somebody wrote there.
    dir.write("cache/gptq/rates.json", "{\"format\": 1, \"records\": [{}]}");
    let made = quantize("broken", &[]);
    assert!(made.stderr.contains("\nhint: delete it, and run gptq bench again\n"));
    assert!(!made.ok().contains("predicted"), "{}", made.stdout);
    assert!(
        made.stderr.contains("warning: `[DIR]/cache/gptq/rates.json` is no file of measured rates")
    );
}

#[test]
fn sweeps_say_how_long_they_will_take_and_took() {
    let dir = tiny();
    let cache = dir.path("cache").display().to_string();
    let gptq = |args: &[&str]| dir.gptq_env(args, &[("XDG_CACHE_HOME", &cache)]);
    let config = "model = \"model\"\ncalibration = \"card\"\nrecipe = \"autogptq\"\ndamp = 0.01\n\
        [evaluation]\ndataset = \"text.txt\"\nprotocol = \"paper\"\nseq_len = 32\n\
        [[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
        [[branch]]\nname = \"b\"\nbits = 3\ngroup_size = \"none\"\nact_order = false\n";
    dir.write("sweep.toml", config);
    let sweep = |more: &[&str]| {
        let fixed = ["sweep", "sweep.toml", "--device", "cpu", "--calib-dataset", "text.txt"];
        gptq(&[&fixed[..], &["--windows", "4", "--seq-len", "32"], more].concat())
    };
    let seconds = |value: &Value| value["seconds"].as_f64().unwrap();
    // Of a machine on which nothing was measured nothing is said but what to do.
    assert!(sweep(&["--dry-run"]).ok().contains("not known; run gptq bench"));
    let unknown = sweep(&["--dry-run", "--json"]).json();
    assert!(unknown["seconds"].is_null() && unknown["branches"][0]["seconds"].is_null());
    let bench = ["bench", "--width", "tiny", "--windows", "1", "--recipe", "autogptq"];
    gptq(&[&bench[..], &["--seq-len", "1024", "--device", "cpu"]].concat()).ok();
    let alone = sweep(&["--dry-run", "--json"]).json();
    let together = sweep(&["--dry-run", "--json", "--together", "2"]).json();
    let both: f64 = (0..2).map(|i| seconds(&alone["branches"][i])).sum();
    for i in 0..2 {
        // They take turns, and end together.
        assert!((seconds(&together["branches"][i]) / both - 1.0).abs() < 1e-9, "{together}");
        assert_eq!(together["branches"][i]["seconds_from"], alone["seconds_from"]);
    }
    assert!((seconds(&together) / seconds(&alone) - 1.0).abs() < 1e-9 && seconds(&alone) > both);
    let text = sweep(&["--dry-run"]).ok().to_owned();
    assert!(text.contains(" s for the whole sweep. Time: "), "{text}");
    assert!(text.contains("made, estimated from a block of another shape.\n"), "{text}");
    let made = sweep(&[]);
    assert!(made.ok().contains("\na branch: predicted "), "{}", made.stdout);
    let table = fs::read_to_string(dir.path("branches/sweep.json")).unwrap();
    let table: Value = serde_json::from_str(&table).unwrap();
    assert_eq!(table["rows"][0]["predicted_seconds"], alone["branches"][0]["seconds"]);
    assert_eq!(table["rows"][0]["predicted_from"], "other-width");
    // Nothing is left to do.
    let left = sweep(&["--dry-run", "--json"]).json();
    assert!(left["branches"][0]["seconds"].is_null() && seconds(&left) < 1.0, "{left}");
}
