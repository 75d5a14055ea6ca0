//! Xet's storage, as much of it as an upload meets: blocks of chunks come in, and a file is known
//! when its chunks have arrived. Nothing is found to be there already, and newer ways are refused, so
//! that the client takes the plain one.

use std::sync::Arc;

use serde_json::json;

use super::http::{Answer, Request};
use super::{State, sha256};

/// The right to write to the storage, which is another server's to give.
pub(crate) fn token(storage: &str) -> Answer {
    let answer = json!({"accessToken": "xet", "exp": 4_000_000_000_u64, "casUrl": storage});
    // The Hub's Python client reads the headers.
    Answer::json(&answer)
        .header("X-Xet-Access-Token", "xet")
        .header("X-Xet-Token-Expiration", "4000000000")
        .header("X-Xet-Cas-Url", storage)
}

pub(crate) fn answer(state: &mut State, request: &Request) -> Answer {
    let post = request.method == "POST";
    match request.path.as_str() {
        path if post && path.starts_with("/v1/xorbs/") => {
            let contents = contents(&request.body);
            state.stored.insert(sha256(&contents), Arc::new(contents));
            Answer::json(&json!({"was_inserted": true}))
        }
        "/v1/shards" if post => Answer::json(&json!({"result": 1})),
        _ => Answer::refusal(404, "not here"),
    }
}

/// The bytes in a block: its chunks, each with a header of eight bytes (version 0, compressed
/// length, scheme, length; lengths in three bytes), until the footer or the end.
fn contents(block: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = block;
    while let [0, a, b, c, scheme, tail @ ..] = rest {
        // Random bytes do not get smaller, so they are sent as they are.
        assert_eq!(*scheme, 0, "a compressed chunk");
        let length = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
        bytes.extend_from_slice(&tail[3..3 + length]);
        rest = &tail[3 + length..];
    }
    bytes
}
