//! Runs shared by several ranks, on the CPU: processes as a launcher starts them, and threads.

#![expect(clippy::unwrap_used, reason = "a test")]
#![allow(dead_code, reason = "the helpers serve other tests too")]

mod util;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use gptq_checkpoint::{Checkpoint, Layout};
use gptq_compute::{Device, Seat};
use gptq_pipeline::calibration::{CalibrationOverrides, CalibrationRecipe};
use gptq_pipeline::progress::Silent;
use gptq_pipeline::quantise::{QuantiseJob, quantise as quantise_branch};
use gptq_pipeline::source_dtype::SourceDtype;
use gptq_pipeline::tokens::TextTokenizer;
use gptq_quant::{QuantSpec, Recipe};
use safetensors::SafeTensors;

use util::{Outcome, TinyLlama, Workdir, words};

/// A port that nobody listens on: the system's choice, given back.
fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

fn model() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::with_mlp(192).write(&dir.path("model"));
    dir.write("text.txt", &words(4000));
    dir
}

/// Runs the command as so many processes; outcomes in rank order.
fn ranks(dir: &Workdir, size: usize, args: &[&str]) -> Vec<Outcome> {
    let port = free_port();
    std::thread::scope(|scope| {
        let run = |rank: usize| {
            let (rank, size, port) = (rank.to_string(), size.to_string(), port.clone());
            scope.spawn(move || {
                let launcher = [
                    ("RANK", rank.as_str()),
                    ("WORLD_SIZE", &size),
                    ("LOCAL_RANK", &rank),
                    ("MASTER_ADDR", "127.0.0.1"),
                    ("MASTER_PORT", &port),
                ];
                dir.gptq_env(args, &launcher)
            })
        };
        let threads: Vec<_> = (0..size).map(run).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn quantise<'a>(out: &'a str, recipe: &'a str) -> Vec<&'a str> {
    let mut args = vec!["quantize", "model", "--out", out, "--recipe", recipe, "--device", "cpu"];
    args.extend(["--group-size", "32", "--calib-dataset", "text.txt", "--windows", "5"]);
    args.extend(["--seq-len", "64", "--json"]);
    args
}

fn perplexity(out: &str) -> Vec<&str> {
    vec!["ppl", out, "--dataset", "text.txt", "--seq-len", "64", "--device", "cpu", "--json"]
}

/// Every tensor's bytes.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
}

/// Share of the first block's 4-bit codes in which two files differ.
fn different_codes(a: &Path, b: &Path) -> f64 {
    let (a, b) = (tensors(a), tensors(b));
    assert!(a.keys().eq(b.keys()));
    let (mut different, mut all) = (0, 0);
    let first = |name: &str| name.starts_with("model.layers.0.") && name.ends_with("qweight");
    for (name, a) in a.iter().filter(|(name, _)| first(name)) {
        let b = &b[name];
        assert_eq!(a.len(), b.len(), "{name}");
        all += 2 * a.len();
        let half = |x: u8| usize::from(x & 15 != 0) + usize::from(x >> 4 != 0);
        different += a.iter().zip(b).map(|(a, b)| half(a ^ b)).sum::<usize>();
    }
    different as f64 / all as f64
}

#[test]
fn ranks_make_the_file_that_one_makes() {
    let dir = model();
    for recipe in ["autogptq", "best"] {
        let one = format!("{recipe}-1");
        dir.gptq(&quantise(&one, recipe)).ok();
        let alone = dir.gptq(&perplexity(&one)).json();
        for size in [2, 3] {
            let names = ["a", "b"].map(|run| format!("{recipe}-{size}{run}"));
            for name in &names {
                let outcomes = ranks(&dir, size, &quantise(name, recipe));
                let report = outcomes[0].json();
                assert_eq!(report["blocks"].as_array().unwrap().len(), 2);
                for follower in &outcomes[1..] {
                    assert_eq!(follower.ok(), "", "rank 0 alone prints results");
                    assert_eq!(follower.stderr, "");
                }
            }
            let [a, b] = names.each_ref().map(|name| dir.path(name));
            assert!(tensors(&a) == tensors(&b), "{recipe} on {size} ranks is not reproducible");
            // Sums over tokens are rounded in another order, so a code near a tie may fall the other
            // way; later blocks then see other inputs.
            let different = different_codes(&dir.path(&one), &a);
            assert!(different < 0.02, "{recipe}, {size} ranks: {different} of the codes");

            let shared = ranks(&dir, size, &perplexity(&names[0])).swap_remove(0).json();
            let ratio = number(&shared["perplexity"]) / number(&alone["perplexity"]);
            assert!((ratio - 1.0).abs() < 5e-3, "{recipe}, {size} ranks: {ratio}");
            assert_eq!(shared["tokens"], alone["tokens"]);
            assert_eq!(shared["windows"], alone["windows"]);
        }
    }
}

#[test]
fn threads_make_the_file_that_processes_make() {
    let dir = model();
    ranks(&dir, 2, &quantise("processes", "best"))[0].ok();

    let source = Checkpoint::open(&dir.path("model")).unwrap();
    let overrides = CalibrationOverrides {
        dataset: Some(dir.path("text.txt").to_str().unwrap().parse().unwrap()),
        windows: Some(5),
        seq_len: Some(64),
        join: None,
        seed: None,
    };
    let recipe = CalibrationRecipe::open("wikitext2").unwrap().with(overrides).unwrap();
    let tokenizer = TextTokenizer::open(source.dir(), source.config().vocab_size).unwrap();
    let calibration = recipe.sample(&tokenizer).unwrap();
    let run = |seat: Seat| {
        seat.run(&Device::Cpu, |ranks| {
            let job = QuantiseJob {
                source: &source,
                model: "model".to_owned(),
                branch: "threads".to_owned(),
                source_dtype: SourceDtype::Fp16,
                device: Device::Cpu,
                ranks: ranks.clone(),
                spec: QuantSpec::new(4, Some(32), true, Recipe::Best.damp(), Recipe::Best),
                calibration: Some(&calibration),
                layout: Layout::Modern,
                out: dir.path("threads"),
                max_shard_bytes: None,
                strict: false,
                shared: None,
            };
            quantise_branch(&job, &Silent)
        })
    };
    let written: Vec<bool> = std::thread::scope(|scope| {
        let run = &run;
        let spawn = |seat| scope.spawn(move || run(seat).unwrap().is_some());
        let threads: Vec<_> = Seat::threads(2).into_iter().map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(written, [true, false], "rank 0 writes");
    assert!(tensors(&dir.path("threads")) == tensors(&dir.path("processes")));
}

#[test]
fn ranks_measure_what_one_measures() {
    let dir = model();
    let args = [&perplexity("model")[..], &["--base", "model", "--max-windows", "7"]].concat();
    let alone = dir.gptq(&args).json();
    for size in [2, 3] {
        let shared = ranks(&dir, size, &args).swap_remove(0).json();
        for key in ["perplexity", "mean_nll", "standard_error"] {
            let (a, b) = (number(&shared[key]), number(&alone[key]));
            assert!((a / b - 1.0).abs() < 1e-6, "{key} on {size} ranks: {a} and {b}");
        }
        assert!(number(&shared["base"]["kl"]).abs() < 1e-9);
    }
}

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// A rank 1 that greets and leaves, as one whose host fails.
#[test]
fn a_lost_rank_ends_the_run_and_leaves_nothing() {
    let dir = model();
    let port = free_port();
    let launcher = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port.as_str()),
    ];
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            let mut stream = loop {
                match TcpStream::connect(format!("127.0.0.1:{port}")) {
                    Ok(stream) => break stream,
                    Err(e) => assert!(start.elapsed() < Duration::from_secs(60), "{e}"),
                }
                std::thread::sleep(Duration::from_millis(20));
            };
            let version = env!("CARGO_PKG_VERSION");
            let mut greeting = b"gptqrank".to_vec();
            for number in [1, 2, version.len()] {
                greeting.extend((number as u64).to_le_bytes());
            }
            greeting.extend(version.as_bytes());
            stream.write_all(&greeting).unwrap();
            stream.read_exact(&mut [0; 8]).unwrap();
        });
        dir.gptq_env(&quantise("out", "autogptq"), &launcher)
    });
    outcome.refused(&["Rank 1 was lost"]);
    assert!(!dir.path("out").exists());
    dir.gptq(&quantise("out", "autogptq")).ok();
}

#[test]
fn what_a_launcher_leaves_out_is_named() {
    let dir = model();
    let outcome = dir.gptq_env(&perplexity("model"), &[("RANK", "1"), ("WORLD_SIZE", "2")]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("MASTER_ADDR"), "{}", outcome.stderr);
}
