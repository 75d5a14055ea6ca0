//! The Hub over HTTP: requests, their failures, and listings.

use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::blocking::{Client, Response};
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, LINK, RANGE, RETRY_AFTER};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::hash::Digest;
use crate::hub::{is_plain, split_id};
use crate::stop::Stop;
use crate::{Error, Hub, Progress, Result};

/// What this program calls itself.
pub(crate) const USER_AGENT: &str = concat!("gptq/", env!("CARGO_PKG_VERSION"));

/// A connection that brings nothing for so long is given up and made anew.
const STALLED: Duration = Duration::from_secs(60);

/// Waits grow from one second to this.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The longest pause that the Hub may ask for; its limits are counted in windows of five minutes.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Model,
    Dataset,
}

impl Kind {
    /// The word in addresses and in the cache's folder names.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A file of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Path within the repository; stays within it.
    pub(crate) path: String,
    /// Size.
    pub(crate) bytes: u64,
    /// What it hashes to.
    pub(crate) digest: Digest,
}

/// Why a request brought nothing.
pub(crate) enum Failure {
    /// May work in a while, perhaps after the time that the Hub asks for.
    Transient { reason: String, pause: Option<Duration> },
    /// Will fail again.
    Fatal(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

/// Counts fruitless attempts and waits between them, each time twice as long.
pub(crate) struct Patience<'a> {
    retries: u32,
    failed: u32,
    stop: &'a Stop,
}

impl<'a> Patience<'a> {
    pub(crate) fn new(retries: u32, stop: &'a Stop) -> Self {
        Self { retries, failed: 0, stop }
    }

    /// Something arrived.
    pub(crate) fn restore(&mut self) {
        self.failed = 0;
    }

    /// Waits before the next attempt, or gives up. Once the whole is stopped, there is no waiting.
    pub(crate) fn spend(
        &mut self,
        what: &str,
        failure: Failure,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (reason, pause) = match failure {
            Failure::Fatal(error) => return Err(error),
            Failure::Transient { reason, pause } => (reason, pause),
        };
        self.failed += 1;
        if self.failed > self.retries {
            return Err(Error::Network { what: what.to_owned(), reason, attempts: self.failed });
        }
        let doubled = Duration::from_secs(1 << (self.failed - 1).min(10));
        let wait = pause.unwrap_or(doubled.min(LONGEST_WAIT)).min(LONGEST_PAUSE);
        progress.note(&format!("{what}: {reason}; trying again in {} s", wait.as_secs()));
        self.stop.wait(wait);
        Ok(())
    }
}

/// A client of one repository.
pub(crate) struct Api<'a> {
    hub: &'a Hub,
    client: Client,
    kind: Kind,
    id: &'a str,
}

impl<'a> Api<'a> {
    pub(crate) fn new(hub: &'a Hub, kind: Kind, id: &'a str) -> Result<Self> {
        split_id(id)?;
        hub.check_online(id)?;
        let client = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(Duration::from_secs(15))
            // Of each read, not of the whole file.
            .timeout(STALLED)
            .build()
            .map_err(|e| Error::Answer { what: id.to_owned(), reason: chain(&e) })?;
        Ok(Self { hub, client, kind, id })
    }

    pub(crate) fn hub(&self) -> &'a Hub {
        self.hub
    }

    /// The repository as the user named it.
    pub(crate) fn id(&self) -> &'a str {
        self.id
    }

    /// The commit that a revision stands for now.
    pub(crate) fn commit(&self, revision: &str, progress: &dyn Progress) -> Result<String> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
        }
        let url = self.url(&["api", self.kind.plural()], &["revision", revision], "");
        let what = format!("{}@{revision}", self.id);
        let (Info { sha }, _) = self.json(&what, url, progress)?;
        if !is_plain(&sha) {
            return Err(Error::Answer { what, reason: format!("`{sha}` is no commit") });
        }
        Ok(sha)
    }

    /// All files at a revision, in the Hub's order.
    pub(crate) fn files(&self, revision: &str, progress: &dyn Progress) -> Result<Vec<RemoteFile>> {
        let mut url = self.url(&["api", self.kind.plural()], &["tree", revision], "");
        url.set_query(Some("recursive=true"));
        let what = format!("{}@{revision}", self.id);
        let mut files = Vec::new();
        let mut next = Some(url);
        while let Some(url) = next {
            let (entries, headers): (Vec<Entry>, _) = self.json(&what, url.clone(), progress)?;
            for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
                files.push(entry.checked(&what)?);
            }
            next = next_page(&headers, &url, &self.hub.endpoint).map_err(|reason| {
                Error::Answer { what: what.clone(), reason: self.hub.redacted(&reason) }
            })?;
        }
        Ok(files)
    }

    /// Opens a file at a commit, from an offset on.
    pub(crate) fn open(&self, commit: &str, path: &str, from: u64) -> Result<Response, Failure> {
        let url = self.url(self.page(), &["resolve", commit], path);
        self.get(&format!("{}/{path}", self.id), url, from)
    }

    /// What stands before the id in the address of the repository's page.
    fn page(&self) -> &'static [&'static str] {
        if self.kind == Kind::Dataset { &["datasets"] } else { &[] }
    }

    /// An address below the endpoint; each part but `path` is one segment, whatever it holds.
    fn url(&self, prefix: &[&str], suffix: &[&str], path: &str) -> Url {
        let mut url = self.hub.endpoint.clone();
        #[expect(clippy::expect_used, reason = "an http address, as `Hub` checked, has a path")]
        let mut segments = url.path_segments_mut().expect("an address with a path");
        segments.pop_if_empty().extend(prefix).extend(self.id.split('/')).extend(suffix);
        segments.extend(path.split('/').filter(|part| !part.is_empty()));
        drop(segments);
        url
    }

    fn json<T: DeserializeOwned>(
        &self,
        what: &str,
        url: Url,
        progress: &dyn Progress,
    ) -> Result<(T, HeaderMap)> {
        let never = Stop::new();
        let mut patience = Patience::new(self.hub.retries, &never);
        loop {
            let answer = self.get(what, url.clone(), 0).and_then(|response| {
                let headers = response.headers().clone();
                Ok((response.bytes().map_err(|e| interrupted(&e))?, headers))
            });
            match answer {
                Ok((body, headers)) => {
                    let reason = |e: serde_json::Error| self.hub.redacted(&e.to_string());
                    let value = serde_json::from_slice(&body)
                        .map_err(|e| Error::Answer { what: what.to_owned(), reason: reason(e) })?;
                    return Ok((value, headers));
                }
                Err(failure) => patience.spend(what, failure, progress)?,
            }
        }
    }

    fn get(&self, what: &str, url: Url, from: u64) -> Result<Response, Failure> {
        // Sizes and ranges are those of the file, not of a compressed form.
        let mut request = self.client.get(url).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.hub.token {
            // Not sent on when another host serves the file.
            request = request.bearer_auth(&token.secret);
        }
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let answered = &self.hub.answered;
        let response = request.send().map_err(|e| match e.is_connect() {
            // Without a network, waiting for one would only hide the message.
            true if !answered.load(Ordering::Relaxed) => Failure::Fatal(Error::Network {
                what: what.to_owned(),
                reason: chain(&e),
                attempts: 1,
            }),
            _ => interrupted(&e),
        })?;
        answered.store(true, Ordering::Relaxed);
        let status = response.status();
        if status.is_success() || (from > 0 && status == StatusCode::RANGE_NOT_SATISFIABLE) {
            return Ok(response);
        }
        Err(self.refusal(what, response))
    }

    fn refusal(&self, what: &str, response: Response) -> Failure {
        let status = response.status();
        let header = |name: &str| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            self.hub.redacted(value.unwrap_or_default())
        };
        if matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504) {
            let seconds = header(RETRY_AFTER.as_str()).parse().ok();
            let pause = seconds.map(Duration::from_secs);
            return Failure::Transient { reason: format!("the Hub answered {status}"), pause };
        }
        let what = what.to_owned();
        let id = self.id;
        Failure::Fatal(match (status.as_u16(), header("x-error-code").as_str(), &self.hub.token) {
            (_, "RevisionNotFound" | "EntryNotFound", _) => {
                Error::NotFound { what: format!("`{what}`: the repository is there, that is not") }
            }
            (_, "GatedRepo", Some(_)) | (403, _, _) => Error::Forbidden {
                action: "reading",
                what,
                hint: format!("accept its terms on {} first", self.url(self.page(), &[], "")),
            },
            (401, _, None) => Error::TokenNeeded { what },
            (401, "RepoNotFound", Some(_)) => {
                Error::NotFound { what: format!("repository `{id}` that the token may read") }
            }
            (401, _, Some(token)) => {
                Error::TokenRefused { what, source_name: token.origin.clone() }
            }
            (404, ..) => Error::NotFound { what: format!("`{what}`") },
            _ => {
                let message = header("x-error-message");
                let message = if message.is_empty() { message } else { format!(": {message}") };
                Error::Status { what, status: status.to_string(), message }
            }
        })
    }
}

/// A connection that could not be made or that broke.
pub(crate) fn interrupted(error: &reqwest::Error) -> Failure {
    Failure::Transient { reason: chain(error), pause: None }
}

/// An error with its causes, without the address: a redirected one is a secret of its own.
fn chain(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("nothing arrived for {} s", STALLED.as_secs());
    }
    let mut source = std::error::Error::source(error);
    let mut last = None;
    while let Some(cause) = source {
        last = Some(cause.to_string());
        source = cause.source();
    }
    last.unwrap_or_else(|| "the connection failed".to_owned())
}

/// An entry of a listing as the Hub sends it.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    oid: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Entry {
    /// Paths and hashes become file names, so they are not taken on trust.
    fn checked(self, what: &str) -> Result<RemoteFile> {
        let unusable = |reason: String| Error::Answer { what: what.to_owned(), reason };
        let safe = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0']);
        if !self.path.split('/').all(safe) {
            return Err(unusable(format!("`{}` would leave the repository", self.path)));
        }
        let (oid, bytes) = self.lfs.map_or((self.oid, self.size), |lfs| (lfs.oid, lfs.size));
        let digest = Digest::parse(&oid)
            .ok_or_else(|| unusable(format!("`{oid}` is no hash of `{}`", self.path)))?;
        Ok(RemoteFile { path: self.path, bytes, digest })
    }
}

/// The next page of a listing, or why there is none although there should be.
///
/// It is asked for at the endpoint, whatever host it is said to be on: a mirror passes on the links
/// of the Hub behind it, a proxy may have changed the scheme, and the token goes to nobody else.
fn next_page(
    headers: &HeaderMap,
    current: &Url,
    endpoint: &Url,
) -> std::result::Result<Option<Url>, String> {
    let values =
        headers.get_all(LINK).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let links = values.collect::<Vec<_>>().join(", ");
    // An address may hold the comma that parts the links, but no `<`.
    let address = links.split('<').find_map(|link| {
        let (address, parameters) = link.split_once('>')?;
        parameters.replace('"', "").contains("rel=next").then_some(address)
    });
    let Some(address) = address else { return Ok(None) };
    let said = current.join(address).ok().filter(Url::has_host);
    let said = said.ok_or_else(|| format!("`{address}` is no address of a next page"))?;
    let mut next = endpoint.clone();
    let root = endpoint.path().trim_end_matches('/');
    let below = said.path().starts_with(&format!("{root}/"));
    next.set_path(&format!("{}{}", if below { "" } else { root }, said.path()));
    next.set_query(said.query());
    if next == *current {
        return Err(format!("the page after `{address}` is the same one"));
    }
    Ok(Some(next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::tests::Impatient;

    #[test]
    fn pages_follow_each_other_on_the_endpoint() {
        let hub = |endpoint: &str, link: &str| {
            let endpoint = Url::parse(endpoint).unwrap();
            let current = endpoint.join("api/tree?cursor=0").unwrap();
            let headers = HeaderMap::from_iter([(LINK, link.parse().unwrap())]);
            next_page(&headers, &current, &endpoint).map(|next| next.map(String::from))
        };
        let page = |link: &str| hub("http://hub:80/", link);
        let expected = Ok(Some("http://hub/api/tree?cursor=x,y".to_owned()));
        for link in [
            "<http://hub/api/tree?cursor=x,y>; rel=\"next\"",
            "</other>; rel=\"prev\", <?cursor=x,y>; rel=\"next\"",
            "<https://hub/api/tree?cursor=x,y>; rel=\"next\"",
            "<https://other:8080/api/tree?cursor=x,y>; rel=next",
        ] {
            assert_eq!(page(link), expected, "{link}");
        }
        for path in ["/api/tree", "/mirror/api/tree"] {
            let link = format!("<https://other{path}?cursor=x>; rel=\"next\"");
            let expected = Ok(Some("http://hub/mirror/api/tree?cursor=x".to_owned()));
            assert_eq!(hub("http://hub/mirror/", &link), expected);
        }
        assert_eq!(page("</other>; rel=\"prev\""), Ok(None));
        for link in ["<http://:0>; rel=\"next\"", "<?cursor=0>; rel=\"next\""] {
            assert!(page(link).is_err(), "{link}");
        }
    }

    #[test]
    fn a_stop_ends_a_wait() {
        let (start, told) = (std::time::Instant::now(), Impatient(Stop::new()));
        let failure = Failure::Transient { reason: "busy".to_owned(), pause: Some(LONGEST_PAUSE) };
        Patience::new(1, &told.0).spend("a file", failure, &told).unwrap();
        assert!(start.elapsed() < LONGEST_PAUSE / 10);
    }

    #[test]
    fn listings_cannot_name_files_outside() {
        let entry = |path: &str, oid: &str| {
            let (kind, oid, path) = ("file".to_owned(), oid.to_owned(), path.to_owned());
            Entry { kind, oid, path, size: 1, lfs: None }.checked("org/name")
        };
        let oid = "a".repeat(40);
        assert!(entry("LLAMA 2 LICENSE/LICENSE.txt", &oid).is_ok());
        for path in ["../x", "/etc/passwd", "a/../../x", "", "a//b", "a\\..\\b", "."] {
            assert!(entry(path, &oid).is_err(), "{path}");
        }
        assert!(entry("config.json", "../x").is_err());
    }
}
