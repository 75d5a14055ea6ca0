//! `kill -9` at any moment, the same command again: the branches are byte for byte those of an
//! undisturbed run.
//!
//! Kills land at random times, and, where `strace` is installed, at every single step that changes
//! the disk: the system call that makes it is where the process dies. `GPTQ_KILLS=200` asks for so
//! many random kills and for every kind of step; without it the tests take seconds.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use util::{Noise, TinyLlama, Workdir, contents, listing, words};

type Contents = BTreeMap<String, Vec<u8>>;

/// Random kills of a quick run.
const KILLS: usize = 12;

const FACTS: &str = "name = \"Tiny\"\nrepository = \"org/tiny-GPTQ\"\nauthor = \"nobody\"\n\
    license = \"mit\"\nlanguages = [\"en\"]\ndescription = \"Says nothing.\"\n";

/// A tiny model with a license in a folder of its own, and two branches with cards.
fn prepared(damp: f32) -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("model/LICENSES/LICENSE", "may be used");
    dir.write("text.txt", &words(2000));
    dir.write("facts.toml", FACTS);
    configure(&dir, damp);
    dir
}

fn configure(dir: &Workdir, damp: f32) {
    let mut config = format!(
        "model = \"model\"\ncalibration = \"card\"\nrecipe = \"autogptq\"\ndamp = {damp}\n\
         card = \"facts.toml\"\n\
         [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 16\nseq_len = 64\n\
         [evaluation]\ndataset = \"text.txt\"\nprotocol = \"paper\"\nseq_len = 64\n"
    );
    for (name, bits, recipe) in [("a", 4, "autogptq"), ("b", 3, "best")] {
        config.push_str(&format!(
            "[[branch]]\nname = \"{name}\"\nbits = {bits}\ngroup_size = 32\nact_order = true\n\
             recipe = \"{recipe}\"\n"
        ));
    }
    dir.write("sweep.toml", &config);
}

/// The sweep into `out`, quiet; `tool` is what runs it.
fn command(dir: &Workdir, tool: &[&str], out: &str) -> Command {
    let gptq = env!("CARGO_BIN_EXE_gptq");
    let mut words = tool.to_vec();
    words.extend([gptq, "sweep", "sweep.toml", "--device", "cpu", "--quiet", "--out", out]);
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .current_dir(dir.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Runs the sweep to its end.
#[track_caller]
fn finish(dir: &Workdir, out: &str) {
    let output = command(dir, &[], out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What must be the same: everything but the table with its seconds; of the sweep's own folder the
/// names.
fn branches(dir: &Workdir, out: &str) -> Contents {
    let mut all = contents(&dir.path(out));
    all.remove("sweep.json");
    let own = listing(&dir.path(out).join(".gptq-sweep"));
    all.extend(own.into_iter().map(|name| (format!(".gptq-sweep/{name}"), Vec::new())));
    all
}

/// Names what differs, for a mismatch.
fn differences(found: &Contents, expected: &Contents) -> Vec<String> {
    let mut names: Vec<&String> = found.keys().chain(expected.keys()).collect();
    names.sort();
    names.dedup();
    names.into_iter().filter(|name| found.get(*name) != expected.get(*name)).cloned().collect()
}

/// How far the branch that was being made had come.
fn phase(out: &Path) -> &'static str {
    let entries = fs::read_dir(out).into_iter().flatten();
    let mut names = entries.map(|entry| entry.unwrap().path());
    let partial = names.find(|path| path.extension().is_some_and(|e| e == "partial"));
    match partial {
        None if out.join("b/gptq_manifest.json").exists() => "after the last branch",
        None => "between branches",
        Some(p) if p.join("gptq_manifest.json").exists() => "measuring, listed",
        Some(p) if p.join("config.json").exists() => "measuring, not listed",
        Some(_) => "quantizing",
    }
}

#[test]
fn a_sweep_that_is_killed_at_random_ends_with_the_same_bytes() {
    let wanted = std::env::var("GPTQ_KILLS").map_or(KILLS, |n| n.parse().unwrap());
    let dir = prepared(0.01);
    let start = Instant::now();
    finish(&dir, "undisturbed");
    let whole_run = start.elapsed().as_secs_f32();
    let expected = branches(&dir, "undisturbed");
    let mut noise = Noise::new(7);
    let (mut kills, mut rounds, mut mismatches) = (0, 0, Vec::new());
    let mut phases: BTreeMap<&str, usize> = BTreeMap::new();
    while kills < wanted {
        rounds += 1;
        let out = format!("round-{rounds}");
        // Until it is killed no more; most kills come early, so that a round has several.
        while !killed(&dir, &out, whole_run * (0.1 + 0.4 * (noise.next() + 1.0) * 0.5)) {
            kills += 1;
            *phases.entry(phase(&dir.path(&out))).or_default() += 1;
        }
        let found = branches(&dir, &out);
        if found != expected {
            mismatches.push((rounds, differences(&found, &expected)));
        }
        fs::remove_dir_all(dir.path(&out)).unwrap();
    }
    println!("{kills} kills in {rounds} rounds, {} mismatches; {phases:?}", mismatches.len());
    assert!(mismatches.is_empty(), "{mismatches:?}");
}

/// Runs the sweep for so many seconds. True if it came to its end first.
fn killed(dir: &Workdir, out: &str, seconds: f32) -> bool {
    let mut child = command(dir, &[], out).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs_f32(seconds);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{}", stderr(child));
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SIGKILL. It may have ended meanwhile.
    child.kill().unwrap();
    child.wait().unwrap().success()
}

fn stderr(child: std::process::Child) -> String {
    String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr).into_owned()
}

/// System calls that change the disk, whether finished branches of other settings are there to be
/// replaced, and the number of steps tried in a quick run.
const STEPS: [(&str, bool, usize); 11] = [
    ("rename", false, usize::MAX),
    ("unlink", false, usize::MAX),
    ("mkdir", false, 3),
    ("ftruncate", false, 2),
    ("fsync", false, 2),
    ("pwrite64", false, 2),
    ("flock", false, 2),
    ("rename", true, 2),
    ("unlink", true, 5),
    ("unlinkat", true, 2),
    ("rmdir", true, 2),
];

#[test]
fn a_sweep_that_is_killed_at_any_step_ends_with_the_same_bytes() {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        util::needs::Need::Strace.is_missing("strace is not installed");
        return;
    }
    let thorough = std::env::var_os("GPTQ_KILLS").is_some();
    let dir = prepared(0.02);
    finish(&dir, "stale");
    configure(&dir, 0.01);
    finish(&dir, "undisturbed");
    let expected = branches(&dir, "undisturbed");
    let (mut kills, mut mismatches) = (0, Vec::new());
    for (call, replacing, quick) in STEPS {
        let most = if thorough { usize::MAX } else { quick };
        let mut step = 0;
        while step < most {
            step += 1;
            let out = format!("{call}-{step}");
            if replacing {
                copy(&dir.path("stale"), &dir.path(&out));
            }
            let alive = killed_at(&dir, call, step, &out).success();
            if !alive {
                kills += 1;
                finish(&dir, &out);
            }
            let found = branches(&dir, &out);
            if found != expected {
                mismatches.push((out.clone(), differences(&found, &expected)));
            }
            fs::remove_dir_all(dir.path(&out)).unwrap();
            if alive {
                step -= 1;
                break;
            }
        }
        let over = if replacing { "over finished branches" } else { "in a new folder" };
        println!("{call} {over}: killed at {step} steps");
    }
    println!("{kills} kills, {} mismatches", mismatches.len());
    assert!(kills > 10, "strace killed nothing");
    assert!(mismatches.is_empty(), "{mismatches:?}");
}

/// A folder, one more level of folders deep than a sweep makes.
fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Runs the sweep under strace, which kills it as a thread makes its `step`th call of that name.
fn killed_at(dir: &Workdir, call: &str, step: usize, out: &str) -> ExitStatus {
    let inject = format!("inject={call}:signal=KILL:when={step}");
    let trace = format!("trace={call}");
    let tool = ["strace", "-f", "-q", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    command(dir, &tool, out).status().unwrap()
}
