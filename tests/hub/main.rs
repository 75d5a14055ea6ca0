//! Downloads and uploads against a stand-in for the Hub: what arrives, what is asked for twice, and
//! what a person is told when the network, the server or the disk is not what it should be.
//!
//! Every run's output is searched for the token.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod choice;
mod hostile;
#[path = "../hub_support/mod.rs"]
mod hub_support;
mod one_download;
mod sharing;
mod uploads;
#[allow(dead_code, reason = "each test binary uses a part of it")]
#[path = "../util/mod.rs"]
mod util;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hub_support::{Fault, StandIn, TOKEN, git_hash, sha256};
use insta::assert_snapshot;
use serde_json::{Value, json};
use util::{Outcome, TinyLlama, Workdir, listing, words};

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
        let commit = setting.publish_files(&model());
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

    /// Makes a folder the model `org/name`; gives the commit.
    fn publish(&self, dir: &Path) -> String {
        self.publish_files(&files(dir))
    }

    fn publish_files(&self, files: &BTreeMap<String, Vec<u8>>) -> String {
        let files: Vec<(&str, &[u8])> =
            files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        self.hub.publish("models/org/name", &files)
    }

    fn folder(&self) -> String {
        self.dir.path("").display().to_string().trim_end_matches('/').to_owned()
    }

    fn repository(&self, name: &str) -> PathBuf {
        self.dir.path("home/.cache/huggingface/hub").join(name)
    }

    fn blobs(&self) -> Vec<String> {
        listing(&self.repository("models--org--name/blobs"))
    }
}

/// The files of a folder.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |name: String| (name.clone(), fs::read(dir.join(name)).unwrap());
    listing(dir).into_iter().map(read).collect()
}

/// A model and what is not needed of its repository.
fn model() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    TinyLlama::new().write_sharded(dir.path(), 2);
    let mut files = files(dir.path());
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
    let shown = snapshot.display().to_string().replace(&setting.folder(), "[DIR]");
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
    assert!(plan.ok().contains("4bit-32g-act "), "{}", plan.stdout);
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
    nobody.refused(&["`org/other`", "HF_ENDPOINT"]);
    assert!(!nobody.stderr.contains("gptq fetch"), "{}", nobody.stderr);
    assert!(nobody.stderr.contains("Connection refused"), "{}", nobody.stderr);
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
    for (fault, reason) in [(Fault::Cut, "attempts made: 1"), (Fault::Status(500), "answered 500")]
    {
        let (setting, _) = Setting::with_model();
        let shard = "model-00002-of-00002.safetensors";
        setting.hub.fail("GET", shard, fault, 1);
        let fetch = ["fetch", "org/name", "--retries", "0"];
        setting.gptq(&fetch).refused(&["`org/name/model-00002-of-00002.safetensors`", reason]);
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
    setting.hub.fail("GET", "/tree/", Fault::Limit(3), 1);
    setting.hub.fail("GET", "config.json", Fault::Status(502), 1);
    let done = setting.gptq(&["fetch", "org/name"]);
    assert_eq!(done.stderr.matches("trying again in 1 s").count(), 2, "{}", done.stderr);
    assert!(done.stderr.contains("429 Too Many Requests: limit; trying again in 3 s"));
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
    for (fault, reason) in
        [(Fault::Damage, "SHA-256"), (Fault::Short, "bytes twice, but the Hub lists")]
    {
        // Side by side with what failed before, all or some of it may have arrived.
        let blobs = setting.repository("models--org--name/blobs");
        for left in setting.blobs().iter().filter(|blob| blob.starts_with(&hash)) {
            fs::remove_file(blobs.join(left)).unwrap();
        }
        setting.hub.fail("GET", shard, fault, 2);
        let failed = setting.gptq(&["fetch", "org/name", "--retries", "0"]);
        failed.refused(&["`org/name/model-00001-of-00002.safetensors`", reason]);
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
    // Longer than the file, of its size, and a wrong beginning, which the hash betrays at the end.
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    partial(one, &vec![7; files[one].len() + 1]);
    partial(two, &vec![7; files[two].len()]);
    let done = setting.gptq(&["fetch", "org/name", "--json"]).json();
    assert_eq!(done[0]["downloaded_bytes"], done[0]["bytes"], "all of it came over the network");
    fs::remove_file(blobs.join(sha256(&files[two]))).unwrap();
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
fn the_cache_is_verified_on_demand() {
    let (setting, _) = Setting::with_model();
    setting.gptq(&["fetch", "org/name"]).ok();
    let files = model();
    let blobs = setting.repository("models--org--name/blobs");
    let (shard, index) = ("model-00001-of-00002.safetensors", "model.safetensors.index.json");
    let damage = |name: &str, hash: String| {
        let blob = blobs.join(hash);
        let mut bytes = files[name].clone();
        bytes[0] ^= 1;
        fs::write(&blob, bytes).unwrap();
        (name.to_owned(), blob)
    };
    let fetch = |more: &[&str]| setting.gptq(&[&["fetch", "org/name", "--json"], more].concat());
    let shard_blob = damage(shard, sha256(&files[shard]));
    assert_eq!(fetch(&[]).json()[0]["downloaded_bytes"], 0);
    let damaged = [shard_blob, damage(index, git_hash(&files[index]))];

    let verified = fetch(&["--verify"]);
    for (name, blob) in &damaged {
        let reason = format!("org/name/{name}: damaged; downloading it again");
        assert!(verified.stderr.contains(&reason), "{}", verified.stderr);
        assert_eq!(fs::read(blob).unwrap(), files[name]);
    }
    let lost = files[shard].len() + files[index].len();
    assert_eq!(verified.json()[0]["downloaded_bytes"], lost);
    setting.hub.forget_requests();
    assert_eq!(fetch(&["--verify"]).json()[0]["downloaded_bytes"], 0);
    assert_eq!(setting.hub.count("GET", "/resolve/"), 0);
}

#[test]
fn a_failure_is_not_kept_waiting_for() {
    let (setting, _) = Setting::with_model();
    setting.hub.fail("GET", "model-00001", Fault::Busy(100), 1);
    // Fails for good when the other has begun to wait.
    setting.hub.fail("GET", "config.json", Fault::Status(503), 1);
    setting.hub.fail("GET", "config.json", Fault::Status(404), 1);
    let start = Instant::now();
    let failed = setting.gptq(&["fetch", "org/name"]);
    failed.refused(&["The Hub has no `org/name/config.json`"]);
    assert!(failed.stderr.contains("trying again in 100 s"), "{}", failed.stderr);
    assert!(start.elapsed() < Duration::from_secs(50));
}

#[test]
fn a_mirror_may_link_to_the_hub_behind_it() {
    let (mut setting, _) = Setting::with_model();
    setting.token = Some(TOKEN);
    let behind = StandIn::start();
    setting.hub.state().links_to = behind.address.clone();
    let done = setting.gptq(&["fetch", "org/name", "--json"]).json();
    assert_eq!(done[0]["files"], WANTED.len());
    assert_eq!(behind.count("GET", ""), 0, "the token is for the mirror");
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
    setting.hub.publish("datasets/org/texts", &[("w2/test-00000-of-00001.parquet", b"x")]);
    setting.hub.fail("GET", "/revision/", Fault::Status(403), 1);
    let page = format!("on {}/datasets/org/texts first", setting.hub.address);
    setting.gptq(&["fetch", "--dataset", "org/texts:w2:test"]).refused(&["forbids", &page]);
    // The stand-in sends the token back.
    setting.hub.fail("GET", "/revision/", Fault::Status(418), 1);
    setting.gptq(&["fetch", "org/name"]).refused(&["answered 418", "[token]"]);
    for id in ["a/b/c", "../x", "org/na me"] {
        setting.gptq(&["fetch", id]).refused(&[&format!("`{id}`"), "ORG/NAME"]);
    }
    let offline = setting.gptq_env(&["fetch", "org/other"], &[OFFLINE]);
    assert_snapshot!(offline.snapshot(), @r"
    exit code 1
    --- stderr
    error: HF_HUB_OFFLINE is set, and `org/other@main` is not all there: [DIR]/home/.cache/huggingface/hub lacks it
    hint: unset HF_HUB_OFFLINE to download what is missing
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
    // How large the model is, the index says.
    assert_eq!(setting.hub.count("GET", "/resolve/"), 1);
    assert_eq!(setting.hub.count("GET", "index.json"), 1);
}
