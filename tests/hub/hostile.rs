//! Servers, proxies and environments that are not what one would wish.

use super::*;
use serde_json::json;

const SOON: (&str, &str) = ("HF_HUB_DOWNLOAD_TIMEOUT", "1");

/// The name of a shard.
const SHARD: &str = "model-00001-of-00002.safetensors";

#[test]
fn bodies_that_a_proxy_packed_are_unpacked() {
    let (setting, commit) = Setting::with_model();
    for part in ["/revision/", "/tree/", "config.json", SHARD] {
        setting.hub.fail("GET", part, Fault::Gzip, 1);
    }
    setting.gptq(&["fetch", "org/name"]).ok();
    let snapshot = setting.repository("models--org--name/snapshots").join(&commit);
    for name in ["config.json", SHARD] {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), model()[name]);
    }
    // The range of a packed body is none of the file's.
    let blob = setting.repository("models--org--name/blobs").join(sha256(&model()[SHARD]));
    fs::remove_file(&blob).unwrap();
    fs::write(blob.with_extension("incomplete"), &model()[SHARD][..100]).unwrap();
    setting.hub.fail("GET", SHARD, Fault::Gzip, 2);
    setting.gptq(&["fetch", "org/name"]).ok();
    assert_eq!(fs::read(snapshot.join(SHARD)).unwrap(), model()[SHARD]);
}

#[test]
fn links_to_the_storage_are_asked_for_anew() {
    let (mut setting, _) = Setting::with_model();
    setting.token = Some(TOKEN);
    for status in [401, 403, 404] {
        setting.hub.fail("GET", &sha256(&model()[SHARD]), Fault::Status(status), 1);
        let done = setting.gptq(&["fetch", "org/name"]);
        let reason = format!("the storage host 127.0.0.1 answered {status}");
        // The stand-in's two servers share a name, not a port.
        assert!(done.stderr.contains(&reason), "{}", done.stderr);
        done.ok();
        let blobs = setting.repository("models--org--name/blobs");
        fs::remove_file(blobs.join(sha256(&model()[SHARD]))).unwrap();
    }
    setting.hub.fail("GET", &sha256(&model()[SHARD]), Fault::Status(403), 100);
    let failed = setting.gptq(&["fetch", "org/name", "--retries", "1"]);
    failed.refused(&["the storage host", "your token is not at fault", "attempts made: 2"]);
    assert!(!failed.stderr.contains("accept its terms"), "{}", failed.stderr);
}

#[test]
fn a_disabled_repository_is_called_one() {
    let (setting, _) = Setting::with_model();
    setting.hub.fail("GET", "/revision/", Fault::Disabled(403), 1);
    let refused = setting.gptq(&["fetch", "org/name"]);
    refused.refused(&["forbids reading", "disabled", "`org/name@main`"]);
    assert!(!refused.stderr.contains("accept its terms"), "{}", refused.stderr);
}

#[test]
fn silent_and_trickling_servers_are_given_up() {
    let (setting, _) = Setting::with_model();
    setting.hub.fail("GET", "/tree/", Fault::Silence(30), 1);
    setting.hub.fail("GET", SHARD, Fault::Trickle, 1);
    let start = Instant::now();
    let done = setting.gptq_env(&["fetch", "org/name"], &[SOON]);
    assert!(done.stderr.contains("nothing arrived for 1 s"), "{}", done.stderr);
    let few = "fewer than 1024 bytes arrived in 1 s";
    let silent = done.stderr.matches("nothing arrived for 1 s").count() > 1;
    assert!(done.stderr.contains(few) || silent, "{}", done.stderr);
    done.ok();
    assert!(start.elapsed() < Duration::from_secs(25));
    let wrong = setting.gptq_env(&["fetch", "org/name"], &[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]);
    wrong.refused(&["HF_HUB_DOWNLOAD_TIMEOUT", "`soon`", "seconds"]);
}

#[test]
fn names_that_are_not_wanted_block_nothing() {
    let (setting, _) = Setting::with_model();
    let oid = "a".repeat(40);
    let entry = |path: &str| json!({"type": "file", "oid": oid, "path": path, "size": 1});
    let long = "x".repeat(300);
    let names = ["../../../../evil.json", "a//b", "/etc/passwd", &long, "c\0.json"];
    setting.hub.state().extra = names.iter().map(|name| entry(name)).collect();
    let done = setting.gptq(&["fetch", "org/name", "--json"]);
    assert!(done.stderr.contains("left out 5 files whose names"), "{}", done.stderr);
    assert_eq!(done.json()[0]["files"], WANTED.len());
    let written = listing(&setting.dir.path(""));
    assert_eq!(written, ["home"], "nothing lies beside the cache");
    // What is left out is not all there is, so that nobody takes the list for it.
    assert!(!setting.repository("models--org--name/trees").exists());

    setting.hub.state().extra = vec![entry("config.json/x")];
    setting.gptq(&["fetch", "org/name"]).refused(&["`config.json` is a file and a folder"]);
}

#[test]
fn names_are_those_that_git_allows() {
    let mut files = model();
    // A backslash is a letter as any other.
    files.insert("a\\b.json".to_owned(), b"{}".to_vec());
    let setting = Setting::new();
    let commit = setting.publish_files(&files);
    let mut state = setting.hub.state();
    let repository = state.repositories.get_mut("models/org/name").unwrap();
    repository.branches.insert("v1+x".to_owned(), commit.clone());
    drop(state);
    setting.gptq(&["fetch", "org/name", "--revision", "v1+x"]).ok();
    let snapshot = setting.repository("models--org--name/snapshots").join(commit);
    assert_eq!(fs::read(snapshot.join("a\\b.json")).unwrap(), b"{}");
    setting.gptq_env(&["inspect", "org/name@v1+x"], &[OFFLINE]).ok();
    for revision in ["a..b", "x.lock", "a b", "../x"] {
        let refused = setting.gptq(&["fetch", "org/name", "--revision", revision]);
        refused.refused(&[&format!("`{revision}`"), "git"]);
    }
}

#[test]
fn variables_are_read_by_the_rules_of_the_hubs_own_client() {
    let (mut setting, _) = Setting::with_model();
    setting.hub.state().closed = true;
    let home = setting.dir.path("home");
    fs::create_dir_all(home.join("hf")).unwrap();
    fs::write(home.join("hf/token"), TOKEN).unwrap();
    let places: [&[(&str, &str)]; 4] = [
        &[("HF_HOME", "~/hf")],
        &[("HF_HOME", "$HOME/hf")],
        &[("HF_TOKEN_PATH", "${HOME}/hf/token"), ("HF_HUB_CACHE", "~/hf/hub")],
        &[("HUGGING_FACE_HUB_TOKEN", TOKEN), ("HUGGINGFACE_HUB_CACHE", "~/hf/hub")],
    ];
    for place in places {
        setting.gptq_env(&["fetch", "org/name"], place).ok();
        assert!(home.join("hf/hub/models--org--name").exists(), "{place:?}");
        let found = [place, &[OFFLINE]].concat();
        setting.gptq_env(&["inspect", "org/name"], &found).ok();
        fs::remove_dir_all(home.join("hf/hub")).unwrap();
        assert!(!setting.dir.path("~").exists() && !setting.dir.path("$HOME").exists());
    }
    // A token file that is not there is no fault: public models need none.
    setting.hub.state().closed = false;
    let missing = [("HF_TOKEN_PATH", "/nowhere/token")];
    setting.gptq_env(&["fetch", "org/name"], &missing).ok();

    setting.hub.forget_requests();
    setting.token = Some(TOKEN);
    // The tests' own variable is out of the way when it is empty.
    let offline = [("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "1")];
    setting.gptq_env(&["fetch", "org/name"], &offline).ok();
    setting.gptq_env(&["inspect", "org/other"], &offline).refused(&["`gptq fetch org/other`"]);
    assert_eq!(setting.hub.count("GET", ""), 0);
}

#[test]
fn no_proxy_may_except_every_host() {
    let (setting, _) = Setting::with_model();
    let proxy = StandIn::start();
    let proxied = [("HTTP_PROXY", proxy.address.as_str()), ("http_proxy", proxy.address.as_str())];
    let fetch = ["fetch", "org/name", "--retries", "0"];
    setting.gptq_env(&fetch, &proxied).refused(&["`org/name@main`"]);
    assert!(proxy.count("GET", "") > 0, "the proxy is used");
    proxy.forget_requests();
    for name in ["NO_PROXY", "no_proxy"] {
        setting.gptq_env(&fetch, &[&proxied[..], &[(name, "other,*")]].concat()).ok();
    }
    assert_eq!(proxy.count("GET", ""), 0);
}

#[test]
fn the_cache_answers_where_the_network_is_forbidden() {
    let (setting, commit) = Setting::with_model();
    setting.gptq(&["plan", "org/name"]).ok();
    let fetch =
        |more: &[&str]| setting.gptq_env(&[&["fetch", "org/name"], more].concat(), &[OFFLINE]);
    // The list shows what a plan did not need.
    fetch(&[]).refused(&["HF_HUB_OFFLINE", "`org/name@main`", "is missing"]);
    let trees = setting.repository("models--org--name/trees");
    assert_eq!(listing(&trees), [format!("{commit}.json")]);
    let tag = fs::read_to_string(setting.repository("CACHEDIR.TAG")).unwrap();
    assert!(tag.starts_with("Signature: 8a477f597d28d172789f06886806bc55\n"), "{tag}");

    let online = setting.gptq(&["fetch", "org/name", "--json"]).json();
    setting.hub.forget_requests();
    let aside = setting.dir.path("trees");
    for list in [true, false] {
        if !list {
            // As older clients leave a cache.
            fs::rename(&trees, &aside).unwrap();
        }
        let there = fetch(&["--json", "--verify"]).json();
        for key in ["folder", "commit", "files", "bytes"] {
            assert_eq!(there[0][key], online[0][key], "{key}, {list}");
        }
        assert_eq!(there[0]["downloaded_bytes"], 0);
    }
    fs::rename(&aside, &trees).unwrap();
    fetch(&["--revision", &commit]).ok();
    fetch(&["--revision", "v2"]).refused(&["`org/name@v2`", "lacks it"]);
    assert_eq!(setting.hub.count("GET", ""), 0);
    let snapshot = setting.repository("models--org--name/snapshots").join(&commit);
    let mut damaged = model()[SHARD].clone();
    damaged[0] ^= 1;
    fs::write(snapshot.join(SHARD), damaged).unwrap();
    fetch(&["--verify"]).refused(&[SHARD, "damaged"]);
    fs::write(snapshot.join(SHARD), "cut").unwrap();
    fs::remove_file(snapshot.join("config.json")).unwrap();
    fetch(&[]).refused(&[SHARD]);

    setting.hub.publish("datasets/org/texts", &[("w2/test-00000-of-00002.parquet", b"x")]);
    let split = ["fetch", "--dataset", "org/texts:w2:test"];
    setting.gptq(&split).ok();
    setting.gptq_env(&split, &[OFFLINE]).ok();
    fs::remove_dir_all(setting.repository("datasets--org--texts/trees")).unwrap();
    setting.gptq_env(&split, &[OFFLINE]).refused(&["1 of 2 files are there"]);
}
