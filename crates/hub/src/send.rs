//! Requests that carry something, with a limit on silence rather than on the whole: a large body on
//! a slow line takes as long as it takes.
//!
//! The blocking client can limit a request as a whole only, so this is the other one, driven here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use reqwest::header::{CONTENT_LENGTH, HeaderMap, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, Url};
use tokio::runtime::{Builder, Runtime};

use crate::http::{Purpose, Refusal, cause, client, interrupted, same_server, silence};
use crate::retry::Failure;
use crate::{Error, Hub, Result};

/// Bytes of a body that are in memory at a time.
const CHUNK: usize = 256 << 10;

/// Between two looks at how far a body has got.
const TICK: Duration = Duration::from_millis(200);

/// Longest answer to a request.
const ANSWER_BYTES: usize = 64 << 20;

/// Servers that one request may be sent on to.
const REDIRECTS: usize = 5;

/// What a request carries; can be sent again.
#[derive(Clone)]
pub(crate) enum Payload {
    Bytes(Bytes),
    /// A part of a file.
    Part {
        file: Arc<File>,
        start: u64,
        length: u64,
    },
}

/// A request.
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) url: Url,
    /// Without the token, which the Hub alone is sent.
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

/// Sends one request at a time.
pub(crate) struct Sender<'a> {
    hub: &'a Hub,
    client: Client,
    runtime: Runtime,
}

impl<'a> Sender<'a> {
    pub(crate) fn new(hub: &'a Hub, what: &str) -> Result<Self> {
        let failed = |reason: String| Error::Answer { what: what.to_owned(), reason };
        // A body cannot be followed by the client, nor may it go just anywhere.
        let client = client(hub).redirect(Policy::none()).build();
        let client = client.map_err(|e| failed(cause(&e, hub.limit)))?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| failed(e.to_string()))?;
        Ok(Self { hub, client, runtime })
    }

    /// Sends a request and reports how much of it has gone; gives a good answer.
    pub(crate) fn send(
        &self,
        request: &Outgoing,
        purpose: Purpose<'_>,
        on_progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<Answer, Failure> {
        self.runtime.block_on(self.exchange(request, purpose, on_progress))
    }

    async fn exchange(
        &self,
        request: &Outgoing,
        purpose: Purpose<'_>,
        on_progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<Answer, Failure> {
        let mut url = request.url.clone();
        for _ in 0..REDIRECTS {
            let sent = Arc::new(AtomicU64::new(0));
            let answer =
                self.watched(self.request(request, &url, &sent).send(), &sent, on_progress);
            let response = answer.await?;
            if matches!(response.status().as_u16(), 307 | 308) {
                url = self.followed(&url, response.headers(), purpose)?;
                continue;
            }
            let (status, headers, good) =
                (response.status(), response.headers().clone(), response.status().is_success());
            let body = self.body(response, &sent, on_progress).await;
            if !good {
                // Its words are a help, no more.
                let body = body.unwrap_or_default();
                return Err(Refusal { status, headers, url, body }.meaning(self.hub, purpose));
            }
            return Ok(Answer { headers, body: body? });
        }
        let reason = "it is sent on from one address to the next".to_owned();
        Err(Error::Answer { what: purpose.what.to_owned(), reason }.into())
    }

    fn request(
        &self,
        request: &Outgoing,
        url: &Url,
        sent: &Arc<AtomicU64>,
    ) -> reqwest::RequestBuilder {
        let body = Outflow { payload: request.payload.clone(), sent: Arc::clone(sent) };
        let length = body.payload.length();
        let mut builder = self
            .client
            .request(request.method.clone(), url.clone())
            .headers(request.headers.clone())
            .header(CONTENT_LENGTH, length)
            .body(reqwest::Body::wrap(body));
        if let Some(token) = self.hub.token.as_ref().filter(|_| self.is_hub(url)) {
            builder = builder.bearer_auth(&token.secret);
        }
        builder
    }

    fn is_hub(&self, url: &Url) -> bool {
        same_server(url, &self.hub.endpoint)
    }

    /// Where a request is sent on to. What is for the Hub goes nowhere else.
    fn followed(&self, from: &Url, headers: &HeaderMap, purpose: Purpose<'_>) -> Result<Url> {
        let location =
            headers.get(LOCATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let next = from.join(location).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let unusable = |reason: String| Error::Answer { what: purpose.what.to_owned(), reason };
        let next = next.ok_or_else(|| unusable("it is sent on to no address".to_owned()))?;
        if self.is_hub(from) && !self.is_hub(&next) {
            let host = next.host_str().unwrap_or("?");
            let (what, host) = (purpose.what.to_owned(), host.to_owned());
            return Err(Error::OtherServer { what, host });
        }
        Ok(next)
    }

    /// Waits for an answer as long as something moves.
    async fn watched(
        &self,
        answer: impl Future<Output = reqwest::Result<Response>>,
        sent: &AtomicU64,
        on_progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<Response, Failure> {
        let mut answer = pin!(answer);
        let (mut before, mut since) = (0, Instant::now());
        loop {
            let waited = tokio::time::timeout(TICK, answer.as_mut()).await;
            let now = sent.load(Ordering::Relaxed);
            on_progress(now);
            match waited {
                Ok(answer) => return answer.map_err(|e| interrupted(&e, self.hub.limit)),
                Err(_) if now > before => (before, since) = (now, Instant::now()),
                Err(_) if since.elapsed() > self.hub.limit => {
                    let all = "the request was taken, but not answered: ";
                    return Err(Failure::transient(format!("{all}{}", silence(self.hub.limit))));
                }
                Err(_) => {}
            }
        }
    }

    async fn body(
        &self,
        mut response: Response,
        sent: &AtomicU64,
        on_progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        loop {
            let chunk = tokio::time::timeout(self.hub.limit, response.chunk()).await;
            let chunk = chunk.map_err(|_| Failure::transient(silence(self.hub.limit)))?;
            let Some(chunk) = chunk.map_err(|e| interrupted(&e, self.hub.limit))? else { break };
            if body.len() + chunk.len() > ANSWER_BYTES {
                return Err(Failure::transient(format!("more than {ANSWER_BYTES} bytes came")));
            }
            body.extend_from_slice(&chunk);
        }
        on_progress(sent.load(Ordering::Relaxed));
        Ok(body)
    }
}

impl Payload {
    fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Part { length, .. } => *length,
        }
    }

    /// Takes the next bytes off; nothing where none are left.
    fn next(&mut self) -> std::io::Result<Bytes> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.split_to(bytes.len().min(CHUNK))),
            Self::Part { length: 0, .. } => Ok(Bytes::new()),
            Self::Part { file, start, length } => {
                let mut buffer = vec![0; CHUNK.min(usize::try_from(*length).unwrap_or(CHUNK))];
                let read = file.read_at(&mut buffer, *start)?;
                if read == 0 {
                    return Err(std::io::Error::other("the file has become shorter"));
                }
                buffer.truncate(read);
                (*start, *length) = (*start + read as u64, *length - read as u64);
                Ok(buffer.into())
            }
        }
    }
}

/// A payload on its way, which counts what has been taken of it.
struct Outflow {
    payload: Payload,
    sent: Arc<AtomicU64>,
}

impl Body for Outflow {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        Poll::Ready(match this.payload.next() {
            Ok(bytes) if bytes.is_empty() => None,
            Ok(bytes) => {
                this.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Some(Ok(Frame::data(bytes)))
            }
            Err(error) => Some(Err(error)),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.payload.length() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.payload.length())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_file_is_sent_as_it_is_in_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..CHUNK as u32 * 3).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = Arc::new(File::open(&path).unwrap());
        let (start, length) = (7, 2 * CHUNK as u64 + 5);
        let mut payload = Payload::Part { file: Arc::clone(&file), start, length };
        let mut sent = Vec::new();
        loop {
            let next = payload.next().unwrap();
            assert!(next.len() <= CHUNK);
            if next.is_empty() {
                break;
            }
            sent.extend_from_slice(&next);
        }
        assert_eq!(sent, &bytes[7..7 + length as usize]);
        let mut beyond = Payload::Part { file, start: bytes.len() as u64, length: 1 };
        assert!(beyond.next().is_err());
    }
}
