//! Runs shared by several ranks, on the CPU: processes as a launcher starts them, and threads.

#![expect(clippy::unwrap_used, reason = "a test")]
#![allow(dead_code, reason = "the helpers serve other tests too")]

mod ranks_support;
mod util;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use gptq_checkpoint::{Checkpoint, Layout};
use gptq_compute::greeting::{Answer, Greeting, RunDigest, Verdict};
use gptq_compute::{Device, RankHandle};
use gptq_pipeline::job::QuantizeJob;
use gptq_pipeline::progress::Silent;
use gptq_pipeline::quantize::quantize as quantize_branch;
use gptq_pipeline::recipe_fit;
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::source_dtype::SourceDtype;
use gptq_text::calibration::{CalibrationOverrides, CalibrationRecipe};
use gptq_text::tokens::TextTokenizer;
use safetensors::SafeTensors;

use ranks_support::{distances, free_port, launcher, ranks, run, unlike_ranks};
use util::{Outcome, TinyLlama, Workdir, listing, repository, words};

fn model() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::with_mlp(192).write(&dir.path("model"));
    dir.write("text.txt", &words(4000));
    dir
}

fn quantize<'a>(out: &'a str, recipe: &'a str) -> Vec<&'a str> {
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

/// The embedded model, which is trained: unlike random weights it shows in perplexity what is wrong.
fn demo<'a>(model: &'a str, out: &'a str, recipe: &'a str) -> Vec<&'a str> {
    let mut args = vec!["quantize", model, "--out", out, "--recipe", recipe, "--device", "cpu"];
    args.extend(["--calib-dataset", "demo/calibration.txt", "--windows", "8", "--seq-len", "256"]);
    args.push("--json");
    args
}

/// KL of a model to another on text that neither was calibrated on, over 8 windows of 256 tokens.
fn kl(dir: &Workdir, size: usize, model: &str, base: &str) -> f64 {
    let mut args = vec!["ppl", model, "--base", base, "--dataset", "demo/heldout.txt"];
    args.extend(["--seq-len", "256", "--max-windows", "8", "--device", "cpu", "--json"]);
    let measured = if size == 1 { dir.gptq(&args) } else { ranks(dir, size, &args).swap_remove(0) };
    number(&measured.json()["base"]["kl"])
}

/// Sums over tokens are rounded in another order by several ranks, so a code near a tie may fall the
/// other way, which moves the codes after it in its row; later blocks then see other inputs. So codes
/// may differ anywhere, but no row of any block may lie farther from that of one rank than rounding
/// explains: a row solved from other weights or for other inputs does.
#[test]
fn ranks_make_the_file_that_one_makes() {
    let dir = Workdir::new();
    let root = repository();
    std::os::unix::fs::symlink(root.join("calib/demo"), dir.path("demo")).unwrap();
    let source = root.join("tests/fixtures/demo-llama");
    let source = source.to_str().unwrap();
    for recipe in ["autogptq", "best"] {
        let one = format!("{recipe}-1");
        dir.gptq(&demo(source, &one, recipe)).ok();
        let lost = kl(&dir, 1, &one, source);
        for (size, runs) in [(2, 2), (3, 1)] {
            let names: Vec<String> =
                (0..runs).map(|run| format!("{recipe}-{size}-{run}")).collect();
            for name in &names {
                let outcomes = ranks(&dir, size, &demo(source, name, recipe));
                assert_eq!(outcomes[0].json()["blocks"].as_array().unwrap().len(), 5);
                for follower in &outcomes[1..] {
                    assert_eq!(follower.ok(), "", "rank 0 alone prints results");
                    assert_eq!(follower.stderr, "");
                }
            }
            let several = dir.path(&names[0]);
            for name in &names[1..] {
                let same = tensors(&several) == tensors(&dir.path(name));
                assert!(same, "{recipe} on {size} ranks is not reproducible");
            }
            for (block, d) in distances(&dir.path(&one), &several).iter().enumerate() {
                let what = format!("{recipe}, {size} ranks, block {block}: {d:?}");
                println!("{what}");
                assert!(d.row < 0.7 && d.scales < 0.1 && d.errors < 0.05, "{what}");
                assert!(d.codes < 0.4 && d.zeros < 0.01 && d.columns < 0.2, "{what}");
            }
            let apart = kl(&dir, size, &names[0], &one);
            println!("{recipe}, {size} ranks: KL {apart}, of {lost} to the dense model");
            assert!(apart < 2.0 * lost, "{recipe}, {size} ranks: KL {apart}, {lost} to the model");
        }
    }
}

#[test]
fn threads_make_the_file_that_processes_make() {
    let dir = model();
    ranks(&dir, 2, &quantize("processes", "best"))[0].ok();

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
    let calibration = recipe.sample(&tokenizer, None).unwrap();
    let mut spec = QuantSpec::new(4, Some(32), true, Recipe::Best.damp(), Recipe::Best);
    recipe_fit::fit(source.config(), false, &mut spec);
    let run = |handle: RankHandle| {
        handle.run(&Device::Cpu, |ranks| {
            let job = QuantizeJob {
                source: &source,
                model: "model".to_owned(),
                branch: "threads".to_owned(),
                source_dtype: SourceDtype::Fp16,
                device: Device::Cpu,
                ranks: ranks.clone(),
                spec: spec.clone(),
                calibration: Some(&calibration),
                layout: Layout::Modern,
                out: dir.path("threads"),
                max_shard_bytes: None,
                strict: false,
                shared: None,
                beside: None,
            };
            quantize_branch(&job, &Silent)
        })
    };
    let written: Vec<bool> = std::thread::scope(|scope| {
        let run = &run;
        let spawn = |handle| scope.spawn(move || run(handle).unwrap().is_some());
        let threads: Vec<_> = RankHandle::threads(2).into_iter().map(spawn).collect();
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

/// A connection to rank 0, once it listens.
fn connect(port: &str) -> TcpStream {
    let start = Instant::now();
    loop {
        match TcpStream::connect(format!("127.0.0.1:{port}")) {
            Ok(stream) => return stream,
            Err(e) => assert!(start.elapsed() < Duration::from_secs(60), "{e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Greets as rank 1 of a run, waits until all are there, and says something before it leaves.
fn impostor(port: &str, run_id: &str, last_words: &[u8]) {
    let mut stream = connect(port);
    let run = RunDigest::of(&format!("GPTQ_RUN_ID={run_id}"));
    stream.write_all(&Greeting::new(1, run).to_bytes()).unwrap();
    // Seated, and then begun.
    for verdict in [Verdict::Admitted, Verdict::Begin] {
        let mut answer = [0; Answer::LENGTH];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(Answer::parse(&answer).unwrap().verdict, verdict);
    }
    stream.write_all(last_words).unwrap();
}

/// A rank 1 that leaves, as one whose host fails, and one that says that 34 GB follow.
#[test]
fn a_lost_rank_ends_the_run_and_leaves_nothing() {
    let dir = model();
    let mut claim = vec![0];
    claim.extend(1_u64.to_le_bytes());
    claim.extend((1_u64 << 33).to_le_bytes());
    for last_words in [&[][..], &claim] {
        let port = free_port();
        let mut env = launcher(0, 2, &port);
        env.push(("GPTQ_RUN_ID".to_owned(), "7".to_owned()));
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| impostor(&port, "7", last_words));
            run(&dir, &quantize("out", "autogptq"), &env)
        });
        outcome.refused(&["Rank 1 was lost"]);
        assert!(!dir.path("out").exists());
    }
    dir.gptq(&quantize("out", "autogptq")).ok();
}

/// Who calls without the run's id is turned away, and the run goes on with its own rank 1.
#[test]
fn a_stranger_is_turned_away_and_reported() {
    let dir = model();
    let port = free_port();
    let args = perplexity("model");
    let outcomes = std::thread::scope(|scope| {
        let first = scope.spawn(|| run(&dir, &args, &launcher(0, 2, &port)));
        let mut stream = connect(&port);
        let guess = Greeting::new(1, RunDigest::of("GPTQ_RUN_ID=guessed"));
        stream.write_all(&guess.to_bytes()).unwrap();
        let mut answer = [0; Answer::LENGTH];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(Answer::parse(&answer).unwrap().verdict, Verdict::OtherRun);
        // Another process of this host and user has no id to find but that of its port's run.
        let second = run(&dir, &args, &launcher(1, 2, &port));
        [first.join().unwrap(), second]
    });
    let [first, second] = outcomes;
    assert_eq!(first.json()["ranks"], 2);
    assert!(first.stderr.contains("turned away 1 call: 127.0.0.1"), "{}", first.stderr);
    assert_eq!((second.ok(), second.stderr.as_str()), ("", ""));
}

/// Ranks that were not started alike: what rank 1 has else, and how both say so.
#[test]
fn ranks_that_differ_name_what_differs_and_write_nothing() {
    let dir = model();
    let mut other = TinyLlama::with_mlp(192);
    other.tensor("model.layers.1.mlp.up_proj.weight").values[77] += 0.25;
    other.write(&dir.path("other"));
    dir.write("other.txt", &words(4001));
    let job = quantize("out", "autogptq");
    let with = |more: &[&'static str]| [&job[..], more].concat();
    // The last of two options counts nowhere: replaced where it is given already.
    let instead = |from: &str, to: &'static str| -> Vec<&str> {
        job.iter().map(|&arg| if arg == from { to } else { arg }).collect()
    };
    let measure = perplexity("model");
    let measured = |more: &[&'static str]| [&measure[..], more].concat();
    let bench =
        ["bench", "--width", "tiny", "--windows", "2", "--seq-len", "32", "--device", "cpu"];
    let cases: Vec<(&[&str], Vec<&str>, &str)> = vec![
        (&job, with(&["--bits", "3"]), "bits (rank 0: `4`, rank 1: `3`)"),
        (&job, instead("32", "64"), "group size (rank 0: `32`, rank 1: `64`)"),
        (&job, with(&["--act-order=false"]), "act-order"),
        (&job, with(&["--damp", "0.02"]), "damp"),
        (&job, with(&["--set", "clip=search"]), "choices"),
        (&job, with(&["--source-dtype", "fp32"]), "source dtype"),
        (&job, instead("autogptq", "best"), "recipe (rank 0: `autogptq`, rank 1: `best`)"),
        (&job, instead("5", "4"), "calibration windows (rank 0: `5 × 64 tokens`, rank 1: `4 × 64"),
        (&job, with(&["--seed", "7"]), "calibration seed (rank 0: `0`, rank 1: `7`)"),
        (&job, instead("text.txt", "other.txt"), "calibration text"),
        (&job, instead("model", "other"), "the source model"),
        (&job, measure.clone(), "the command (rank 0: `quantize`, rank 1: `ppl`)"),
        (&measure, measured(&["--max-windows", "3"]), "windows (rank 0: "),
        (&measure, measured(&["--base", "other"]), "the base (rank 0: `none`, rank 1: "),
        (&measure, perplexity("other"), "the model"),
        (&bench, [&bench[..], &["--recipe", "autogptq"]].concat(), "recipe"),
    ];
    for (first, second, named) in &cases {
        let outcomes = unlike_ranks(&dir, &[first, second], &[]);
        for (rank, outcome) in outcomes.iter().enumerate() {
            let Outcome { code, stdout, stderr } = outcome;
            assert_eq!((*code, stdout.as_str()), (1, ""), "{named}: rank {rank}: {stderr}");
            let explained = stderr.contains("The ranks do not agree") && stderr.contains(named);
            assert!(explained, "{named}: rank {rank}: {stderr}");
        }
    }
    assert!(listing(&dir.path(".")).iter().all(|name| !name.starts_with("out")));
}

/// The same tensors and config.json: one word of quantize_config.json makes other weights of them.
#[test]
fn scales_are_tuned_by_one_rank_alone() {
    let dir = model();
    let outcomes = ranks(&dir, 2, &quantize("out", "tuned"));
    let said: Vec<&str> = outcomes.iter().map(|outcome| outcome.stderr.as_str()).collect();
    assert!(outcomes.iter().all(|outcome| outcome.code == 1), "{said:?}");
    // Whichever comes second may hear of the first's end before it comes to say the same.
    let why =
        "tune=0 (or the recipe best) instead of 64: scales are tuned on one device, and 2 make";
    assert!(said.iter().any(|said| said.contains(why)), "{said:?}");
    assert!(!dir.path("out").exists());
}

#[test]
fn ranks_that_read_one_file_in_two_ways_do_not_measure_it() {
    let dir = model();
    for name in ["ra", "rb"] {
        let mut args = quantize(name, "rtn");
        args.truncate(8);
        dir.gptq(&args).ok();
        let edit = |file: &str, change: &dyn Fn(&mut serde_json::Value)| {
            let path = dir.path(name).join(file);
            let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            change(&mut json);
            std::fs::write(path, json.to_string()).unwrap();
        };
        edit("config.json", &|json| {
            json.as_object_mut().unwrap().remove("quantization_config");
        });
        edit("quantize_config.json", &|json| {
            json["sym"] = false.into();
            json["checkpoint_format"] = if name == "ra" { "gptq" } else { "gptq_v2" }.into();
        });
    }
    let mut with_base = perplexity("model");
    with_base.extend(["--base", "ra"]);
    let mut with_other = perplexity("model");
    with_other.extend(["--base", "rb"]);
    for (first, second, named) in [
        (perplexity("ra"), perplexity("rb"), "in the model's checkpoint_format (rank 0: `gptq`"),
        (with_base, with_other, "in the base's checkpoint_format (rank 0: `gptq`"),
    ] {
        for (rank, outcome) in unlike_ranks(&dir, &[&first, &second], &[]).iter().enumerate() {
            let Outcome { code, stdout, stderr } = outcome;
            assert_eq!((*code, stdout.as_str()), (1, ""), "rank {rank}: {stderr}");
            let explained = stderr.contains(named) && stderr.contains("rank 1: `gptq_v2`)");
            assert!(explained, "rank {rank}: {stderr}");
        }
    }
}

/// One byte more at the end of the program's file changes nothing but what build it is.
#[test]
fn ranks_of_two_builds_do_not_work_together() {
    let dir = model();
    let other = dir.path("gptq");
    let mut program = std::fs::read(env!("CARGO_BIN_EXE_gptq")).unwrap();
    program.push(0);
    std::fs::write(&other, program).unwrap();
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o755)).unwrap();
    let port = free_port();
    let args = quantize("out", "autogptq");
    let second = std::process::Command::new(&other)
        .args(&args)
        .current_dir(dir.path("."))
        .env_clear()
        .envs(launcher(1, 2, &port))
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let first = run(&dir, &args, &launcher(0, 2, &port));
    first.refused(&["The ranks do not agree", "the program (rank 0: `"]);
    let second = second.wait_with_output().unwrap();
    let messages = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{messages}");
    assert!(
        messages.contains("rank 1: error: ") && messages.contains("the program (rank 0: `"),
        "{messages}"
    );
    assert!(!dir.path("out").exists());
}

/// The second job's rank 0 finds the port taken, and its rank 1 is no rank of the first job.
#[test]
fn two_jobs_at_one_port_are_distinguished() {
    let dir = model();
    let port = free_port();
    let of_job = |rank: usize, job: &str| {
        let mut env = launcher(rank, 2, &port);
        env.extend(
            [("GPTQ_RUN_ID", job), ("GPTQ_JOIN_TIMEOUT", if job == "b" { "1" } else { "60" })]
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        env
    };
    let args = perplexity("model");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| run(&dir, &args, &of_job(0, "a")));
        let start = Instant::now();
        while TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            assert!(start.elapsed() < Duration::from_secs(60), "job a does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        run(&dir, &args, &of_job(0, "b")).refused(&[&port, "another run may be using it"]);
        let stray = run(&dir, &args, &of_job(1, "b"));
        assert_eq!(stray.code, 1);
        assert!(stray.stderr.contains("rank 0 of another run"), "{}", stray.stderr);
        run(&dir, &args, &of_job(1, "a")).ok();
        first.join().unwrap().ok();
    });
}

#[test]
fn ranks_meet_at_every_name_of_this_host() {
    let dir = model();
    let mut hosts = vec!["127.0.1.1", "localhost"];
    if TcpListener::bind("[::1]:0").is_ok() {
        hosts.extend(["::1", "[::1]"]);
    }
    let args = perplexity("model");
    for host in hosts {
        let outcomes = unlike_ranks(&dir, &[&args, &args], &[("MASTER_ADDR", host)]);
        for outcome in outcomes {
            outcome.ok();
        }
    }
}

#[test]
fn the_number_of_ranks_is_recorded() {
    let dir = model();
    let outcome = ranks(&dir, 2, &quantize("two", "autogptq")).swap_remove(0);
    assert_eq!(outcome.json()["ranks"], 2);
    let read = |file: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.path(file)).unwrap()).unwrap()
    };
    assert_eq!(read("two/gptq_report.json")["ranks"], 2);
    assert_eq!(read("two/gptq_manifest.json")["made_from"]["the number of ranks"], "2");
    let text = dir.gptq(&["report", "two", "--html", "two.html"]);
    text.ok();
    let page = std::fs::read_to_string(dir.path("two.html")).unwrap();
    assert!(page.contains("2 × cpu ("), "{page}");
}

#[test]
fn what_a_launcher_leaves_out_is_named() {
    let dir = model();
    let outcome = dir.gptq_env(&perplexity("model"), &[("RANK", "1"), ("WORLD_SIZE", "2")]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("MASTER_ADDR"), "{}", outcome.stderr);
}

/// A wrong number is neither tried nor taken for a run of one.
#[test]
fn numbers_that_no_launcher_gives_are_refused() {
    let dir = model();
    let args = perplexity("model");
    for (rank, size, port, named) in [
        ("0", "18446744073709551615", "29500", "`WORLD_SIZE=18446744073709551615`"),
        ("0", "10000000000", "29500", "`WORLD_SIZE=10000000000`"),
        ("0", "0", "29500", "`WORLD_SIZE=0`"),
        ("1", "1", "29500", "`RANK=1`"),
        ("0", "2", "0", "`MASTER_PORT=0`"),
    ] {
        let env = [
            ("RANK", rank),
            ("WORLD_SIZE", size),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
            ("GPTQ_JOIN_TIMEOUT", "1"),
        ];
        dir.gptq_env(&args, &env).refused(&[named]);
    }
}

#[test]
fn rank_0_says_for_whom_it_waits() {
    let dir = model();
    let mut env = launcher(0, 3, &free_port());
    env.push(("GPTQ_JOIN_TIMEOUT".to_owned(), "7".to_owned()));
    let outcome = run(&dir, &[&perplexity("model")[..], &["--quiet"]].concat(), &env);
    outcome.refused(&["Rank 0 has waited 7 s", "rank 1, 2 of 3"]);
    let messages =
        outcome.stderr.matches("rank 0 is waiting for rank 1, 2 of 3 at 127.0.0.1:").count();
    assert_eq!(messages, 1, "{}", outcome.stderr);
}
