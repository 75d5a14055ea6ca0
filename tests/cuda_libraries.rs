//! Where the command finds CUDA's libraries, with those of a Python environment in its place.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "util/needs.rs"]
mod needs;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use needs::Need;

const NVRTC: &str = "libnvrtc.so.13";

/// The folder of NVRTC that the environment names.
fn nvrtc() -> Option<PathBuf> {
    let named = std::env::var_os("GPTQ_CUDA_LIB").map(PathBuf::from);
    let named = named.filter(|folder| folder.join(NVRTC).is_file());
    if named.is_none() {
        Need::Nvrtc.is_missing(format!("GPTQ_CUDA_LIB names no folder with {NVRTC}"));
    }
    named
}

/// The command as it is installed at `root`, by a link as an environment's tools have it.
fn install(root: &Path) -> PathBuf {
    let bin = root.join("bin");
    fs::create_dir_all(&bin).unwrap();
    let installed = bin.join("gptq");
    // A link to the file, unlike a symbolic one, is a program of this place; so is a copy.
    let built = env!("CARGO_BIN_EXE_gptq");
    fs::hard_link(built, &installed).or_else(|_| fs::copy(built, &installed).map(drop)).unwrap();
    installed
}

/// What `gptq doctor` says of a library.
fn doctor(program: &Path, env: &[(&str, &Path)], library: &str) -> Value {
    let output = Command::new(program)
        .args(["doctor", "--json"])
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = printed["checks"].as_array().unwrap();
    checks.iter().find(|check| check["what"] == library).unwrap().clone()
}

/// Puts the packages' folder of libraries into an environment.
fn add_packages(root: &Path, libraries: &Path) -> PathBuf {
    let package = root.join("lib/python3.12/site-packages/nvidia/cu13");
    fs::create_dir_all(&package).unwrap();
    symlink(libraries, package.join("lib")).unwrap();
    package.join("lib")
}

#[test]
fn an_environments_own_packages_are_found_by_the_program_in_it() {
    let Some(libraries) = nvrtc() else { return };
    let work = TempDir::new().unwrap();
    let root = work.path().join("environment");
    let installed = install(&root);
    let folder = add_packages(&root, &libraries);
    let from = format!(", from {}", folder.display());
    let found = doctor(&installed, &[], NVRTC)["found"].to_string();
    assert!(found.trim_matches('"').ends_with(&from), "{found}");
    // What is called by a link elsewhere, as tools of `uv` are, is still the environment's.
    let link = work.path().join("gptq");
    symlink(&installed, &link).unwrap();
    assert_eq!(doctor(&link, &[], NVRTC)["found"].to_string(), found);
}

#[test]
fn an_active_environment_is_searched_too_and_a_named_folder_before_it() {
    let Some(libraries) = nvrtc() else { return };
    let work = TempDir::new().unwrap();
    let active = work.path().join("active");
    let folder = add_packages(&active, &libraries);
    let program = Path::new(env!("CARGO_BIN_EXE_gptq"));
    let from = |env: &[(&str, &Path)]| {
        let found = doctor(program, env, NVRTC)["found"].to_string();
        found.trim_matches('"').split_once(", from ").unwrap().1.to_owned()
    };
    let (active, named) = (("VIRTUAL_ENV", &*active), ("GPTQ_CUDA_LIB", &*libraries));
    assert_eq!(from(&[active]), folder.display().to_string());
    assert_eq!(from(&[active, named]), libraries.display().to_string());
}

/// Another CUDA's packages hold files of other names; what is behind the names here would do.
#[test]
fn the_packages_of_another_cuda_are_passed_over() {
    let Some(libraries) = nvrtc() else { return };
    let work = TempDir::new().unwrap();
    let root = work.path().join("environment");
    let installed = install(&root);
    let folder = root.join("lib/python3.12/site-packages/nvidia/cuda_nvrtc/lib");
    fs::create_dir_all(&folder).unwrap();
    for name in ["libnvrtc.so.12", "libnvrtc.so"] {
        symlink(libraries.join(NVRTC), folder.join(name)).unwrap();
    }
    let check = doctor(&installed, &[], NVRTC);
    // A machine may have CUDA 13 in its system.
    let found = check["found"].as_str().unwrap_or("missing");
    assert!(!found.contains("environment"), "{check}");
}

/// The library that calls would go to is the loader's `libnvrtc.so`, which is looked for first.
#[test]
fn a_library_of_another_version_in_the_loaders_path_is_not_called() {
    let Some(libraries) = nvrtc() else { return };
    let work = TempDir::new().unwrap();
    let other = work.path().join("other");
    fs::create_dir(&other).unwrap();
    symlink(any_library(), other.join("libnvrtc.so")).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_gptq"));
    let env = [("GPTQ_CUDA_LIB", &*libraries), ("LD_LIBRARY_PATH", &*other)];
    let check = doctor(program, &env, NVRTC);
    assert!(check["found"].is_null(), "{check}");
    assert!(check["advice"].as_str().unwrap().contains("out of LD_LIBRARY_PATH"), "{check}");
    // And by the link that the advice asks for it is.
    let linked = work.path().join("linked");
    fs::create_dir(&linked).unwrap();
    symlink(libraries.join(NVRTC), linked.join("libnvrtc.so")).unwrap();
    let paths = std::env::join_paths([&linked, &other]).unwrap();
    let env = [("GPTQ_CUDA_LIB", &*libraries), ("LD_LIBRARY_PATH", Path::new(&paths))];
    assert!(doctor(program, &env, NVRTC)["found"].is_string());
}

/// A library that this process has open.
fn any_library() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    PathBuf::from(paths.into_iter().find(|path| path.contains("/libc.so")).unwrap())
}
