//! Shards that come one after the other and go when they have been read, for a disk smaller than
//! the model.
//!
//! Linears, which are nearly all of a model, are read from the shard's file when they are asked for,
//! into memory of their own: a mapping would keep a deleted file's space. The other tensors of a
//! shard (norms, embedding, head) are wanted again at the end, and are kept in memory.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::cause::Cause;
use crate::header::Entry;
use crate::small_file::open_regular;
use crate::weight_files::{View, find_index, map_file, read_index};
use crate::{Error, ModelConfig, Result};

/// Waits until the shard of this name lies in the folder.
pub type Bring = dyn Fn(&str) -> std::result::Result<(), Failure> + Send + Sync;
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The shards of an index.
pub(crate) struct Arriving {
    dir: PathBuf,
    index: PathBuf,
    /// Names of the weights that can be discarded.
    linears: BTreeSet<String>,
    /// Names of all that the model needs.
    needed: BTreeSet<String>,
    shards: Vec<Shard>,
    /// Tensors by name, with their shard.
    tensors: BTreeMap<String, usize>,
    bring: Box<Bring>,
}

struct Shard {
    name: String,
    tensors: Vec<String>,
    arrived: OnceLock<Arrived>,
    /// Held while the shard is fetched; why that failed, if it did. It is not tried again: each of
    /// several readers would wait as long as the first.
    coming: Mutex<Option<Cause>>,
}

struct Arrived {
    entries: BTreeMap<String, Entry>,
    /// Bytes of the tensors that are no linears.
    kept: BTreeMap<String, Vec<u8>>,
    rest: Mutex<Rest>,
}

/// What is on disk still.
struct Rest {
    /// `None` once it was deleted.
    file: Option<File>,
    linears: BTreeSet<String>,
}

impl fmt::Debug for Arriving {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Arriving").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Arriving {
    /// Reads the index of `dir`, in which the model of `config` lies.
    pub(crate) fn open(dir: &Path, config: &ModelConfig, bring: Box<Bring>) -> Result<Self> {
        let linears = config.linears().map(|(name, _)| format!("{name}.weight")).collect();
        let needed = config.dense_tensors().into_iter().map(|(name, _)| name).collect();
        let index = find_index(dir)?;
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for (name, names) in read_index(&index)? {
            tensors.extend(names.iter().map(|tensor| (tensor.clone(), shards.len())));
            let (arrived, coming) = (OnceLock::new(), Mutex::new(None));
            shards.push(Shard { name, tensors: names, arrived, coming });
        }
        Ok(Self { dir: dir.to_owned(), index, linears, needed, shards, tensors, bring })
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(crate) fn view(&self, name: &str) -> Result<Option<View<'_>>> {
        let Some((name, &shard)) = self.tensors.get_key_value(name) else { return Ok(None) };
        let shard = &self.shards[shard];
        let arrived = self.arrived(shard)?;
        let Some(entry) = arrived.entries.get(name) else {
            let (index, tensor) = (self.index.clone(), name.to_owned());
            return Err(Error::IndexMismatch { index, tensor, shard: shard.name.clone() });
        };
        let bytes = match arrived.kept.get(name) {
            Some(bytes) => Cow::Borrowed(bytes.as_slice()),
            None => {
                let rest = lock(&arrived.rest);
                let file = rest.file.as_ref().filter(|_| rest.linears.contains(name));
                let file = file.ok_or_else(|| Error::Discarded { tensor: name.to_owned() })?;
                Cow::Owned(read(file, entry, &self.dir.join(&shard.name))?)
            }
        };
        Ok(Some(View { name, entry, bytes }))
    }

    /// Gives a linear's weight up, and with the last of a shard its file.
    pub(crate) fn discard(&self, name: &str) -> Result<()> {
        let Some(&shard) = self.tensors.get(name) else { return Ok(()) };
        let shard = &self.shards[shard];
        let mut rest = lock(&self.arrived(shard)?.rest);
        rest.linears.remove(name);
        self.delete_if_read(shard, &mut rest)
    }

    /// The shard's tensors, once it is there.
    fn arrived<'a>(&self, shard: &'a Shard) -> Result<&'a Arrived> {
        let mut coming = lock(&shard.coming);
        if let Some(arrived) = shard.arrived.get() {
            return Ok(arrived);
        }
        if coming.is_none() {
            *coming = (self.bring)(&shard.name).err().map(|failure| Cause(failure.into()));
        }
        if let Some(source) = coming.clone() {
            return Err(Error::Bring { shard: shard.name.clone(), source });
        }
        let arrived = self.open_shard(shard)?;
        self.delete_if_read(shard, &mut lock(&arrived.rest))?;
        Ok(shard.arrived.get_or_init(|| arrived))
    }

    fn open_shard(&self, shard: &Shard) -> Result<Arrived> {
        let path = self.dir.join(&shard.name);
        let file = open_regular(&path).map_err(Error::io("open", &path))?;
        let (_, found) = map_file(&path)?;
        let mut found: BTreeMap<String, Entry> = found.into_iter().collect();
        let (mut entries, mut kept) = (BTreeMap::new(), BTreeMap::new());
        let mut linears = BTreeSet::new();
        for tensor in &shard.tensors {
            let entry = match found.remove(tensor) {
                Some(entry) => entry,
                None if self.needed.contains(tensor) => {
                    let (index, tensor) = (self.index.clone(), tensor.clone());
                    return Err(Error::IndexMismatch { index, tensor, shard: shard.name.clone() });
                }
                None => continue,
            };
            if self.linears.contains(tensor) {
                linears.insert(tensor.clone());
            } else {
                kept.insert(tensor.clone(), read(&file, &entry, &path)?);
            }
            entries.insert(tensor.clone(), entry);
        }
        let rest = Mutex::new(Rest { file: Some(file), linears });
        Ok(Arrived { entries, kept, rest })
    }

    fn delete_if_read(&self, shard: &Shard, rest: &mut Rest) -> Result<()> {
        if rest.file.is_none() || !rest.linears.is_empty() {
            return Ok(());
        }
        rest.file = None;
        // The folder's own name of it: what a link leads to is used by others, too.
        let path = self.dir.join(&shard.name);
        fs::remove_file(&path).map_err(Error::io("delete", &path))
    }
}

/// The bytes of a tensor.
fn read(file: &File, entry: &Entry, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; entry.range.len()];
    let start = entry.range.start as u64;
    file.read_exact_at(&mut bytes, start).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// A panic while one was held left nothing half-done behind.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
