//! README.md and the book (`crates/cli/docs`): their commands are run as they stand there, on the
//! embedded model. That the options of all others exist is tested in `crates/cli/src/book.rs`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "the tests of the command line use the rest of it")]
mod docs_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use docs_support::{Block, blocks, pages};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The blocks of a page, one after the other, in a folder that has what commands name of the repository.
#[track_caller]
fn run(page: &str) {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tests", "calib", "configs"] {
        symlink(repository().join(name), dir.path().join(name)).unwrap();
    }
    let all = blocks(&repository().join(page));
    let here: Vec<&Block> = all.iter().filter(|block| block.runs_here()).collect();
    assert!(!here.is_empty(), "{page} shows nothing that can be tried");
    for block in here {
        let output = shell(dir.path(), &block.script());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}:\n{}{errors}", block.place(), block.script());
        let Some(shown) = block.printed() else { continue };
        assert_eq!(String::from_utf8_lossy(&output.stdout), shown, "{}", block.place());
    }
}

/// Runs a script with the built command, and nothing of the caller's environment but the programs.
fn shell(dir: &Path, script: &str) -> std::process::Output {
    let built = Path::new(env!("CARGO_BIN_EXE_gptq")).parent().unwrap().display().to_string();
    let programs = std::env::var("PATH").unwrap();
    Command::new("bash")
        .args(["--norc", "-euo", "pipefail", "-c", script])
        .current_dir(dir)
        .env_clear()
        .env("PATH", format!("{built}:{programs}"))
        .env("HOME", dir)
        .env("NO_COLOR", "1")
        .env("COLUMNS", "200")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap()
}

macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        /// Every page is here.
        const PAGES: &[&str] = &[$($page,)*];

        $(#[test]
        fn $test() {
            run($page);
        })*
    };
}

pages! {
    install: "crates/cli/docs/install.md",
    nine_branches: "crates/cli/docs/nine_branches.md",
    choosing: "crates/cli/docs/choosing.md",
    sources: "crates/cli/docs/sources.md",
    recipes: "crates/cli/docs/recipes.md",
    calibration: "crates/cli/docs/calibration.md",
    formats: "crates/cli/docs/formats.md",
    verify: "crates/cli/docs/verify.md",
    gpus: "crates/cli/docs/gpus.md",
    text: "crates/cli/docs/text.md",
    json: "crates/cli/docs/json.md",
    readme: "README.md",
}

#[test]
fn every_page_is_run_and_shown() {
    let book = fs::read_to_string(repository().join("crates/cli/src/book.rs")).unwrap();
    let modules = book.split("pages! { ").nth(1).unwrap().split(" }").next().unwrap();
    let mut shown: Vec<String> =
        modules.split_whitespace().map(|page| format!("crates/cli/docs/{page}.md")).collect();
    shown.push("README.md".to_owned());
    let mut run: Vec<&str> = PAGES.to_vec();
    let mut stored: Vec<String> = pages()
        .iter()
        .map(|page| page.strip_prefix(repository()).unwrap().display().to_string())
        .collect();
    run.sort_unstable();
    shown.sort_unstable();
    stored.sort_unstable();
    assert_eq!(run, stored, "tests/docs.rs");
    assert_eq!(shown, stored, "crates/cli/src/book.rs");
}

/// Links to files of the repository, and to pages: `](path)` and `[page]: path`.
#[test]
fn links_lead_to_files() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        let folder = page.parent().unwrap();
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let defined = text
            .lines()
            .filter_map(|line| line.strip_prefix('[')?.split_once("]: ").map(|(_, target)| target));
        for target in inline.chain(defined) {
            let file = target.split('#').next().unwrap();
            if !file.starts_with("https://") && !file.is_empty() {
                assert!(folder.join(file).exists(), "{}: {target}", page.display());
            }
        }
    }
}

/// The table of results stands in README and on the page that explains it.
#[test]
fn results_are_the_same_wherever_they_stand() {
    let table = |page: &str| {
        let text = fs::read_to_string(repository().join(page)).unwrap();
        let rows = text.lines().skip_while(|line| !line.starts_with("| | `autogptq`, 4-bit"));
        rows.take_while(|line| line.starts_with('|')).map(str::to_owned).collect::<Vec<_>>()
    };
    let rows = table("README.md");
    assert_eq!(rows.len(), 7, "{rows:?}");
    assert_eq!(rows, table("crates/cli/docs/recipes.md"));
}
