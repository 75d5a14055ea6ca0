//! What of a folder goes to which branch, without a network.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{CONFIG_FILE, PARTIAL_END};
use serde::Serialize;

use crate::hub::split_repo;
use crate::revision::check_branch;
use crate::{Error, Result};

/// The branch that every repository has.
pub(crate) const MAIN: &str = "main";

/// A branch to be uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BranchPlan {
    /// Name on the Hub.
    pub branch: String,
    /// Folder here.
    pub folder: PathBuf,
    /// Its files, weights first, then by name.
    pub files: Vec<PlannedFile>,
}

/// A file to be uploaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedFile {
    /// Path in the folder and on the branch, with `/` between its parts.
    pub path: String,
    /// Size.
    pub bytes: u64,
}

impl PlannedFile {
    pub(crate) fn is_weights(&self) -> bool {
        self.path.ends_with(".safetensors")
    }
}

/// Says what of `dir` goes where in `repo`, without a network: a checkpoint to `branch` (`main` if
/// none is given), a folder of checkpoints to a branch each, or to `branch` only.
///
/// # Errors
/// [`Error::InvalidId`], [`Error::NothingToPush`], [`Error::NoBranch`], [`Error::InvalidRevision`]
/// for a folder whose name is no branch name, and [`Error::Io`].
pub fn plan_push(repo: &str, dir: &Path, branch: Option<&str>) -> Result<Vec<BranchPlan>> {
    split_repo(repo)?;
    if let Some(branch) = branch {
        check_branch(branch)?;
    }
    if is_checkpoint(dir) {
        return Ok(vec![planned(branch.unwrap_or(MAIN), dir)?]);
    }
    let mut branches = Vec::new();
    for (name, path) in entries(dir)? {
        // A folder that is still being written has this ending.
        if path.is_dir() && is_checkpoint(&path) && !name.ends_with(PARTIAL_END) {
            branches.push(name);
        }
    }
    if branches.is_empty() {
        return Err(Error::NothingToPush { dir: dir.to_owned() });
    }
    if let Some(branch) = branch {
        if !branches.iter().any(|name| name == branch) {
            let (dir, branch) = (dir.to_owned(), branch.to_owned());
            return Err(Error::NoBranch { dir, branch, available: branches.join(", ") });
        }
        branches.retain(|name| name == branch);
    }
    branches.iter().map(|name| planned(name, &dir.join(name))).collect()
}

fn is_checkpoint(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).is_file()
}

fn planned(branch: &str, folder: &Path) -> Result<BranchPlan> {
    check_branch(branch)?;
    let mut files = Vec::new();
    collect(folder, "", &mut files)?;
    files.sort_by_key(|file| (!file.is_weights(), file.path.clone()));
    Ok(BranchPlan { branch: branch.to_owned(), folder: folder.to_owned(), files })
}

/// Files below a folder but hidden ones, of which `.gitattributes` alone belongs to a repository.
fn collect(folder: &Path, prefix: &str, files: &mut Vec<PlannedFile>) -> Result<()> {
    for (name, path) in entries(folder)? {
        if name.starts_with('.') && name != ".gitattributes" {
            continue;
        }
        let meta = fs::metadata(&path).map_err(Error::io("read", &path))?;
        if meta.is_dir() {
            collect(&path, &format!("{prefix}{name}/"), files)?;
        } else if let Some(kind) = without_contents(meta.file_type()) {
            return Err(Error::NoFile { path, kind });
        } else {
            files.push(PlannedFile { path: format!("{prefix}{name}"), bytes: meta.len() });
        }
    }
    Ok(())
}

/// What a thing is that is no file: reading it would wait for somebody to write, or never end.
fn without_contents(kind: fs::FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_fifo() => Some("a named pipe"),
        kind if kind.is_socket() => Some("a socket"),
        kind if kind.is_block_device() || kind.is_char_device() => Some("a device"),
        _ => None,
    }
}

/// Names and paths in a folder, sorted.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) => found.push((name.to_owned(), path)),
            None => {
                let source = std::io::Error::other("its name is not UTF-8");
                return Err(Error::Io { action: "upload", path, source });
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, names: &[&str]) {
        for name in names {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
    }

    fn paths(plan: &BranchPlan) -> Vec<&str> {
        plan.files.iter().map(|file| file.path.as_str()).collect()
    }

    #[test]
    fn a_checkpoint_is_one_branch() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "config.json",
            "model.safetensors",
            "LICENSE/LICENSE.txt",
            ".gitattributes",
            ".cache/x",
            "README.md",
        ];
        write(dir.path(), &names);
        for (asked, branch) in [(None, "main"), (Some("4bit-128g"), "4bit-128g")] {
            let plans = plan_push("me/x", dir.path(), asked).unwrap();
            assert_eq!(plans.len(), 1);
            assert_eq!(plans[0].branch, branch);
            let expected =
                ["model.safetensors", ".gitattributes", "LICENSE/LICENSE.txt", "README.md"];
            assert_eq!(paths(&plans[0])[..4], expected);
            assert_eq!(plans[0].files[0].bytes, "model.safetensors".len() as u64);
        }
        assert!(plan_push("me/x", dir.path(), Some("../x")).is_err());
        for repo in ["x", "no org", "me/x/y", "me/no name"] {
            let planned = plan_push(repo, dir.path(), None);
            assert!(matches!(planned, Err(Error::InvalidId { .. })), "{repo}");
        }
    }

    #[test]
    fn what_is_no_file_is_named_and_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &["config.json"]);
        let (pipe, socket) = (dir.path().join("a"), dir.path().join("b"));
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
        let message = plan_push("me/x", dir.path(), None).unwrap_err().to_string();
        assert!(message.contains("a named pipe") && message.contains("/a`"), "{message}");
        fs::remove_file(pipe).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let message = plan_push("me/x", dir.path(), None).unwrap_err().to_string();
        assert!(message.contains("a socket") && message.contains("/b`"), "{message}");
        fs::remove_file(&socket).unwrap();
        std::os::unix::fs::symlink("/dev/zero", socket).unwrap();
        let message = plan_push("me/x", dir.path(), None).unwrap_err().to_string();
        assert!(message.contains("a device"), "{message}");
    }

    #[test]
    fn branches_are_what_git_allows() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &["config.json"]);
        for branch in ["../x", "a..b", "x.lock", "HEAD", "-x", "refs/heads/x", "a b"] {
            let planned = plan_push("me/x", dir.path(), Some(branch));
            assert!(matches!(planned, Err(Error::InvalidRevision { .. })), "{branch}");
        }
        plan_push("me/x", dir.path(), Some("v1+x/y")).unwrap();
    }

    #[test]
    fn a_sweep_is_a_branch_per_finished_folder() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["main/config.json", "3bit/config.json", "4bit.partial/config.json"];
        write(dir.path(), &names);
        write(dir.path(), &["report.json", "logs/log.txt"]);
        let branches = |asked| -> Vec<String> {
            plan_push("me/x", dir.path(), asked)
                .unwrap()
                .into_iter()
                .map(|plan| plan.branch)
                .collect()
        };
        assert_eq!(branches(None), ["3bit", "main"]);
        assert_eq!(branches(Some("main")), ["main"]);
        let message = plan_push("me/x", dir.path(), Some("4bit")).unwrap_err().to_string();
        assert!(message.contains("`4bit`") && message.contains("3bit, main"), "{message}");
        let message = plan_push("me/x", &dir.path().join("logs"), None).unwrap_err().to_string();
        assert!(message.contains("logs") && message.contains("config.json"), "{message}");
    }
}
