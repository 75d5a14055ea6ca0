//! What a newcomer sees: the bare command, doctor's verdict, a plan of any model, and what mistakes are
//! answered with.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use insta::assert_snapshot;
use serde_json::Value;
use util::{TinyLlama, Workdir, repository};

fn run(args: &[&str]) -> util::Outcome {
    Workdir::new().gptq(args)
}

fn tiny() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir
}

#[test]
fn the_bare_command_says_where_to_start() {
    let bare = run(&[]);
    assert_snapshot!(bare.snapshot(), @r"
    exit code 1
    --- stderr
    gptq quantizes Llama-family models
    with GPTQ and proves the result.

    Where to start:

      gptq doctor
        what this machine can do
      gptq plan MODEL
        size, memory, time of nine branches
      gptq quantize MODEL --out DIR
        4 bits, group size 128, act-order

    MODEL is a folder or a Hub id, such as
    HuggingFaceTB/SmolLM2-135M.

    All commands: gptq --help
    ");
    assert!(bare.stderr.lines().all(|line| line.len() <= 40));
    // What it names can be typed: clap takes each, and misses nothing but the model.
    let dir = tiny();
    dir.gptq(&["doctor"]).ok();
    dir.gptq(&["plan", "model"]).ok();
    let unknown = ["quantize", "HuggingFaceTB/SmolLM2-135M", "--out", "x"];
    dir.gptq_env(&unknown, &[("HF_HOME", "cache")])
        .refused(&["HuggingFaceTB/SmolLM2-135M", "gptq fetch"]);
    // A command without its arguments is told what it lacks.
    assert!(run(&["quantize"]).stderr.contains("--out <DIR>"));
}

#[test]
fn doctor_ends_with_a_verdict_and_one_step() {
    let shown = run(&["doctor"]);
    let lines: Vec<&str> = shown.ok().lines().collect();
    let [.., gap, verdict, next] = lines[..] else { panic!("{}", shown.stdout) };
    assert_eq!(gap, "");
    assert!(verdict.contains("eady"), "{verdict}");
    assert!(next.starts_with("Next: "), "{next}");
    let json = run(&["doctor", "--json"]).json();
    assert_eq!(json["verdict"], verdict);
    assert_eq!(format!("Next: {}", json["next"].as_str().unwrap()), next);
}

#[test]
fn any_model_is_planned_without_a_configuration() {
    let dir = tiny();
    let planned = dir.gptq(&["plan", "model", "--json"]).json();
    let rows = planned.as_array().unwrap();
    assert_eq!(rows.len(), 9);
    let settings = |row: &Value| {
        (row["bits"].as_u64(), row["group_size"].as_u64(), row["act_order"].as_bool())
    };
    assert_eq!(settings(&rows[0]), (Some(4), Some(32), Some(true)));
    assert_eq!(settings(&rows[8]), (Some(3), None, Some(true)));
    let shown = dir.gptq(&["plan", "model"]);
    assert!(shown.ok().contains("\n4bit-128g-act "), "{}", shown.stdout);
    assert!(shown.stderr.contains("Make them: gptq sweep nine --model model"), "{}", shown.stderr);
    // What it says to type next does what was planned, as far as a text is at hand.
    let sweep = ["sweep", "nine", "--model", "model", "--device=cpu"];
    dir.write("text.txt", &util::words(4000));
    let calibration = ["--calib-dataset=text.txt", "--windows=4", "--seq-len=32"];
    dir.gptq(&[&sweep[..], &calibration].concat()).refused(&["wikitext", "gptq fetch --dataset"]);
    dir.gptq(&["sweep", "nine"]).refused(&["`nine` names no model", "--model"]);
    dir.gptq(&["sweep", "ten"]).refused(&["`ten`", "nine or stablebeluga2"]);
    dir.gptq(&["plan", "model", "--config", "ten.toml"]).refused(&["`ten.toml`", "nine"]);
}

/// What is written in it is planned: bytes of a file that is made afterwards.
#[test]
fn a_plan_of_any_model_is_what_is_made() {
    let dir = tiny();
    let planned = dir.gptq(&["plan", "model", "--json"]).json();
    dir.write("text.txt", &util::words(4000));
    for row in planned.as_array().unwrap() {
        let name = row["branch"].as_str().unwrap();
        let fixed = ["quantize", "model", "--config=nine", "--device=cpu", "--windows=128"];
        // The metadata names the calibration, whose length the plan knows by its own name.
        let text = ["--calib-dataset=text.txt", "--seq-len=32"];
        let out = format!("out/{name}");
        let made =
            dir.gptq(&[&fixed[..], &text, &["--branch", name, "--out", &out, "--json"]].concat());
        let (planned, made) =
            (row["file_bytes"].as_u64().unwrap(), made.json()["file_bytes"].as_u64().unwrap());
        assert!(planned.abs_diff(made) < 100, "{name}: {planned} planned, {made} made");
    }
}

/// Mistakes that a newcomer makes, and a part of what each is told to do.
#[test]
fn mistakes_are_told_what_to_type_next() {
    let dir = tiny();
    std::fs::create_dir(dir.path("empty")).unwrap();
    dir.write("plain.txt", "w3");
    dir.write("none.txt", "");
    dir.write("other.jsonl", "{\"words\": \"w3\"}\n");
    dir.write("facts.jinja", "{{ messages }}");
    TinyLlama::new().write(&dir.path("outer/inner"));
    let cards = repository().join("configs/cards/demo.toml").display().to_string();
    let on = "--calib-dataset";
    let cases: [(&[&str], &str); 43] = [
        (&["plan", "./nowhere"], "a folder that is there, or a model of the Hub as `ORG/NAME`"),
        (&["plan", "models\\x"], "paths have `/`"),
        (&["plan", "org/name"], "gptq fetch org/name"),
        (&["inspect", "empty"], "the folder that holds config.json"),
        (&["quantize", "empty", "--out=q"], "the folder that holds config.json"),
        (&["ppl", "outer"], "give `outer/inner`"),
        (&["plan", "plain.txt"], "the folder that holds config.json"),
        (&["verify", "model"], "gptq quantize made"),
        (&["verify", "model/model.safetensors"], "name a folder"),
        (&["sweep", "model"], "name a file"),
        (&["check", "empty", "--baseline=empty"], "gptq sweep or gptq quantize"),
        (&["man", "--out", "plain.txt"], "name a folder"),
        (&["ppl", "model", "--per-token=empty"], "name a file"),
        (&["ppl", "model", "--per-token=no/such.csv"], "paths count from"),
        (&["quantize", "model", "--out", "model"], "choose another name"),
        (&["quantize", "model", "--out", "plain.txt"], "choose another name"),
        (&["quantize", "model", "--out", "plain.txt/q"], "name a folder"),
        (&["sweep", "nine", "--model=model", "--out=plain.txt"], "name a folder"),
        (&["quantize", "model", "--out=q", on, "none.txt"], "give a file"),
        (&["quantize", "model", "--out=q", on, "other.jsonl"], "#FIELD"),
        (&["quantize", "model", "--out=q", "--bits=5"], "2, 3, 4 or 8"),
        (&["quantize", "model", "--out=q", "--damp", "-1"], "above 0 and below 1"),
        (&["generate", "model", "--prompt=w3", "--chat", "--template=facts.jinja"], "TOML"),
        (&["generate", "model", "--prompt=w3", "--chat", "--template=no.toml"], "paths count from"),
        (&["inspect", "plain.txt"], "the folder that holds config.json"),
        (&["inspect", "C:\\models\\x"], "/mnt/c/models/x"),
        (&["quantize", "model", "--out=D:/x"], "/mnt/d/x"),
        (&["ppl", "model"], "gptq fetch --dataset Salesforce/wikitext"),
        (&["quantize", "model", "--out", "q"], "gptq fetch --dataset Salesforce/wikitext"),
        (&["quantize", "model", "--out", "q", "--calib-dataset=x.txt"], "paths count from"),
        (&["quantize", "model", "--out", "q", "--calib=mine"], "--calib-dataset"),
        (
            &["quantize", "model", "--out", "q", "--branch=a", "--config=mine"],
            "nine or stablebeluga2",
        ),
        (&["calib", "mix", "--model=model"], "gptq fetch --dataset Salesforce/wikitext"),
        (&["calib", "mine", "--model=model"], "--calib-dataset"),
        (&["calib", "mix", "--model=org/name"], "gptq fetch org/name"),
        (&["report", "empty"], "gptq sweep or gptq quantize"),
        (&["report", "nowhere"], "gptq quantize or gptq sweep"),
        (&["check", "empty", "--baseline", "b.json"], "gptq sweep or gptq quantize"),
        (&["card", "empty", "--facts", "nope.toml"], "paths count from"),
        (&["card", "empty", "--facts", &cards], "gptq sweep or gptq quantize"),
        (&["generate", "model", "--prompt=w3", "--chat"], "--template"),
        (&["eval", "model", "--tasks=x"], "pip install"),
        (&["schema", "serve"], "quantize, ppl"),
    ];
    for (args, advice) in cases {
        let told = dir.gptq_env(args, &[("HF_HOME", "cache")]);
        assert_eq!(told.code, 1, "{args:?}");
        let hints: Vec<&str> = told.stderr.lines().filter(|l| l.starts_with("hint: ")).collect();
        assert_eq!(hints.len(), 1, "{args:?}: {}", told.stderr);
        assert!(hints[0].contains(advice), "{args:?}: {}", told.stderr);
        assert!(!dir.path("q").exists() && !dir.path("q.partial").exists(), "{args:?}");
    }
    // A word that is nearly a command.
    assert!(run(&["quantise", "m"]).stderr.contains("'quantize'"));
}

/// What cannot be written is known before a model is downloaded or a text read.
#[test]
fn outputs_are_looked_at_first() {
    let dir = tiny();
    dir.write("plain.txt", "w3");
    let absent = ["--device=cpu", "--calib-dataset=absent.txt"];
    for out in ["model", "plain.txt", "plain.txt/q"] {
        let told = dir.gptq(&[&["quantize", "org/absent", "--out", out], &absent[..]].concat());
        told.refused(&[&format!("`{out}`")]);
        assert!(!told.stderr.contains("absent"), "{}", told.stderr);
    }
    let told = dir.gptq(&["sweep", "nine", "--model=org/absent", "--out=plain.txt"]);
    told.refused(&["`plain.txt`"]);
    let told = dir.gptq(&["ppl", "org/absent", "--per-token=plain.txt/x"]);
    told.refused(&["`plain.txt/x`"]);
}

/// Runs a line of bash in which `gptq` is the command.
fn bash(dir: &Workdir, line: &str) -> (i32, String) {
    let built = std::path::Path::new(env!("CARGO_BIN_EXE_gptq")).parent().unwrap();
    let output = std::process::Command::new("bash")
        .args(["--norc", "-c", line])
        .current_dir(dir.path("."))
        .env_clear()
        .env("PATH", format!("{}:/usr/bin:/bin", built.display()))
        .output()
        .unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8(output.stderr).unwrap())
}

/// As by a disk that is full, for one who may not mount a small one.
#[test]
fn a_limit_on_files_ends_with_an_error_and_leaves_nothing() {
    let dir = tiny();
    let before = util::listing(&dir.path("."));
    let run = "gptq quantize model --recipe rtn --device cpu --out q";
    let (code, told) = bash(&dir, &format!("ulimit -f 8; {run}"));
    assert_eq!(code, 1, "{told}");
    assert!(told.contains("error: Cannot write `q.partial/") && told.contains("hint: "), "{told}");
    assert!(told.contains("`ulimit -f`"), "{told}");
    assert_eq!(util::listing(&dir.path(".")), before);
    let (code, told) = bash(&dir, "ulimit -f 1; gptq man --out . 2>&1 >&2");
    assert_eq!(code, 1, "{told}");
    let left = util::listing(&dir.path("."));
    assert!(left.iter().all(|name| !name.starts_with(".gptq-")), "{left:?}");
}

#[test]
fn a_result_that_cannot_be_shown_is_an_error_and_a_closed_pipe_is_none() {
    let dir = tiny();
    for line in ["--help", "--version", "quantize --help", "doctor", "plan model", "man", "schema"]
    {
        let (code, told) = bash(&dir, &format!("gptq {line} > /dev/full"));
        assert_eq!(code, 1, "{line}: {told}");
        assert!(told.contains("error: Cannot write to stdout"), "{line}: {told}");
        assert!(told.contains("hint: free some space"), "{line}: {told}");
        let (code, told) = bash(&dir, &format!("set -o pipefail; gptq {line} | true"));
        assert_eq!(code, 0, "{line}: {told}");
        assert!(!told.contains("error:"), "{line}: {told}");
    }
}
