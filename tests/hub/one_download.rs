//! A sweep's branches from one download: what a sweep with `--discard-shards` makes, keeps and refuses.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use safetensors::SafeTensors;

use super::sharing::{is_left_over, snapshot};
use super::*;
use util::{contents, repository};

type Files = BTreeMap<String, Vec<u8>>;

/// The same model in shards as models on the Hub have them: block after block.
fn in_shards(dir: &Path) -> Files {
    let mut files = files(dir);
    let bytes = files.remove("model.safetensors").unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let block =
        |name: &str| Some(name.strip_prefix("model.layers.")?.split_once('.')?.0.to_owned());
    let blocks =
        model.names().into_iter().filter_map(block).collect::<std::collections::BTreeSet<_>>();
    let place = |name: &str| match block(name) {
        Some(number) => 1 + number.parse::<usize>().unwrap(),
        None if name.contains("embed_tokens") => 0,
        None => 1 + blocks.len(),
    };
    let count = 2 + blocks.len();
    let shard = |place: usize| format!("model-{:05}-of-{count:05}.safetensors", place + 1);
    let mut map = serde_json::Map::new();
    for number in 0..count {
        let tensors: Vec<_> =
            model.tensors().into_iter().filter(|(name, _)| place(name) == number).collect();
        map.extend(tensors.iter().map(|(name, _)| (name.clone(), json!(shard(number)))));
        files.insert(shard(number), safetensors::serialize(tensors, None).unwrap());
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string().into_bytes();
    files.insert("model.safetensors.index.json".to_owned(), index);
    files
}

fn tiny() -> Files {
    let dir = tempfile::tempdir().unwrap();
    TinyLlama::new().write(dir.path());
    in_shards(dir.path())
}

fn shards(files: &Files) -> impl Iterator<Item = &String> {
    files.keys().filter(|name| name.ends_with(".safetensors"))
}

/// A configuration of `org/name` with these branches, and its texts.
fn configure(setting: &Setting, texts: [&str; 2], seq_len: usize, branches: &str) {
    for (name, text) in ["text.txt", "held-out.txt"].iter().zip(texts) {
        setting.dir.write(name, text);
    }
    let calibration = format!(
        "name = \"some\"\ndataset = \"text.txt\"\njoin = \"paragraphs\"\nwindows = 4\n\
         seq_len = {seq_len}\nseed = 0\n"
    );
    setting.dir.write("calibration.toml", &calibration);
    let text = format!(
        "model = \"org/name\"\ncalibration = \"calibration.toml\"\nrecipe = \"best\"\n\
         [evaluation]\ndataset = \"held-out.txt\"\nprotocol = \"paper\"\nseq_len = {seq_len}\n\
         max_windows = 8\n{branches}"
    );
    setting.dir.write("sweep.toml", &text);
}

/// A Hub with the tiny model, and four branches of three grids.
fn prepared() -> Setting {
    let setting = Setting::new();
    setting.publish_files(&tiny());
    let branches = [("a", 4, "best"), ("b", 3, "autogptq"), ("c", 4, "autogptq"), ("d", 8, "rtn")];
    let branch = |(name, bits, recipe)| {
        format!(
            "[[branch]]\nname = \"{name}\"\nbits = {bits}\ngroup_size = 32\nact_order = true\n\
             recipe = \"{recipe}\"\n"
        )
    };
    let branches: String = branches.into_iter().map(branch).collect();
    configure(&setting, [&words(600), &words(400)], 32, &branches);
    setting
}

/// A sweep into `out`, all branches together.
fn arguments<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["sweep", "sweep.toml", "--out", out, "--device", "cpu", "--no-progress"];
    all.extend(["--json", "--together", "9"]);
    all.extend(more);
    all
}

const DISCARD: [&str; 1] = ["--discard-shards"];

/// All files of all branches.
fn branches(setting: &Setting, out: &str) -> Files {
    let mut all = contents(&setting.dir.path(out));
    all.remove("sweep.json");
    all
}

/// A table without its seconds and places.
fn numbers(mut table: Value) -> Value {
    for row in table["rows"].as_array_mut().unwrap() {
        for key in ["quantize_seconds", "measure_seconds", "dir"] {
            row[key].take();
        }
    }
    table
}

#[track_caller]
fn assert_same(setting: &Setting, one: &str, other: &str) {
    let (one, other) = (branches(setting, one), branches(setting, other));
    assert!(one.keys().eq(other.keys()), "{:?} {:?}", one.keys(), other.keys());
    let differ: Vec<_> = one.iter().filter(|(name, bytes)| other[*name] != **bytes).collect();
    let differ: Vec<_> = differ.into_iter().map(|(name, _)| name).collect();
    assert!(differ.is_empty(), "{differ:?}");
}

/// Shards, and parts of some, that a run keeps for itself.
fn on_disk(setting: &Setting) -> usize {
    let entries = fs::read_dir(setting.repository("models--org--name"));
    let own = entries.into_iter().flatten().flatten().map(|entry| entry.path());
    let own = own.filter(|path| path.to_string_lossy().contains("discarding-"));
    let names = own.flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten());
    names.filter(|entry| entry.file_name().to_string_lossy().contains(".safetensors")).count()
}

/// The most shards on the disk at once while `run` runs.
fn most_on_disk(setting: &Setting, run: impl FnOnce()) -> usize {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !ended.load(Ordering::Relaxed) {
                most = most.max(on_disk(setting));
                std::thread::sleep(Duration::from_millis(1));
            }
            most
        });
        run();
        ended.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    })
}

#[test]
fn nine_branches_come_from_one_download() {
    let setting = Setting::new();
    let files = in_shards(&repository().join("tests/fixtures/demo-llama"));
    setting.publish_files(&files);
    let text = |name: &str| {
        let path = repository().join("calib/demo").join(name);
        fs::read_to_string(path).unwrap()
    };
    let config = fs::read_to_string(repository().join("configs/demo.toml")).unwrap();
    let table = &config[config.find("[[branch]]").unwrap()..];
    assert_eq!(table.matches("[[branch]]").count(), 9);
    configure(&setting, [&text("calibration.txt"), &text("heldout.txt")], 64, table);
    // No rotation is learned from shards that come and go.
    let config = fs::read_to_string(setting.dir.path("sweep.toml")).unwrap();
    let config =
        config.replacen("recipe = \"best\"\n", "recipe = \"best\"\nset = [\"rotate=full\"]\n", 1);
    setting.dir.write("sweep.toml", &config);

    let mut discarding = Value::Null;
    let most = most_on_disk(&setting, || {
        discarding = setting.gptq(&arguments("discarding", &DISCARD)).json();
    });
    // Two that come, and those of the one block that is read.
    assert!((1..=4).contains(&most), "{most} of {} shards", shards(&files).count());
    for name in shards(&files) {
        assert_eq!(setting.hub.count("GET", name), 1, "{name}");
    }
    assert!(!snapshot(&setting).iter().any(|name| name.ends_with(".safetensors")));
    assert!(!is_left_over(&setting));

    // Finished, the sweep needs no shard.
    setting.hub.forget_requests();
    let again = setting.gptq(&arguments("discarding", &DISCARD));
    assert!(again.stderr.contains("4bit-32g-act: finished, reused"), "{}", again.stderr);
    assert_eq!(again.json(), discarding);
    assert_eq!(setting.hub.count("GET", "-of-"), 0);
    assert!(!is_left_over(&setting));

    let whole = setting.gptq(&arguments("whole", &[])).json();
    assert_same(&setting, "discarding", "whole");
    assert_eq!(numbers(discarding), numbers(whole));
    // Each takes the other's branches as its own.
    let reused = setting.gptq(&arguments("discarding", &[]));
    assert!(reused.ok().contains("4bit-32g-act") && !reused.stderr.contains("starts over"));
    assert!(!reused.stderr.contains("quantize"), "{}", reused.stderr);
}

#[test]
fn weights_as_stored_are_measured_alike() {
    let setting = prepared();
    let run = |out: &str, more: &[&str]| {
        let more = [&["--source-dtype", "fp32"], more].concat();
        setting.gptq(&arguments(out, &more)).json()
    };
    let discarding = run("discarding", &DISCARD);
    let whole = run("whole", &[]);
    assert_same(&setting, "discarding", "whole");
    assert_eq!(numbers(discarding), numbers(whole));
}

/// A weight that a rotation brings within fp16, and that rounding as it stands does not.
#[test]
fn a_baseline_that_cannot_be_made_takes_nothing_down() {
    let setting = prepared();
    let dir = tempfile::tempdir().unwrap();
    let mut model = TinyLlama::new();
    model.tensor("model.layers.1.mlp.up_proj.weight").values[7] = 5e5;
    model.write(dir.path());
    setting.publish_files(&in_shards(dir.path()));
    let more = ["--source-dtype", "fp32", "--only", "a"];
    let outcome = setting.gptq(&arguments("out", &[&more[..], &DISCARD].concat()));
    let table = outcome.json();
    assert!(table["rows"][0]["result"]["perplexity"].as_f64().unwrap() > 1.0, "{table}");
    assert_eq!(table["rows"][0]["rtn"], Value::Null);
    assert_eq!(outcome.stderr.matches("baseline rounded to nearest is missing").count(), 1);
}

/// A run of the command that is not waited for.
fn begin(setting: &Setting, out: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(arguments(out, &DISCARD))
        .current_dir(setting.dir.path(""))
        .env_clear()
        .env("HOME", setting.dir.path("home"))
        .env("HF_ENDPOINT", &setting.hub.address)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_run_reads_the_source_again_and_a_measured_one_does_not() {
    let setting = prepared();
    let last_block = "model-00003-of-00004";
    setting.hub.fail("GET", last_block, Fault::Silence(60), 1);
    let mut child = begin(&setting, "killed");
    let start = Instant::now();
    while setting.hub.count("GET", last_block) == 0 {
        assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    setting.hub.state().faults.clear();
    setting.hub.forget_requests();
    let table = setting.gptq(&arguments("killed", &DISCARD)).json();
    assert_eq!(setting.hub.count("GET", last_block), 1);
    assert!(!is_left_over(&setting));
    let whole = setting.gptq(&arguments("whole", &[])).json();
    assert_same(&setting, "killed", "whole");
    assert_eq!(numbers(table), numbers(whole));

    // Branches that are there are measured again, without being made: one reading, for the dense model.
    fs::remove_dir_all(setting.repository("models--org--name")).unwrap();
    setting.dir.write("held-out.txt", &words(500));
    setting.hub.forget_requests();
    let again = setting.gptq(&arguments("killed", &DISCARD));
    assert!(again.stderr.contains("finished, but measured on something else"), "{}", again.stderr);
    let again = again.json();
    assert_eq!(setting.hub.count("GET", last_block), 1);
    let whole = setting.gptq(&arguments("whole", &[])).json();
    assert_same(&setting, "killed", "whole");
    let measured = |table: &Value| {
        let rows = table["rows"].as_array().unwrap();
        rows.iter().map(|row| (row["result"].clone(), row["rtn"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(measured(&again), measured(&whole));
    assert_eq!(again["baseline"], whole["baseline"]);
}

#[test]
fn what_would_read_the_source_twice_is_refused() {
    let setting = prepared();
    let sweep = |out: &str, more: &[&str]| {
        let all = [&["sweep", "sweep.toml", "--out", out, "--device", "cpu"], more].concat();
        setting.gptq(&[&all[..], &DISCARD].concat())
    };
    let untouched = |setting: &Setting| {
        assert_eq!(setting.hub.count("GET", "-of-"), 0);
        assert!(!is_left_over(setting));
    };
    for dry in [&[][..], &["--dry-run"]] {
        sweep("out", &[&["--together", "3"], dry].concat())
            .refused(&["4 branches", "--together 4"]);
    }
    sweep("out", &["--together", "4", "--dry-run"]).ok();
    sweep("out", &[]).refused(&["--together 4", "leave out --discard-shards"]);
    untouched(&setting);
    // Fewer branches are fewer to make together.
    sweep("out", &["--only", "d"]).ok();
    // Of a folder made before, nothing says what it was made from.
    fs::remove_file(setting.dir.path("out/.gptq-sweep/sources.json")).unwrap();
    setting.hub.forget_requests();
    sweep("out", &["--only", "d"]).refused(&["out/d", "before its shards are read", "--out"]);
    fs::rename(setting.dir.path("out/d"), setting.dir.path("out/d.partial")).unwrap();
    sweep("out", &["--only", "d"]).refused(&["out/d.partial", "--discard-shards"]);
    untouched(&setting);
    // Nobody's own files are deleted.
    TinyLlama::new().write_sharded(&setting.dir.path("local"), 2);
    sweep("out", &["--model", "local", "--together", "4"]).refused(&["`local`", "Hub id"]);
    assert_eq!(listing(&setting.dir.path("local")).len(), 5);
    let single: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", b"x")];
    setting.hub.publish("models/org/single", &single);
    sweep("out", &["--model", "org/single"]).refused(&["one file", "--discard-shards"]);
}

#[test]
fn a_shard_that_does_not_come_ends_the_sweep_and_is_not_asked_for_by_each_walk() {
    let setting = prepared();
    setting.hub.fail("GET", "model-00003-of-00004", Fault::Status(404), 100);
    let lost = setting.gptq(&arguments("out", &DISCARD));
    lost.refused(&["`model-00003-of-00004.safetensors`"]);
    assert!(lost.stderr.contains("The Hub has no"), "{}", lost.stderr);
    // By the two threads that read ahead, and by the first walk that wants it; not by all seven walks.
    assert!(setting.hub.count("GET", "model-00003-of-00004") <= 3);
    for name in ["a", "b", "c", "d"] {
        assert!(!setting.dir.path("out").join(name).exists());
    }
    setting.hub.state().faults.clear();
    setting.gptq(&arguments("out", &DISCARD)).ok();
}
