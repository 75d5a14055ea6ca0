//! Uploads: one Hub branch per folder.
//!
//! What is on the branch already is left alone, so a repeated upload sends what is missing. Large
//! files go to the storage first, where they stay if the rest fails. Commits come after that, weights
//! before the small files: a look at an unfinished branch finds no config.json that promises a
//! model. In the end the branch is listed again and compared with what was sent.

use std::fs::File;
use std::io::Read;
use std::sync::Mutex;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::{Api, Kind};
use crate::commit::{self, Ready, Way, commits};
use crate::hash::Digest;
use crate::hub::split_repo;
use crate::lfs::{Object, Storage, repeated};
use crate::listing::RemoteFile;
use crate::plan::{BranchPlan, MAIN, PlannedFile};
use crate::progress::Meter;
use crate::send::{Outgoing, Payload, Sender};
use crate::{Error, Hub, Progress, Result};

/// Beginning of a file by which the Hub says how it wants to keep it.
const SAMPLE: u64 = 512;

/// How many of a branch's other files are named.
const OTHERS: usize = 20;

/// Files that one request asks about.
const ASKED: usize = 256;

/// The largest file that is sent within a commit, and so is in memory whole.
const PLAIN: u64 = 64 << 20;

/// An upload.
#[derive(Clone, Debug)]
pub struct PushRequest<'a> {
    /// `ORG/NAME`; made if it does not exist.
    pub repo: &'a str,
    /// Make the repository private.
    pub private: bool,
    /// What goes where, from [`crate::plan_push`].
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

/// Makes the repository and its branches where they are missing, and uploads what they lack.
///
/// A new branch starts at the repository's first commit, so that it inherits nothing from `main`.
/// Files on a branch that the folder does not hold stay, and are named.
///
/// # Errors
/// Without a token, when the network is forbidden, when the Hub refuses, or lists something else
/// than what was sent. What was uploaded by then stays.
pub fn push(hub: &Hub, request: &PushRequest<'_>, progress: &dyn Progress) -> Result<Pushed> {
    split_repo(request.repo)?;
    let api = Api::new(hub, Kind::Model, request.repo)?;
    if hub.token.is_none() {
        return Err(Error::NoToken);
    }
    let sender = Sender::new(hub, request.repo)?;
    let upload = Upload { api: &api, sender: &sender, progress };
    upload.make_repository(request.private)?;
    upload.make_branches(request.branches)?;

    let mut missing: Vec<(&BranchPlan, Vec<&PlannedFile>)> = Vec::new();
    let mut unchanged = 0;
    for plan in request.branches {
        progress.note(&format!("comparing {} with the Hub", plan.branch));
        let there = api.files(&plan.branch, progress)?.files;
        warn_of_others(plan, &there, progress);
        let mut lacking = Vec::new();
        for file in &plan.files {
            if is_there(plan, file, &there)? {
                unchanged += 1;
            } else {
                lacking.push(file);
            }
        }
        missing.push((plan, lacking));
    }
    let all = || missing.iter().flat_map(|(_, files)| files);
    let (files, bytes) = (all().count(), all().map(|file| file.bytes).sum());
    progress.begin(request.repo, bytes, 0);
    let meter = Meter::new(progress, 0);
    let sent = missing.iter().try_for_each(|(plan, files)| upload.branch(plan, files, &meter));
    progress.end();
    sent?;
    Ok(Pushed { files, bytes, unchanged })
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
        let named = others[..others.len().min(OTHERS)].join(", ");
        let more = match others.len().saturating_sub(OTHERS) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        progress.note(&format!("branch {branch} has files that {folder} lacks: {named}{more}"));
    }
}

fn is_there(plan: &BranchPlan, file: &PlannedFile, there: &[RemoteFile]) -> Result<bool> {
    let Some(remote) = there.iter().find(|remote| remote.path == file.path) else {
        return Ok(false);
    };
    // Weights that lie in git itself are not where they belong.
    if file.is_weights() && file.bytes > 0 && matches!(remote.digest, Digest::Git(_)) {
        return Ok(false);
    }
    let path = plan.folder.join(&file.path);
    Ok(remote.bytes == file.bytes
        && remote.digest.is_of(&path).map_err(Error::io("read", &path))?)
}

/// A connection that may write to a repository.
struct Upload<'a> {
    api: &'a Api<'a>,
    sender: &'a Sender<'a>,
    progress: &'a dyn Progress,
}

impl Upload<'_> {
    fn make_repository(&self, private: bool) -> Result<()> {
        if let Some(is_private) = self.found()? {
            return match private && is_private == Some(false) {
                true => Err(Error::Public { repo: self.api.id().to_owned() }),
                false => Ok(()),
            };
        }
        let (owner, name) = split_repo(self.api.id())?;
        let body = json!({
            "type": "model", "organization": owner, "name": name, "private": private,
        });
        let url = self.address(&["api", "repos", "create"]);
        self.make("create the repository", url, &body)?;
        // Another server may call the wish by another name, and pass over it.
        if private && self.found()?.flatten() == Some(false) {
            return Err(Error::MadePublic { repo: self.api.id().to_owned() });
        }
        Ok(())
    }

    /// Whether the repository exists, and then whether it says that it is private.
    fn found(&self) -> Result<Option<Option<bool>>> {
        #[derive(Deserialize)]
        struct Info {
            private: Option<bool>,
        }
        match self.api.json::<Info>(self.api.id(), self.api.api(&[]), self.progress) {
            Ok((info, _)) => Ok(Some(info.private)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn make_branches(&self, plans: &[BranchPlan]) -> Result<()> {
        #[derive(Deserialize)]
        struct Refs {
            branches: Vec<Branch>,
        }
        #[derive(Deserialize)]
        struct Branch {
            name: String,
        }
        let what = format!("the branches of {}", self.api.id());
        let refs: Refs = self.api.json(&what, self.api.api(&["refs"]), self.progress)?.0;
        let exists = |name: &str| refs.branches.iter().any(|branch| branch.name == name);
        let missing: Vec<&str> = plans
            .iter()
            .map(|plan| plan.branch.as_str())
            .filter(|name| *name != MAIN && !exists(name))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let first = self.first_commit()?;
        for name in missing {
            self.progress.note(&format!("creating branch {name}"));
            let body = match &first {
                Some(commit) => json!({"startingPoint": commit}),
                None => json!({}),
            };
            let url = self.api.api(&["branch", name]);
            self.make(&format!("create branch {name}"), url, &body)?;
        }
        Ok(())
    }

    /// The commit that the repository began with; the newest come first.
    fn first_commit(&self) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Commit {
            id: String,
        }
        let what = format!("the commits of {}", self.api.id());
        let mut first = None;
        self.api.pages(&what, self.api.api(&["commits", MAIN]), self.progress, |body| {
            let commits: Vec<Commit> = serde_json::from_slice(body).map_err(|e| e.to_string())?;
            first = commits.into_iter().next_back().map(|commit| commit.id).or(first.take());
            Ok(())
        })?;
        Ok(first)
    }

    /// Makes something that may be there: somebody else may have been faster.
    fn make(&self, action: &str, url: Url, body: &Value) -> Result<()> {
        match self.post(action, url, "application/json", body.to_string().into()) {
            Err(Error::Upload { source, .. }) if is_conflict(&source) => Ok(()),
            made => made.map(|_| ()),
        }
    }

    fn address(&self, parts: &[&str]) -> Url {
        let mut url = self.api.hub().endpoint.clone();
        let root = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{root}/{}", parts.join("/")));
        url
    }

    fn post(&self, action: &str, url: Url, kind: &'static str, body: Vec<u8>) -> Result<Vec<u8>> {
        let request = Outgoing {
            method: Method::POST,
            url,
            headers: HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]),
            payload: Payload::Bytes(body.into()),
        };
        repeated(self.api, self.sender, &request, self.api.id(), self.progress)
            .map(|answer| answer.body)
            .map_err(|source| failed(action, source))
    }

    /// Sends what a branch lacks.
    fn branch(&self, plan: &BranchPlan, files: &[&PlannedFile], meter: &Meter<'_>) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let ready = self.ready(plan, files)?;
        let senders = Mutex::new(Vec::new());
        let storage = Storage {
            api: self.api,
            sender: self.sender,
            branch: &plan.branch,
            meter,
            senders: &senders,
        };
        let mut last = None;
        for commit in commits(&ready) {
            let large: Vec<&Object> = commit.iter().filter_map(Ready::object).collect();
            let what = || format!("upload `{}` to {}", commit[0].file.path, plan.branch);
            storage.upload(&large).map_err(|source| failed(&what(), source))?;
            last = Some(self.commit(plan, commit, &what())?);
            for ready in commit {
                if ready.object().is_none() {
                    meter.add(ready.file.bytes);
                }
                let name = format!("{}/{}", plan.branch, ready.file.path);
                self.progress.file(&name, ready.file.bytes);
            }
        }
        match last {
            Some(commit) => self.look(plan, &ready, commit.as_deref()),
            None => Ok(()),
        }
    }

    /// Asks how the Hub wants each file, and hashes the large ones.
    fn ready<'b>(&self, plan: &BranchPlan, files: &[&'b PlannedFile]) -> Result<Vec<Ready<'b>>> {
        #[derive(Deserialize)]
        struct Modes {
            files: Vec<Mode>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Mode {
            path: String,
            upload_mode: String,
            #[serde(default)]
            should_ignore: bool,
        }
        let mut ready = Vec::new();
        for files in files.chunks(ASKED) {
            let described = files.iter().map(|file| {
                let path = plan.folder.join(&file.path);
                let sample = beginning(&path, SAMPLE).map_err(Error::io("read", &path))?;
                let sample = BASE64_STANDARD.encode(sample);
                Ok(json!({"path": file.path, "size": file.bytes, "sample": sample}))
            });
            let body = json!({"files": described.collect::<Result<Vec<_>>>()?});
            let url = self.api.api(&["preupload", &plan.branch]);
            let action = format!("upload `{}` to {}", files[0].path, plan.branch);
            let answer =
                self.post(&action, url, "application/json", body.to_string().into_bytes())?;
            let modes: Modes = self.parsed(&answer)?;
            for &file in files {
                let mode = modes.files.iter().find(|mode| mode.path == file.path);
                if mode.is_some_and(|mode| mode.should_ignore) {
                    let (branch, path) = (&plan.branch, &file.path);
                    self.progress.note(&format!(
                        "{branch}/{path} is left out: the repository's .gitignore names it"
                    ));
                    continue;
                }
                let is_large = mode.is_some_and(|mode| mode.upload_mode == "lfs");
                ready.push(self.way(plan, file, is_large)?);
            }
        }
        Ok(ready)
    }

    fn way<'b>(
        &self,
        plan: &BranchPlan,
        file: &'b PlannedFile,
        is_large: bool,
    ) -> Result<Ready<'b>> {
        let path = plan.folder.join(&file.path);
        let name = format!("{}/{}", plan.branch, file.path);
        // The storage takes no empty files.
        if !is_large || file.bytes == 0 {
            if file.bytes > PLAIN || (file.is_weights() && file.bytes > 0) {
                return Err(Error::NotLarge { file: name, bytes: file.bytes });
            }
            return Ok(Ready { file, path, way: Way::Plain });
        }
        let modified = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok();
        let oid = sha256(&path)?;
        let way = Way::Large(Object { name, path: path.clone(), oid, bytes: file.bytes, modified });
        Ok(Ready { file, path, way })
    }

    fn parsed<T: serde::de::DeserializeOwned>(&self, answer: &[u8]) -> Result<T> {
        serde_json::from_slice(answer).map_err(|e| Error::Answer {
            what: self.api.id().to_owned(),
            reason: self.api.hub().redacted(&e.to_string()),
        })
    }

    /// One commit; gives its name, if the Hub says it.
    fn commit(
        &self,
        plan: &BranchPlan,
        files: &[Ready<'_>],
        action: &str,
    ) -> Result<Option<String>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Done {
            commit_oid: Option<String>,
        }
        let summary = match files {
            [one] => format!("Upload {}", one.file.path),
            _ => format!("Upload {} files", files.len()),
        };
        let body = commit::body(&summary, files)?;
        let url = self.api.api(&["commit", &plan.branch]);
        let answer = self.post(action, url, "application/x-ndjson", body)?;
        Ok(self.parsed::<Done>(&answer)?.commit_oid)
    }

    /// Compares what a branch lists with what was sent.
    fn look(&self, plan: &BranchPlan, sent: &[Ready<'_>], commit: Option<&str>) -> Result<()> {
        let commit = commit.filter(|commit| gptq_checkpoint::is_hub_name(commit));
        let there = self.api.files(commit.unwrap_or(&plan.branch), self.progress)?.files;
        for ready in sent {
            let remote = there.iter().find(|remote| remote.path == ready.file.path);
            let as_sent = match (remote, &ready.way) {
                (None, _) => false,
                (Some(remote), Way::Large(object)) => {
                    remote.bytes == object.bytes && remote.digest.hex() == object.oid
                }
                (Some(remote), Way::Plain) => {
                    let is_of = remote.digest.is_of(&ready.path);
                    is_of.map_err(Error::io("read", &ready.path))?
                }
            };
            if !as_sent {
                let found = match remote {
                    None => "nothing".to_owned(),
                    Some(remote) => format!("{} bytes with {}", remote.bytes, remote.digest),
                };
                return Err(Error::NotArrived {
                    repo: self.api.id().to_owned(),
                    branch: plan.branch.clone(),
                    file: ready.file.path.clone(),
                    found,
                });
            }
        }
        Ok(())
    }
}

fn beginning(path: &std::path::Path, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut sample = Vec::new();
    File::open(path)?.take(bytes).read_to_end(&mut sample)?;
    Ok(sample)
}

fn sha256(path: &std::path::Path) -> Result<String> {
    let mut hasher = crate::hash::Hasher::sha256();
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    hasher.read(&mut file).map_err(Error::io("read", path))?;
    Ok(hasher.finish())
}

/// A step of an upload that failed. What says by itself what to do is left as it is.
fn failed(action: &str, source: Error) -> Error {
    match source {
        Error::TokenRefused { .. }
        | Error::TokenNeeded { .. }
        | Error::Forbidden { .. }
        | Error::Panicked { .. } => source,
        source => Error::Upload { action: action.to_owned(), source: Box::new(source) },
    }
}

fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Status { status, .. } if status.starts_with("409"))
}
