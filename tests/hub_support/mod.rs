//! A stand-in for the Hugging Face Hub on 127.0.0.1, with faults on demand.
//!
//! It speaks what downloads and uploads use: revisions, paged listings, files with ranges (large ones
//! from a second host, as the Hub's are), repositories, branches, commits, and the storage that large
//! files are uploaded to, by git-lfs's links and for the Hub's own client by Xet as well.

mod http;
mod lfs;
mod xet;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub(crate) use http::Request;
use http::{Answer, serve};

/// The only token that may write.
pub(crate) const TOKEN: &str = "hf_TestTokenThatNobodyMaySee";

/// Entries of a listing's page, so that every test turns pages.
const PAGE: usize = 3;

/// What a fault does to a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Is busy, and names the seconds to wait.
    Busy(u64),
    /// Closes the connection in the middle of the body.
    Cut,
    /// Flips a bit of the body.
    Damage,
    /// Leaves the last byte out, in good order.
    Short,
    /// Ignores the range asked for.
    Whole,
    /// Has met a limit, which starts anew in so many seconds.
    Limit(u64),
    /// Packs the body, which nobody asked for.
    Gzip,
    /// Takes the request and is silent for so many seconds.
    Silence(u64),
    /// Sends a byte a second.
    Trickle,
    /// Answers with this status and the words of a disabled repository.
    Disabled(u16),
    /// Sends the request on to another server.
    Elsewhere,
}

/// The contents of files by path; shared, as commits hold mostly what the one before held.
pub(crate) type Files = BTreeMap<String, Arc<Vec<u8>>>;

/// A repository: its branches, and the files of each commit.
#[derive(Default)]
pub(crate) struct Repository {
    pub(crate) private: bool,
    pub(crate) branches: BTreeMap<String, String>,
    pub(crate) commits: BTreeMap<String, Files>,
    history: Vec<String>,
}

impl Repository {
    /// Adds a commit on a branch, made where it is missing; gives its name.
    pub(crate) fn commit(&mut self, branch: &str, files: Files) -> String {
        let name = hex(&Sha1::digest(format!("{branch}{}", self.history.len())));
        self.branches.insert(branch.to_owned(), name.clone());
        self.commits.insert(name.clone(), files);
        self.history.push(name.clone());
        name
    }

    /// The files of a branch, tag or commit.
    pub(crate) fn files(&self, revision: &str) -> Option<&Files> {
        self.commits.get(self.branches.get(revision).map_or(revision, String::as_str))
    }
}

#[derive(Default)]
pub(crate) struct State {
    /// By `models/org/name` or `datasets/org/name`.
    pub(crate) repositories: BTreeMap<String, Repository>,
    /// Requests to come that go wrong: method and a part of the path, how, how often.
    pub(crate) faults: Vec<(&'static str, String, Fault, usize)>,
    /// Every request, in order.
    pub(crate) log: Vec<Request>,
    /// Reading needs the token, too.
    pub(crate) closed: bool,
    /// Sizes that listings claim instead of the true ones.
    pub(crate) claimed: BTreeMap<String, u64>,
    /// Where the pages of listings say that the next one is; their own host where this is empty.
    pub(crate) links_to: String,
    /// Large contents by SHA-256, as uploaded.
    pub(crate) stored: Files,
    /// Parts of large contents by SHA-256 and number, as uploaded.
    parts: BTreeMap<(String, usize), Vec<u8>>,
    /// Links to the storage that have been given.
    links: usize,
    /// Keeps every file in git itself.
    pub(crate) plain: bool,
    /// Takes large files by this way only.
    pub(crate) transfer: Option<&'static str>,
    /// A file that commits lose.
    pub(crate) loses: Option<String>,
    /// Makes every repository public.
    pub(crate) public: bool,
    /// Entries that listings hold besides the files.
    pub(crate) extra: Vec<Value>,
}

pub(crate) struct StandIn {
    state: Arc<Mutex<State>>,
    pub(crate) address: String,
}

impl StandIn {
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let storage = {
            let state = Arc::clone(&state);
            serve(move |request| storage(&mut state.lock().unwrap(), request))
        };
        let address = {
            let state = Arc::clone(&state);
            serve(move |request| hub(&mut state.lock().unwrap(), request, &storage))
        };
        Self { state, address }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Puts files on the branch `main` of `models/org/name` or the like; gives the commit.
    pub(crate) fn publish(&self, repository: &str, files: &[(&str, &[u8])]) -> String {
        let files =
            files.iter().map(|(name, bytes)| ((*name).to_owned(), Arc::new(bytes.to_vec())));
        let mut state = self.state();
        state.repositories.entry(repository.to_owned()).or_default().commit("main", files.collect())
    }

    /// The next `times` requests of this method whose path holds `part` go wrong.
    pub(crate) fn fail(&self, method: &'static str, part: &str, fault: Fault, times: usize) {
        self.state().faults.push((method, part.to_owned(), fault, times));
    }

    /// How many requests of this method had `part` in their path.
    pub(crate) fn count(&self, method: &str, part: &str) -> usize {
        let state = self.state();
        state.log.iter().filter(|r| r.method == method && r.path.contains(part)).count()
    }

    pub(crate) fn forget_requests(&self) {
        self.state().log.clear();
    }
}

/// Files that the Hub keeps outside of git.
fn is_large(path: &str) -> bool {
    [".safetensors", ".bin", ".parquet"].iter().any(|ending| path.ends_with(ending))
}

/// The fault planned for a request, if there is one; noted in the log either way.
fn next_fault(state: &mut State, request: &Request) -> Option<Fault> {
    state.log.push(Request { body: Vec::new(), ..request.clone() });
    let planned = state.faults.iter_mut().find(|(method, part, _, times)| {
        *times > 0 && *method == request.method && request.path.contains(part.as_str())
    })?;
    planned.3 -= 1;
    Some(planned.2)
}

/// What a fault answers in place of the server, if it is one that does.
fn refused(fault: Option<Fault>, request: &Request) -> Option<Answer> {
    Some(match fault? {
        Fault::Busy(seconds) => {
            Answer::refusal(503, "busy").header("Retry-After", &seconds.to_string())
        }
        Fault::Limit(seconds) => {
            Answer::refusal(429, "limit").header("ratelimit", &format!("\"api\";r=0;t={seconds}"))
        }
        // As a careless server may: the token comes back in an error.
        Fault::Status(status) => Answer::refusal(status, &format!("no, {}", request.authorization)),
        Fault::Disabled(status) => Answer::refusal(status, "Access to this resource is disabled."),
        Fault::Silence(seconds) => Answer::silence(std::time::Duration::from_secs(seconds)),
        Fault::Elsewhere => Answer::redirect("http://localhost:9/elsewhere").status(307),
        _ => return None,
    })
}

/// The Hub itself.
fn hub(state: &mut State, request: &Request, storage: &str) -> Answer {
    let fault = next_fault(state, request);
    if let Some(answer) = refused(fault, request) {
        return answer;
    }
    let writes = !matches!(request.method.as_str(), "GET" | "HEAD");
    // The word that a multipart upload is over needs no token: its address is a secret.
    let open = request.path.starts_with("/complete/");
    if request.authorization != format!("Bearer {TOKEN}")
        && !open
        && (state.closed || writes || !request.authorization.is_empty())
    {
        return Answer::refusal(401, "Invalid username or password.");
    }
    let answer = answered(state, request, fault, storage);
    if matches!(fault, Some(Fault::Gzip)) && request.path.starts_with("/api/") {
        return answer.packed();
    }
    answer
}

fn answered(state: &mut State, request: &Request, fault: Option<Fault>, storage: &str) -> Answer {
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let parts: Vec<String> = path.trim_start_matches('/').split('/').map(http::decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    // Whole addresses, as the Hub's own client wants them.
    let links = match state.links_to.as_str() {
        "" => format!("http://{}", request.host),
        other => other.to_owned(),
    };
    let method = if request.method == "HEAD" { "GET" } else { request.method.as_str() };
    match (method, parts.as_slice()) {
        ("GET", ["api", "whoami-v2"]) => Answer::json(&json!({
            "type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}},
        })),
        ("POST", ["api", "validate-yaml"]) => Answer::json(&json!({"errors": [], "warnings": []})),
        ("POST", ["api", "repos", "create"]) => create(state, request),
        ("GET", ["api", kind, org, name, rest @ ..]) => {
            let id = format!("{org}/{name}");
            match state.repositories.get(&format!("{kind}/{id}")) {
                None => Answer::refusal(404, "Repository not found").code("RepoNotFound"),
                Some(_) if rest.first() == Some(&"xet-write-token") => xet::token(storage),
                Some(repository) => match rest {
                    ["tree", revision, ..] => {
                        let page = format!("{links}{path}");
                        tree(repository.files(revision), state, query, &page)
                    }
                    ["commits", "main"] => commits(repository, query, &format!("{links}{path}")),
                    _ => described(repository, &id, rest),
                },
            }
        }
        ("POST", ["api", "models", org, name, action, revision]) => {
            change(state, &format!("models/{org}/{name}"), action, revision, request)
        }
        ("POST", [org, name, "info", "lfs", "objects", "batch"]) => {
            lfs::batch(state, &format!("{org}/{name}"), request, storage)
        }
        ("POST", [_, _, "info", "lfs", "verify"]) => lfs::verified(state, &request.json()),
        ("POST", ["complete", oid]) => lfs::completed(state, oid, &request.json()),
        ("GET", ["datasets", org, name, "resolve", commit, path @ ..]) => {
            let key = format!("datasets/{org}/{name}");
            resolved(state, &key, commit, &path.join("/"), request, fault, storage)
        }
        ("GET", [org, name, "resolve", commit, path @ ..]) => {
            let key = format!("models/{org}/{name}");
            resolved(state, &key, commit, &path.join("/"), request, fault, storage)
        }
        _ => Answer::refusal(404, "no such page"),
    }
}

/// What the API says of a repository that is there.
fn described(repository: &Repository, id: &str, rest: &[&str]) -> Answer {
    match *rest {
        [] => Answer::json(&json!({"id": id, "private": repository.private, "siblings": []})),
        ["refs"] => {
            let branch = |(name, commit): (&String, &String)| json!({"name": name, "ref": format!("refs/heads/{name}"), "targetCommit": commit});
            let branches: Vec<Value> = repository.branches.iter().map(branch).collect();
            Answer::json(&json!({"branches": branches, "tags": [], "converts": []}))
        }
        ["revision", revision] => match repository.files(revision) {
            Some(_) => {
                let commit = repository.branches.get(revision).map_or(revision, String::as_str);
                Answer::json(&json!({"id": id, "sha": commit, "siblings": []}))
            }
            None => Answer::refusal(404, "Invalid rev id").code("RevisionNotFound"),
        },
        _ => Answer::refusal(404, "no such page"),
    }
}

/// Where a page begins.
fn cursor(query: &str) -> usize {
    query.split("cursor=").nth(1).map_or(0, |cursor| cursor.parse().unwrap())
}

/// A page of what there is; `page` is the address for the next one.
fn paged(entries: &[Value], query: &str, page: &str) -> Answer {
    let start = cursor(query);
    let shown: Vec<&Value> = entries.iter().skip(start).take(PAGE).collect();
    let answer = Answer::json(&json!(shown));
    if start + PAGE >= entries.len() {
        return answer;
    }
    let next = format!("<{page}?recursive=true&cursor={}>; rel=\"next\"", start + PAGE);
    answer.header("Link", &next)
}

/// A page of a branch's history, the newest first.
fn commits(repository: &Repository, query: &str, page: &str) -> Answer {
    let date = "2026-01-01T00:00:00.000Z";
    let commit =
        |id: &String| json!({"id": id, "authors": [], "title": "", "message": "", "date": date});
    let all: Vec<Value> = repository.history.iter().rev().map(commit).collect();
    paged(&all, query, page)
}

/// A page of a listing, with a folder among the files.
fn tree(files: Option<&Files>, state: &State, query: &str, page: &str) -> Answer {
    let Some(files) = files else {
        return Answer::refusal(404, "Invalid rev id").code("RevisionNotFound");
    };
    assert!(query.to_lowercase().contains("recursive=true"), "{query}");
    let mut entries = vec![json!({"type": "directory", "oid": "", "path": "folder", "size": 0})];
    for (path, bytes) in files {
        let size = state.claimed.get(path).copied().unwrap_or(bytes.len() as u64);
        let mut entry = json!({"type": "file", "oid": git_hash(bytes), "path": path, "size": size});
        if is_large(path) && !state.plain {
            entry["lfs"] = json!({"oid": sha256(bytes), "size": size, "pointerSize": 130});
        }
        entries.push(entry);
    }
    entries.extend(state.extra.iter().cloned());
    paged(&entries, query, page)
}

/// A file: small ones at once, large ones by a detour to the storage, as on the Hub.
fn resolved(
    state: &mut State,
    key: &str,
    commit: &str,
    path: &str,
    request: &Request,
    fault: Option<Fault>,
    storage: &str,
) -> Answer {
    let Some(bytes) = state.repositories.get(key).and_then(|r| r.commits.get(commit)?.get(path))
    else {
        return Answer::refusal(404, "Entry not found").code("EntryNotFound");
    };
    if !is_large(path) {
        return Answer::file(bytes, request, fault)
            .header("ETag", &format!("\"{}\"", git_hash(bytes)))
            .header("X-Repo-Commit", commit);
    }
    let (name, size) = (sha256(bytes), bytes.len());
    state.stored.insert(name.clone(), Arc::clone(bytes));
    if let Some(fault) = fault {
        // The storage is the one that fails.
        state.faults.push(("GET", name.clone(), fault, 1));
    }
    Answer::redirect(&format!("{storage}/file/{name}"))
        .header("X-Linked-ETag", &format!("\"{name}\""))
        .header("X-Linked-Size", &size.to_string())
        .header("X-Repo-Commit", commit)
}

/// The storage behind the Hub: files to download, and uploads by link or by Xet.
fn storage(state: &mut State, request: &Request) -> Answer {
    let fault = next_fault(state, request);
    if let Some(answer) = refused(fault, request) {
        return answer;
    }
    let parts: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
    let by_link = matches!(parts[0], "file" | "lfs");
    assert!(!by_link || request.authorization.is_empty(), "the token went to another host");
    match (request.method.as_str(), parts.as_slice()) {
        (_, ["file", name]) => Answer::file(&state.stored[*name], request, fault),
        ("PUT", ["lfs", oid, link]) => lfs::stored(state, oid, link, request),
        _ => xet::answer(state, request),
    }
}

fn create(state: &mut State, request: &Request) -> Answer {
    let body = request.json();
    let (org, name) =
        (body["organization"].as_str().unwrap_or("me"), body["name"].as_str().unwrap());
    let key = format!("models/{org}/{name}");
    if state.repositories.contains_key(&key) {
        return Answer::refusal(409, "You already created this model repo");
    }
    // In the words of one client or of another.
    let private = body["private"] == true || body["visibility"] == "private";
    let private = private && !state.public;
    let mut repository = Repository { private, ..Default::default() };
    let attributes = Arc::new(b"*.safetensors filter=lfs\n".to_vec());
    repository.commit("main", BTreeMap::from([(".gitattributes".to_owned(), attributes)]));
    state.repositories.insert(key, repository);
    Answer::json(&json!({"url": format!("http://{}/{org}/{name}", request.host)}))
}

/// Branches and commits.
fn change(state: &mut State, key: &str, action: &str, revision: &str, request: &Request) -> Answer {
    let plain = state.plain;
    let Some(repository) = state.repositories.get_mut(key) else {
        return Answer::refusal(404, "Repository not found").code("RepoNotFound");
    };
    match action {
        "branch" if repository.branches.contains_key(revision) => {
            Answer::refusal(409, "Reference already exists")
        }
        "branch" => {
            let start = request.json()["startingPoint"].as_str().unwrap().to_owned();
            assert!(repository.commits.contains_key(&start));
            repository.branches.insert(revision.to_owned(), start);
            Answer::json(&json!({}))
        }
        "preupload" => {
            let mode = |file: &Value| {
                let path = file["path"].as_str().unwrap();
                let mode = if is_large(path) && !plain { "lfs" } else { "regular" };
                json!({"path": path, "uploadMode": mode, "shouldIgnore": false})
            };
            let body = request.json();
            let files: Vec<Value> = body["files"].as_array().unwrap().iter().map(mode).collect();
            Answer::json(&json!({"files": files}))
        }
        "commit" => commit(state, key, revision, request),
        other => Answer::refusal(404, &format!("no {other}")),
    }
}

fn commit(state: &mut State, key: &str, revision: &str, request: &Request) -> Answer {
    let mut files = state.repositories[key].files(revision).unwrap().clone();
    for line in String::from_utf8(request.body.clone()).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let value = &line["value"];
        let path = || value["path"].as_str().unwrap().to_owned();
        match line["key"].as_str().unwrap() {
            "header" => {}
            "file" => {
                let content = http::base64(value["content"].as_str().unwrap());
                files.insert(path(), Arc::new(content));
            }
            "lfsFile" => {
                let name = value["oid"].as_str().unwrap();
                let Some(bytes) = state.stored.get(name) else {
                    return Answer::refusal(400, &format!("{name} was not uploaded"));
                };
                assert_eq!(value["size"], bytes.len());
                files.insert(path(), Arc::clone(bytes));
            }
            other => panic!("{other} in a commit"),
        }
    }
    if let Some(lost) = &state.loses {
        files.remove(lost);
    }
    let name = state.repositories.get_mut(key).unwrap().commit(revision, files);
    let id = key.trim_start_matches("models/");
    let url = format!("http://{}/{id}/commit/{name}", request.host);
    Answer::json(&json!({"commitOid": name, "commitUrl": url}))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn git_hash(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hex(&hasher.finalize())
}
