//! git-lfs's batch protocol, with the Hub's way of sending large files in parts.

use std::sync::Arc;

use serde_json::{Value, json};

use super::http::{Answer, Request};
use super::{State, sha256};

/// Larger files come in parts, of this size or more.
const SINGLE: usize = 100_000;
const PART: usize = 64_000;
const MOST_PARTS: usize = 64;

/// Links for what the storage has not got.
pub(crate) fn batch(state: &mut State, name: &str, request: &Request, storage: &str) -> Answer {
    if let Some(transfer) = state.transfer {
        return Answer::json(&json!({"transfer": transfer, "objects": []}));
    }
    let body = request.json();
    assert_eq!(body["operation"], "upload");
    assert_eq!(body["hash_algo"], "sha256");
    let hub = format!("http://{}", request.host);
    state.links += 1;
    let link = state.links;
    let object = |object: &Value| {
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
        let mut answer = json!({"oid": oid, "size": size});
        if state.stored.contains_key(oid) {
            return answer;
        }
        let size = usize::try_from(size).unwrap();
        let verify = json!({"href": format!("{hub}/{name}/info/lfs/verify")});
        let upload = if size <= SINGLE {
            json!({"href": format!("{storage}/lfs/{oid}/{link}-0"), "header": {"X-Part": "whole"}})
        } else {
            let chunk = PART.max(size.div_ceil(MOST_PARTS));
            let mut header = json!({"chunk_size": chunk.to_string()});
            for number in 1..=size.div_ceil(chunk) {
                header[format!("{number:05}")] =
                    format!("{storage}/lfs/{oid}/{link}-{number}").into();
            }
            json!({"href": format!("{hub}/complete/{oid}"), "header": header})
        };
        answer["actions"] = json!({"upload": upload, "verify": verify});
        answer
    };
    let objects: Vec<Value> = body["objects"].as_array().unwrap().iter().map(object).collect();
    let parts = objects.iter().any(|o| !o["actions"]["upload"]["header"]["chunk_size"].is_null());
    let transfer = if parts { "multipart" } else { "basic" };
    Answer::json(&json!({"transfer": transfer, "objects": objects}))
}

/// Takes a whole file (number 0) or a part of one, by one of the links that were given last.
pub(crate) fn stored(state: &mut State, oid: &str, link: &str, request: &Request) -> Answer {
    let (link, number) = link.split_once('-').unwrap();
    if link != state.links.to_string() {
        return Answer::refusal(403, "Request has expired");
    }
    let number: usize = number.parse().unwrap();
    let name = sha256(&request.body);
    if number == 0 {
        assert_eq!(name, oid);
        state.stored.insert(oid.to_owned(), Arc::new(request.body.clone()));
    } else {
        state.parts.insert((oid.to_owned(), number), request.body.clone());
    }
    Answer::json(&json!({})).header("ETag", &format!("\"{name}\""))
}

/// Puts the parts together.
pub(crate) fn completed(state: &mut State, oid: &str, body: &Value) -> Answer {
    assert_eq!(body["oid"], oid);
    let mut whole = Vec::new();
    for (number, part) in (1..).zip(body["parts"].as_array().unwrap()) {
        assert_eq!(part["partNumber"], number);
        let bytes = state.parts.remove(&(oid.to_owned(), number)).unwrap();
        assert_eq!(part["etag"], format!("\"{}\"", sha256(&bytes)));
        whole.extend_from_slice(&bytes);
    }
    assert_eq!(sha256(&whole), oid);
    state.stored.insert(oid.to_owned(), Arc::new(whole));
    Answer::json(&json!({}))
}

/// Whether a file is there and of the size that it should have.
pub(crate) fn verified(state: &State, body: &Value) -> Answer {
    match state.stored.get(body["oid"].as_str().unwrap()) {
        Some(bytes) if body["size"] == bytes.len() => Answer::json(&json!({})),
        _ => Answer::refusal(404, "it is not there"),
    }
}
