//! Uploads: one Hub branch per folder.
//!
//! What is on the branch already is left alone, so a repeated upload sends what is missing. Weights
//! get a commit each, before the small files: a failure costs one weight file at most, and whoever
//! looks at an unfinished branch finds no config.json that promises a model.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use hf_hub::progress::{ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::{CommitOperation, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync};
use serde::Serialize;

use crate::api::{Api, Kind, RemoteFile, USER_AGENT};
use crate::hub::{check_revision, split_repo};
use crate::{Error, Hub, Progress, Result};

/// The branch that every repository has.
const MAIN: &str = "main";

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
    fn is_weights(&self) -> bool {
        self.path.ends_with(".safetensors")
    }
}

/// An upload.
#[derive(Clone, Debug)]
pub struct PushRequest<'a> {
    /// `ORG/NAME`; made if it does not exist.
    pub repo: &'a str,
    /// Make the repository private.
    pub private: bool,
    /// What goes where, from [`plan_push`].
    pub branches: &'a [BranchPlan],
}

/// What an upload did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Files sent.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Files that were there already.
    pub unchanged: usize,
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
        check_revision(branch)?;
    }
    if is_checkpoint(dir) {
        return Ok(vec![planned(branch.unwrap_or(MAIN), dir)?]);
    }
    let mut branches = Vec::new();
    for (name, path) in entries(dir)? {
        // A folder that is still being written has this ending.
        if path.is_dir() && is_checkpoint(&path) && !name.ends_with(".partial") {
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
    dir.join("config.json").is_file()
}

fn planned(branch: &str, folder: &Path) -> Result<BranchPlan> {
    check_revision(branch)?;
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
        } else {
            files.push(PlannedFile { path: format!("{prefix}{name}"), bytes: meta.len() });
        }
    }
    Ok(())
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

/// Makes the repository and its branches where they are missing, and uploads what they lack.
///
/// A new branch starts at the repository's first commit, so that it inherits nothing from `main`.
/// Files on a branch that the folder does not hold stay, and are told of.
///
/// # Errors
/// Without a token, when the network is forbidden, or when the Hub refuses. What was uploaded by
/// then stays.
pub fn push(hub: &Hub, request: &PushRequest<'_>, progress: &dyn Progress) -> Result<Pushed> {
    let api = Api::new(hub, Kind::Model, request.repo)?;
    let upload = Upload::connect(hub, request.repo)?;
    upload.make_repository(request.private)?;
    upload.make_branches(request.branches, progress)?;

    let mut missing = Vec::new();
    let mut unchanged = 0;
    for plan in request.branches {
        progress.note(&format!("comparing {} with the Hub", plan.branch));
        let there = api.files(&plan.branch, progress)?;
        warn_of_others(plan, &there, progress);
        for file in &plan.files {
            if is_there(plan, file, &there)? {
                unchanged += 1;
            } else {
                missing.push((plan, file));
            }
        }
    }
    let bytes = missing.iter().map(|(_, file)| file.bytes).sum();
    progress.begin(request.repo, bytes, 0);
    let result = upload.commits(&missing, progress);
    progress.end();
    result?;
    Ok(Pushed { files: missing.len(), bytes, unchanged })
}

fn warn_of_others(plan: &BranchPlan, there: &[RemoteFile], progress: &dyn Progress) {
    let ours = |path: &str| plan.files.iter().any(|file| file.path == path);
    let others: Vec<&str> = there
        .iter()
        .map(|file| file.path.as_str())
        .filter(|path| *path != ".gitattributes" && !ours(path))
        .collect();
    if !others.is_empty() {
        let (branch, folder) = (&plan.branch, plan.folder.display());
        let others = others.join(", ");
        progress.note(&format!("branch {branch} has files that {folder} lacks: {others}"));
    }
}

fn is_there(plan: &BranchPlan, file: &PlannedFile, there: &[RemoteFile]) -> Result<bool> {
    let Some(remote) = there.iter().find(|remote| remote.path == file.path) else {
        return Ok(false);
    };
    let path = plan.folder.join(&file.path);
    Ok(remote.bytes == file.bytes
        && remote.digest.is_of(&path).map_err(Error::io("read", &path))?)
}

/// A connection that may write to a repository.
struct Upload<'a> {
    hub: &'a Hub,
    repo: &'a str,
    client: HFClientSync,
    remote: HFRepositorySync<RepoTypeModel>,
}

impl<'a> Upload<'a> {
    fn connect(hub: &'a Hub, repo: &'a str) -> Result<Self> {
        let (owner, name) = split_repo(repo)?;
        let token = hub.token.as_ref().ok_or(Error::NoToken)?;
        let client = HFClient::builder()
            .endpoint(hub.endpoint.as_str())
            .token(token.secret.as_str())
            .user_agent(USER_AGENT)
            .retry_max_attempts(hub.retries as usize)
            .build_sync()
            .map_err(|e| failed(hub, repo, "connect", &e))?;
        let remote = client.model(owner, name);
        Ok(Self { hub, repo, client, remote })
    }

    fn failed(&self, action: &str, error: &HFError) -> Error {
        failed(self.hub, self.repo, action, error)
    }

    fn make_repository(&self, private: bool) -> Result<()> {
        let doing = "read the repository's description";
        if self.remote.exists().send().map_err(|e| self.failed(doing, &e))? {
            let info = self.remote.info().send().map_err(|e| self.failed(doing, &e))?;
            if private && info.private == Some(false) {
                return Err(Error::Public { repo: self.repo.to_owned() });
            }
            return Ok(());
        }
        self.client
            .create_repository()
            .repo_id(self.repo)
            .repo_type(RepoTypeModel)
            .private(private)
            .exist_ok(true)
            .send()
            .map_err(|e| self.failed("create the repository", &e))?;
        Ok(())
    }

    fn make_branches(&self, plans: &[BranchPlan], progress: &dyn Progress) -> Result<()> {
        let refs =
            self.remote.list_refs().send().map_err(|e| self.failed("list the branches", &e))?;
        let exists = |name: &str| refs.branches.iter().any(|branch| branch.name == name);
        let missing: Vec<&str> = plans
            .iter()
            .map(|plan| plan.branch.as_str())
            .filter(|name| *name != MAIN && !exists(name))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let history = self.remote.list_commits().send();
        let history = history.map_err(|e| self.failed("list the branches", &e))?;
        let first = history.last().map(|commit| commit.id.clone());
        for name in missing {
            progress.note(&format!("creating branch {name}"));
            match self.remote.create_branch().branch(name).maybe_revision(first.clone()).send() {
                // Made by somebody else meanwhile.
                Ok(()) | Err(HFError::Conflict { .. }) => {}
                Err(e) => return Err(self.failed(&format!("create branch {name}"), &e)),
            }
        }
        Ok(())
    }

    /// Each weight file in a commit of its own, then the rest of its branch in one.
    fn commits(
        &self,
        missing: &[(&BranchPlan, &PlannedFile)],
        progress: &dyn Progress,
    ) -> Result<()> {
        let mut done = 0;
        let together = |a: &(&BranchPlan, &PlannedFile), b: &(&BranchPlan, &PlannedFile)| {
            a.0.branch == b.0.branch && !a.1.is_weights() && !b.1.is_weights()
        };
        for files in missing.chunk_by(together) {
            done += self.commit(files, done, progress)?;
        }
        Ok(())
    }

    /// One commit; gives its bytes.
    fn commit(
        &self,
        files: &[(&BranchPlan, &PlannedFile)],
        done: u64,
        progress: &dyn Progress,
    ) -> Result<u64> {
        let Some((plan, first)) = files.first() else { return Ok(0) };
        let operations: Vec<CommitOperation> = files
            .iter()
            .map(|(plan, file)| {
                CommitOperation::add_file(file.path.as_str(), plan.folder.join(&file.path))
            })
            .collect();
        let message = match files {
            [_] => format!("Upload {}", first.path),
            _ => format!("Upload {} files", files.len()),
        };
        let bytes: u64 = files.iter().map(|(_, file)| file.bytes).sum();
        let (sender, receiver) = channel();
        let commit = self
            .remote
            .create_commit()
            .operations(operations)
            .commit_message(message)
            .revision(plan.branch.as_str())
            .progress(Sent(sender));
        let result = std::thread::scope(|scope| {
            let job = scope.spawn(|| commit.send());
            // The sender may outlive the job inside hf-hub, so its end is not waited for.
            while !job.is_finished() {
                match receiver.recv_timeout(Duration::from_millis(100)) {
                    Ok(sent) => progress.position(done + bytes.min(sent)),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            job.join()
        });
        let what = format!("`{}` to {}", first.path, plan.branch);
        result
            .map_err(|_| Error::Panicked { doing: format!("uploading {what}") })?
            .map_err(|e| self.failed(&format!("upload {what}"), &e))?;
        progress.position(done + bytes);
        for (plan, file) in files {
            progress.file(&format!("{}/{}", plan.branch, file.path), file.bytes);
        }
        Ok(bytes)
    }
}

/// Hands the bytes sent so far over to the thread that shows them.
struct Sent(Sender<u64>);

impl ProgressHandler for Sent {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Upload(UploadEvent::Progress { bytes_completed, .. }) = event {
            // Nobody listens any more when the upload is over.
            let _ = self.0.send(*bytes_completed);
        }
    }
}

/// An error of hf-hub in words that say what to do, without the token.
fn failed(hub: &Hub, repo: &str, action: &str, error: &HFError) -> Error {
    let origin = || hub.token.as_ref().map_or_else(String::new, |token| token.origin.clone());
    match error {
        HFError::AuthRequired { .. } => {
            Error::TokenRefused { what: repo.to_owned(), source_name: origin() }
        }
        HFError::Forbidden { .. } => Error::Forbidden {
            action: "writing",
            what: repo.to_owned(),
            hint: format!("the token of {} needs the write role for it", origin()),
        },
        _ => {
            let mut reason = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !reason.contains(&cause_text) {
                    reason = format!("{reason}: {cause_text}");
                }
                source = cause.source();
            }
            Error::Upload { action: action.to_owned(), reason: hub.redacted(&reason) }
        }
    }
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
