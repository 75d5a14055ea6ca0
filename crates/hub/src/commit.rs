//! What a commit of an upload holds: how many files, and how each gets into it.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::lfs::Object;
use crate::plan::PlannedFile;
use crate::{Error, Result};

/// A commit holds no more than so many files, bytes of large ones and bytes within itself. Commits
/// are what the Hub limits; one that is too large is not done in the time that proxies allow.
const COMMIT_FILES: usize = 100;
const COMMIT_LARGE: u64 = 64 << 30;
const COMMIT_PLAIN: u64 = 32 << 20;

/// How a file gets into a commit.
pub(crate) enum Way {
    /// Within it.
    Plain,
    /// By its hash: its contents are in the storage.
    Large(Object),
}

/// A file on its way, with what it hashes to.
pub(crate) struct Ready<'a> {
    pub(crate) file: &'a PlannedFile,
    pub(crate) path: PathBuf,
    pub(crate) way: Way,
}

impl Ready<'_> {
    /// The large file that it is.
    pub(crate) fn object(&self) -> Option<&Object> {
        match &self.way {
            Way::Plain => None,
            Way::Large(object) => Some(object),
        }
    }
}

/// Files in turn, as many as a commit may hold.
pub(crate) fn commits<'a, 'b>(files: &'a [Ready<'b>]) -> Vec<&'a [Ready<'b>]> {
    let (mut groups, mut start) = (Vec::new(), 0);
    let (mut large, mut plain) = (0_u64, 0_u64);
    for (index, ready) in files.iter().enumerate() {
        let count = match ready.object() {
            Some(_) => &mut large,
            None => &mut plain,
        };
        *count += ready.file.bytes;
        let full = index - start == COMMIT_FILES || large > COMMIT_LARGE || plain > COMMIT_PLAIN;
        if full && index > start {
            groups.push(&files[start..index]);
            start = index;
            (large, plain) = match ready.object() {
                Some(_) => (ready.file.bytes, 0),
                None => (0, ready.file.bytes),
            };
        }
    }
    groups.push(&files[start..]);
    groups.retain(|group| !group.is_empty());
    groups
}

/// The lines of a commit: what it is called, then each file.
pub(crate) fn body(summary: &str, files: &[Ready<'_>]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let header = json!({"key": "header", "value": {"summary": summary, "description": ""}});
    push_line(&mut body, &header);
    for ready in files {
        match &ready.way {
            Way::Large(object) => push_line(
                &mut body,
                &json!({"key": "lfsFile", "value": {
                    "path": ready.file.path, "algo": "sha256", "oid": object.oid,
                    "size": object.bytes,
                }}),
            ),
            Way::Plain => push_plain(&mut body, ready)?,
        }
    }
    Ok(body)
}

fn push_line(body: &mut Vec<u8>, line: &Value) {
    body.extend_from_slice(line.to_string().as_bytes());
    body.push(b'\n');
}

/// A file within a commit, encoded as it is read.
fn push_plain(body: &mut Vec<u8>, ready: &Ready<'_>) -> Result<()> {
    const READ: u64 = 3 << 16;
    let io = |source| Error::Io { action: "read", path: ready.path.clone(), source };
    let path = serde_json::Value::from(ready.file.path.as_str());
    let head = format!(
        "{{\"key\": \"file\", \"value\": {{\"encoding\": \"base64\", \"path\": {path}, \"content\": \""
    );
    body.extend_from_slice(head.as_bytes());
    let mut file = File::open(&ready.path).map_err(io)?;
    let mut bytes = 0;
    loop {
        let mut part = Vec::new();
        // In threes, so that the pieces can be put together.
        file.by_ref().take(READ).read_to_end(&mut part).map_err(io)?;
        if part.is_empty() {
            break;
        }
        bytes += part.len() as u64;
        if bytes > ready.file.bytes {
            break;
        }
        body.extend_from_slice(BASE64_STANDARD.encode(part).as_bytes());
    }
    if bytes != ready.file.bytes {
        return Err(Error::Changed { path: ready.path.clone() });
    }
    body.extend_from_slice(b"\"}}\n");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_as_few_as_may_be() {
        let file = |bytes| PlannedFile { path: "a".to_owned(), bytes };
        let groups = |sizes: &[(u64, bool)]| -> Vec<usize> {
            let files: Vec<PlannedFile> = sizes.iter().map(|&(bytes, _)| file(bytes)).collect();
            let ready = |(file, &(bytes, large)): (_, &(u64, bool))| Ready {
                file,
                path: PathBuf::new(),
                way: match large {
                    false => Way::Plain,
                    true => Way::Large(Object {
                        name: String::new(),
                        path: PathBuf::new(),
                        oid: String::new(),
                        bytes,
                        modified: None,
                    }),
                },
            };
            let ready: Vec<Ready<'_>> = files.iter().zip(sizes).map(ready).collect();
            commits(&ready).into_iter().map(<[_]>::len).collect()
        };
        assert_eq!(groups(&[]), [0; 0]);
        assert_eq!(groups(&[(40 << 30, true), (1, false), (20 << 20, false)]), [3]);
        assert_eq!(groups(&[(40 << 30, true), (40 << 30, true), (5, false)]), [1, 2]);
        assert_eq!(groups(&[(100 << 30, true), (5, false)]), [1, 1]);
        assert_eq!(groups(&[(20 << 20, false), (20 << 20, false), (1, true)]), [1, 2]);
        assert_eq!(groups(&[(1, false); 250]), [100, 100, 50]);
    }

    #[test]
    fn a_file_within_a_commit_is_what_was_planned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..500_000_u32).map(|i| (i % 253) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut file = PlannedFile { path: "a \"b\"".to_owned(), bytes: 500_000 };
        let mut body = Vec::new();
        push_plain(&mut body, &Ready { file: &file, path: path.clone(), way: Way::Plain }).unwrap();
        let line: Value = serde_json::from_slice(&body).unwrap();
        let content = line["value"]["content"].as_str().unwrap();
        assert_eq!(BASE64_STANDARD.decode(content).unwrap(), bytes);
        assert_eq!(line["value"]["path"], "a \"b\"");
        for other in [499_999, 500_001] {
            file.bytes = other;
            let ready = Ready { file: &file, path: path.clone(), way: Way::Plain };
            let failed = push_plain(&mut Vec::new(), &ready).unwrap_err();
            assert!(matches!(failed, Error::Changed { .. }), "{failed}");
        }
    }
}
