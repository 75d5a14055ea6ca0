//! Downloads and uploads against a stand-in for the Hub: what arrives, what is asked for twice, and
//! what a person is told when the network, the server or the disk is not what it should be.
//!
//! Every run's output is searched for the token.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod hub_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hub_support::{Fault, StandIn, TOKEN, git_hash, sha256};
use insta::assert_snapshot;
use serde_json::{Value, json};
use util::{Noise, Outcome, TinyLlama, Workdir, listing, words};

const ONLINE: (&str, &str) = ("HF_HUB_OFFLINE", "0");
const OFFLINE: (&str, &str) = ("HF_HUB_OFFLINE", "1");

/// A folder with a cache of its own, and a Hub.
struct Setting {
    dir: Workdir,
    hub: StandIn,
    token: Option<&'static str>,
}

impl Setting {
    fn new() -> Self {
        Self { dir: Workdir::new(), hub: StandIn::start(), token: None }
    }

    /// A Hub with the model `org/name`; gives its commit, too.
    fn with_model() -> (Self, String) {
        let setting = Self::new();
        let files = model();
        let files: Vec<(&str, &[u8])> =
            files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        let commit = setting.hub.publish("models/org/name", &files);
        (setting, commit)
    }

    fn gptq(&self, args: &[&str]) -> Outcome {
        self.gptq_env(args, &[])
    }

    fn gptq_env(&self, args: &[&str], env: &[(&str, &str)]) -> Outcome {
        let home = self.dir.path("home").display().to_string();
        let address = self.hub.address.as_str();
        let mut all = vec![("HOME", home.as_str()), ("HF_ENDPOINT", address), ONLINE];
        all.extend(self.token.map(|token| ("HF_TOKEN", token)));
        all.extend(env);
        let outcome = self.dir.gptq_env(args, &all);
        for text in [&outcome.stdout, &outcome.stderr] {
            assert!(!text.contains(TOKEN), "the token was printed: {text}");
        }
        outcome
    }

    fn repository(&self, name: &str) -> PathBuf {
        self.dir.path("home/.cache/huggingface/hub").join(name)
    }

    fn blobs(&self) -> Vec<String> {
        listing(&self.repository("models--org--name/blobs"))
    }
}

/// A model and what is not needed of its repository.
fn model() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    TinyLlama::new().write_sharded(dir.path(), 2);
    let mut files: BTreeMap<String, Vec<u8>> = listing(dir.path())
        .into_iter()
        .map(|name| (name.clone(), fs::read(dir.path().join(name)).unwrap()))
        .collect();
    for name in ["LICENSE", "TERMS 1/LICENSE.txt", "pytorch_model.bin", "model-q4.gguf", "a.png"] {
        files.insert(name.to_owned(), name.as_bytes().to_vec());
    }
    files
}

const WANTED: [&str; 7] = [
    "LICENSE",
    "TERMS 1/LICENSE.txt",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
];

#[test]
fn a_model_is_fetched_once_and_then_found_by_its_id() {
    let (setting, commit) = Setting::with_model();
    let hint = ["`gptq fetch org/name`", "local folder", "HF_HOME"];
    setting.gptq_env(&["inspect", "org/name"], &[OFFLINE]).refused(&hint);

    let done = setting.gptq(&["fetch", "org/name"]);
    let snapshot = setting.repository("models--org--name/snapshots").join(&commit);
    let shown = snapshot
        .display()
        .to_string()
        .replace(&setting.dir.path("").display().to_string(), "[DIR]/");
    assert_eq!(done.ok().trim_end(), shown);
    assert!(done.stderr.contains("org/name: 7 files, "), "{}", done.stderr);

    let files = model();
    let mut total = 0;
    for name in WANTED {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), files[name], "{name}");
        // As huggingface_hub lays it out: a link to a blob named by its hash.
        let target = fs::read_link(snapshot.join(name)).unwrap();
        let large = name.ends_with(".safetensors");
        let hash = if large { sha256(&files[name]) } else { git_hash(&files[name]) };
        let up = "../".repeat(name.split('/').count() + 1);
        assert_eq!(target, Path::new(&format!("{up}blobs/{hash}")));
        total += files[name].len();
    }
    let reference = setting.repository("models--org--name/refs/main");
    assert_eq!(fs::read_to_string(reference).unwrap(), commit);
    for name in ["pytorch_model.bin", "model-q4.gguf", "a.png"] {
        assert!(!snapshot.join(name).exists(), "{name} was not needed");
    }

    setting.hub.forget_requests();
    let again = setting.gptq(&["fetch", "org/name", "--json"]).json();
    assert_eq!(setting.hub.count("GET", "/resolve/"), 0);
    let Value::Array(rows) = &again else { panic!("{again}") };
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["commit"], commit);
    assert_eq!(rows[0]["files"], WANTED.len());
    assert_eq!((&rows[0]["bytes"], &rows[0]["downloaded_bytes"]), (&json!(total), &json!(0)));

    let shown = setting.gptq_env(&["inspect", "org/name", "--json"], &[OFFLINE]);
    assert_eq!(shown.json()["hidden_size"], 64);
}

#[test]
fn what_a_command_needs_is_downloaded() {
    let (setting, commit) = Setting::with_model();
    let plan = setting.gptq(&["plan", "org/name"]);
    assert!(plan.ok().contains("gptq-4bit-32g-actorder_True"), "{}", plan.stdout);
    let snapshot = setting.repository("models--org--name/snapshots").join(&commit);
    assert_eq!(listing(&snapshot), ["config.json"]);

    fs::write(setting.dir.path("text.txt"), words(300)).unwrap();
    let base = format!("org/name@{commit}");
    let measure = ["ppl", "org/name", "--base", &base, "--dataset", "text.txt", "--seq-len", "32"];
    let measured = setting.gptq(&measure);
    assert!(measured.ok().contains("perplexity "), "{}", measured.stdout);
    assert!(measured.stderr.contains("downloading"), "{}", measured.stderr);
    setting.hub.forget_requests();
    setting.gptq_env(&measure, &[OFFLINE]).ok();
    assert_eq!(setting.hub.count("GET", "/"), 0);

    let text = ["ppl", "org/name", "--dataset", "org/texts:w2:test"];
    let missing = setting.gptq(&text);
    missing.refused(&["`org/texts:w2:test`", "not in the Hub cache"]);
    assert!(missing.stderr.contains("The Hub has no `org/texts@main`"), "{}", missing.stderr);
    setting.gptq_env(&text, &[OFFLINE]).refused(&["`gptq fetch --dataset org/texts:w2:test`"]);
    let gone = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    let nobody = setting.gptq_env(&["inspect", "org/other"], &gone);
    nobody.refused(&["`gptq fetch org/other`"]);
    assert!(nobody.stderr.contains("Connection refused"), "{}", nobody.stderr);
}

/// The bytes of a branch made of `org/name`, all files of it.
fn quantised(setting: &Setting, out: &str, more: &[&str]) -> BTreeMap<String, Vec<u8>> {
    fs::write(setting.dir.path("text.txt"), words(2000)).unwrap();
    let mut args = vec!["quantize", "org/name", "--out", out, "--calib-dataset", "text.txt"];
    args.extend(["--windows", "4", "--seq-len", "32", "--group-size", "32"]);
    args.extend(more);
    setting.gptq(&args).ok();
    let dir = setting.dir.path(out);
    listing(&dir)
        .into_iter()
        .map(|name| (name.clone(), fs::read(dir.join(name)).unwrap()))
        .collect()
}

#[test]
fn discarded_shards_give_the_same_branch_and_are_gone() {
    for (extension, write) in [
        ("safetensors", TinyLlama::write_sharded as fn(&TinyLlama, &Path, usize) -> Vec<PathBuf>),
        ("bin", TinyLlama::write_bin_sharded),
    ] {
        let setting = Setting::new();
        let dir = tempfile::tempdir().unwrap();
        write(&TinyLlama::new(), dir.path(), 5);
        let files = listing(dir.path());
        let files: Vec<(&str, Vec<u8>)> = files
            .iter()
            .map(|name| (name.as_str(), fs::read(dir.path().join(name)).unwrap()))
            .collect();
        let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (*n, b.as_slice())).collect();
        setting.hub.publish("models/org/name", &files);
        let snapshots = setting.repository("models--org--name/snapshots");

        for recipe in ["best", "rtn"] {
            let streamed =
                quantised(&setting, "streamed", &["--recipe", recipe, "--discard-shards"]);
            let snapshot = snapshots.join(&listing(&snapshots)[0]);
            let left = listing(&snapshot);
            assert!(!left.iter().any(|name| name.ends_with(extension)), "{left:?}");
            // One blob for each small file.
            assert_eq!(setting.blobs().len(), left.len());
            // From the cache, which the command fills again.
            let whole = quantised(&setting, "whole", &["--recipe", recipe]);
            assert!(streamed == whole, "{extension} {recipe}");
            assert_eq!(listing(&snapshot).len(), files.len());
            fs::remove_dir_all(setting.dir.path("streamed")).unwrap();
            fs::remove_dir_all(setting.dir.path("whole")).unwrap();
        }
    }
}

#[test]
fn discarding_is_refused_where_it_would_lose_something() {
    let (setting, _) = Setting::with_model();
    TinyLlama::new().write_sharded(&setting.dir.path("local"), 2);
    let quantize = |model: &str, more: &[&str]| {
        let mut args =
            vec!["quantize", model, "--out", "out", "--recipe", "rtn", "--discard-shards"];
        args.extend(more);
        setting.gptq(&args)
    };
    quantize("local", &[]).refused(&["`local`", "Hub id"]);
    quantize("org/name", &["--device", "cuda:0,1"]).refused(&["one device", "--discard-shards"]);
    setting
        .hub
        .publish("models/org/single", &[("config.json", b"{}"), ("model.safetensors", b"x")]);
    quantize("org/single", &[]).refused(&["`org/single`", "one file"]);
    assert_eq!(listing(&setting.dir.path("local")).len(), 5);

    // A shard that does not come ends the run, with nothing under the name; what came is kept.
    setting.hub.fail("GET", "model-00002-of-00002", Fault::Status(404), 100);
    let lost = quantize("org/name", &[]);
    lost.refused(&["`model-00002-of-00002.safetensors`"]);
    assert!(lost.stderr.contains("The Hub has no"), "{}", lost.stderr);
    assert!(!setting.dir.path("out").exists());
    setting.hub.state().faults.clear();
    setting.hub.forget_requests();
    quantize("org/name", &[]).ok();
    assert_eq!(setting.hub.count("GET", "model-00001-of-00002"), 0);
}

#[test]
fn a_broken_connection_goes_on_where_it_broke() {
    let (setting, _) = Setting::with_model();
    let shard = "model-00002-of-00002.safetensors";
    setting.hub.fail("GET", shard, Fault::Cut, 1);
    let done = setting.gptq(&["fetch", "org/name"]);
    assert!(done.stderr.contains("trying again in 1 s"), "{}", done.stderr);
    done.ok();
    let half = model()[shard].len() / 2;
    let state = setting.hub.state();
    let asked: Vec<Option<usize>> =
        state.log.iter().filter(|r| r.path.contains(shard)).map(|r| r.from).collect();
    assert_eq!(asked, [None, Some(half)]);
}

#[test]
fn a_failed_download_is_no_model_and_is_completed_by_the_next() {
    for (fault, told) in [(Fault::Cut, "attempts made: 1"), (Fault::Status(500), "answered 500")] {
        let (setting, _) = Setting::with_model();
        let shard = "model-00002-of-00002.safetensors";
        setting.hub.fail("GET", shard, fault, 1);
        let fetch = ["fetch", "org/name", "--retries", "0"];
        setting.gptq(&fetch).refused(&["`org/name/model-00002-of-00002.safetensors`", told]);
        setting.gptq_env(&["inspect", "org/name"], &[OFFLINE]).refused(&["`gptq fetch org/name`"]);
        let there = setting.blobs().iter().filter(|name| !name.ends_with(".incomplete")).count();

        setting.hub.forget_requests();
        setting.gptq(&fetch).ok();
        assert_eq!(setting.hub.count("GET", "/resolve/"), WANTED.len() - there, "{fault:?}");
        setting.gptq(&["inspect", "org/name"]).ok();
    }
}

#[test]
fn busy_servers_are_asked_again() {
    let (setting, _) = Setting::with_model();
    setting.hub.fail("GET", "/revision/main", Fault::Status(503), 1);
    setting.hub.fail("GET", "/tree/", Fault::Status(429), 1);
    setting.hub.fail("GET", "config.json", Fault::Status(502), 1);
    let done = setting.gptq(&["fetch", "org/name"]);
    assert_eq!(done.stderr.matches("trying again in 1 s").count(), 3, "{}", done.stderr);
    setting.gptq(&["inspect", "org/name"]).ok();
    done.ok();
}

#[test]
fn damaged_files_are_never_kept() {
    let (setting, _) = Setting::with_model();
    // Small files have git's hash, large ones another.
    setting.hub.fail("GET", "tokenizer.json", Fault::Damage, 2);
    setting.gptq(&["fetch", "org/name"]).refused(&["`org/name/tokenizer.json`", "git hash"]);
    let shard = "model-00001-of-00002.safetensors";
    let hash = sha256(&model()[shard]);
    for (fault, told) in [(Fault::Damage, "SHA-256"), (Fault::Short, "bytes, but the Hub lists")] {
        // Side by side with what failed before, all or some of it may have arrived.
        let blobs = setting.repository("models--org--name/blobs");
        for left in setting.blobs().iter().filter(|blob| blob.starts_with(&hash)) {
            fs::remove_file(blobs.join(left)).unwrap();
        }
        setting.hub.fail("GET", shard, fault, 2);
        let failed = setting.gptq(&["fetch", "org/name", "--retries", "0"]);
        failed.refused(&["`org/name/model-00001-of-00002.safetensors`", told]);
        assert!(!setting.blobs().iter().any(|blob| blob.starts_with(&hash)), "{fault:?}");
    }
    // Once is bad luck.
    setting.hub.fail("GET", shard, Fault::Damage, 1);
    let done = setting.gptq(&["fetch", "org/name"]);
    assert!(done.stderr.contains("downloading it again"), "{}", done.stderr);
    done.ok();
    setting.gptq(&["inspect", "org/name"]).ok();
}

#[test]
fn leftovers_of_another_client_do_no_harm() {
    let (setting, commit) = Setting::with_model();
    let files = model();
    let blobs = setting.repository("models--org--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let partial = |name: &str, bytes: &[u8]| {
        fs::write(blobs.join(format!("{}.incomplete", sha256(&files[name]))), bytes).unwrap();
    };
    // Longer than the file; and a wrong beginning, which the hash betrays at the end.
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    partial(one, &vec![7; files[one].len() + 1]);
    partial(two, b"something else");
    setting.gptq(&["fetch", "org/name"]).ok();
    // A server that ignores the range gets the whole file accepted.
    let snapshot = setting.repository("models--org--name/snapshots").join(commit);
    fs::remove_file(blobs.join(sha256(&files[two]))).unwrap();
    partial(two, &files[two][..100]);
    setting.hub.fail("GET", two, Fault::Whole, 1);
    setting.gptq(&["fetch", "org/name"]).ok();
    for name in [one, two] {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), files[name], "{name}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let (mut setting, _) = Setting::with_model();
    setting.hub.state().closed = true;
    setting.gptq(&["fetch", "org/name"]).refused(&[
        "`org/name@main`",
        "HF_TOKEN",
        "check its name",
    ]);
    setting.token = Some("hf_wrong");
    setting
        .gptq(&["fetch", "org/name"])
        .refused(&["refused the token of HF_TOKEN", "`org/name@main`"]);
    setting.token = Some(TOKEN);
    setting.gptq(&["fetch", "org/name"]).ok();
    setting.gptq(&["fetch", "org/nome"]).refused(&["The Hub has no", "`org/nome@main`"]);
    let revision = ["fetch", "org/name", "--revision", "v2"];
    setting.gptq(&revision).refused(&["`org/name@v2`", "the repository is there"]);
    setting.hub.fail("GET", "/revision/", Fault::Status(403), 1);
    setting.gptq(&["fetch", "org/name"]).refused(&["forbids", "accept its terms", "/org/name"]);
    // The stand-in sends the token back.
    setting.hub.fail("GET", "/revision/", Fault::Status(418), 1);
    setting.gptq(&["fetch", "org/name"]).refused(&["answered 418", "[token]"]);
    for id in ["a/b/c", "../x", "org/na me"] {
        setting.gptq(&["fetch", id]).refused(&[&format!("`{id}`"), "ORG/NAME"]);
    }
    let offline = setting.gptq_env(&["fetch", "org/name"], &[("HF_HUB_OFFLINE", "1")]);
    assert_snapshot!(offline.snapshot(), @r"
    exit code 1
    --- stderr
    error: HF_HUB_OFFLINE is set, so the Hub cannot be asked for `org/name`; unset it
    ");
    let nowhere = setting.gptq_env(
        &["fetch", "org/name", "--retries", "0"],
        &[("HF_ENDPOINT", "http://127.0.0.1:1")],
    );
    nowhere.refused(&["`org/name@main`", "Connection refused"]);
    setting.gptq_env(&["fetch", "org/name"], &[("HF_ENDPOINT", "hub")]).refused(&["HF_ENDPOINT"]);
    assert_eq!(setting.gptq(&["fetch"]).code, 1);
}

#[test]
fn a_disk_too_small_is_noticed_before_the_first_byte() {
    let (setting, _) = Setting::with_model();
    let shard = "model-00001-of-00002.safetensors".to_owned();
    setting.hub.state().claimed.insert(shard, 1 << 60);
    setting.gptq(&["fetch", "org/name"]).refused(&["bytes free", "HF_HOME", "models--org--name"]);
    assert_eq!(setting.hub.count("GET", "/resolve/"), 0);
}

#[test]
fn a_listing_cannot_write_outside_the_cache() {
    let setting = Setting::new();
    let files: [(&str, &[u8]); 2] = [("model.safetensors", b"x"), ("../../../../evil.json", b"x")];
    setting.hub.publish("models/org/name", &files);
    setting.gptq(&["fetch", "org/name"]).refused(&["evil.json", "would leave the repository"]);
    assert!(!setting.dir.path("home").exists());
}

#[test]
fn other_revisions_stand_beside_main() {
    let (setting, old) = Setting::with_model();
    let new = setting.hub.publish("models/org/name", &[("model.safetensors", b"of another kind")]);
    for revision in ["main", &old] {
        let done = setting.gptq(&["fetch", "org/name", "--revision", revision, "--json"]).json();
        let expected = if revision == "main" { &new } else { &old };
        assert_eq!(&done[0]["commit"], expected);
        assert_eq!(&done[0]["revision"], revision);
    }
    let name = "models--org--name";
    assert_eq!(listing(&setting.repository(name).join("refs")), ["main"]);
    let mut both = [old, new];
    both.sort();
    assert_eq!(listing(&setting.repository(name).join("snapshots")), both);
}

#[test]
fn a_dataset_is_fetched_by_split() {
    let (setting, _) = Setting::with_model();
    let names = [
        "README.md",
        "w2/test-00000-of-00002.parquet",
        "w2/test-00001-of-00002.parquet",
        "w2/train-00000-of-00001.parquet",
    ];
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (*n, n.as_bytes())).collect();
    let commit = setting.hub.publish("datasets/org/texts", &files);
    TinyLlama::new().write(&setting.dir.path("model"));
    let ppl = ["ppl", "model", "--device=cpu", "--dataset", "org/texts:w2:test"];
    let missing = setting.gptq_env(&ppl, &[OFFLINE]);
    let hint = "`gptq fetch --dataset org/texts:w2:test`";
    assert!(missing.code == 1 && missing.stderr.contains(hint), "{}", missing.stderr);

    let both = ["fetch", "org/name", "--dataset", "org/texts:w2:test", "--json"];
    let done = setting.gptq(&both).json();
    assert_eq!(done[1]["name"], "org/texts:w2:test");
    assert_eq!(done[1]["commit"], commit);
    let snapshot = setting.repository("datasets--org--texts/snapshots").join(&commit);
    assert_eq!(
        listing(&snapshot.join("w2")),
        ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    );
    // Found now, and read: it is no parquet.
    let read = setting.gptq(&ppl);
    assert!(read.stderr.contains("w2/test-00000-of-00002.parquet"), "{}", read.stderr);
    let other = setting.gptq(&["fetch", "--dataset", "org/texts:w2:validation"]);
    other.refused(&["`org/texts`", "w2:validation", "holds w2:test, w2:train"]);
    setting.gptq(&["fetch", "--dataset", "text.txt"]).refused(&["`text.txt`", "local file"]);
}

/// A sweep's folder: two branches and `main`, weights of some length and small files.
fn branches(setting: &Setting) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let mut branches: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for (seed, branch) in ["main", "3bit-128g", "4bit-32g"].into_iter().enumerate() {
        let mut noise = Noise::new(seed as u64);
        // Random bytes, so that the storage has to take them as they are.
        let weights = (0..200_000).map(|_| noise.next().to_bits().to_be_bytes()[2]);
        let mut files = BTreeMap::from([
            ("model.safetensors".to_owned(), weights.collect::<Vec<u8>>()),
            ("config.json".to_owned(), format!("{{\"branch\": \"{branch}\"}}").into_bytes()),
            ("LICENSE/LICENSE.txt".to_owned(), words(50).into_bytes()),
        ]);
        if branch == "main" {
            files.insert("README.md".to_owned(), b"# A card\n".to_vec());
        }
        for (name, bytes) in &files {
            let path = setting.dir.path("branches").join(branch).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        branches.insert(branch.to_owned(), files);
    }
    setting.dir.write("branches/report.json", "{}");
    branches
}

const PUSH: [&str; 6] = ["push", "branches", "--repo", "me/quantised", "--retries", "0"];

/// What the Hub holds, without the file that it makes itself.
fn uploaded(setting: &Setting) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let state = setting.hub.state();
    let Some(repository) = state.repositories.get("models/me/quantised") else {
        return BTreeMap::new();
    };
    let files = |branch: &String| {
        let mut files = repository.files(branch).unwrap().clone();
        assert!(files.remove(".gitattributes").is_some());
        (branch.clone(), files)
    };
    repository.branches.keys().map(files).collect()
}

#[test]
fn a_dry_run_lists_what_would_go_where() {
    let setting = Setting::new();
    branches(&setting);
    let dry = ["push", "branches", "--repo", "me/quantised", "--dry-run"];
    assert_snapshot!(setting.gptq(&dry).snapshot(), @r"
    exit code 0
    --- stdout
    branch     file                     size
    3bit-128g  model.safetensors    200.0 kB
    3bit-128g  LICENSE/LICENSE.txt     196 B
    3bit-128g  config.json              23 B
    4bit-32g   model.safetensors    200.0 kB
    4bit-32g   LICENSE/LICENSE.txt     196 B
    4bit-32g   config.json              22 B
    main       model.safetensors    200.0 kB
    main       LICENSE/LICENSE.txt     196 B
    main       README.md                 9 B
    main       config.json              18 B
    10 files on 3 branches of me/quantised, 600.7 kB
    ");
    let json = setting.gptq(&[&dry[..], &["--json", "--branch", "main"]].concat()).json();
    assert_eq!(json["files"], 4);
    assert_eq!(json["branches"][0]["branch"], "main");
    assert_eq!(json["branches"][0]["files"][0]["path"], "model.safetensors");
    assert_eq!(json["branches"][0]["files"][0]["bytes"], 200_000);
    assert!(setting.hub.state().log.is_empty(), "a dry run needs no network");
}

#[test]
fn a_sweep_becomes_a_branch_a_folder() {
    let mut setting = Setting::new();
    setting.token = Some(TOKEN);
    let expected = branches(&setting);
    let done = setting.gptq(&PUSH);
    assert!(done.ok().contains("10 files uploaded"), "{}", done.stdout);
    assert_eq!(uploaded(&setting), expected);
    // Weights come first, in a commit of their own.
    assert_eq!(setting.hub.count("POST", "/commit/"), 6);

    setting.hub.forget_requests();
    let again = setting.gptq(&[&PUSH[..], &["--json"]].concat()).json();
    assert_eq!(again["uploaded_files"], 0);
    assert_eq!(again["unchanged_files"], 10);
    assert_eq!(again["branches"], json!(["3bit-128g", "4bit-32g", "main"]));
    assert_eq!(setting.hub.count("POST", ""), 0);

    // A branch that comes later inherits nothing from main, and a lone checkpoint is a branch, too.
    setting.gptq(&["push", "branches/3bit-128g", "--repo", "me/quantised", "--branch", "new"]).ok();
    assert_eq!(uploaded(&setting)["new"], expected["3bit-128g"]);
    // What the folder lacks stays and is told of.
    fs::remove_file(setting.dir.path("branches/main/README.md")).unwrap();
    let fewer = setting.gptq(&PUSH);
    assert!(fewer.stderr.contains("branch main has files"), "{}", fewer.stderr);
    assert!(fewer.stderr.contains("README.md"), "{}", fewer.stderr);
    fewer.ok();
    assert_eq!(uploaded(&setting)["main"], expected["main"]);
}

#[test]
fn a_failed_upload_is_completed_by_the_next() {
    // The storage, a branch, the last commit of a branch, the repository.
    let faults = [
        ("/v1/xorbs/", 400, "upload `model.safetensors` to 3bit-128g"),
        ("/branch/4bit-32g", 500, "create branch 4bit-32g"),
        ("/commit/4bit-32g", 500, "`model.safetensors` to 4bit-32g"),
        ("/commit/main", 400, "`model.safetensors` to main"),
        ("/repos/create", 502, "create the repository"),
    ];
    for (part, status, told) in faults {
        let mut setting = Setting::new();
        setting.token = Some(TOKEN);
        let expected = branches(&setting);
        setting.hub.fail("POST", part, Fault::Status(status), 1);
        let failed = setting.gptq(&PUSH);
        failed.refused(&[told, "run the command again"]);
        let there: usize = uploaded(&setting).values().map(BTreeMap::len).sum();

        let done = setting.gptq(&[&PUSH[..], &["--json"]].concat()).json();
        assert_eq!(done["uploaded_files"], 10 - there, "{part}");
        assert_eq!(done["unchanged_files"], there, "{part}");
        assert_eq!(uploaded(&setting), expected, "{part}");
    }
}

#[test]
fn uploads_that_may_not_happen_do_not() {
    let mut setting = Setting::new();
    branches(&setting);
    setting.gptq(&PUSH).refused(&["HF_TOKEN", "write"]);
    setting.token = Some("hf_wrong");
    setting.gptq(&PUSH).refused(&["refused the token of HF_TOKEN", "`me/quantised`"]);
    setting.token = Some(TOKEN);
    setting.hub.fail("POST", "/repos/create", Fault::Status(403), 1);
    setting.gptq(&PUSH).refused(&["forbids writing", "`me/quantised`", "write role"]);
    setting.gptq_env(&PUSH, &[("HF_HUB_OFFLINE", "1")]).refused(&["HF_HUB_OFFLINE"]);
    setting
        .gptq(&["push", "branches", "--repo", "quantised"])
        .refused(&["`quantised`", "ORG/NAME"]);
    setting.gptq(&["push", "nowhere", "--repo", "me/x"]).refused(&["`nowhere`"]);
    assert!(uploaded(&setting).is_empty());

    setting.hub.publish("models/me/quantised", &[(".gitattributes", b"")]);
    let private = [&PUSH[..], &["--private"]].concat();
    setting.gptq(&private).refused(&["`me/quantised`", "public", "--private"]);
    setting.hub.state().repositories.clear();
    setting.gptq(&private).ok();
    assert!(setting.hub.state().repositories["models/me/quantised"].private);
    // A token in a file is as good.
    setting.token = None;
    setting.dir.write("token", &format!("{TOKEN}\n"));
    let file = setting.dir.path("token").display().to_string();
    setting.gptq_env(&PUSH, &[("HF_TOKEN_PATH", &file)]).ok();
}
