//! Connections, from the first to the last.

use std::future::Future;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use gptq_generate::Engine;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};

use crate::api_key::ApiKey;
use crate::engine_loop;
use crate::error::{Error, Result};
use crate::handlers::{self, Shared};
use crate::metrics::Metrics;
use crate::patient::Patient;
use crate::queue::Queue;
use crate::refusal::Refusal;
use crate::served::Served;
use crate::token_texts::TokenTexts;
use crate::writer::now;

/// Connections at a time; others are told to come again.
const MOST_CONNECTIONS: usize = 256;
/// Connections that are told so at a time; others are closed at once.
const MOST_TURNED_AWAY: usize = 64;
/// How long the head of a request may take, and how long a connection may be idle. A few clients that
/// send half of one would otherwise keep all others out for long.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// How long nothing of an answer may be taken.
const WRITE_SILENCE: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const MOST_HEAD: usize = 64 << 10;
/// How long texts may go on once the server is to stop.
const GRACE: Duration = Duration::from_secs(5);
/// Threads that read bodies and make tokens of them.
const READERS: usize = 2;

/// How much is done at a time, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Texts that are made together: as many as the engine has slots.
    pub slots: usize,
    /// Requests that wait while all slots have texts; more are told to come again.
    pub queue: usize,
    /// Whether the terminal's end, SIGHUP, ends the server as well.
    pub ends_on_hangup: bool,
}

/// An address that is listened on.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    key: Option<ApiKey>,
}

impl Listener {
    /// Listens. Without a key only on addresses that no other machine reaches.
    ///
    /// # Errors
    /// [`Error::Open`] and [`Error::Bind`].
    pub fn bind(host: &str, port: u16, key: Option<ApiKey>) -> Result<Self> {
        let failed = |source| Error::Bind { host: host.to_owned(), port, source };
        let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(failed)?.collect();
        if key.is_none() && !addresses.iter().all(|address| address.ip().is_loopback()) {
            return Err(Error::Open { host: host.to_owned() });
        }
        let listener = TcpListener::bind(&addresses[..]).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, key })
    }
}

/// Answers requests until Ctrl-C, SIGTERM or SIGHUP; then running ones have a few seconds to end. `ready`
/// hears of the address when requests are answered.
///
/// # Errors
/// [`Error::Start`].
pub fn serve(
    listener: Listener,
    limits: Limits,
    served: Served,
    engine: &mut Engine<'_>,
    ready: impl FnOnce(SocketAddr) + Send,
) -> Result<()> {
    let Listener { listener, key } = listener;
    let shared = Arc::new(Shared {
        texts: TokenTexts::new(Arc::clone(&served.tokenizer)),
        served,
        queue: Queue::new(limits.queue, limits.slots),
        metrics: Metrics::default(),
        key,
        created: now(),
    });
    let gone = Arc::new(Notify::new());
    std::thread::scope(|scope| {
        let http = std::thread::Builder::new()
            .name("http".to_owned())
            .spawn_scoped(scope, || {
                // The engine must not wait for requests that nobody can send.
                let _ends = OnDrop(|| shared.queue.abort());
                run_http(listener, &shared, limits.ends_on_hangup, &gone, ready)
            })
            .map_err(Error::Start)?;
        {
            // Nor clients for an engine that has panicked.
            let _ends = OnDrop(|| {
                shared.queue.abort();
                gone.notify_one();
            });
            engine_loop::run(engine, limits.slots, &shared.queue, &shared.metrics);
        }
        http.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Does something at the end, a panic's too.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn run_http(
    listener: TcpListener,
    shared: &Arc<Shared>,
    ends_on_hangup: bool,
    gone: &Notify,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(READERS)
        .build()
        .map_err(Error::Start)?;
    let done = runtime.block_on(async {
        let address = listener.local_addr().map_err(Error::Start)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(Error::Start)?;
        let stop = end_signal(ends_on_hangup).map_err(Error::Start)?;
        let stop = async {
            first(stop, gone.notified()).await;
        };
        ready(address);
        let graceful = accept(listener, router(shared), stop).await;
        shared.queue.close();
        // Those who are not done by then are told so.
        let mut ending = pin!(graceful.shutdown());
        if timeout(GRACE, &mut ending).await.is_err() {
            shared.queue.abort();
            let _ = timeout(Duration::from_secs(1), ending).await;
        }
        Ok(())
    });
    // A body that is being read keeps nobody.
    runtime.shutdown_background();
    done
}

/// Comes with the first signal that is to end the server.
fn end_signal(hangup: bool) -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = hangup.then(|| signal(SignalKind::hangup())).transpose()?;
    Ok(async move {
        let hung_up = async {
            match &mut hung_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        first(first(interrupted.recv(), terminated.recv()), hung_up).await;
    })
}

fn router(shared: &Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/models", get(handlers::models))
        // Names of models may have slashes.
        .route("/v1/models/{*name}", get(handlers::model))
        .route("/v1/completions", post(handlers::complete))
        .route("/v1/chat/completions", post(handlers::chat))
        .route("/health", get(handlers::health))
        .route("/metrics", get(handlers::metrics))
        .fallback(handlers::no_path)
        .method_not_allowed_fallback(handlers::no_method)
        .layer(from_fn_with_state(Arc::clone(shared), handlers::attend))
        .with_state(Arc::clone(shared))
}

/// Takes connections until `stop`.
async fn accept(
    listener: tokio::net::TcpListener,
    router: Router,
    stop: impl Future<Output = ()>,
) -> GracefulShutdown {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let turned_away = Arc::new(Semaphore::new(MOST_TURNED_AWAY));
    let mut stop = pin!(stop);
    loop {
        let accepted = match first(stop.as_mut(), listener.accept()).await {
            First::One(()) => return graceful,
            First::Other(next) => next,
        };
        let Ok((stream, _)) = accepted else {
            // Out of files, perhaps: some will be closed.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            if let Ok(place) = Arc::clone(&turned_away).try_acquire_owned() {
                tokio::spawn(async move {
                    turn_away(stream).await;
                    drop(place);
                });
            }
            continue;
        };
        // A token is sent when it is made.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME)
            .max_buf_size(MOST_HEAD)
            .serve_connection(TokioIo::new(Patient::new(stream, WRITE_SILENCE)), service);
        let watched = graceful.watch(connection);
        tokio::spawn(async move {
            // How a connection ends is the client's business.
            let _ = watched.await;
            drop(place);
        });
    }
}

/// Tells a client that there are too many of them, whatever it has to say.
async fn turn_away(mut stream: TcpStream) {
    let body = Refusal::crowded(MOST_CONNECTIONS).json().to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let telling = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // A connection that is closed with something unread takes the answer back.
        tokio::io::copy(&mut stream.take(MOST_HEAD as u64), &mut tokio::io::sink()).await
    };
    // How that ends is the client's business.
    let _ = timeout(Duration::from_secs(1), telling).await;
}

/// What came first.
enum First<A, B> {
    One(A),
    Other(B),
}

/// Waits for one of two; the other is dropped. The first one comes first if both are there.
async fn first<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> First<A, B> {
    let (mut one, mut other) = (pin!(one), pin!(other));
    std::future::poll_fn(|context| {
        if let Poll::Ready(value) = one.as_mut().poll(context) {
            return Poll::Ready(First::One(value));
        }
        other.as_mut().poll(context).map(First::Other)
    })
    .await
}
