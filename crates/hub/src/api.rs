//! The Hub over HTTP: one repository's commits, listings and files.

use std::sync::atomic::Ordering;

use reqwest::blocking::{Client, Response};
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, RANGE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::http::{Coding, Purpose, Refusal, bounded, broken, cause, client, interrupted};
use crate::hub::split_id;
use crate::listing::{Listing, next_page};
use crate::retry::{Failure, Patience};
use crate::stop::Stop;
use crate::{Error, Hub, Progress, Result};

/// The longest answer that is no file.
const ANSWER_BYTES: u64 = 64 << 20;

/// More pages than any listing has.
const PAGES: usize = 100_000;

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

/// A client of one repository.
pub(crate) struct Api<'a> {
    hub: &'a Hub,
    client: Client,
    kind: Kind,
    id: &'a str,
    page: String,
}

impl<'a> Api<'a> {
    pub(crate) fn new(hub: &'a Hub, kind: Kind, id: &'a str) -> Result<Self> {
        split_id(id)?;
        hub.check_online(id)?;
        let client = reqwest::blocking::ClientBuilder::from(client(hub))
            // Of each read, not of the whole file.
            .timeout(hub.limit)
            .build()
            .map_err(|e| Error::Answer { what: id.to_owned(), reason: cause(&e, hub.limit) })?;
        let mut api = Self { hub, client, kind, id, page: String::new() };
        api.page = api.url(api.prefix(), &[], "").into();
        Ok(api)
    }

    pub(crate) fn hub(&self) -> &'a Hub {
        self.hub
    }

    /// The repository as the user named it.
    pub(crate) fn id(&self) -> &'a str {
        self.id
    }

    /// What a request is for.
    pub(crate) fn purpose<'b>(&'b self, action: &'static str, what: &'b str) -> Purpose<'b> {
        Purpose { action, what, id: self.id, page: &self.page }
    }

    /// The commit that a revision stands for now.
    pub(crate) fn commit(&self, revision: &str, progress: &dyn Progress) -> Result<String> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
        }
        let what = format!("{}@{revision}", self.id);
        let Info { sha } = self.json(&what, self.api(&["revision", revision]), progress)?.0;
        if !gptq_checkpoint::is_hub_name(&sha) {
            return Err(Error::Answer { what, reason: format!("`{sha}` is no commit") });
        }
        Ok(sha)
    }

    /// All files at a revision, in the Hub's order.
    pub(crate) fn files(&self, revision: &str, progress: &dyn Progress) -> Result<Listing> {
        let mut url = self.api(&["tree", revision]);
        url.set_query(Some("recursive=true"));
        let what = format!("{}@{revision}", self.id);
        let mut all = Listing::default();
        self.pages(&what, url, progress, |body| {
            all.append(Listing::parse(body)?);
            Ok(())
        })?;
        Ok(all)
    }

    /// Takes the pages of a list in turn.
    pub(crate) fn pages(
        &self,
        what: &str,
        url: Url,
        progress: &dyn Progress,
        mut take: impl FnMut(&[u8]) -> std::result::Result<(), String>,
    ) -> Result<()> {
        let unusable = |reason: String| Error::Answer {
            what: what.to_owned(),
            reason: self.hub.redacted(&reason),
        };
        let mut next = Some(url);
        for _ in 0..PAGES {
            let Some(url) = next else { return Ok(()) };
            let (body, headers) = self.body(what, url.clone(), progress)?;
            take(&body).map_err(unusable)?;
            next = next_page(&headers, &url, &self.hub.endpoint).map_err(unusable)?;
        }
        Err(unusable("its pages have no end".to_owned()))
    }

    /// Opens a file at a commit, from an offset on.
    pub(crate) fn open(&self, commit: &str, path: &str, from: u64) -> Result<Response, Failure> {
        let url = self.url(self.prefix(), &["resolve", commit], path);
        self.get(&format!("{}/{path}", self.id), url, from)
    }

    /// What stands before the id in the address of the repository's page.
    fn prefix(&self) -> &'static [&'static str] {
        if self.kind == Kind::Dataset { &["datasets"] } else { &[] }
    }

    /// An address of the repository's API.
    pub(crate) fn api(&self, parts: &[&str]) -> Url {
        self.url(&["api", self.kind.plural()], parts, "")
    }

    /// An address below the endpoint; each part but `path` is one segment, whatever it holds.
    pub(crate) fn url(&self, prefix: &[&str], suffix: &[&str], path: &str) -> Url {
        let mut url = self.hub.endpoint.clone();
        #[expect(clippy::expect_used, reason = "an http address, as `Hub` checked, has a path")]
        let mut segments = url.path_segments_mut().expect("an address with a path");
        segments.pop_if_empty().extend(prefix).extend(self.id.split('/')).extend(suffix);
        segments.extend(path.split('/').filter(|part| !part.is_empty()));
        drop(segments);
        url
    }

    /// What the Hub answers in JSON.
    pub(crate) fn json<T: DeserializeOwned>(
        &self,
        what: &str,
        url: Url,
        progress: &dyn Progress,
    ) -> Result<(T, HeaderMap)> {
        let (body, headers) = self.body(what, url, progress)?;
        let unusable = |e: serde_json::Error| Error::Answer {
            what: what.to_owned(),
            reason: self.hub.redacted(&e.to_string()),
        };
        Ok((serde_json::from_slice(&body).map_err(unusable)?, headers))
    }

    fn body(&self, what: &str, url: Url, progress: &dyn Progress) -> Result<(Vec<u8>, HeaderMap)> {
        let never = Stop::new();
        let mut patience = Patience::new(self.hub.retries, &never);
        loop {
            let answer = self.get(what, url.clone(), 0).and_then(|response| {
                let headers = response.headers().clone();
                let body = Coding::of(what, &headers)?.reader(response);
                let body = bounded(body, ANSWER_BYTES).map_err(|e| broken(&e, self.hub.limit))?;
                Ok((body, headers))
            });
            match answer {
                Ok(answer) => return Ok(answer),
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
                reason: cause(&e, self.hub.limit),
                attempts: 1,
            }),
            _ => interrupted(&e, self.hub.limit),
        })?;
        answered.store(true, Ordering::Relaxed);
        let status = response.status();
        if status.is_success() || (from > 0 && status == StatusCode::RANGE_NOT_SATISFIABLE) {
            return Ok(response);
        }
        Err(Refusal::read(response).meaning(self.hub, self.purpose("reading", what)))
    }
}
