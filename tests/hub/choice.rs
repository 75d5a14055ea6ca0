//! Which files of a repository are fetched, and when.

use super::sharing::quantized;
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
    setting
        .gptq(&["fetch", "--dataset", "text.txt"])
        .refused(&["`text.txt`", "no dataset on the Hub"]);
}

#[test]
fn an_adapter_is_no_model() {
    let setting = Setting::new();
    let dir = tempfile::tempdir().unwrap();
    TinyLlama::new().write_bin(dir.path());
    fs::write(dir.path().join("adapter_model.safetensors"), "x").unwrap();
    setting.publish(dir.path());
    setting.gptq(&["fetch", "org/name"]).ok();
    setting.gptq_env(&["inspect", "org/name", "--checksum"], &[OFFLINE]).ok();
}

/// Gives shards and their index other names.
fn rename(dir: &Path, index: &str, shard: impl Fn(usize) -> String) {
    let old = dir.join("model.safetensors.index.json");
    let mut text = fs::read_to_string(&old).unwrap();
    let shards = listing(dir).into_iter().filter(|name| name.ends_with(".safetensors"));
    for (i, name) in shards.enumerate() {
        text = text.replace(&name, &shard(i));
        fs::rename(dir.join(&name), dir.join(shard(i))).unwrap();
    }
    fs::remove_file(old).unwrap();
    fs::write(dir.join(index), text).unwrap();
}

#[test]
fn shards_are_those_of_the_index_whatever_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    TinyLlama::new().write_sharded(&model, 3);
    rename(&model, "model.safetensors.index.json", |i| format!("part{i}.safetensors"));
    fs::write(model.join("model-00001-of-00001.safetensors"), "of no index").unwrap();
    let setting = Setting::new();
    setting.publish(&model);
    let done = setting.gptq(&["fetch", "org/name"]);
    let snapshot = PathBuf::from(done.ok().trim_end().replace("[DIR]", &setting.folder()));
    assert!(!snapshot.join("model-00001-of-00001.safetensors").exists());
    setting.gptq_env(&["inspect", "org/name", "--checksum"], &[OFFLINE]).ok();
    // One after the other as well.
    quantized(&setting, "streamed", &["--recipe", "rtn", "--discard-shards"]);

    // An early checkpoint, as AutoGPTQ named them.
    setting.gptq(&["fetch", "org/name"]).ok();
    let sharded = ["--recipe", "rtn", "--max-shard-size", "20000B"];
    quantized(&setting, "early", &sharded);
    let early = setting.dir.path("early");
    let stem = "gptq_model-4bit-32g";
    let shard = |i| format!("{stem}-{i}.safetensors");
    rename(&early, &format!("{stem}.safetensors.index.json"), shard);
    assert!(early.join(shard(1)).exists());
    // That knows the files by other names, and no other program writes one.
    fs::remove_file(early.join("gptq_manifest.json")).unwrap();
    setting.publish(&early);
    setting.gptq(&["fetch", "org/name"]).ok();
    setting.gptq_env(&["verify", "org/name"], &[OFFLINE]).ok();
}

#[test]
fn an_index_must_name_shards_that_are_there() {
    let (setting, _) = Setting::with_model();
    let mut files = model();
    files.remove("model-00002-of-00002.safetensors");
    setting.publish_files(&files);
    let named = ["`org/name/model.safetensors.index.json`", "`model-00002-of-00002.safetensors`"];
    setting.gptq(&["fetch", "org/name"]).refused(&named);
    let streamed = ["quantize", "org/name", "--out", "out", "--recipe", "rtn", "--discard-shards"];
    setting.gptq(&streamed).refused(&named);
    files.insert("model.safetensors.index.json".to_owned(), b"[]".to_vec());
    setting.publish_files(&files);
    setting.gptq(&["fetch", "org/name"]).refused(&[named[0], "no index"]);
}
