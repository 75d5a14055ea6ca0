//! Large files to the Hub's storage, by the links that it gives: git-lfs's `basic` transfer, and the
//! Hub's own `multipart`, which takes files above its storage's limit.
//!
//! The storage knows contents by their hash. What it has got is not sent again, whether it was
//! committed or not, so that an upload which was cut short is repeated file by file.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use reqwest::header::{ACCEPT, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde_json::json;

use crate::api::Api;
use crate::fetch::side_by_side;
use crate::http::same_server;
use crate::listing::on_endpoint;
use crate::lock::lock;
use crate::progress::Meter;
use crate::retry::{Failure, Patience};
use crate::send::{Answer, Outgoing, Payload, Sender};
use crate::stop::Stop;
use crate::{Error, Result};

const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// The Hub that its own links name, also where a mirror of it was asked.
const HUB_HOST: &str = "huggingface.co";

/// Objects that one request asks for.
const BATCH: usize = 256;

/// Times that links are asked for anew: they expire while a large file is on its way.
const NEW_LINKS: u32 = 3;

/// A large file.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    /// Branch and path, for messages.
    pub(crate) name: String,
    /// The file here.
    pub(crate) path: PathBuf,
    /// SHA-256 of its contents.
    pub(crate) oid: String,
    pub(crate) bytes: u64,
    /// When it was last written to before it was hashed.
    pub(crate) modified: Option<SystemTime>,
}

/// What the storage wants of an object.
#[derive(Debug, PartialEq, Eq)]
enum Transfer {
    /// Nothing: it has got it.
    None,
    /// All of it at once.
    Basic { url: Url, headers: HeaderMap, verify: Option<Url> },
    /// In parts of so many bytes, and a word when all are there.
    Multipart { parts: Vec<Url>, chunk: u64, complete: Url, verify: Option<Url> },
}

/// An answer to a batch request.
#[derive(Deserialize)]
struct Batch {
    transfer: Option<String>,
    objects: Vec<BatchObject>,
}

#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    actions: Option<Actions>,
    error: Option<BatchError>,
}

#[derive(Deserialize)]
struct BatchError {
    message: String,
}

#[derive(Default, Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Option<BTreeMap<String, serde_json::Value>>,
}

/// The large file storage of a repository.
pub(crate) struct Storage<'a> {
    pub(crate) api: &'a Api<'a>,
    pub(crate) sender: &'a Sender<'a>,
    pub(crate) branch: &'a str,
    pub(crate) meter: &'a Meter<'a>,
    /// Those that are not in use, with their connections.
    pub(crate) senders: &'a Mutex<Vec<Sender<'a>>>,
}

/// A piece of an object on its way to one address.
struct Piece<'a> {
    object: &'a Object,
    file: Arc<File>,
    url: &'a Url,
    headers: HeaderMap,
    start: u64,
    length: u64,
}

impl Storage<'_> {
    /// Sends what the storage has not got.
    pub(crate) fn upload(&self, objects: &[&Object]) -> Result<()> {
        for objects in objects.chunks(BATCH) {
            let mut left: Vec<&Object> = objects.to_vec();
            let times = 1 + NEW_LINKS.min(self.api.hub().retries);
            for time in 1..=times {
                left = self.with_links(&left, time == times)?;
                if left.is_empty() {
                    break;
                }
                let progress = self.meter.progress();
                progress.note(&format!("{}: asking for new links", left[0].name));
            }
        }
        Ok(())
    }

    /// Asks for links and sends by them; gives the objects whose links expired on the way, unless
    /// this was the last time.
    fn with_links<'b>(&self, objects: &[&'b Object], last: bool) -> Result<Vec<&'b Object>> {
        let transfers = self.transfers(objects)?;
        let mut expired = Vec::new();
        // One at a time: its parts go side by side, and no more links are in use than are needed.
        for (&object, transfer) in objects.iter().zip(&transfers) {
            match self.object(object, transfer) {
                Err(Error::LinkRefused { .. }) if !last => expired.push(object),
                done => done?,
            }
        }
        Ok(expired)
    }

    fn transfers(&self, objects: &[&Object]) -> Result<Vec<Transfer>> {
        let progress = self.meter.progress();
        let wanted: Vec<_> =
            objects.iter().map(|o| json!({"oid": o.oid, "size": o.bytes})).collect();
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": wanted,
            "hash_algo": "sha256",
            "ref": {"name": self.branch},
        });
        let request = Outgoing {
            method: Method::POST,
            url: self.batch_url(),
            headers: lfs_headers(),
            payload: Payload::Bytes(body.to_string().into()),
        };
        let what = format!("{} (large files)", self.api.id());
        let answer = repeated(self.api, self.sender, &request, &what, progress)?;
        let hub = self.api.hub();
        let unusable = |reason: String| Error::Answer { what: what.clone(), reason };
        let batch: Batch = serde_json::from_slice(&answer.body)
            .map_err(|e| unusable(hub.redacted(&e.to_string())))?;
        if let Some(other) = batch.transfer.filter(|t| !matches!(t.as_str(), "basic" | "multipart"))
        {
            let other = crate::http::words(&other);
            return Err(unusable(format!(
                "it takes large files by `{other}` only, which gptq does not speak"
            )));
        }
        let mut found: BTreeMap<String, BatchObject> =
            batch.objects.into_iter().map(|object| (object.oid.clone(), object)).collect();
        let mut transfer = |object: &&Object| {
            let refused = |reason: String| Error::Storage { file: object.name.clone(), reason };
            let entry = found.remove(&object.oid);
            let entry = entry.ok_or_else(|| refused("it was not answered for".to_owned()))?;
            if let Some(error) = entry.error {
                return Err(refused(crate::http::words(&hub.redacted(&error.message))));
            }
            let actions = entry.actions.unwrap_or_default();
            self.transfer(actions, object.bytes).map_err(refused)
        };
        objects.iter().map(&mut transfer).collect()
    }

    fn batch_url(&self) -> Url {
        let mut url = self.api.url(&[], &["info", "lfs", "objects", "batch"], "");
        // The id's last part is the name of a git repository here.
        let path = url.path().replacen("/info/lfs/", ".git/info/lfs/", 1);
        url.set_path(&path);
        url
    }

    fn transfer(&self, actions: Actions, bytes: u64) -> std::result::Result<Transfer, String> {
        let Some(upload) = actions.upload else { return Ok(Transfer::None) };
        let verify = actions.verify.map(|action| self.address(&action.href)).transpose()?;
        let url = self.address(&upload.href)?;
        let header = upload.header.unwrap_or_default();
        let Some(chunk) = header.get("chunk_size") else {
            return Ok(Transfer::Basic { url, headers: checked_headers(&header)?, verify });
        };
        let chunk = chunk.as_u64().or_else(|| chunk.as_str()?.parse().ok()).filter(|&n| n > 0);
        let chunk = chunk.ok_or("its size of parts is none")?;
        // By number, as `10` comes before `9` among texts.
        let mut parts = BTreeMap::new();
        for (name, value) in &header {
            if let (Ok(number), Some(link)) = (name.parse::<u32>(), value.as_str()) {
                parts.insert(number, self.address(link)?);
            }
        }
        let parts: Vec<Url> = parts.into_values().collect();
        if parts.len() as u64 != bytes.div_ceil(chunk) {
            let count = parts.len();
            return Err(format!("{count} parts of {chunk} bytes are not its {bytes} bytes"));
        }
        Ok(Transfer::Multipart { parts, chunk, complete: url, verify })
    }

    /// A link, at the endpoint where it is one of the Hub itself.
    fn address(&self, link: &str) -> std::result::Result<Url, String> {
        let url = Url::parse(link).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let url = url.filter(Url::has_host).ok_or("a link of its answer is no address")?;
        let endpoint = &self.api.hub().endpoint;
        let is_hub = url.host_str() == Some(HUB_HOST) && !same_server(&url, endpoint);
        Ok(if is_hub { on_endpoint(&url, endpoint) } else { url })
    }

    fn object(&self, object: &Object, transfer: &Transfer) -> Result<()> {
        let file = Arc::new(File::open(&object.path).map_err(Error::io("open", &object.path))?);
        let piece = |url, headers: &HeaderMap, start, length| Piece {
            object,
            file: Arc::clone(&file),
            url,
            headers: headers.clone(),
            start,
            length,
        };
        let verify = match transfer {
            Transfer::None => {
                self.meter.add(object.bytes);
                return Ok(());
            }
            Transfer::Basic { url, headers, verify } => {
                self.pieces(&[piece(url, headers, 0, object.bytes)])?;
                verify
            }
            Transfer::Multipart { parts, chunk, complete, verify } => {
                let none = HeaderMap::new();
                let pieces: Vec<Piece<'_>> = (0..)
                    .zip(parts)
                    .map(|(number, url)| {
                        let start = number * chunk;
                        piece(url, &none, start, (*chunk).min(object.bytes - start))
                    })
                    .collect();
                let etags = self.pieces(&pieces)?;
                self.complete(object, complete, &etags)?;
                verify
            }
        };
        if object.changed() {
            return Err(Error::Changed { path: object.path.clone() });
        }
        match verify {
            Some(url) => {
                self.confirm(object, url, &json!({"oid": object.oid, "size": object.bytes}))
            }
            None => Ok(()),
        }
    }

    /// Sends pieces side by side; gives the storage's names of them.
    fn pieces(&self, pieces: &[Piece<'_>]) -> Result<Vec<Option<String>>> {
        let etags = Mutex::new(vec![None; pieces.len()]);
        let sent = AtomicU64::new(0);
        let numbered: Vec<(usize, &Piece<'_>)> = pieces.iter().enumerate().collect();
        let stop = Stop::new();
        let doing = || format!("uploading to `{}`", self.api.id());
        let done = side_by_side(&numbered, &stop, doing, |&(number, piece)| {
            let etag = self.piece(piece, &stop)?;
            sent.fetch_add(piece.length, Ordering::Relaxed);
            lock(&etags)[number] = etag;
            Ok(())
        });
        if done.is_err() {
            // Parts of an object that is not whole are nothing.
            self.meter.take_back(sent.into_inner());
        }
        done?;
        Ok(etags.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn piece(&self, piece: &Piece<'_>, stop: &Stop) -> Result<Option<String>> {
        let Piece { object, start, length, .. } = *piece;
        let idle = || lock(self.senders);
        let sender = match idle().pop() {
            Some(sender) => sender,
            None => Sender::new(self.api.hub(), &object.name)?,
        };
        let request = Outgoing {
            method: Method::PUT,
            url: piece.url.clone(),
            headers: piece.headers.clone(),
            payload: Payload::Part { file: Arc::clone(&piece.file), start, length },
        };
        let purpose = self.api.purpose("writing", &object.name);
        let mut patience = Patience::new(self.api.hub().retries, stop);
        loop {
            let mut counted = 0;
            let answer = sender.send(&request, purpose, &mut |sent| {
                self.meter.add(sent.saturating_sub(counted));
                counted = counted.max(sent);
            });
            match answer {
                Ok(answer) => {
                    // Of a body that was refused and asked for elsewhere, the end counts.
                    self.meter.add(length.saturating_sub(counted));
                    let etag = answer.headers.get(ETAG).and_then(|value| value.to_str().ok());
                    idle().push(sender);
                    return Ok(etag.map(str::to_owned));
                }
                Err(Failure::Expired { reason }) => {
                    self.meter.take_back(counted);
                    return Err(Error::LinkRefused { file: object.name.clone(), reason });
                }
                Err(failure) => {
                    self.meter.take_back(counted);
                    patience.spend(&object.name, failure, self.meter.progress())?;
                }
            }
        }
    }

    fn complete(&self, object: &Object, url: &Url, etags: &[Option<String>]) -> Result<()> {
        let mut parts = Vec::new();
        for (number, etag) in (1..).zip(etags) {
            let reason = || format!("it gave no name to part {number}");
            let etag = etag.as_deref().filter(|etag| !etag.is_empty());
            let etag =
                etag.ok_or_else(|| Error::Storage { file: object.name.clone(), reason: reason() })?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        self.confirm(object, url, &json!({"oid": object.oid, "parts": parts}))
    }

    fn confirm(&self, object: &Object, url: &Url, body: &serde_json::Value) -> Result<()> {
        let request = Outgoing {
            method: Method::POST,
            url: url.clone(),
            headers: lfs_headers(),
            payload: Payload::Bytes(body.to_string().into()),
        };
        let progress = self.meter.progress();
        repeated(self.api, self.sender, &request, &object.name, progress).map(|_| ())
    }
}

impl Object {
    /// Whether the file was written to since it was hashed.
    fn changed(&self) -> bool {
        let Ok(meta) = std::fs::metadata(&self.path) else { return true };
        meta.len() != self.bytes || meta.modified().ok() != self.modified
    }
}

/// Sends a request until it is answered, or patience ends.
pub(crate) fn repeated(
    api: &Api<'_>,
    sender: &Sender<'_>,
    request: &Outgoing,
    what: &str,
    progress: &dyn crate::Progress,
) -> Result<Answer> {
    let never = Stop::new();
    let mut patience = Patience::new(api.hub().retries, &never);
    loop {
        match sender.send(request, api.purpose("writing", what), &mut |_| {}) {
            Ok(answer) => return Ok(answer),
            Err(failure) => patience.spend(what, failure, progress)?,
        }
    }
}

fn lfs_headers() -> HeaderMap {
    let json = HeaderValue::from_static(LFS_JSON);
    HeaderMap::from_iter([(ACCEPT, json.clone()), (CONTENT_TYPE, json)])
}

/// The headers that a link wants, but for those that the connection sets itself.
fn checked_headers(
    entry: &BTreeMap<String, serde_json::Value>,
) -> std::result::Result<HeaderMap, String> {
    const OWN: [&str; 4] = ["content-length", "transfer-encoding", "host", "connection"];
    let mut headers = HeaderMap::new();
    for (name, value) in entry {
        if OWN.contains(&name.to_lowercase().as_str()) {
            continue;
        }
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = value.as_str().and_then(|value| HeaderValue::from_str(value).ok());
        match (name, value) {
            (Ok(name), Some(value)) => headers.insert(name, value),
            _ => return Err("a header of its answer is none".to_owned()),
        };
    }
    Ok(headers)
}
