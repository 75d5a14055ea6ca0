//! `gptq serve` among clients: more than it has places for, such as go away, send half of a request or
//! garbage, show no key, or are pages of elsewhere; and its own end.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod serve_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serve_support::Server;
use util::{Noise, TinyLlama, Workdir, words};

const COMPLETIONS: &str = "/v1/completions";

/// A model that writes for as long as it is let: minutes, if nobody ends it.
fn endless(dir: &Workdir) {
    let mut model = TinyLlama::new();
    model.config["max_position_embeddings"] = json!(65_536);
    model.config["eos_token_id"] = Value::Null;
    model.write(&dir.path("endless"));
}

fn endless_server(dir: &Workdir, more: &[&str]) -> Server {
    endless(dir);
    Server::start(dir, "endless", &[&["--context", "60000"], more].concat())
}

fn long_text() -> Value {
    json!({"prompt": "w5 w6", "max_tokens": 59_000, "stream": true, "logprobs": 0})
}

#[test]
fn garbage_leaves_no_trace() {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    let server = Server::start(&dir, "model", &[]);
    let mut noise = Noise::new(5);
    let mut bytes = |count: usize| -> Vec<u8> {
        (0..count).map(|_| ((noise.next() + 1.0) * 127.0) as u8).collect()
    };
    for round in 0..40 {
        let garbage = bytes(1 + 37 * round);
        let status = server.post_bytes(COMPLETIONS, &garbage).status;
        assert_eq!(status, 400);
        let mut stream = server.connect();
        let _ = stream.write_all(&bytes(300));
        if round % 2 == 0 {
            // A head that promises more than comes.
            let _ = server.connect().write_all(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\
                  Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
            );
        }
    }
    let body = json!({"prompt": words(3), "max_tokens": 4, "stop": ["never"]});
    server.complete(&body);
    server.wait_for("gptq_texts_active", 0.0);
    assert_eq!(server.metric("gptq_requests_queued"), 0.0);
}

#[test]
fn who_goes_away_frees_a_place() {
    let dir = Workdir::new();
    let server = endless_server(&dir, &["--max-batch", "1"]);
    for stream in [true, false] {
        let mut body = long_text();
        body["stream"] = json!(stream);
        let started = server.metric("gptq_texts_cancelled_total");
        let connection = match stream {
            true => server.begin(COMPLETIONS, &body),
            false => {
                let (mut connection, text) = (server.connect(), body.to_string());
                let head = format!(
                    "POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                     Content-Length: {}\r\n\r\n{text}",
                    text.len()
                );
                connection.write_all(head.as_bytes()).unwrap();
                server.wait_for("gptq_texts_active", 1.0);
                connection
            }
        };
        server.wait_for("gptq_texts_active", 1.0);
        drop(connection);
        let short = json!({"prompt": "w7", "max_tokens": 3});
        let start = Instant::now();
        server.complete(&short);
        assert!(start.elapsed() < Duration::from_secs(20));
        assert_eq!(server.metric("gptq_texts_cancelled_total"), started + 1.0);
    }
}

/// Those that never had a place count as well, and nothing is counted that is gone.
#[test]
fn counts_are_right_once_all_have_gone() {
    let dir = Workdir::new();
    let server = endless_server(&dir, &["--max-batch", "1"]);
    let mut several = long_text();
    several["n"] = json!(3);
    // One text is made, two wait for its place, and a request of two behind them has none.
    let running = server.begin(COMPLETIONS, &several);
    several["n"] = json!(2);
    let mut waiting = server.connect();
    waiting.write_all(serve_support::request(COMPLETIONS, &several).as_bytes()).unwrap();
    server.wait_for("gptq_requests_queued", 1.0);
    drop(waiting);
    server.wait_for("gptq_requests_queued", 0.0);
    drop(running);
    // The engine is idle: nobody else asks for anything.
    server.wait_for("gptq_texts_active", 0.0);
    server.wait_for("gptq_texts_cancelled_total", 5.0);
}

#[test]
fn more_than_may_wait_are_told_to_come_again() {
    let dir = Workdir::new();
    let server = endless_server(&dir, &["--max-batch", "1", "--queue", "1"]);
    let running = server.begin(COMPLETIONS, &long_text());
    let short = json!({"prompt": "w7", "max_tokens": 3});
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.complete(&short));
        server.wait_for("gptq_requests_queued", 1.0);
        let refused = server.post(COMPLETIONS, &short);
        refused.refused(429, None, "1 requests wait");
        assert!(refused.head.contains("retry-after: "), "{refused:?}");
        assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
        drop(running);
        waiting.join().unwrap();
    });
    server.complete(&short);
}

/// Requests for which a slot is free do not wait, however many come before the engine looks.
#[test]
fn idle_slots_are_no_queue() {
    let dir = Workdir::new();
    let server = endless_server(&dir, &["--max-batch", "4", "--queue", "1"]);
    // While the first prompt is read, all others are where requests wait.
    let long = vec![5; 2500];
    let body = json!({"prompt": long, "max_tokens": 2000, "stream": true});
    let mut asked: Vec<_> = (0..4)
        .map(|_| {
            let mut connection = server.connect();
            connection.write_all(serve_support::request(COMPLETIONS, &body).as_bytes()).unwrap();
            connection
        })
        .collect();
    for connection in &mut asked {
        let mut status = [0; 15];
        std::io::Read::read_exact(connection, &mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 200 OK");
    }
    server.wait_for("gptq_texts_active", 4.0);
    let short = json!({"prompt": "w7", "max_tokens": 3});
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.complete(&short));
        server.wait_for("gptq_requests_queued", 1.0);
        server.post(COMPLETIONS, &short).refused(429, None, "1 requests wait");
        drop(asked);
        waiting.join().unwrap();
    });
}

/// Clients that send half of a request keep others out for a few seconds, which these are told at once.
#[test]
fn half_sent_requests_are_no_siege() {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    let server = Server::start(&dir, "model", &[]);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                Content-Length: 99\r\n\r\n{";
    let half = |number: usize| {
        let mut connection = server.connect();
        // Some to the middle of their heads, and some of their bodies.
        let sent = if number.is_multiple_of(2) { head } else { &head[..30] };
        let _ = connection.write_all(sent.as_bytes());
        connection
    };
    let siege: Vec<_> = (0..300).map(half).collect();
    let start = Instant::now();
    let refused = server.get("/health");
    refused.refused(503, None, "connections are open");
    assert!(refused.head.contains("retry-after: "), "{refused:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "told at once");
    while server.get("/health").status != 200 {
        assert!(start.elapsed() < Duration::from_secs(25), "still besieged");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(siege);
}

/// Neither is one that asks and asks, and reads nothing.
#[test]
fn who_never_reads_is_left() {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    let server = Server::start(&dir, "model", &[]);
    let mut connection = server.connect();
    connection.set_write_timeout(Some(Duration::from_secs(90))).unwrap();
    let asked = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    let start = Instant::now();
    let left = loop {
        // What the system holds of answers and of requests is some megabytes each.
        if let Err(error) = connection.write_all(asked.as_bytes()) {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(90), "it is answered for ever");
    };
    let kinds = [std::io::ErrorKind::BrokenPipe, std::io::ErrorKind::ConnectionReset];
    assert!(kinds.contains(&left.kind()), "{left}");
}

#[test]
fn bodies_are_json_and_no_page_of_elsewhere_asks() {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    let server = Server::start(&dir, "model", &[]);
    let body = br#"{"prompt": "w5", "max_tokens": 2}"#;
    let ask = |headers: &str| {
        let length = body.len();
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        );
        server.send(&head, body)
    };
    let json = "Content-Type: application/json\r\n";
    for kind in
        ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"]
    {
        ask(&format!("Host: localhost\r\n{kind}")).refused(415, None, "application/json");
    }
    // Who sends much comes to read that it was for nothing.
    let (large, mut stream) = (vec![b' '; 4 << 20], server.connect());
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n",
        large.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that answers at once and closes would break this off.
    for part in large.chunks(1 << 20) {
        std::thread::sleep(Duration::from_millis(100));
        stream.write_all(part).unwrap();
    }
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 415 "), "{answer}");
    ask("Host: localhost\r\nContent-Type: Application/JSON; charset=utf-8\r\n").ok();
    let address = &server.address;
    ask(&format!("Host: {address}\r\nOrigin: http://{address}\r\n{json}")).ok();
    for origin in ["https://example.org", "null", "http://127.0.0.1:1"] {
        let refused = ask(&format!("Host: {address}\r\nOrigin: {origin}\r\n{json}"));
        refused.refused(403, None, origin);
    }
    // A name that was made to point here.
    let refused = ask(&format!("Host: evil.org\r\nOrigin: http://evil.org\r\n{json}"));
    refused.refused(403, None, "evil.org");
    let get = |headers: &str| {
        let head = format!(
            "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
        );
        server.send(&head, b"")
    };
    get("Origin: https://example.org\r\n").refused(403, None, "https://example.org");
    let long = get(&format!("Origin: https://{}.org\r\n", "a".repeat(5000)));
    long.refused(403, None, "https://aaa");
    assert!(long.body.len() < 500, "{long:?}");
    get("").ok();
    // A page reads what its own host has without saying where it is from.
    for host in ["Host: evil.org\r\n", "Host: localhost.evil.org:80\r\n", "Host:\r\n", ""] {
        for path in ["/v1/models", "/metrics", "/health", "/nothing"] {
            let head = format!("GET {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
            server.send(&head, b"").refused(403, None, "`Host`");
        }
    }
}

#[test]
fn keys_are_asked_for_and_never_shown() {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("empty.txt", " \n");
    dir.write("spaces.txt", "two words");
    dir.write("key.txt", "sk-ElephantSeal\n");
    let serve = ["serve", "model", "--port", "0", "--device=cpu"];
    let refused = |more: &[&str], names: &[&str]| {
        dir.gptq(&[&serve[..], more].concat()).refused(names);
    };
    refused(&["--host", "0.0.0.0"], &["0.0.0.0", "key", "--api-key-file"]);
    refused(&["--host", "::"], &["::", "--api-key-file"]);
    refused(&["--api-key-file", "absent.txt"], &["absent.txt"]);
    refused(&["--api-key-file", "empty.txt"], &["empty.txt", "empty"]);
    refused(&["--api-key-file", "spaces.txt"], &["spaces.txt"]);
    refused(&["--api-key-file", "/dev/zero"], &["/dev/zero", "longer"]);
    refused(&["--max-batch", "17"], &["--max-batch 17"]);
    refused(&["--context", "1000"], &["1000"]);

    let server = Server::start(&dir, "model", &["--host", "0.0.0.0", "--api-key-file", "key.txt"]);
    let ask = |path: &str, header: &str| {
        server.send(
            &format!("GET {path} HTTP/1.1\r\nHost: model.example.org\r\nConnection: close\r\n{header}\r\n"),
            b"",
        )
    };
    for wrong in
        ["", "Authorization: Bearer sk-ElephantSea\r\n", "Authorization: sk-ElephantSeal\r\n"]
    {
        for path in ["/v1/models", "/metrics", "/nothing"] {
            let reply = ask(path, wrong);
            reply.refused(401, None, "key");
            assert!(!reply.body.contains("Elephant") && reply.head.contains("www-authenticate"));
        }
    }
    ask("/v1/models", "Authorization: Bearer sk-ElephantSeal\r\n").ok();
    ask("/health", "").ok();
}

#[test]
fn the_end_lets_texts_end() {
    let dir = Workdir::new();
    let mut idle = endless_server(&dir, &[]);
    idle.get("/health").ok();
    assert_eq!(idle.end("-INT"), Some(0));

    // A terminal that goes away is an end like any other, unless it was to be outlived: as this test may be,
    // of whose children that is then true as well.
    if !util::hangups_are_ignored() {
        let mut left = Server::start(&dir, "endless", &["--context", "60000"]);
        assert_eq!(left.end("-HUP"), Some(0));
    }
    let mut outliving = std::process::Command::new("sh");
    outliving.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_gptq")]);
    let mut outliving = Server::start_by(outliving, &dir, "endless", &["--context", "60000"]);
    outliving.signal("-HUP");
    std::thread::sleep(Duration::from_millis(300));
    outliving.get("/health").ok();
    assert_eq!(outliving.end("-TERM"), Some(0));

    let mut server = Server::start(&dir, "endless", &["--context", "60000"]);
    let address = server.address.clone();
    // Some seconds' worth: it is cut off, and its client can tell.
    let mut running = server.begin(COMPLETIONS, &long_text());
    let start = Instant::now();
    let code = server.end("-TERM");
    assert_eq!(code, Some(0));
    assert!(start.elapsed() < Duration::from_secs(30));
    let mut rest = String::new();
    let _ = std::io::Read::read_to_string(&mut running, &mut rest);
    assert!(!rest.contains("[DONE]"), "{}", &rest[rest.len().saturating_sub(300)..]);
    assert!(std::net::TcpStream::connect(address).is_err());
}
