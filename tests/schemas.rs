//! Every command's `--json` against the schema that `gptq schema` prints of it.
//!
//! Stricter than a schema's readers are: a key that a schema does not list fails here, so that none
//! is printed which nobody has described.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[cfg(feature = "hub")]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod hub_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod schema_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::process::{Command, Stdio};

use schema_support::{Schema, refusals};
use serde_json::{Value, json};
use util::runs::CALIBRATION;
use util::{TinyLlama, Workdir, repository, words};

/// A folder with a tiny model, a text and a sweep of two branches.
fn workdir() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("text.txt", &words(400));
    dir.write("other.txt", &words(300).replace("w7 ", "w8 "));
    let config = "model = \"model\"\ncalibration = \"card\"\nrecipe = \"best\"\n\
        [evaluation]\ndataset = \"other.txt\"\nprotocol = \"llama-cpp\"\nseq_len = 32\n\
        [[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
        [[branch]]\nname = \"b\"\nbits = 3\ngroup_size = \"none\"\nact_order = false\n";
    dir.write("sweep.toml", config);
    dir
}

fn schema(command: &str) -> Schema {
    Schema::new(Workdir::new().gptq(&["schema", command]).json())
}

/// Runs a command with `--json` and holds what it prints to its schema.
#[track_caller]
fn holds(dir: &Workdir, args: &[&str]) -> Value {
    let printed = dir.gptq(&[args, &["--json"]].concat());
    let json: Value = serde_json::from_str(&printed.stdout)
        .unwrap_or_else(|e| panic!("{args:?}: {e}: {}{}", printed.stdout, printed.stderr));
    held(args[0], &json);
    json
}

#[track_caller]
fn held(command: &str, json: &Value) {
    let wrong = schema(command).check(json);
    assert!(wrong.is_empty(), "{command}: {}\n{json:#}", wrong.join("\n"));
}

fn sweep(dir: &Workdir, out: &str, more: &[&str]) -> Value {
    holds(dir, &[&["sweep", "sweep.toml", "--out", out], &CALIBRATION[..], more].concat())
}

#[test]
fn what_makes_and_measures_checkpoints_prints_what_its_schema_says() {
    let dir = workdir();
    let quantize = |out: &str, recipe: &str| {
        let fixed = ["quantize", "model", "--out", out, "--recipe", recipe, "--bits=3"];
        holds(&dir, &[&fixed[..], &CALIBRATION].concat())
    };
    assert!(quantize("out", "best")["calibration"].is_object());
    assert!(quantize("tuned", "tuned")["tuning"].is_object());
    let shown = holds(
        &dir,
        &[
            "calib",
            "wikitext2",
            "--model=model",
            "--show",
            "--calib-dataset",
            "text.txt",
            "--windows=2",
            "--seq-len=32",
        ],
    );
    assert_eq!(shown["shown"].as_array().unwrap().len(), 2, "{shown}");
    // Conversations, of another length each.
    dir.write("chats.jsonl", "{\"prompt\": \"w3\", \"response\": \"w4 w5\"}\n");
    dir.write("model/chat_template.jinja", "{{ messages[0].content }} {{ messages[1].content }}");
    let both = "name = \"both\"\nseq_len = 32\nseed = 0\n[[source]]\ndataset = \"text.txt\"\n\
        join = \"card\"\nwindows = 3\n[[source]]\ndataset = \"chats.jsonl\"\n\
        template = \"chat\"\nrows = \"padded\"\nwindows = 1\n";
    dir.write("both.toml", both);
    holds(&dir, &["calib", "both.toml", "--model=model", "--show"]);
    let fixed = ["quantize", "model", "--out=both", "--calib=both.toml", "--device=cpu"];
    assert_eq!(holds(&dir, &fixed)["calibration"]["sources"][1]["tokens"], 3);
    assert!(holds(&dir, &["report", "both"])["branches"][0]["calibration"]["tokens"].is_number());
    // Without calibration most of it is absent.
    assert!(quantize("rounded", "rtn")["calibration"].is_null());
    let text = ["--dataset=other.txt", "--device=cpu"];
    let ppl =
        |more: &[&str]| holds(&dir, &[&["ppl", "out", "--seq-len=32"], &text[..], more].concat());
    assert!(ppl(&["--base=model"])["base"].is_object());
    assert!(ppl(&["--protocol=llama-cpp"])["base"].is_null());
    ppl(&["--protocol=strided"]);
    let base = ["--base=model", "--seq-len=32"];
    let verified = holds(&dir, &[&["verify", "out"], &base[..], &text].concat());
    assert!(verified["outputs"].is_object() && verified["weights"].is_object());
    holds(&dir, &["verify", "out"]);
    holds(&dir, &["inspect", "out", "--checksum"]);
    holds(&dir, &["inspect", "model"]);
}

/// What is broken is told in the same form.
#[test]
fn findings_have_a_schema_too() {
    let dir = workdir();
    let fixed = ["quantize", "model", "--out", "out", "--recipe=rtn", "--device=cpu"];
    dir.gptq(&fixed).ok();
    dir.write("out/quantize_config.json", "{\"bits\": 3}");
    let verified = holds(&dir, &["verify", "out"]);
    assert!(!verified["findings"].as_array().unwrap().is_empty(), "{verified}");
    dir.write("out/model.safetensors", "cut");
    let verified = holds(&dir, &["verify", "out"]);
    assert!(verified["settings"].is_null(), "{verified}");
}

#[test]
fn sweeps_and_what_reads_them_print_what_their_schemas_say() {
    let dir = workdir();
    let planned = sweep(&dir, "branches", &["--dry-run"]);
    assert_eq!(planned["branches"][0]["action"], "make");
    let made = sweep(&dir, "branches", &[]);
    assert!(made["rows"][0]["result"].is_object(), "{made}");
    assert_eq!(sweep(&dir, "branches", &["--dry-run"])["branches"][0]["action"], "reuse");
    sweep(&dir, "less", &["--only=b"]);
    holds(&dir, &["report", "branches"]);
    let changes = holds(&dir, &["report", "less", "--previous", "branches"])["changes"].clone();
    assert_eq!(changes.as_array().unwrap().len(), 2, "{changes}");
    holds(&dir, &["report", "branches", "--previous", "less"]);
    holds(&dir, &["check", "branches", "--baseline", "accepted.json", "--update"]);
    holds(&dir, &["check", "branches", "--baseline", "accepted.json"]);
    // One that fails, and says more of it.
    let failed = holds(&dir, &["check", "less", "--baseline", "accepted.json"]);
    assert_eq!(failed["passed"], false);
    let facts = repository().join("configs/cards/demo.toml").display().to_string();
    holds(&dir, &["card", "branches", "--facts", &facts]);
}

#[test]
fn plans_and_machines_print_what_their_schemas_say() {
    let dir = workdir();
    holds(&dir, &["plan", "model", "--config", "sweep.toml"]);
    holds(&dir, &["plan", "model", "--config", "sweep.toml", "--card=A100"]);
    holds(&dir, &["doctor"]);
    let bench = ["bench", "--width=tiny", "--device=cpu"];
    let block = ["--windows=1", "--seq-len=64", "--recipe=autogptq", "--blocks=."];
    assert!(holds(&dir, &[&bench[..], &block].concat())["disk"][0].is_object());
    let tuned = ["--windows=2", "--seq-len=64", "--recipe=tuned", "--set=tune=2"];
    let stages = holds(&dir, &[&bench[..], &tuned].concat())["block"]["stages"].clone();
    let tune =
        stages.as_array().unwrap().iter().find(|stage| stage["operation"] == "tune").unwrap();
    // Two windows go four times forward in each of two steps; another is judged before them and after each.
    let forward = 2.0 * tune["operations"].as_f64().unwrap() / 19.0;
    let whole =
        stages.as_array().unwrap().iter().find(|stage| stage["operation"] == "forward").unwrap();
    assert!((forward / whole["operations"].as_f64().unwrap() - 1.0).abs() < 1e-9);
    assert!(holds(&dir, &[&bench[..], &["--decode"]].concat())["steps"][0].is_object());
    let mixture = ["bench", "--width=tiny-moe", "--device=cpu"];
    let made = holds(&dir, &[&mixture[..], &block[..3], &["--blocks=."]].concat());
    assert_eq!(made["block"]["width"]["experts"]["count"], 8);
    dir.gptq(&[&mixture[..], &["--decode"]].concat()).refused(&["--decode", "tiny-moe"]);
}

#[test]
fn texts_are_printed_as_their_schemas_say() {
    let dir = workdir();
    let generate = |more: &[&str]| {
        let fixed = ["generate", "model", "--prompt=w3 w4", "--max-tokens=3", "--device=cpu"];
        holds(&dir, &[&fixed[..], more].concat())
    };
    generate(&[]);
    generate(&["--temperature=0.7", "--context=4", "--stop=w5"]);
    let facts = repository().join("configs/cards/stablebeluga2.toml");
    let mut chat = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["chat", "model", "--max-tokens=2", "--device=cpu", "--json", "--template"])
        .arg(facts)
        .current_dir(dir.path("."))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut chat.stdin.take().unwrap(), b"w3\nw4 w5\n").unwrap();
    let said = chat.wait_with_output().unwrap();
    let lines: Vec<Value> = String::from_utf8(said.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    lines.iter().for_each(|line| held("chat", line));
}

/// A harness's results, of which one task has all there is to say and the other as little as can be.
#[cfg(all(unix, feature = "serve"))]
#[test]
fn results_of_tasks_are_printed_as_their_schema_says() {
    use std::os::unix::fs::PermissionsExt;
    let dir = workdir();
    let harness = "#!/bin/sh\n[ \"$1\" = --help ] && exit 0\nwhile [ $# -gt 0 ]; do\n\
        [ \"$1\" = --output_path ] && out=$2\nshift\ndone\nmkdir -p \"$out/m\"\n\
        cp results.json \"$out/m/results_1.json\"\n";
    dir.write("harness", harness);
    let results = json!({
        "results": {"full": {"acc,none": 0.5, "acc_stderr,none": 0.1}, "bare": {"f1,none": 0.25}},
        "n-samples": {"full": {"original": 4, "effective": 4}}, "n-shot": {"full": 0},
        "higher_is_better": {"full": {"acc": true}, "bare": {"f1": true}},
        "lm_eval_version": "0.4.13",
    });
    dir.write("results.json", &results.to_string());
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir.path("harness"), executable).unwrap();
    let harness = dir.path("harness").display().to_string();
    let eval = ["eval", "model", "--tasks=full,bare", "--device=cpu", "--json", "--lm-eval"];
    let path = [("PATH", "/usr/bin:/bin")];
    let printed = dir.gptq_env(&[&eval[..], &[&harness]].concat(), &path).json();
    assert_eq!(printed.as_array().unwrap().len(), 2, "{printed}");
    held("eval", &printed);
}

#[cfg(feature = "hub")]
#[test]
fn transfers_are_printed_as_their_schemas_say() {
    use hub_support::StandIn;
    let dir = workdir();
    let hub = StandIn::start();
    let model = dir.path("model");
    let files: Vec<(String, Vec<u8>)> = util::listing(&model)
        .into_iter()
        .map(|name| (name.clone(), std::fs::read(model.join(name)).unwrap()))
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), &b[..])).collect();
    hub.publish("models/org/name", &files);
    let home = dir.path("home").display().to_string();
    let address = hub.address.clone();
    let run = |args: &[&str]| {
        let token = ("HF_TOKEN", hub_support::TOKEN);
        let env = [("HOME", &*home), ("HF_ENDPOINT", &*address), ("HF_HUB_OFFLINE", "0"), token];
        let printed = dir.gptq_env(args, &env).json();
        held(args[0], &printed);
        printed
    };
    assert_eq!(run(&["fetch", "org/name", "--json"]).as_array().unwrap().len(), 1);
    let fixed = ["quantize", "model", "--out", "out", "--recipe=rtn", "--device=cpu"];
    dir.gptq(&fixed).ok();
    let push = ["push", "out", "--repo", "me/made", "--json"];
    assert!(run(&[&push[..], &["--dry-run"]].concat())["files"].is_number());
    assert!(run(&push)["address"].is_string());
}

/// Whether a help lists the option, however wide its columns are.
fn speaks_json(help: &str) -> bool {
    help.lines().any(|line| line.split_whitespace().next() == Some("--json"))
}

/// Every command that takes `--json` has a schema and a test above, and there is no other schema.
#[test]
fn every_json_output_has_a_schema() {
    let run = |args: &[&str]| Workdir::new().gptq(args).stdout;
    let all: Value = serde_json::from_str(&run(&["schema"])).unwrap();
    let listed: Vec<&String> = all.as_object().unwrap().keys().collect();
    let help = run(&["--help"]);
    let commands = help.lines().filter_map(|line| {
        let name = line.strip_prefix("  ")?.split_whitespace().next()?;
        line.as_bytes()[2].is_ascii_lowercase().then_some(name)
    });
    let mut speak: Vec<&str> =
        commands.filter(|name| speaks_json(&run(&[name, "--help"]))).collect();
    speak.sort_unstable();
    assert_eq!(listed, speak);
    assert!(speak.len() >= 16, "{speak:?}");
    let tests = include_str!("schemas.rs");
    for command in speak {
        let named = tests.contains(&format!("\"{command}\", "))
            || tests.contains(&format!("\"{command}\"]"));
        assert!(named, "no test runs {command} --json");
        assert_eq!(schema(command).title(), format!("gptq {command} --json"));
        let wrong = schema(command).faults();
        assert!(wrong.is_empty(), "{command}: {}", wrong.join("\n"));
    }
    Workdir::new().gptq(&["schema", "serve"]).refused(&["`serve`", "--json", "quantize"]);
}

/// The oracle of this file: what is wrong with a document is found.
#[test]
fn documents_that_are_not_of_the_schema_are_refused() {
    let schema = json!({
        "type": "object", "required": ["bits", "error"],
        "properties": {
            "bits": {"type": "integer", "enum": [3, 4], "minimum": 0},
            "error": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
            "list": {"type": "array", "items": {"$ref": "#/$defs/name"}, "minItems": 1, "maxItems": 2},
            "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "$defs": {"name": {"type": "string"}},
    });
    let good = json!({"bits": 4, "error": null, "list": ["a"], "either": true, "map": {"x": 1}});
    assert_eq!(refusals(&schema, &good), Vec::<String>::new());
    for (key, value) in [
        ("bits", json!(5)),
        ("bits", json!(3.5)),
        ("bits", json!("4")),
        ("error", json!(1.5)),
        ("error", json!(-0.5)),
        ("error", json!(false)),
        ("list", json!([])),
        ("list", json!(["a", "b", "c"])),
        ("list", json!([1])),
        ("either", json!(1)),
        ("map", json!({"x": "1"})),
        ("unlisted", json!(1)),
    ] {
        let mut bad = good.clone();
        bad[key] = value;
        assert!(!refusals(&schema, &bad).is_empty(), "{bad}");
    }
    let mut short = good.clone();
    short.as_object_mut().unwrap().remove("error");
    assert!(!refusals(&schema, &short).is_empty());
    assert!(!refusals(&schema, &json!([])).is_empty());
    // A word that this reader does not know would be a rule that nothing checks.
    let odd = Schema::new(json!({"type": "string", "pattern": "x"}));
    assert!(!odd.faults().is_empty());
    let dangling = Schema::new(json!({"$ref": "#/$defs/none"}));
    assert!(!dangling.faults().is_empty());
}
