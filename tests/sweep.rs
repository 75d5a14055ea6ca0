//! `gptq sweep` finds what earlier runs left: finished branches are reused, whatever has changed is
//! made again with a reason, several processes share one folder, and nothing that is not the
//! sweep's is touched.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::os::unix::fs::MetadataExt;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_pipeline::progress::Silent;
use gptq_pipeline::rates::KnownRates;
use gptq_pipeline::sweep::config::SweepConfig;
use gptq_pipeline::sweep::{SweepJob, sweep};
use gptq_text::tokens::TextTokenizer;
use serde_json::{Value, json};
use util::{TinyLlama, Workdir, contents, words};

/// Two grids, a rotated recipe and one without calibration.
const BRANCHES: [(&str, u8, &str, &str); 4] = [
    ("a", 4, "32", "autogptq"),
    ("b", 3, "\"none\"", "autogptq"),
    ("c", 4, "32", "best"),
    ("d", 8, "32", "rtn"),
];
const RUN: [&str; 7] = ["sweep", "sweep.toml", "--out", "out", "--device", "cpu", "--no-progress"];

fn configuration(seq_len: usize) -> String {
    let mut text = format!(
        "model = \"model\"\ncalibration = \"calibration.toml\"\nrecipe = \"autogptq\"\ndamp = 0.01\n\
         [evaluation]\ndataset = \"held-out.txt\"\nprotocol = \"paper\"\nseq_len = {seq_len}\n"
    );
    for (name, bits, group, recipe) in BRANCHES {
        text.push_str(&format!(
            "[[branch]]\nname = \"{name}\"\nbits = {bits}\ngroup_size = {group}\n\
             act_order = true\nrecipe = \"{recipe}\"\n"
        ));
    }
    text
}

/// A tiny model with licenses and a configuration of four branches.
fn prepared() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    for (name, text) in [
        ("generation_config.json", "{}"),
        ("LICENSE", "may be used"),
        ("Notice", "was made"),
        ("USE_POLICY.md", "for good"),
        ("LLAMA 2 LICENSE/LICENSE.txt", "may be used too"),
    ] {
        dir.write(&format!("model/{name}"), text);
    }
    dir.write("text.txt", &words(600));
    dir.write("held-out.txt", &words(300));
    dir.write(
        "calibration.toml",
        "name = \"words\"\ndataset = \"text.txt\"\njoin = \"card\"\nwindows = 4\nseq_len = 32\nseed = 0\n",
    );
    dir.write("sweep.toml", &configuration(32));
    dir
}

/// Runs the sweep and gives what it said on stderr.
#[track_caller]
fn run(dir: &Workdir, more: &[&str]) -> String {
    let outcome = dir.gptq(&[&RUN[..], more].concat());
    outcome.ok();
    outcome.stderr
}

fn inode(dir: &Workdir, file: &str) -> u64 {
    fs::metadata(dir.path(file)).unwrap().ino()
}

fn edit(dir: &Workdir, file: &str, with: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(dir.path(file)).unwrap();
    with(&mut bytes);
    fs::write(dir.path(file), bytes).unwrap();
}

fn read_json(dir: &Workdir, file: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.path(file)).unwrap()).unwrap()
}

#[test]
fn every_folder_is_complete_and_equals_the_branch_made_alone() {
    let dir = prepared();
    let table = dir.gptq(&[&RUN[..], &["--json"]].concat()).json();
    for (row, (name, ..)) in table["rows"].as_array().unwrap().iter().zip(BRANCHES) {
        assert_eq!(row["branch"], name);
        let mut swept = contents(&dir.path("out").join(name));
        for file in ["config.json", "quantize_config.json", "tokenizer.json", "LICENSE", "Notice"] {
            assert!(swept.contains_key(file), "{name} has no {file}");
        }
        for file in ["USE_POLICY.md", "generation_config.json", "LLAMA 2 LICENSE/LICENSE.txt"] {
            assert!(swept.contains_key(file), "{name} has no {file}");
        }

        let alone = format!("alone-{name}");
        let fixed = ["quantize", "model", "--config", "sweep.toml", "--device", "cpu"];
        let calibration = ["--calib", "calibration.toml"];
        dir.gptq(&[&fixed[..], &calibration, &["--branch", name, "--out", &alone]].concat()).ok();
        let mut alone = contents(&dir.path(&alone));
        // The manifest lists what there is.
        let manifest: Value =
            serde_json::from_slice(&swept.remove("gptq_manifest.json").unwrap()).unwrap();
        let listed = manifest["files"].as_object().unwrap();
        assert_eq!(listed.len() + 1, swept.len());
        let sums: Value =
            serde_json::from_slice(&alone.remove("gptq_manifest.json").unwrap()).unwrap();
        assert_eq!(sums["files"], manifest["files"]);
        // The reports differ in the measurement alone.
        let parse =
            |bytes: Option<Vec<u8>>| serde_json::from_slice::<Value>(&bytes.unwrap()).unwrap();
        let mut report = parse(swept.remove("gptq_report.json"));
        let evaluation = report["evaluations"][0].take();
        report["evaluations"] = json!([]);
        assert_eq!(report, parse(alone.remove("gptq_report.json")));
        assert!(swept == alone, "{name}: {:?} {:?}", swept.keys(), alone.keys());

        assert_eq!(evaluation["perplexity"], row["result"]["perplexity"]);
        assert_eq!(evaluation["kl"], row["result"]["kl"]);
        assert_eq!(evaluation["rtn"], row["rtn"]);
        assert_eq!(evaluation["base_perplexity"], table["baseline"]["perplexity"]);
        assert_eq!(evaluation["dataset"]["name"], "held-out.txt");
        assert_eq!(report["model"], "model");
        assert_eq!(report["calibration"].is_null(), name == "d");
        assert_eq!(report["blocks"].as_array().unwrap().len(), 2);
    }
    // What is rounded to nearest is its own baseline.
    assert_eq!(table["rows"][3]["result"], table["rows"][3]["rtn"]);
}

#[test]
fn branches_made_together_are_those_made_alone() {
    let (alone, together) = (prepared(), prepared());
    run(&alone, &[]);
    let stderr = run(&together, &["--together", "3"]);
    assert!(stderr.contains("quantize 3 branches: 6 blocks"), "{stderr}");
    for (name, ..) in BRANCHES {
        let made = |dir: &Workdir| contents(&dir.path("out").join(name));
        assert!(made(&alone) == made(&together), "{name}");
        assert_eq!(stderr.contains(&format!("{name}: block 2/2")), name != "d", "{stderr}");
    }
}

/// What `--device cuda:all` does, with two CPUs for two cards.
#[test]
fn several_devices_make_and_measure_what_one_does() {
    let dir = prepared();
    // Of windows that are a chunk each, both devices have some.
    dir.write("held-out.txt", &words(4000));
    dir.write("sweep.toml", &configuration(128));
    run(&dir, &[]);
    let mut text = configuration(128);
    for file in ["\"model\"", "\"held-out.txt\"", "\"calibration.toml\""] {
        text = text.replace(file, &format!("{:?}", dir.path(file.trim_matches('"'))));
    }
    dir.write("absolute.toml", &text);
    let calibration = fs::read_to_string(dir.path("calibration.toml")).unwrap();
    let data = format!("{:?}", dir.path("text.txt"));
    dir.write("calibration.toml", &calibration.replace("\"text.txt\"", &data));
    let mut config = SweepConfig::open(dir.path("absolute.toml").to_str().unwrap()).unwrap();
    let source = Checkpoint::open(&dir.path("model")).unwrap();
    config.fit(source.config(), false);
    let tokenizer = TextTokenizer::open(source.dir(), source.config().vocab_size).unwrap();
    let job = SweepJob {
        config: &config,
        branches: &config.branches,
        model: config.model.as_deref().unwrap(),
        source: &source,
        origin: None,
        calibration: &config.calibration.sample(&tokenizer, None).unwrap(),
        devices: &[Device::Cpu, Device::Cpu],
        together: 1,
        out: &dir.path("two"),
        strict: false,
        rates: &KnownRates::default(),
    };
    let report = sweep(&job, &Silent).unwrap();
    let one = read_json(&dir, "out/sweep.json");
    for (row, expected) in report.rows.iter().zip(one["rows"].as_array().unwrap()) {
        assert_eq!(json!(row.branch), expected["branch"]);
        assert_eq!(serde_json::to_value(row.result).unwrap(), expected["result"]);
        assert_eq!(serde_json::to_value(row.rtn).unwrap(), expected["rtn"]);
        let weights = |out| fs::read(dir.path(out).join(&row.branch).join("model.safetensors"));
        assert!(weights("out").unwrap() == weights("two").unwrap(), "{}", row.branch);
    }
    assert_eq!(serde_json::to_value(report.baseline).unwrap(), one["baseline"]);
}

#[test]
fn a_branch_that_fails_takes_no_other_down() {
    for together in ["1", "4"] {
        let dir = prepared();
        dir.write("out/b.partial/thesis.txt", "years of work");
        let more = ["--together", together];
        let outcome = dir.gptq(&[&RUN[..], &more].concat());
        assert_eq!(outcome.code, 1, "{}", outcome.stderr);
        let hint = "\nhint: move it away or choose another output\n";
        for part in ["warning: b failed: ", "b.partial", hint, "error: 1 of 4 branches failed: b"] {
            assert!(outcome.stderr.contains(part), "no `{part}` in {}", outcome.stderr);
        }
        for name in ["a", "c", "d"] {
            dir.gptq(&["verify", &format!("out/{name}"), "--base", "model"]).ok();
        }
        let rows = |dir: &Workdir| {
            let table = read_json(dir, "out/sweep.json");
            let rows = table["rows"].as_array().unwrap().iter();
            rows.map(|row| row["branch"].as_str().unwrap().to_owned()).collect::<String>()
        };
        assert_eq!(rows(&dir), "acd");
        fs::remove_dir_all(dir.path("out/b.partial")).unwrap();
        let stderr = run(&dir, &more);
        assert!(
            stderr.contains("a: finished, reused") && stderr.contains("quantize: 2"),
            "{stderr}"
        );
        assert_eq!(rows(&dir), "abcd");
    }
}

#[test]
fn a_finished_sweep_is_read_and_left_as_it_is() {
    let dir = prepared();
    let first = dir.gptq(&[&RUN[..], &["--json"]].concat()).json();
    let (before, node) = (contents(&dir.path("out")), inode(&dir, "out/a/model.safetensors"));
    let again = dir.gptq(&[&RUN[..], &["--json"]].concat());
    for (name, ..) in BRANCHES {
        assert!(again.stderr.contains(&format!("{name}: finished, reused")), "{}", again.stderr);
    }
    assert!(!again.stderr.contains("perplexity:"), "measured again: {}", again.stderr);
    assert_eq!(again.json(), first);
    assert!(contents(&dir.path("out")) == before);
    assert_eq!(inode(&dir, "out/a/model.safetensors"), node);
    // Without its table only the fp16 model is measured again, and the timings are unknown.
    fs::remove_file(dir.path("out/sweep.json")).unwrap();
    let again = dir.gptq(&[&RUN[..], &["--json"]].concat()).json();
    assert_eq!(again["baseline"], first["baseline"]);
    assert!(again["rows"][0]["quantize_seconds"].is_null());
    assert_eq!(again["rows"][0]["result"], first["rows"][0]["result"]);
}

#[test]
fn what_has_changed_starts_over_and_says_why() {
    let dir = prepared();
    run(&dir, &[]);
    let before = contents(&dir.path("out/b"));
    let only_a = |stderr: &str, why: &str| {
        assert!(stderr.contains(&format!("warning: a starts over: {why}")), "{stderr}");
        assert!(stderr.contains("b: finished, reused"), "{stderr}");
        assert_eq!(stderr.matches("starts over").count(), 1, "{stderr}");
    };
    // Settings of one branch.
    let text = configuration(32);
    dir.write("sweep.toml", &text.replacen("bits = 4", "bits = 8", 1));
    only_a(&run(&dir, &[]), "settings was `4 bits, group size 32, act-order true");
    assert_eq!(read_json(&dir, "out/a/quantize_config.json")["bits"], 8);
    dir.write("sweep.toml", &text);
    only_a(&run(&dir, &[]), "settings was `8 bits");
    let undisturbed = contents(&dir.path("out/a"));

    // A byte of the weights, a truncated file, a lost file.
    let weights = "out/a/model.safetensors";
    edit(&dir, weights, |bytes| *bytes.last_mut().unwrap() ^= 1);
    only_a(&run(&dir, &[]), "`model.safetensors` is not as it was made");
    edit(&dir, weights, |bytes| bytes.truncate(1000));
    only_a(&run(&dir, &[]), "`model.safetensors` is not as it was made");
    fs::remove_file(dir.path("out/a/LICENSE")).unwrap();
    only_a(&run(&dir, &[]), "`LICENSE` is not as it was made");
    // A model card is not the sweep's business, but for a branch that starts over.
    dir.write("out/a/README.md", "card");
    assert!(!run(&dir, &[]).contains("starts over"));
    fs::remove_file(dir.path("out/a/README.md")).unwrap();
    assert!(contents(&dir.path("out/a")) == undisturbed);
    assert!(contents(&dir.path("out/b")) == before);

    // The calibration concerns all but the branch that does without.
    let stderr = run(&dir, &["--seed", "1"]);
    assert_eq!(
        stderr.matches("starts over: calibration was `4 × 32 tokens of text.txt").count(),
        3
    );
    assert!(stderr.contains("d: finished, reused"), "{stderr}");
}

#[test]
fn another_source_is_seen_and_a_copy_is_not() {
    let dir = prepared();
    run(&dir, &["--only", "d"]);
    // The same model elsewhere, in shards, touched just now.
    let copied = TinyLlama::new();
    copied.write_sharded(&dir.path("elsewhere/model"), 3);
    for file in ["generation_config.json", "LICENSE", "Notice", "USE_POLICY.md"] {
        fs::copy(dir.path("model").join(file), dir.path("elsewhere/model").join(file)).unwrap();
    }
    dir.write("elsewhere/model/LLAMA 2 LICENSE/LICENSE.txt", "may be used too");
    let stderr = run(&dir, &["--only", "d", "--model", "elsewhere/model"]);
    assert!(stderr.contains("d: finished, reused"), "{stderr}");
    // One tensor trained a little further.
    let mut trained = TinyLlama::new();
    for value in &mut trained.tensor("model.layers.1.mlp.up_proj.weight").values {
        *value *= 1.0001;
    }
    trained.write(&dir.path("model"));
    let stderr = run(&dir, &["--only", "d"]);
    assert!(stderr.contains("d starts over: the source has changed"), "{stderr}");
    dir.write("model/LICENSE", "may be used by anyone");
    let stderr = run(&dir, &["--only", "d"]);
    assert!(stderr.contains("d starts over: the source has changed"), "{stderr}");
    assert_eq!(fs::read_to_string(dir.path("out/d/LICENSE")).unwrap(), "may be used by anyone");
}

#[test]
fn another_evaluation_measures_again_and_makes_nothing() {
    let dir = prepared();
    run(&dir, &["--only", "a"]);
    let (before, node) = (contents(&dir.path("out/a")), inode(&dir, "out/a/model.safetensors"));
    dir.write("sweep.toml", &configuration(24));
    let stderr = run(&dir, &["--only", "a"]);
    assert!(stderr.contains("a: finished, but measured on something else"), "{stderr}");
    assert!(!stderr.contains("quantize:"), "{stderr}");
    assert_eq!(inode(&dir, "out/a/model.safetensors"), node);
    assert_eq!(read_json(&dir, "out/a/gptq_report.json")["evaluations"][0]["seq_len"], 24);
    // An edited report is not believed, whatever it says.
    dir.write("sweep.toml", &configuration(32));
    run(&dir, &["--only", "a"]);
    edit(&dir, "out/a/gptq_report.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("\"windows\": 9", "\"windows\": 99").into_bytes();
    });
    assert!(contents(&dir.path("out/a")) != before, "the edit did nothing");
    let stderr = run(&dir, &["--only", "a"]);
    assert!(!stderr.contains("quantize:"), "{stderr}");
    assert!(contents(&dir.path("out/a")) == before);
}

/// Everything that a run which was killed between two steps can leave, by hand.
#[test]
fn left_overs_of_every_step_are_resumed() {
    let dir = prepared();
    run(&dir, &["--only", "a"]);
    let whole = contents(&dir.path("out/a"));
    let (named, working) = (dir.path("out/a"), dir.path("out/a.partial"));
    let marker = |folder: &str| dir.write(&format!("out/{folder}/.gptq-partial"), "");
    #[track_caller]
    fn whole_again(dir: &Workdir, whole: &std::collections::BTreeMap<String, Vec<u8>>) -> String {
        let stderr = run(dir, &["--only", "a"]);
        assert!(contents(&dir.path("out/a")) == *whole);
        assert!(!dir.path("out/a.partial").exists());
        stderr
    }

    // Named, but the marker is still there.
    marker("a");
    assert!(whole_again(&dir, &whole).contains("a: finished, reused"));
    // Everything written, not yet named; with the file of an interrupted replacement.
    marker("a");
    fs::rename(&named, &working).unwrap();
    dir.write("out/a.partial/.gptq_report.json.new", "{\"half");
    dir.write("out/a.partial/.gptq_manifest.json.new", "{\"half");
    let stderr = whole_again(&dir, &whole);
    assert!(
        stderr.contains("a: made, to be measured") && !stderr.contains("quantize:"),
        "{stderr}"
    );
    // The report has evaluations that the manifest does not know of.
    marker("a");
    fs::rename(&named, &working).unwrap();
    let mut manifest = read_json(&dir, "out/a.partial/gptq_manifest.json");
    manifest["report"] = manifest["made_report"].clone();
    manifest["measured_on"] = Value::Null;
    dir.write("out/a.partial/gptq_manifest.json", &manifest.to_string());
    assert!(whole_again(&dir, &whole).contains("a: made, to be measured"));
    // Not listed yet, or half listed, or half removed: made again.
    for damage in ["gptq_manifest.json", "config.json", "model.safetensors"] {
        marker("a");
        fs::rename(&named, &working).unwrap();
        edit(&dir, &format!("out/a.partial/{damage}"), |bytes| bytes.truncate(bytes.len() / 2));
        assert!(whole_again(&dir, &whole).contains("quantize:"), "{damage}");
    }
    // A working folder whose marker was not yet made.
    fs::remove_dir_all(&named).unwrap();
    fs::create_dir(&working).unwrap();
    assert!(whole_again(&dir, &whole).contains("quantize:"));
}

#[test]
fn what_is_not_the_sweeps_is_left_alone() {
    let dir = prepared();
    let refused = |names: &[&str]| dir.gptq(&[&RUN[..], &["--only", "a"]].concat()).refused(names);
    dir.write("out/a/thesis.txt", "years of work");
    refused(&["out/a", "no sweep finished it", "--out"]);
    fs::remove_file(dir.path("out/a/thesis.txt")).unwrap();
    // A branch that would be replaced, with something of the user's in it.
    run(&dir, &["--only", "a"]);
    dir.write("out/a/thesis.txt", "years of work");
    assert!(run(&dir, &["--only", "a"]).contains("a: finished, reused"));
    edit(&dir, "out/a/config.json", |bytes| bytes.push(b' '));
    refused(&["`thesis.txt`", "not the sweep's to delete"]);
    assert!(dir.path("out/a/thesis.txt").exists());
    // A working folder of someone else's.
    fs::remove_dir_all(dir.path("out/a")).unwrap();
    dir.write("out/a.partial/thesis.txt", "years of work");
    refused(&["a.partial", "not made by this program"]);
}

/// A full disk's remedy: what the link leads to is somebody's, the link is the sweep's.
#[test]
fn a_branch_moved_away_behind_a_link_is_reused_and_made_anew_beside_it() {
    let dir = prepared();
    run(&dir, &["--only", "a"]);
    fs::rename(dir.path("out/a"), dir.path("moved")).unwrap();
    std::os::unix::fs::symlink("../moved", dir.path("out/a")).unwrap();
    let moved = contents(&dir.path("moved"));
    assert!(run(&dir, &["--only", "a"]).contains("a: finished, reused"));
    dir.write("sweep.toml", &configuration(32).replacen("bits = 4", "bits = 8", 1));
    let stderr = run(&dir, &["--only", "a"]);
    assert!(
        stderr.contains("a starts over") && stderr.contains("what it led to stays"),
        "{stderr}"
    );
    assert!(fs::symlink_metadata(dir.path("out/a")).unwrap().is_dir());
    assert_eq!(read_json(&dir, "out/a/quantize_config.json")["bits"], 8);
    assert!(contents(&dir.path("moved")) == moved);
    assert!(run(&dir, &["--only", "a"]).contains("a: finished, reused"));
    // A run that was killed while it measured such a branch again, and then other settings.
    fs::remove_dir_all(dir.path("out/a")).unwrap();
    std::os::unix::fs::symlink("../moved", dir.path("out/a.partial")).unwrap();
    run(&dir, &["--only", "a"]);
    assert!(fs::symlink_metadata(dir.path("out/a.partial")).is_err());
    assert!(contents(&dir.path("moved")) == moved);
}

#[test]
fn a_branch_that_another_process_makes_is_refused() {
    let dir = prepared();
    fs::create_dir_all(dir.path("out/.gptq-sweep")).unwrap();
    let lock = fs::File::create(dir.path("out/.gptq-sweep/b.lock")).unwrap();
    lock.lock().unwrap();
    dir.gptq(&RUN).refused(&["at work on branch `b`", "--jobs"]);
    assert!(!dir.path("out/a").exists());
    run(&dir, &["--only", "a"]);
    // A lock file without a process is nothing.
    drop(lock);
    run(&dir, &[]);
}

#[test]
fn jobs_share_a_folder_and_make_every_branch_once() {
    let whole = prepared();
    run(&whole, &[]);
    let split = prepared();
    std::thread::scope(|scope| {
        for job in ["1/3", "2/3", "3/3"] {
            let split = &split;
            scope.spawn(move || run(split, &["--jobs", job]));
        }
    });
    for (name, ..) in BRANCHES {
        let of = |dir: &Workdir| contents(&dir.path("out").join(name));
        assert!(of(&whole) == of(&split), "{name}");
    }
    let table = |dir: &Workdir| {
        let mut table = read_json(dir, "out/sweep.json");
        for row in table["rows"].as_array_mut().unwrap() {
            assert!(row["quantize_seconds"].as_f64().unwrap() > 0.0);
            row["quantize_seconds"].take();
            row["measure_seconds"].take();
        }
        table
    };
    assert_eq!(table(&whole), table(&split));
    // One that has nothing to do is no error.
    let idle = split.gptq(&[&RUN[..], &["--jobs", "9/9"]].concat());
    let branch = |line: &str| BRANCHES.iter().any(|b| line.starts_with(&format!("{} ", b.0)));
    assert!(!idle.ok().lines().any(branch), "{}", idle.stdout);
    assert!(!idle.stderr.contains("perplexity:"), "{}", idle.stderr);
    split.gptq(&[&RUN[..], &["--jobs", "0/3"]].concat()).refused(&["0/3", "2/4"]);
}

#[test]
fn only_branches_that_saw_the_text_are_reported_to_have() {
    let dir = prepared();
    dir.write("sweep.toml", &configuration(32).replace("held-out.txt", "text.txt"));
    let sweep = |only: &[&str]| dir.gptq(&[&RUN[..], only].concat()).ok().to_owned();
    // Rounding is not calibrated.
    assert!(!sweep(&["--only", "d"]).contains("calibrated"));
    assert_eq!(read_json(&dir, "out/sweep.json")["evaluation"]["contaminated"], false);
    let text = sweep(&["--only", "b", "--only", "d"]);
    assert!(text.contains("\nb was calibrated on this split: "), "{text}");
    let table = read_json(&dir, "out/sweep.json");
    assert_eq!(table["evaluation"]["contaminated"], true);
    for (row, contaminated) in [(0, true), (1, false)] {
        assert_eq!(table["rows"][row]["contaminated"], contaminated);
        let report = format!("out/{}/gptq_report.json", ["b", "d"][row]);
        assert_eq!(read_json(&dir, &report)["evaluations"][0]["contaminated"], contaminated);
    }
}

#[test]
fn a_dry_run_tells_and_touches_nothing() {
    let dir = prepared();
    let dry = |more: &[&str]| dir.gptq(&[&RUN[..], &["--dry-run"], more].concat());
    let text = dry(&[]).ok().to_owned();
    assert!(!dir.path("out").exists());
    assert_eq!(text.matches(" make ").count(), 4, "{text}");
    run(&dir, &["--only", "a", "--only", "b"]);
    edit(&dir, "out/b/config.json", |bytes| bytes.push(b' '));
    let before = contents(&dir.path("out"));
    let preview = dry(&["--json"]).json();
    let action = |i: usize| preview["branches"][i]["action"].as_str().unwrap();
    assert_eq!(
        [action(0), action(1), action(2), action(3)],
        ["reuse", "make again", "make", "make"]
    );
    let reason = preview["branches"][1]["reason"].as_str().unwrap();
    assert!(reason.contains("`config.json`"), "{reason}");
    assert!(contents(&dir.path("out")) == before);
    // Sizes are those of the files.
    run(&dir, &[]);
    for (i, (name, ..)) in BRANCHES.iter().enumerate() {
        let file = dir.path("out").join(name).join("model.safetensors");
        assert_eq!(preview["branches"][i]["file_bytes"], fs::metadata(file).unwrap().len());
    }
}

#[test]
fn raised_damping_is_an_error_under_strict() {
    let dir = prepared();
    // One token over and over: a Hessian of rank one, which too little damping does not help.
    dir.write("text.txt", &"w5 ".repeat(600));
    dir.write("sweep.toml", &configuration(32).replace("damp = 0.01", "damp = 1e-5"));
    let stderr = run(&dir, &["--only", "a"]);
    assert!(stderr.contains("is not positive definite"), "{stderr}");
    // Whether it is finished already or not.
    let strict = || dir.gptq(&[&RUN[..], &["--only", "a", "--strict"]].concat());
    strict().refused(&["--strict", "q_proj"]);
    fs::remove_dir_all(dir.path("out/a")).unwrap();
    strict().refused(&["--strict", "q_proj"]);
    assert!(!dir.path("out/a").exists() && !dir.path("out/a.partial").exists());
}

/// A weight that a rotation brings within fp16, and that rounding as it stands does not.
#[test]
fn a_baseline_that_cannot_be_made_is_a_missing_number() {
    let dir = prepared();
    let mut model = TinyLlama::new();
    model.tensor("model.layers.1.mlp.up_proj.weight").values[7] = 5e5;
    model.write(&dir.path("model"));
    let configuration = configuration(32);
    let header = configuration.split("[[branch]]").next().unwrap();
    let mut text = header.replace("damp = 0.01", "damp = 0.01\nsource_dtype = \"fp32\"");
    for name in ["one", "two"] {
        let act_order = name == "one";
        text.push_str(&format!(
            "[[branch]]\nname = \"{name}\"\nbits = 4\ngroup_size = 32\n\
             act_order = {act_order}\nrecipe = \"best\"\n"
        ));
    }
    dir.write("sweep.toml", &text);
    let outcome = dir.gptq(&[&RUN[..], &["--json"]].concat());
    let rows = outcome.json()["rows"].as_array().unwrap().clone();
    assert_eq!(rows.len(), 2);
    for row in &rows {
        assert!(row["result"]["perplexity"].as_f64().unwrap() > 1.0, "{row}");
        assert_eq!(row["rtn"], Value::Null);
    }
    let missing = |l: &&str| l.starts_with("warning: the baseline rounded to nearest is missing");
    // Said once: both branches have one grid.
    let stderr: Vec<&str> = outcome.stderr.lines().filter(missing).collect();
    assert_eq!(stderr.len(), 1, "{}", outcome.stderr);
    assert!(stderr[0].contains("up_proj") && stderr[0].contains("fp16"), "{stderr:?}");
    // A report without the number is read like any other.
    assert!(dir.gptq(&["report", "out"]).ok().contains("`two`"));
    assert!(run(&dir, &[]).contains("two: finished, reused"));
}
