//! From an HTTP request to an answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use crate::api_key::ApiKey;
use crate::fields::Fields;
use crate::job::Job;
use crate::metrics::Metrics;
use crate::part::Part;
use crate::queue::{Queue, Refused};
use crate::refusal::{Refusal, json_response};
use crate::served::Served;
use crate::token_texts::TokenTexts;
use crate::writer::Writer;
use crate::{chat, completions, origin};

/// Bytes of a body: a context of tokens is a small part of it.
const MOST_BODY: usize = 4 << 20;
/// Bytes that are read of one that is too large, so that its sender comes to read why it is refused.
const MOST_READ: usize = 64 << 20;
/// How long a body may take to arrive, and how long nothing of it may.
const BODY_TIME: Duration = Duration::from_secs(30);
const BODY_SILENCE: Duration = Duration::from_secs(10);

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) served: Served,
    pub(crate) texts: TokenTexts,
    pub(crate) queue: Queue,
    pub(crate) metrics: Metrics,
    pub(crate) key: Option<ApiKey>,
    pub(crate) created: u64,
}

/// A request that was understood.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    pub(crate) receiver: UnboundedReceiver<Result<Part, String>>,
    pub(crate) writer: Writer,
    pub(crate) stream: bool,
    pub(crate) usage: bool,
}

/// Makes a job of the parameters of a request.
type Prepare = fn(&Arc<Shared>, &Fields) -> Result<Prepared, Refusal>;

/// What metrics call a path; what clients make up is one.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: [&str; 5] =
        ["/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"];
    let models = path.starts_with("/v1/models/").then_some("/v1/models");
    KNOWN.into_iter().find(|known| *known == path).or(models).unwrap_or("other")
}

/// Asks every request where it comes from and for the key, and counts its answer.
pub(crate) async fn attend(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let endpoint = endpoint(request.uri().path());
    let response = match admit(&shared, endpoint, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let status = response.status().as_u16();
    *shared.metrics.counts().requests.entry((endpoint, status)).or_default() += 1;
    response
}

fn admit(shared: &Shared, endpoint: &str, headers: &HeaderMap) -> Result<(), Refusal> {
    if let Some(origin) = origin::foreign(headers) {
        return Err(Refusal::foreign(&origin));
    }
    if let Some(host) = origin::elsewhere(headers).filter(|_| shared.key.is_none()) {
        return Err(Refusal::elsewhere(&host));
    }
    match &shared.key {
        // Whether it is alive a balancer may ask that has no key.
        Some(key) if endpoint != "/health" && !key.is_shown(authorization(headers)) => {
            Err(Refusal::no_key())
        }
        _ => Ok(()),
    }
}

fn authorization(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes)
}

pub(crate) async fn health() -> Response {
    json_response(&json!({"status": "ok"}))
}

pub(crate) async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, shared.metrics.text(shared.queue.counts())).into_response()
}

pub(crate) async fn models(State(shared): State<Arc<Shared>>) -> Response {
    json_response(&json!({"object": "list", "data": [shared.model()]}))
}

pub(crate) async fn model(
    State(shared): State<Arc<Shared>>,
    name: Result<Path<String>, PathRejection>,
) -> Response {
    let Ok(Path(name)) = name else {
        return Refusal::param("model", "The model's name is not UTF-8").into_response();
    };
    match shared.served.check_name(Some(&name)) {
        Ok(()) => json_response(&shared.model()),
        Err(refusal) => refusal.into_response(),
    }
}

impl Shared {
    /// The model as lists have it.
    fn model(&self) -> Value {
        json!({
            "id": self.served.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gptq",
            "max_model_len": self.served.context,
        })
    }
}

pub(crate) async fn no_path(request: Request) -> Response {
    Refusal::no_path(request.uri().path()).into_response()
}

pub(crate) async fn no_method(request: Request) -> Response {
    Refusal::no_method(request.method().as_str(), request.uri().path()).into_response()
}

pub(crate) async fn complete(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    answer(shared, request, completions::prepare).await.unwrap_or_else(IntoResponse::into_response)
}

pub(crate) async fn chat(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    answer(shared, request, chat::prepare).await.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(
    shared: Arc<Shared>,
    request: Request,
    prepare: Prepare,
) -> Result<Response, Refusal> {
    let is_json = is_json(request.headers());
    // Of whatever kind: who is answered while it sends may never come to read the answer.
    let body = read(request.into_body()).await?;
    if !is_json {
        return Err(Refusal::no_json());
    }
    // A large text takes a while, which others need not wait for; few at a time, for the memory.
    let with = Arc::clone(&shared);
    let understood = tokio::task::spawn_blocking(move || prepare(&with, &Fields::parse(&body)?));
    let prepared = understood.await.map_err(|_| Refusal::failed("The request broke the server"))?;
    let Prepared { job, receiver, writer, stream, usage } = prepared?;
    shared.queue.push(job).map_err(|refused| match refused {
        Refused::Full => Refusal::busy(shared.queue.most()),
        Refused::Closed => Refusal::stopping(),
    })?;
    if !stream {
        return whole(receiver, writer, &shared).await;
    }
    let body = Body::new(Events { receiver, writer, usage, over: false, shared });
    let head = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((StatusCode::OK, head, body).into_response())
}

/// Whether a body is said to be JSON.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim());
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"))
}

/// Reads a body.
async fn read(mut body: Body) -> Result<Vec<u8>, Refusal> {
    let broken = |_| Refusal::invalid("The body broke off");
    if body.size_hint().lower() > MOST_READ as u64 {
        return Err(Refusal::too_large(MOST_BODY));
    }
    let reading = async {
        let (mut read, mut arrived) = (Vec::new(), 0);
        loop {
            let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context));
            let frame = timeout(BODY_SILENCE, frame).await.map_err(|_| Refusal::too_slow())?;
            let Some(frame) = frame else { break };
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            arrived += data.len();
            match () {
                () if arrived <= MOST_BODY => read.extend_from_slice(&data),
                () if arrived <= MOST_READ => read = Vec::new(),
                () => break,
            }
        }
        if arrived > MOST_BODY { Err(Refusal::too_large(MOST_BODY)) } else { Ok(read) }
    };
    timeout(BODY_TIME, reading).await.unwrap_or_else(|_| Err(Refusal::too_slow()))
}

/// Waits for all texts. A client that goes away ends the waiting, and the engine sees that.
async fn whole(
    mut receiver: UnboundedReceiver<Result<Part, String>>,
    mut writer: Writer,
    shared: &Shared,
) -> Result<Response, Refusal> {
    let mut texts: Vec<Part> = (0..writer.texts()).map(Part::new).collect();
    while let Some(part) = receiver.recv().await {
        let part = part.map_err(Refusal::failed)?;
        texts[part.index].push(part);
    }
    let answer = writer.whole(texts);
    match writer.is_over() {
        true => Ok(json_response(&answer)),
        false => Err(broken_off(&shared.queue)),
    }
}

/// Why texts have no ends.
fn broken_off(queue: &Queue) -> Refusal {
    if queue.is_aborted() { Refusal::stopping() } else { Refusal::failed("The engine failed") }
}

/// An answer that comes in parts, as server-sent events.
struct Events {
    receiver: UnboundedReceiver<Result<Part, String>>,
    writer: Writer,
    usage: bool,
    over: bool,
    shared: Arc<Shared>,
}

impl Events {
    /// What ends a stream. Without `[DONE]` clients know that it is not whole.
    fn end(&mut self, failure: Option<Refusal>) -> Bytes {
        self.over = true;
        self.receiver.close();
        if let Some(failure) = failure {
            return event(&failure.json()).into();
        }
        let mut text = String::new();
        if self.usage {
            text.push_str(&event(&self.writer.usage_chunk()));
        }
        (text + "data: [DONE]\n\n").into()
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let frame = |bytes: Bytes| Poll::Ready(Some(Ok(Frame::data(bytes))));
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        loop {
            match ready!(this.receiver.poll_recv(context)) {
                Some(Ok(part)) => {
                    if let Some(chunk) = this.writer.chunk(part, this.usage) {
                        return frame(event(&chunk).into());
                    }
                }
                Some(Err(message)) => return frame(this.end(Some(Refusal::failed(message)))),
                None if this.writer.is_over() => return frame(this.end(None)),
                None => {
                    let failure = broken_off(&this.shared.queue);
                    return frame(this.end(Some(failure)));
                }
            }
        }
    }
}
