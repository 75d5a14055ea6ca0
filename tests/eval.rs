//! `gptq eval`: what a harness measures of a server of ours is kept beside perplexity.

#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use util::runs::{quantize, with_model};
use util::{TinyLlama, Workdir};

/// A harness that asks the server which model it has, and says of the base what is not said of others.
const HARNESS: &str = r#"#!/bin/sh
[ "$1" = --help ] && exit 0
while [ $# -gt 0 ]; do
    case "$1" in
        --output_path) out=$2 ;;
        --model_args) args=$2 ;;
        --tasks) tasks=$2 ;;
    esac
    shift
done
[ "$tasks" = broken ] && { echo 'no such task' >&2; exit 3; }
[ "$tasks" = silent ] && exit 0
if [ "$tasks" = slow ]; then
    sleep 1000 &
    printf ' 10%%|#\r' >&2
    echo "$$ $! $args" > asked.new
    mv asked.new asked
    wait
fi
value=0.625
case "$args" in model=*/model,*) value=0.75 ;; esac
case "$args" in *base_url=http://127.0.0.1:*/v1/completions,*) ;; *) exit 4 ;; esac
# As a text begins by its own tokenizer, and as long as the model was made for.
case "$args" in *,add_bos_token=True,max_length=128,*) ;; *) exit 5 ;; esac
mkdir -p "$out/some model"
cat > "$out/some model/results_2026.json" <<EOF
{"results": {"$tasks": {"alias": "x", "acc,none": $value, "acc_stderr,none": 0.02}},
 "n-samples": {"$tasks": {"original": 40, "effective": 40}}, "n-shot": {"$tasks": 0},
 "higher_is_better": {"$tasks": {"acc": true}}, "lm_eval_version": "0.4.13"}
EOF
"#;

fn workdir() -> Workdir {
    let dir = with_model(&TinyLlama::new());
    dir.write("harness", HARNESS);
    fs::set_permissions(dir.path("harness"), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// The harness is found by its path, and needs a shell's own.
fn eval(dir: &Workdir, args: &[&str]) -> util::Outcome {
    let harness = dir.path("harness").display().to_string();
    let fixed = ["eval", "--lm-eval", &harness];
    dir.gptq_env(&[&fixed[..], args].concat(), &[("PATH", "/usr/bin:/bin")])
}

#[test]
fn results_are_kept_beside_perplexity_and_shown_with_it() {
    let dir = workdir();
    quantize(&dir, &["--bits", "4", "--group-size", "32"]).ok();
    let records = eval(&dir, &["out", "--tasks", "facts", "--base", "model", "--json"]).json();
    assert_eq!(records[0]["value"], 0.625);
    assert_eq!(records[0]["base"], 0.75);
    let report: Value =
        serde_json::from_str(&fs::read_to_string(dir.path("out/gptq_report.json")).unwrap())
            .unwrap();
    assert_eq!(report["tasks"], records);
    // The folder is as whole as it was, and a second result takes the place of the first.
    dir.gptq(&["verify", "out"]).ok();
    eval(&dir, &["out", "--tasks", "facts"]).ok();
    eval(&dir, &["out", "--tasks", "more"]).ok();
    dir.gptq(&["verify", "out"]).ok();
    let shown = dir.gptq(&["report", "out"]);
    assert!(shown.ok().contains("| branch | facts acc | more acc |"), "{}", shown.stdout);
    assert!(shown.stdout.contains("0.6250 ± 0.0200 | 0.6250 ± 0.0200"), "{}", shown.stdout);
    // The gate holds what was never measured on a text, and nothing else but that.
    dir.gptq(&["check", "out", "--baseline", "tasks.json", "--update"]).ok();
    let held = dir.gptq(&["check", "out", "--baseline", "tasks.json"]);
    assert!(
        held.ok().contains("facts acc") && !held.stdout.contains("perplexity"),
        "{}",
        held.stdout
    );
    // A folder has a name, by whatever it is called.
    let harness = dir.path("harness").display().to_string();
    let inside = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["eval", ".", "--tasks", "facts", "--lm-eval", &harness])
        .current_dir(dir.path("out"))
        .output()
        .unwrap();
    assert!(inside.status.success(), "{}", String::from_utf8_lossy(&inside.stderr));
    dir.gptq(&["verify", "out"]).ok();
    // A model without a report is measured all the same.
    let dense = eval(&dir, &["model", "--tasks", "facts"]);
    assert!(dense.ok().contains("0.7500"), "{}", dense.stdout);
    assert!(dense.stderr.contains("not kept"), "{}", dense.stderr);
}

/// An eval that waits for a slow harness.
struct Asking {
    eval: Child,
    address: String,
    /// The harness and what it has started.
    processes: Vec<String>,
}

impl Asking {
    fn start(dir: &Workdir) -> Self {
        let harness = dir.path("harness").display().to_string();
        let eval = Command::new(env!("CARGO_BIN_EXE_gptq"))
            .args(["eval", "model", "--tasks", "slow", "--lm-eval", &harness])
            .current_dir(dir.path(""))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        within_a_minute("the harness is not asked", || dir.path("asked").exists());
        let asked = fs::read_to_string(dir.path("asked")).unwrap();
        fs::remove_file(dir.path("asked")).unwrap();
        let address = asked.split("http://").nth(1).unwrap().split('/').next().unwrap();
        TcpStream::connect(address).unwrap();
        let processes = asked.split(' ').take(2).map(str::to_owned).collect();
        Self { eval, address: address.to_owned(), processes }
    }

    fn signal(&self, signal: &str) {
        let id = self.eval.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }
}

fn within_a_minute(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The server and the harness are told of the same length, and whoever asks of one that is not all.
#[test]
fn a_context_is_the_one_that_is_asked_for() {
    let dir = workdir();
    let whole = eval(&dir, &["model", "--tasks", "facts"]);
    whole.ok();
    assert!(!whole.stderr.contains("context"), "{}", whole.stderr);
    let harness = HARNESS.replace("max_length=128", "max_length=64");
    dir.write("harness", &harness);
    let part = eval(&dir, &["model", "--tasks", "facts", "--context", "64"]);
    part.ok();
    assert!(part.stderr.contains("128 tokens, of which 64"), "{}", part.stderr);
    let refused = eval(&dir, &["model", "--tasks", "facts", "--context", "1000"]);
    refused.refused(&["1000", "128"]);
    // What is longer than most need is not taken as a matter of course.
    let mut long = TinyLlama::new();
    long.config["max_position_embeddings"] = serde_json::json!(8192);
    long.write(&dir.path("model"));
    dir.write("harness", &harness.replace("max_length=64", "max_length=4096"));
    let most = eval(&dir, &["model", "--tasks", "facts"]);
    most.ok();
    assert!(most.stderr.contains("8192 tokens, of which 4096"), "{}", most.stderr);
}

/// Nobody is left to answer or to ask, however impatient the one is who ends it.
#[test]
fn a_signal_ends_the_harness_and_the_server() {
    let dir = workdir();
    for (signals, last) in [
        (&["-INT"][..], 2),
        (&["-TERM"], 15),
        (&["-QUIT"], 3),
        // As a terminal does that is closed, and a person who does not wait.
        (&["-HUP", "-HUP"], 1),
        (&["-INT", "-INT", "-INT"], 2),
    ] {
        if signals[0] == "-HUP" && util::hangups_are_ignored() {
            continue;
        }
        let asking = Asking::start(&dir);
        signals.iter().for_each(|signal| asking.signal(signal));
        let Asking { eval, address, processes } = asking;
        let ended = eval.wait_with_output().unwrap();
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.signal(), Some(last), "a loop of a shell ends as well: {stderr}");
        assert!(stderr.contains("error: Interrupted"), "{stderr}");
        assert!(!stderr.contains("10%"), "what is piped gets no progress: {stderr}");
        assert!(ended.stdout.is_empty());
        assert!(TcpStream::connect(&address).is_err(), "the server is there");
        for process in processes {
            // What nobody has taken note of is a zombie.
            let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            assert!(state.is_empty() || state.contains(") Z "), "{signals:?}: {state}");
        }
    }
}

/// What no program hears of is no reason for a server to stay.
#[test]
fn the_server_ends_with_an_eval_that_is_killed() {
    let dir = workdir();
    let mut asking = Asking::start(&dir);
    asking.signal("-KILL");
    asking.eval.wait().unwrap();
    within_a_minute("the server is there", || TcpStream::connect(&asking.address).is_err());
    // A harness without a server fails by itself; this one sleeps.
    let _ = Command::new("kill").args(&asking.processes).status().unwrap();
}

#[test]
fn what_goes_wrong_is_named() {
    let dir = workdir();
    eval(&dir, &["model", "--tasks", "broken"]).refused(&["no such task"]);
    eval(&dir, &["model", "--tasks", "silent"]).refused(&["wrote no results"]);
    eval(&dir, &["model", "--tasks", "a b"]).refused(&["`a b` is no task's name"]);
    eval(&dir, &["model", "--tasks=--version"]).refused(&["no task's name"]);
    eval(&dir, &["absent", "--tasks", "facts"]).refused(&["absent"]);
    // Before a question is asked.
    dir.write("model/gptq_report.json", "{}");
    let refused = eval(&dir, &["model", "--tasks", "broken"]);
    refused.refused(&["not a report of this program"]);
    fs::remove_file(dir.path("model/gptq_report.json")).unwrap();
    dir.gptq(&["eval", "model", "--tasks", "facts"]).refused(&["lm_eval", "pip install"]);
}
