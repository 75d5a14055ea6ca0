//! What every request to the Hub has in common: the client, who answered, and what a refusal means.

use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use flate2::read::MultiGzDecoder;
use reqwest::blocking::Response;
use reqwest::header::{CONTENT_ENCODING, HeaderMap};
use reqwest::{ClientBuilder, StatusCode, Url};

use crate::retry::{Failure, pause};
use crate::{Error, Hub};

/// What this program calls itself.
const USER_AGENT: &str = concat!("gptq/", env!("CARGO_PKG_VERSION"));

/// Time for a connection to be made.
const CONNECT: Duration = Duration::from_secs(15);

/// Bytes of a refusal that are read for its words.
const REFUSAL_BYTES: u64 = 16 << 10;

/// Characters of a server's words that are passed on.
const WORDS: usize = 300;

/// A client as the environment wants it, without a limit on time.
pub(crate) fn client(hub: &Hub) -> ClientBuilder {
    // Does nothing from the second time on.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder =
        reqwest::Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT.min(hub.limit));
    if hub.no_proxy { builder.no_proxy() } else { builder }
}

/// Whether two addresses are one server, which may see the token.
pub(crate) fn same_server(one: &Url, other: &Url) -> bool {
    one.scheme() == other.scheme()
        && one.host_str() == other.host_str()
        && one.port_or_known_default() == other.port_or_known_default()
}

/// A connection that could not be made or that broke.
pub(crate) fn interrupted(error: &reqwest::Error, limit: Duration) -> Failure {
    Failure::transient(cause(error, limit))
}

/// A body that ended before its end.
pub(crate) fn broken(error: &io::Error, limit: Duration) -> Failure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<reqwest::Error>()) {
        Some(cause) => interrupted(cause, limit),
        None => Failure::transient(error.to_string()),
    }
}

/// The innermost cause, without the address: a redirected one is a secret of its own.
pub(crate) fn cause(error: &reqwest::Error, limit: Duration) -> String {
    if error.is_timeout() {
        return silence(limit);
    }
    let mut source = std::error::Error::source(error);
    let mut last = None;
    while let Some(cause) = source {
        last = Some(cause.to_string());
        source = cause.source();
    }
    last.unwrap_or_else(|| "the connection failed".to_owned())
}

/// What is said of a connection that is silent for too long.
pub(crate) fn silence(limit: Duration) -> String {
    format!("nothing arrived for {} s", limit.as_secs())
}

/// How a body was packed on its way, which is undone when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coding {
    Plain,
    Gzip,
}

impl Coding {
    /// Of an answer. It was asked for without, but some proxies pack all the same.
    pub(crate) fn of(what: &str, headers: &HeaderMap) -> Result<Self, Error> {
        let Some(value) = headers.get(CONTENT_ENCODING) else { return Ok(Self::Plain) };
        match value.to_str().map(str::trim).map(str::to_lowercase).as_deref() {
            Ok("identity" | "") => Ok(Self::Plain),
            Ok("gzip" | "x-gzip") => Ok(Self::Gzip),
            coding => Err(Error::Coding {
                what: what.to_owned(),
                coding: words(coding.unwrap_or("something unreadable")),
            }),
        }
    }

    pub(crate) fn reader(self, response: Response) -> Box<dyn Read> {
        match self {
            Self::Plain => Box::new(response),
            Self::Gzip => Box::new(MultiGzDecoder::new(response)),
        }
    }
}

/// A body of at most so many bytes.
pub(crate) fn bounded(mut body: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = body.by_ref().take(limit + 1).read_to_end(&mut bytes)? as u64;
    if read > limit {
        return Err(io::Error::other(format!("it has more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Text from a server in one short line.
pub(crate) fn words(text: &str) -> String {
    let line = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.trim().chars().take(WORDS).map(line).collect();
    if short.len() < text.trim().len() {
        short.push('…');
    }
    short
}

/// What a request is for, for the words of a refusal.
#[derive(Clone, Copy)]
pub(crate) struct Purpose<'a> {
    /// `reading` or `writing`.
    pub(crate) action: &'static str,
    /// Repository or file.
    pub(crate) what: &'a str,
    /// The repository.
    pub(crate) id: &'a str,
    /// Its page, where terms are accepted.
    pub(crate) page: &'a str,
}

/// An answer that is none.
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// The address that answered at last.
    pub(crate) url: Url,
    /// The body's beginning.
    pub(crate) body: Vec<u8>,
}

impl Refusal {
    pub(crate) fn read(response: Response) -> Self {
        let (status, headers, url) =
            (response.status(), response.headers().clone(), response.url().clone());
        let mut body = Vec::new();
        // The words are a help, no more.
        let _ = response.take(REFUSAL_BYTES).read_to_end(&mut body);
        Self { status, headers, url, body }
    }

    fn header(&self, hub: &Hub, name: &str) -> String {
        let value = self.headers.get(name).and_then(|value| value.to_str().ok());
        hub.redacted(value.unwrap_or_default())
    }

    /// The server's own words after a colon, or nothing.
    fn message(&self, hub: &Hub) -> String {
        let mut message = self.header(hub, "x-error-message");
        if message.is_empty() {
            let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
            message =
                hub.redacted(body["error"].as_str().or(body["message"].as_str()).unwrap_or(""));
        }
        if message.is_empty() { message } else { format!(": {}", words(&message)) }
    }

    /// What it means for a request of this purpose.
    pub(crate) fn meaning(&self, hub: &Hub, purpose: Purpose<'_>) -> Failure {
        let status = self.status;
        if !same_server(&self.url, &hub.endpoint) {
            return self.of_storage(hub);
        }
        if may_pass(status) {
            let reason = format!("the Hub answered {status}{}", self.message(hub));
            return Failure::Transient { reason, pause: pause(status, &self.headers, now()) };
        }
        Failure::Fatal(self.of_hub(hub, purpose))
    }

    /// Links to the storage are made for a while: a new one may work where an old one does not.
    fn of_storage(&self, hub: &Hub) -> Failure {
        let (status, host) = (self.status, self.url.host_str().unwrap_or("?"));
        let mut reason = format!("the storage host {host} answered {status}");
        reason.push_str(&self.message(hub));
        if matches!(status.as_u16(), 401 | 403) {
            reason.push_str(", as for a link that has expired: your token is not at fault");
            return Failure::Expired { reason };
        }
        Failure::Transient { reason, pause: pause(status, &self.headers, now()) }
    }

    fn of_hub(&self, hub: &Hub, purpose: Purpose<'_>) -> Error {
        let Purpose { action, what, id, page } = purpose;
        let (what, code, message) =
            (what.to_owned(), self.header(hub, "x-error-code"), self.message(hub));
        let disabled = message.contains("is disabled");
        match (self.status.as_u16(), code.as_str(), &hub.token) {
            (_, "RevisionNotFound" | "EntryNotFound", _) => {
                Error::NotFound { what: format!("`{what}`: the repository is there, that is not") }
            }
            _ if disabled => Error::Forbidden { action, what, advice: None, message },
            (401 | 403, "GatedRepo", None) => {
                let advice = Some(format!("accept its terms on {page} and set HF_TOKEN"));
                Error::Forbidden { action, what, advice, message }
            }
            (403, _, Some(token)) if action == "writing" => {
                let advice =
                    Some(format!("give the token of {} the write role for it", token.origin));
                Error::Forbidden { action, what, advice, message }
            }
            (401 | 403, "GatedRepo", Some(_)) | (403, ..) => {
                let advice = Some(format!("accept its terms on {page} first"));
                Error::Forbidden { action, what, advice, message }
            }
            (401, _, None) => Error::TokenNeeded { what, message },
            (401, "RepoNotFound", Some(_)) => {
                Error::NotFound { what: format!("repository `{id}` that the token may read") }
            }
            (401, _, Some(token)) => {
                Error::TokenRefused { what, source_name: token.origin.clone() }
            }
            (404, ..) => Error::NotFound { what: format!("`{what}`") },
            _ => Error::Status { what, status: self.status.to_string(), message },
        }
    }
}

/// Whether a server that says so may do better in a while.
fn may_pass(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_body_is_known_by_its_header() {
        let coding = |value: &str| {
            let headers = HeaderMap::from_iter([(CONTENT_ENCODING, value.parse().unwrap())]);
            Coding::of("org/name/x", &headers)
        };
        assert_eq!(Coding::of("x", &HeaderMap::new()).unwrap(), Coding::Plain);
        assert_eq!(coding("identity").unwrap(), Coding::Plain);
        assert_eq!(coding("GZip").unwrap(), Coding::Gzip);
        let message = coding("br").unwrap_err().to_string();
        assert!(message.contains("`org/name/x`") && message.contains("proxy"), "{message}");
    }

    #[test]
    fn words_of_a_server_are_one_short_line() {
        assert_eq!(words(" no\n\u{1b}[31mway "), "no  [31mway");
        assert_eq!(words(&"é".repeat(WORDS + 1)), format!("{}…", "é".repeat(WORDS)));
        assert!(bounded(&b"12345"[..], 4).is_err());
        assert_eq!(bounded(&b"1234"[..], 4).unwrap(), b"1234");
    }

    #[test]
    fn the_token_is_for_one_server() {
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(same_server(&url("https://hub/x"), &url("https://hub:443/y")));
        for other in ["http://hub", "https://hub:444", "https://hub.evil"] {
            assert!(!same_server(&url("https://hub"), &url(other)), "{other}");
        }
    }
}
