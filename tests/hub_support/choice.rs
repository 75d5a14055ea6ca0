//! Which files of a repository are fetched, and when.

use super::*;

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
