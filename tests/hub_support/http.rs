//! HTTP/1.1 for the stand-in: a request a connection, a thread each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use serde_json::{Value, json};

use super::Fault;

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// With the query, as sent.
    pub(crate) path: String,
    pub(crate) authorization: String,
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
}

impl Answer {
    fn new(status: u16, body: Vec<u8>) -> Self {
        let length = body.len();
        Self { status, headers: Vec::new(), body, length }
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
            _ => {}
        }
        answer
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn code(self, code: &str) -> Self {
        self.header("X-Error-Code", code)
    }

    fn send(&self, stream: &mut TcpStream) -> std::io::Result<()> {
        let Self { status, length, .. } = self;
        let mut head = format!("HTTP/1.1 {status} Said\r\nContent-Length: {length}\r\n");
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("Connection: close\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(&self.body)
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
                    let _ = answer(&request).send(&mut stream);
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
    let mut request =
        Request { method, path, authorization: String::new(), from: None, body: Vec::new() };
    let mut length = 0;
    while let Some((name, value)) = line()?.split_once(": ") {
        match name.to_lowercase().as_str() {
            "authorization" => request.authorization = value.to_owned(),
            "content-length" => length = value.parse().unwrap(),
            "range" => {
                let from = value.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
                request.from = Some(from.parse().unwrap());
            }
            "transfer-encoding" => panic!("{first}: a body of unknown length"),
            _ => {}
        }
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
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
