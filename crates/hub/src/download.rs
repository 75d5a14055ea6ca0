//! One file: from the Hub to a blob, checked, going on after every interruption.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Instant;

use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::{CONTENT_ENCODING, CONTENT_RANGE};

use crate::api::Api;
use crate::cache::RepoCache;
use crate::hash::Hasher;
use crate::http::{Coding, broken};
use crate::listing::RemoteFile;
use crate::progress::Meter;
use crate::retry::{Failure, Patience};
use crate::stop::Stop;
use crate::{Error, Result};

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// A file that arrives whole and wrong is asked for once more: the fault may have been underway.
const DAMAGED_ATTEMPTS: u32 = 2;

/// Fewer bytes than this in the time of silence that is borne, and a connection is as good as dead.
const TRICKLE: u64 = 1024;

/// What the files of a download share.
pub(crate) struct Download<'a> {
    pub(crate) api: &'a Api<'a>,
    pub(crate) cache: &'a RepoCache,
    pub(crate) commit: &'a str,
    pub(crate) meter: Meter<'a>,
    /// Set when another file has failed; what has arrived by then is kept.
    pub(crate) stop: &'a Stop,
}

impl Download<'_> {
    /// Brings a blob that is not there, or the rest of one.
    pub(crate) fn file(&self, file: &RemoteFile) -> Result<()> {
        let progress = self.meter.progress();
        let name = self.name(file);
        let Some(_lock) = self.cache.lock(file, self.stop, progress)? else { return Ok(()) };
        if self.cache.is_complete(file) {
            // Another process was faster.
            return Ok(());
        }
        let mut patience = Patience::new(self.api.hub().retries, self.stop);
        let mut damaged = 0;
        let incomplete = self.cache.incomplete(file);
        let mut furthest = length(&incomplete);
        while !self.stop.is_set() {
            match self.attempt(file, &incomplete) {
                Ok(true) => {
                    progress.file(&file.path, file.bytes);
                    return Ok(());
                }
                Ok(false) => return Ok(()),
                Err(Failure::Fatal(
                    error @ (Error::WrongHash { .. } | Error::WrongSize { .. }),
                )) => {
                    self.meter.take_back(length(&incomplete).min(file.bytes));
                    remove(&incomplete)?;
                    damaged += 1;
                    if damaged == DAMAGED_ATTEMPTS {
                        return Err(error);
                    }
                    progress.note(&format!("{name}: arrived damaged; downloading it again"));
                }
                Err(failure) => {
                    // What a proxy packs starts anew each time, so that less is no progress.
                    if length(&incomplete) > furthest {
                        furthest = length(&incomplete);
                        patience.restore();
                    }
                    patience.spend(&name, failure, progress)?;
                }
            }
        }
        Ok(())
    }

    fn name(&self, file: &RemoteFile) -> String {
        format!("{}/{}", self.api.id(), file.path)
    }

    /// Downloads what is missing; whether the blob is complete, or the download was stopped.
    fn attempt(&self, file: &RemoteFile, incomplete: &Path) -> Result<bool, Failure> {
        let mut target = open(incomplete)?;
        let mut hasher = file.digest.hasher(file.bytes);
        let mut have = target.metadata().map_err(Error::io("read", incomplete))?.len();
        if have > file.bytes {
            // Of no use, and not counted beyond the file's size.
            self.meter.take_back(file.bytes);
            have = restart(&mut target, incomplete)?;
        }
        hasher.read(&mut target).map_err(Error::io("read", incomplete))?;
        if have < file.bytes || file.bytes == 0 {
            let mut response = self.api.open(self.commit, &file.path, have)?;
            if have > 0 && !continues(&response, have) {
                self.meter.take_back(have);
                have = restart(&mut target, incomplete)?;
                hasher = file.digest.hasher(file.bytes);
                // Only an answer with the whole file is of use.
                if response.status() != StatusCode::OK {
                    response = self.api.open(self.commit, &file.path, 0)?;
                }
            }
            let sink = Sink { target: &mut target, hasher: &mut hasher, path: incomplete, have };
            if !self.receive(file, response, sink)? {
                return Ok(false);
            }
        }
        let found = hasher.finish();
        if found != file.digest.hex() {
            let (file, expected) = (self.name(file), file.digest.to_string());
            return Err(Error::WrongHash { file, expected, found }.into());
        }
        // The blob's name is the promise that it is whole, also after a power cut.
        target.sync_all().map_err(Error::io("write", incomplete))?;
        let blob = self.cache.blob(file);
        fs::rename(incomplete, &blob).map_err(Error::io("create", &blob))?;
        Ok(true)
    }

    /// Writes and hashes a body until it has the file's size; `false` where it was stopped.
    fn receive(
        &self,
        file: &RemoteFile,
        response: Response,
        mut sink: Sink<'_>,
    ) -> Result<bool, Failure> {
        let limit = self.api.hub().limit;
        let mut body = Coding::of(&self.name(file), response.headers())?.reader(response);
        let mut buffer = vec![0; BUFFER];
        let (mut since, mut mark) = (Instant::now(), sink.have);
        loop {
            // With the last byte here, the blob is as good as made.
            if self.stop.is_set() && sink.have < file.bytes {
                return Ok(false);
            }
            let read = body.read(&mut buffer).map_err(|e| broken(&e, limit))?;
            if read == 0 {
                break;
            }
            if since.elapsed() > limit {
                if sink.have - mark < TRICKLE {
                    let seconds = limit.as_secs();
                    let reason = format!("fewer than {TRICKLE} bytes arrived in {seconds} s");
                    return Err(Failure::transient(reason));
                }
                (since, mark) = (Instant::now(), sink.have);
            }
            let expected = file.bytes;
            if sink.have + read as u64 > expected {
                let (file, found) = (self.name(file), sink.have + read as u64);
                return Err(Error::WrongSize { file, expected, found }.into());
            }
            sink.take(&buffer[..read])?;
            self.meter.add(read as u64);
        }
        match sink.have {
            whole if whole == file.bytes => Ok(true),
            // The server closed in good order: this is all that it has.
            found => {
                let (file, expected) = (self.name(file), file.bytes);
                Err(Error::WrongSize { file, expected, found }.into())
            }
        }
    }
}

/// Where arriving bytes go.
struct Sink<'a> {
    target: &'a mut File,
    hasher: &'a mut Hasher,
    path: &'a Path,
    have: u64,
}

impl Sink<'_> {
    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        self.target.write_all(bytes).map_err(Error::io("write", self.path))?;
        self.hasher.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(Error::io("create", path))
}

/// Empties a file whose bytes are of no use; gives its length.
fn restart(file: &mut File, path: &Path) -> Result<u64> {
    file.set_len(0).map_err(Error::io("write", path))?;
    file.seek(SeekFrom::Start(0)).map_err(Error::io("write", path))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(Error::io("remove", path))
}

/// Whether an answer goes on at `have`. A server may ignore the range and send the whole file, and
/// the range of a packed form is none of the file.
fn continues(response: &Response, have: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && !response.headers().contains_key(CONTENT_ENCODING)
        && range.is_some_and(|range| range.starts_with(&format!("bytes {have}-")))
}
