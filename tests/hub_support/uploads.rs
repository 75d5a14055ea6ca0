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
    for repo in ["quantised", "no org", "me/x/y"] {
        let dry = setting.gptq(&["push", "branches", "--repo", repo, "--dry-run"]);
        dry.refused(&[&format!("`{repo}`"), "ORG/NAME"]);
    }
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
