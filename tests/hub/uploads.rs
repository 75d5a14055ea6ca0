//! Uploads: what goes where, what is sent twice, and what may not be sent.

use super::*;
use crate::util::Noise;

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

const PUSH: [&str; 6] = ["push", "branches", "--repo", "me/quantized", "--retries", "0"];

/// What the Hub holds, without the file that it makes itself.
fn uploaded(setting: &Setting) -> BTreeMap<String, BTreeMap<String, Vec<u8>>> {
    let state = setting.hub.state();
    let Some(repository) = state.repositories.get("models/me/quantized") else {
        return BTreeMap::new();
    };
    let files = |branch: &String| {
        let mut files = repository.files(branch).unwrap().clone();
        assert!(files.remove(".gitattributes").is_some());
        let owned = files.into_iter().map(|(name, bytes)| (name, bytes.to_vec()));
        (branch.clone(), owned.collect())
    };
    repository.branches.keys().map(files).collect()
}

#[test]
fn a_dry_run_lists_what_would_go_where() {
    let setting = Setting::new();
    branches(&setting);
    let dry = ["push", "branches", "--repo", "me/quantized", "--dry-run"];
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
    10 files on 3 branches of me/quantized, 600.7 kB
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
    // One a branch: commits are what the Hub limits.
    assert_eq!(setting.hub.count("POST", "/commit/"), 3);
    // In four parts each, of which the last is shorter.
    assert_eq!(setting.hub.count("PUT", "/lfs/"), 3 * 4);

    setting.hub.forget_requests();
    let again = setting.gptq(&[&PUSH[..], &["--json"]].concat()).json();
    assert_eq!(again["uploaded_files"], 0);
    assert_eq!(again["unchanged_files"], 10);
    assert_eq!(again["branches"], json!(["3bit-128g", "4bit-32g", "main"]));
    assert_eq!(setting.hub.count("POST", ""), 0);

    // A branch that comes later inherits nothing from main, and a lone checkpoint is a branch, too.
    setting.gptq(&["push", "branches/3bit-128g", "--repo", "me/quantized", "--branch", "new"]).ok();
    assert_eq!(uploaded(&setting)["new"], expected["3bit-128g"]);
    // What the folder lacks stays, and is named.
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
        ("PUT", "/lfs/", 400, "upload `model.safetensors` to 3bit-128g"),
        ("POST", "/objects/batch", 500, "upload `model.safetensors` to 3bit-128g"),
        ("POST", "/complete/", 502, "upload `model.safetensors` to 3bit-128g"),
        ("POST", "/lfs/verify", 404, "upload `model.safetensors` to 3bit-128g"),
        ("POST", "/branch/4bit-32g", 500, "create branch 4bit-32g"),
        ("POST", "/preupload/4bit-32g", 500, "`model.safetensors` to 4bit-32g"),
        ("POST", "/commit/4bit-32g", 500, "`model.safetensors` to 4bit-32g"),
        ("POST", "/commit/main", 400, "`model.safetensors` to main"),
        ("POST", "/repos/create", 502, "create the repository"),
    ];
    for (method, part, status, reason) in faults {
        let mut setting = Setting::new();
        setting.token = Some(TOKEN);
        let expected = branches(&setting);
        setting.hub.fail(method, part, Fault::Status(status), 1);
        let failed = setting.gptq(&PUSH);
        failed.refused(&[reason, "run the command again"]);
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
    setting.gptq(&PUSH).refused(&["refused the token of HF_TOKEN", "`me/quantized`"]);
    setting.token = Some(TOKEN);
    setting.hub.fail("POST", "/repos/create", Fault::Status(403), 1);
    setting.gptq(&PUSH).refused(&["forbids writing", "`me/quantized`", "write role"]);
    setting.gptq_env(&PUSH, &[("HF_HUB_OFFLINE", "1")]).refused(&["HF_HUB_OFFLINE"]);
    setting
        .gptq(&["push", "branches", "--repo", "quantized"])
        .refused(&["`quantized`", "ORG/NAME"]);
    for repo in ["quantized", "no org", "me/x/y"] {
        let dry = setting.gptq(&["push", "branches", "--repo", repo, "--dry-run"]);
        dry.refused(&[&format!("`{repo}`"), "ORG/NAME"]);
    }
    setting.gptq(&["push", "nowhere", "--repo", "me/x"]).refused(&["`nowhere`"]);
    assert!(uploaded(&setting).is_empty());

    setting.hub.publish("models/me/quantized", &[(".gitattributes", b"")]);
    let private = [&PUSH[..], &["--private"]].concat();
    setting.gptq(&private).refused(&["`me/quantized`", "public", "--private"]);
    setting.hub.state().repositories.clear();
    setting.gptq(&private).ok();
    assert!(setting.hub.state().repositories["models/me/quantized"].private);
    // A token in a file is as good.
    setting.token = None;
    setting.dir.write("token", &format!("{TOKEN}\n"));
    let file = setting.dir.path("token").display().to_string();
    setting.gptq_env(&PUSH, &[("HF_TOKEN_PATH", &file)]).ok();
}

/// A checkpoint of weights and small files, in the folder `one`.
fn checkpoint(setting: &Setting, bytes: usize) -> Vec<u8> {
    let mut noise = Noise::new(1);
    let weights: Vec<u8> = (0..bytes).map(|_| noise.next().to_bits().to_be_bytes()[2]).collect();
    setting.dir.write("one/config.json", "{}");
    fs::write(setting.dir.path("one/model.safetensors"), &weights).unwrap();
    weights
}

/// Asserts a failed step whose error, or the cause of it, holds `names`.
#[track_caller]
fn failed_as(outcome: &Outcome, names: &[&str]) {
    outcome.refused(&[]);
    for name in names {
        assert!(outcome.stderr.contains(name), "`{name}` is not named in: {}", outcome.stderr);
    }
}

const ONE: [&str; 4] = ["push", "one", "--repo", "me/one"];

fn uploader() -> Setting {
    let mut setting = Setting::new();
    setting.token = Some(TOKEN);
    setting
}

#[test]
fn an_upload_waits_as_long_as_it_is_asked() {
    let setting = uploader();
    checkpoint(&setting, 1000);
    let steps = [
        ("GET", "/refs", Fault::Limit(2)),
        ("POST", "/preupload/", Fault::Busy(2)),
        ("POST", "/objects/batch", Fault::Limit(2)),
        ("PUT", "/lfs/", Fault::Busy(2)),
        ("POST", "/commit/", Fault::Limit(2)),
    ];
    for (method, part, fault) in steps {
        setting.hub.fail(method, part, fault, 1);
    }
    let start = Instant::now();
    let done = setting.gptq(&ONE);
    assert!(start.elapsed() > Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(done.stderr.matches("trying again in 2 s").count(), 5, "{}", done.stderr);
    done.ok();
}

#[test]
fn an_upload_that_nobody_answers_is_given_up() {
    for (method, part) in
        [("GET", "/refs"), ("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", "/commit/")]
    {
        let setting = uploader();
        checkpoint(&setting, 1000);
        setting.hub.fail(method, part, Fault::Silence(30), 1);
        let start = Instant::now();
        let failed = setting.gptq_env(
            &[&ONE[..], &["--retries", "0"]].concat(),
            &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")],
        );
        failed_as(&failed, &["for 1 s"]);
        assert!(start.elapsed() < Duration::from_secs(20), "{part}");
        setting.gptq(&ONE).ok();
    }
}

#[test]
fn expired_links_are_asked_for_again() {
    for bytes in [1000, 200_000] {
        let setting = uploader();
        let weights = checkpoint(&setting, bytes);
        setting.hub.fail("PUT", "/lfs/", Fault::Status(403), 2);
        let done = setting.gptq(&ONE);
        assert!(done.stderr.contains("asking for new links"), "{}", done.stderr);
        done.ok();
        let state = setting.hub.state();
        let files = state.repositories["models/me/one"].files("main").unwrap();
        assert_eq!(*files["model.safetensors"], weights);
    }
    let setting = uploader();
    checkpoint(&setting, 1000);
    setting.hub.fail("PUT", "/lfs/", Fault::Status(403), 100);
    let failed = setting.gptq(&[&ONE[..], &["--retries", "1"]].concat());
    failed_as(&failed, &["by the links that the Hub gave", "the storage host", "403"]);
}

#[test]
fn weights_are_never_put_into_git_itself() {
    let setting = uploader();
    let weights = checkpoint(&setting, 1000);
    setting.hub.state().plain = true;
    let refused = setting.gptq(&ONE);
    refused.refused(&["plain git content", "`main/model.safetensors`", ".gitattributes"]);
    assert_eq!(setting.hub.count("POST", "/commit/"), 0);
    // As another program left them: they are there, but not where they belong.
    setting.hub.publish(
        "models/me/one",
        &[(".gitattributes", b""), ("config.json", b"{}"), ("model.safetensors", &weights)],
    );
    setting.gptq(&ONE).refused(&["plain git content"]);
    // A server that has no links for large files.
    setting.hub.state().plain = false;
    setting.hub.state().repositories.clear();
    setting.hub.state().transfer = Some("xet");
    failed_as(&setting.gptq(&ONE), &["large files by `xet` only"]);
}

#[test]
fn success_is_reported_after_a_look_at_the_branch() {
    let setting = uploader();
    checkpoint(&setting, 1000);
    setting.hub.state().loses = Some("model.safetensors".to_owned());
    let lost = setting.gptq(&ONE);
    lost.refused(&["does not hold what was sent", "`model.safetensors`", "lists nothing"]);
    setting.hub.state().loses = None;
    setting.gptq(&ONE).ok();
    setting.hub.state().repositories.clear();
    setting.hub.state().public = true;
    let public = setting.gptq(&[&ONE[..], &["--private"]].concat());
    public.refused(&["`me/one`", "was made public", "nothing was sent"]);
    assert_eq!(setting.hub.count("POST", "/preupload/"), 2);
}

#[test]
fn the_token_goes_to_no_other_server() {
    let setting = uploader();
    branches(&setting);
    let behind = StandIn::start();
    // The pages of listings and of the history name another host.
    setting.hub.state().links_to = behind.address.clone();
    let attributes: [(&str, &[u8]); 1] = [(".gitattributes", b"")];
    let first = setting.hub.publish("models/me/quantized", &attributes);
    for _ in 0..5 {
        setting.hub.publish("models/me/quantized", &[(".gitattributes", b""), ("x", b"x")]);
    }
    setting.gptq(&PUSH).ok();
    assert_eq!(behind.count("GET", ""), 0);
    let state = setting.hub.state();
    let repository = &state.repositories["models/me/quantized"];
    assert!(!repository.files("4bit-32g").unwrap().contains_key("x"), "not from {first}");
    drop(state);

    checkpoint(&setting, 1000);
    for part in ["/repos/create", "/preupload/", "/objects/batch", "/commit/"] {
        setting.hub.fail("POST", part, Fault::Elsewhere, 1);
        let failed = setting.gptq(&ONE);
        failed_as(&failed, &["sent on to localhost", "HF_ENDPOINT"]);
    }
    setting.gptq(&ONE).ok();
}

#[test]
fn what_has_no_contents_is_named() {
    let setting = uploader();
    checkpoint(&setting, 1000);
    let pipe = setting.dir.path("one/pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    setting.gptq(&ONE).refused(&["one/pipe`", "a named pipe"]);
    assert!(setting.hub.state().log.is_empty());
    fs::remove_file(pipe).unwrap();
    for branch in ["a..b", "x.lock", "HEAD", "refs/heads/x"] {
        let args = [&ONE[..], &["--dry-run", "--branch", branch]].concat();
        setting.gptq(&args).refused(&[&format!("`{branch}`"), "git"]);
    }
}
