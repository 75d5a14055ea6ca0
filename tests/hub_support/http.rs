//! HTTP/1.1 for the stand-in: a request a connection, a thread each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::Fault;

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query, as sent.
    pub(crate) path: String,
    pub(crate) authorization: String,
    /// The server as the client names it.
    pub(crate) host: String,
    /// The first byte asked for.
    pub(crate) from: Option<usize>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

pub(crate) struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Announced, whatever is sent.
    length: usize,
    /// Before the head is sent.
    delay: Duration,
    /// Bytes that are sent one a second; the rest follows after them.
    trickle: usize,
}

impl Answer {
    fn new(status: u16, body: Vec<u8>) -> Self {
        let length = body.len();
        let (headers, delay, trickle) = (Vec::new(), Duration::ZERO, 0);
        Self { status, headers, body, length, delay, trickle }
    }

    pub(crate) fn json(value: &Value) -> Self {
        Self::new(200, value.to_string().into_bytes()).header("Content-Type", "application/json")
    }

    pub(crate) fn refusal(status: u16, message: &str) -> Self {
        let mut answer = Self::json(&json!({"error": message})).header("X-Error-Message", message);
        answer.status = status;
        answer
    }

    pub(crate) fn redirect(to: &str) -> Self {
        Self::new(302, Vec::new()).header("Location", to)
    }

    /// Nothing for a time, as of a server that hangs.
    pub(crate) fn silence(time: Duration) -> Self {
        let mut answer = Self::refusal(500, "late");
        answer.delay = time;
        answer
    }

    /// A file, or what a fault makes of it.
    pub(crate) fn file(bytes: &[u8], request: &Request, fault: Option<Fault>) -> Self {
        let from = if matches!(fault, Some(Fault::Whole)) { None } else { request.from };
        if from.is_some_and(|from| from >= bytes.len()) {
            return Self::refusal(416, "out of range");
        }
        let mut answer = match from {
            None => Self::new(200, bytes.to_vec()),
            Some(from) => Self::new(206, bytes[from..].to_vec()).header(
                "Content-Range",
                &format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()),
            ),
        };
        match fault {
            Some(Fault::Cut) => answer.body.truncate(answer.body.len() / 2),
            Some(Fault::Damage) => answer.body[0] ^= 1,
            Some(Fault::Short) => {
                answer.body.pop();
                answer.length = answer.body.len();
            }
            Some(Fault::Gzip) => answer = answer.packed(),
            Some(Fault::Trickle) => answer.trickle = 20,
            _ => {}
        }
        answer
    }

    /// As a proxy packs it that was not asked to.
    pub(crate) fn packed(mut self) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&self.body).unwrap();
        self.body = encoder.finish().unwrap();
        self.length = self.body.len();
        self.header("Content-Encoding", "gzip")
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    pub(crate) fn code(self, code: &str) -> Self {
        self.header("X-Error-Code", code)
    }

    fn send(&self, method: &str, stream: &mut TcpStream) -> std::io::Result<()> {
        let Self { status, length, .. } = self;
        sleep(self.delay);
        let mut head = format!("HTTP/1.1 {status} Said\r\nContent-Length: {length}\r\n");
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("Connection: close\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        if method == "HEAD" {
            return Ok(());
        }
        let (slow, rest) = self.body.split_at(self.trickle.min(self.body.len()));
        for byte in slow {
            stream.write_all(&[*byte])?;
            sleep(Duration::from_secs(1));
        }
        stream.write_all(rest)
    }
}

/// Answers requests until the test ends; gives the address.
pub(crate) fn serve(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                if let Some(request) = read(&stream) {
                    // The client may have gone.
                    let _ = answer(&request).send(&request.method, &mut stream);
                }
            });
        }
    });
    address
}

/// A request with a body of announced length; `None` where the client closed instead.
fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let (authorization, host) = (String::new(), String::new());
    let mut request = Request { method, path, authorization, host, from: None, body: Vec::new() };
    let (mut length, mut chunked) = (0, false);
    while let Some((name, value)) = line()?.split_once(':') {
        let value = value.trim();
        match name.to_lowercase().as_str() {
            "host" => request.host = value.to_owned(),
            "authorization" => request.authorization = value.to_owned(),
            "content-length" => length = value.parse().unwrap(),
            "range" => {
                let from = value.strip_prefix("bytes=").unwrap().split('-').next().unwrap();
                request.from = Some(from.parse().unwrap());
            }
            "transfer-encoding" => chunked = true,
            _ => {}
        }
    }
    if chunked {
        request.body = chunks(&mut reader)?;
        return Some(request);
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

/// A body of unknown length, as some clients send them: sizes in hexadecimal before each piece.
fn chunks(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim().split(';').next()?, 16).ok()?;
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..]).ok()?;
        reader.read_line(&mut line).ok()?;
        if size == 0 {
            return Some(body);
        }
    }
}

/// `%2F` and the like.
pub(crate) fn decode(part: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = part.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = if first == b'%' { tail.get(..2) } else { None };
        match digits {
            Some(digits) => {
                let digits = std::str::from_utf8(digits).unwrap();
                bytes.push(u8::from_str_radix(digits, 16).unwrap());
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// Decodes base 64 with padding.
pub(crate) fn base64(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let value = |c: u8| digits.iter().position(|&d| d == c).unwrap() as u32;
    let mut bytes = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let data: Vec<u32> = four.iter().filter(|&&c| c != b'=').map(|&c| value(c)).collect();
        let word = data.iter().enumerate().fold(0, |word, (i, v)| word | v << (18 - 6 * i));
        bytes.extend_from_slice(&word.to_be_bytes()[1..data.len()]);
    }
    bytes
}
