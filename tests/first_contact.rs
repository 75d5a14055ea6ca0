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
    let cards = repository().join("configs/cards/demo.toml").display().to_string();
    let cases: [(&[&str], &str); 23] = [
        (&["plan", "./nowhere"], "a folder that is there, or a model of the Hub as `ORG/NAME`"),
        (&["plan", "models\\x"], "paths have `/`"),
        (&["plan", "org/name"], "gptq fetch org/name"),
        (&["inspect", "empty"], "paths count from"),
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
