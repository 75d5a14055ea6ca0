//! Who else uses what a run deletes: other runs, revisions, repositories and programs.

use super::*;

/// The bytes of a branch made of `org/name`, all files of it.
pub(crate) fn quantized(setting: &Setting, out: &str, more: &[&str]) -> BTreeMap<String, Vec<u8>> {
    fs::write(setting.dir.path("text.txt"), words(2000)).unwrap();
    let mut args = vec!["quantize", "org/name", "--out", out, "--calib-dataset", "text.txt"];
    args.extend(["--windows", "4", "--seq-len", "32", "--group-size", "32"]);
    args.extend(more);
    setting.gptq(&args).ok();
    files(&setting.dir.path(out))
}

const DISCARD: [&str; 3] = ["--recipe", "rtn", "--discard-shards"];

/// A Hub with a model in five shards; gives the model's files, too.
fn sharded() -> (Setting, BTreeMap<String, Vec<u8>>) {
    let (setting, dir) = (Setting::new(), tempfile::tempdir().unwrap());
    TinyLlama::new().write_sharded(dir.path(), 5);
    let files = files(dir.path());
    setting.publish_files(&files);
    (setting, files)
}

/// Whether a run left a folder of its own behind.
pub(crate) fn is_left_over(setting: &Setting) -> bool {
    let entries = fs::read_dir(setting.repository("models--org--name")).unwrap();
    let is_own = |name: std::ffi::OsString| name.to_str().unwrap().starts_with("discarding-");
    entries.into_iter().any(|entry| is_own(entry.unwrap().file_name()))
}

/// The files of the only snapshot.
pub(crate) fn snapshot(setting: &Setting) -> Vec<String> {
    let snapshots = setting.repository("models--org--name/snapshots");
    listing(&snapshots.join(&listing(&snapshots)[0]))
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
        let files = files(dir.path());
        setting.publish_files(&files);
        let recipes = ["best", "rtn"];
        for recipe in recipes {
            quantized(&setting, recipe, &["--recipe", recipe, "--discard-shards"]);
            let left = snapshot(&setting);
            assert!(!left.iter().any(|name| name.ends_with(extension)), "{left:?}");
            // One blob for each small file.
            assert_eq!(setting.blobs().len(), left.len());
            assert!(!is_left_over(&setting));
        }
        for recipe in recipes {
            // From the cache, which the command fills again.
            let whole = quantized(&setting, "whole", &["--recipe", recipe]);
            let streamed = super::files(&setting.dir.path(recipe));
            let differ: Vec<_> =
                whole.iter().filter(|(name, bytes)| streamed.get(*name) != Some(*bytes)).collect();
            let differ: Vec<_> = differ.into_iter().map(|(name, _)| name).collect();
            assert!(streamed == whole, "{extension} {recipe}: {differ:?}");
            assert_eq!(snapshot(&setting).len(), files.len());
            fs::remove_dir_all(setting.dir.path("whole")).unwrap();
        }
    }
}

#[test]
fn shards_that_were_there_before_stay() {
    let (setting, files) = sharded();
    setting.gptq(&["fetch", "org/name"]).ok();
    let before = setting.blobs();
    setting.hub.forget_requests();
    quantized(&setting, "out", &DISCARD);
    assert_eq!(setting.hub.count("GET", "safetensors"), setting.hub.count("GET", "index.json"));
    assert_eq!(setting.blobs(), before);
    setting.gptq_env(&["fetch", "org/name", "--verify"], &[OFFLINE]).ok();
    // Another revision with the same shards keeps them as well.
    let mut changed = files.clone();
    changed.insert("README.md".to_owned(), b"# Another\n".to_vec());
    setting.publish_files(&changed);
    quantized(&setting, "other", &DISCARD);
    let snapshots = setting.repository("models--org--name/snapshots");
    for commit in listing(&snapshots) {
        for name in listing(&snapshots.join(&commit)) {
            assert_eq!(fs::read(snapshots.join(&commit).join(&name)).unwrap(), changed[&name]);
        }
    }
}

#[test]
fn a_store_that_repositories_share_is_left_alone() {
    let (setting, files) = sharded();
    setting.gptq(&["fetch", "org/name"]).ok();
    // As the Hub's own client lays files of Xet out: once for all, with links from each repository.
    let blobs = setting.repository("models--org--name/blobs");
    let store = setting.repository("blobs/ab");
    fs::create_dir_all(&store).unwrap();
    for (name, bytes) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        let blob = blobs.join(sha256(bytes));
        fs::rename(&blob, store.join(name)).unwrap();
        std::os::unix::fs::symlink(store.join(name), &blob).unwrap();
    }
    quantized(&setting, "out", &DISCARD);
    assert_eq!(listing(&store).len(), 5);
    setting.gptq_env(&["fetch", "org/name", "--verify"], &[OFFLINE]).ok();
}

#[test]
fn a_killed_run_leaves_its_shards_to_the_next() {
    let (setting, files) = sharded();
    let commit = setting.hub.state().repositories["models/org/name"].branches["main"].clone();
    let place = setting.repository(&format!("models--org--name/discarding-{commit}-0"));
    fs::create_dir_all(&place).unwrap();
    let (whole, part) = ("model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors");
    fs::write(place.join(whole), &files[whole]).unwrap();
    fs::write(place.join(format!("{part}.incomplete")), &files[part][..100]).unwrap();
    let other = setting.repository("models--org--name/discarding-0ther-0");
    fs::create_dir_all(&other).unwrap();
    quantized(&setting, "out", &DISCARD);
    assert_eq!(setting.hub.count("GET", whole), 0);
    let state = setting.hub.state();
    assert!(state.log.iter().any(|r| r.path.contains(part) && r.from == Some(100)));
    assert!(!other.exists() && !place.exists(), "nothing is left of any run");
}

/// `GPTQ_HUB_ROUNDS` says how often.
#[test]
fn runs_beside_each_other_lose_nothing() {
    let rounds = std::env::var("GPTQ_HUB_ROUNDS").map_or(3, |count| count.parse().unwrap());
    let (setting, files) = sharded();
    let setting = &setting;
    for round in 0..rounds {
        let cache = setting.repository("");
        let _ = fs::remove_dir_all(&cache);
        let fetched = std::thread::scope(|scope| {
            let quantize =
                |out: &'static str| scope.spawn(move || quantized(setting, out, &DISCARD));
            let (one, two) = (quantize("one"), quantize("two"));
            let fetch = scope.spawn(|| setting.gptq(&["fetch", "org/name"]));
            let (one, two) = (one.join().unwrap(), two.join().unwrap());
            assert!(one == two, "round {round}");
            fetch.join().unwrap()
        });
        let folder = PathBuf::from(fetched.ok().trim_end().replace("[DIR]", &setting.folder()));
        for (name, bytes) in &files {
            assert!(fs::read(folder.join(name)).unwrap() == *bytes, "round {round}: {name}");
        }
        assert!(!is_left_over(setting), "round {round}");
        for out in ["one", "two"] {
            fs::remove_dir_all(setting.dir.path(out)).unwrap();
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
    quantize("org/single", &[]).refused(&["`org/single`", "one file", "--discard-shards"]);
    assert_eq!(listing(&setting.dir.path("local")).len(), 5);

    // A shard that does not come ends the run, with nothing under the name; what came is kept.
    setting.hub.fail("GET", "model-00002-of-00002", Fault::Busy(2), 1);
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
