//! The weight files of a folder: which they are, and what each holds.
//!
//! Either all are there and mapped ([`Mapped`]), or they come one after the other and go when they
//! have been read ([`Arriving`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use serde_json::{Map, Value};

use crate::arriving::Arriving;
use crate::header::{self, Entry};
use crate::quantize_config::is_file_name;
use crate::{Error, QuantizeConfig, Result, foreign, json, pytorch};

/// Where tensors come from.
#[derive(Debug)]
pub(crate) enum Weights {
    Mapped(Mapped),
    Arriving(Arriving),
}

/// A tensor as its file holds it.
pub(crate) struct View<'a> {
    pub(crate) name: &'a str,
    pub(crate) entry: &'a Entry,
    /// The bytes of the entry's range.
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl Weights {
    /// All names, sorted.
    pub(crate) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Mapped(mapped) => Box::new(mapped.tensors.keys().map(String::as_str)),
            Self::Arriving(arriving) => Box::new(arriving.names()),
        }
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        match self {
            Self::Mapped(mapped) => mapped.tensors.contains_key(name),
            Self::Arriving(arriving) => arriving.contains(name),
        }
    }

    /// The type that a tensor is stored in, as far as it is known.
    pub(crate) fn stored_type(&self, name: &str) -> Option<safetensors::Dtype> {
        match self {
            Self::Mapped(mapped) => mapped.entry(name).map(|entry| entry.dtype),
            Self::Arriving(_) => None,
        }
    }

    /// The index and the shard that should hold a tensor, but do not.
    pub(crate) fn promised(&self, name: &str) -> Option<(PathBuf, String)> {
        let Self::Mapped(Mapped { files, index: Some(index), .. }) = self else { return None };
        let file = files.iter().find(|file| file.absent.iter().any(|absent| absent == name))?;
        let shard = file.path.file_name()?.to_string_lossy().into_owned();
        Some((index.clone(), shard))
    }

    /// A tensor, or `None` for a name that is not there.
    pub(crate) fn view(&self, name: &str) -> Result<Option<View<'_>>> {
        match self {
            Self::Mapped(mapped) => Ok(mapped.view(name)),
            Self::Arriving(arriving) => arriving.view(name),
        }
    }
}

/// Weight files that are all there.
#[derive(Debug)]
pub(crate) struct Mapped {
    files: Vec<WeightFile>,
    /// The index, of weights in shards.
    index: Option<PathBuf>,
    /// Tensors by name, with the file that holds them.
    tensors: BTreeMap<String, (usize, Entry)>,
}

/// A mapped weight file of a checkpoint.
#[derive(Debug)]
pub struct WeightFile {
    /// Where it is.
    pub path: PathBuf,
    /// What its header says beside its tensors.
    pub metadata: BTreeMap<String, String>,
    /// Tensors that it holds, but that the index does not name: no loader sees them.
    pub unindexed: Vec<String>,
    /// Tensors that the index places here, but that it does not hold.
    pub absent: Vec<String>,
    map: Mmap,
}

impl WeightFile {
    /// Bytes of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.map.len() as u64
    }
}

impl Mapped {
    /// Finds and maps the weights of a folder.
    pub(crate) fn open(dir: &Path, quantize: Option<&QuantizeConfig>) -> Result<Self> {
        match find_weights(dir, quantize)? {
            Found::Single(path) => {
                let (file, entries) = map_file(&path)?;
                let tensors = entries.into_iter().map(|(name, entry)| (name, (0, entry)));
                Ok(Self { files: vec![file], index: None, tensors: tensors.collect() })
            }
            Found::Index(index) => open_shards(dir, &index),
        }
    }

    pub(crate) fn files(&self) -> &[WeightFile] {
        &self.files
    }

    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name).map(|(_, entry)| entry)
    }

    fn view(&self, name: &str) -> Option<View<'_>> {
        let (name, (file, entry)) = self.tensors.get_key_value(name)?;
        let bytes = Cow::Borrowed(&self.files[*file].map[entry.range.clone()]);
        Some(View { name, entry, bytes })
    }

    pub(crate) fn release(&self, name: &str) {
        let Some((file, entry)) = self.tensors.get(name) else { return };
        release(&self.files[*file].map, entry.range.clone());
    }
}

/// Name of the weights of a PyTorch folder, and the start of its index's.
const PYTORCH: &str = "pytorch_model.bin";
/// Largest piece of a file that the system maps at once when one byte of it is touched.
const FOLIO: usize = 2 << 20;
/// How the text begins that Git keeps in place of a large file.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Gives back the pages of a range. One touch may have mapped a neighbour's as well, so they go too.
fn release(map: &Mmap, range: Range<usize>) {
    let start = range.start / FOLIO * FOLIO;
    let end = range.end.next_multiple_of(FOLIO).min(map.len());
    // SAFETY: the mapping is read-only and backed by a file, so no page holds data of its own: one
    // dropped here is read again from the file when it is next touched. References into it stay
    // valid and see the same values.
    #[expect(unsafe_code, reason = "madvise on a read-only file mapping")]
    let advised =
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
    // Refused advice costs memory, not correctness.
    drop(advised);
}

/// Where a folder keeps its weights.
enum Found {
    Single(PathBuf),
    Index(PathBuf),
}

fn find_weights(dir: &Path, quantize: Option<&QuantizeConfig>) -> Result<Found> {
    let mut stems = Vec::new();
    if let Some(quantize) = quantize {
        stems.push(quantize.file_stem());
        // A folder may follow AutoGPTQ's scheme although its config names a base.
        let scheme = QuantizeConfig { model_file_base_name: None, ..quantize.clone() };
        stems.push(scheme.file_stem());
    }
    stems.push("model".to_owned());
    for stem in stems {
        let single = dir.join(format!("{stem}.safetensors"));
        if single.is_file() {
            return Ok(Found::Single(single));
        }
        let index = dir.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return Ok(Found::Index(index));
        }
    }
    let mut named = list_extension(dir, "safetensors")?;
    let dir = dir.to_owned();
    match (quantize, named.len()) {
        (Some(_), 1) => return Ok(Found::Single(named.remove(0))),
        (Some(_), count) if count > 1 => return Err(Error::AmbiguousWeights { dir, count }),
        _ => {}
    }
    let (single, index) = (dir.join(PYTORCH), dir.join(format!("{PYTORCH}.index.json")));
    match (single.is_file(), index.is_file()) {
        (true, _) => Ok(Found::Single(single)),
        (false, true) => Ok(Found::Index(index)),
        (false, false) => {
            Err(foreign::recognize(&dir).unwrap_or_else(|| Error::NoWeights { dir: dir.clone() }))
        }
    }
}

/// The index of a folder whose shards need not be there.
pub(crate) fn find_index(dir: &Path) -> Result<PathBuf> {
    let names = ["model.safetensors.index.json".to_owned(), format!("{PYTORCH}.index.json")];
    let mut indices = names.map(|name| dir.join(name)).into_iter();
    indices.find(|path| path.is_file()).ok_or_else(|| Error::NoWeights { dir: dir.to_owned() })
}

/// Files of a folder with this extension.
fn list_extension(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let path = entry.map_err(Error::io("list", dir))?.path();
        if path.extension().is_some_and(|e| e == extension) && path.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Opens the shards of an index. What one lacks of that the index places there is noted: it matters
/// only if the model needs it.
fn open_shards(dir: &Path, index: &Path) -> Result<Mapped> {
    let mut files = Vec::new();
    let mut tensors = BTreeMap::new();
    for (shard, names) in read_index(index)? {
        let path = dir.join(&shard);
        if !path.is_file() {
            return Err(Error::MissingShard { index: index.to_owned(), shard });
        }
        let (mut file, entries) = map_file(&path)?;
        let mut entries: BTreeMap<String, Entry> = entries.into_iter().collect();
        for tensor in names {
            match entries.remove(&tensor) {
                Some(entry) => drop(tensors.insert(tensor, (files.len(), entry))),
                None => file.absent.push(tensor),
            }
        }
        file.unindexed = entries.into_keys().collect();
        files.push(file);
    }
    Ok(Mapped { files, index: Some(index.to_owned()), tensors })
}

/// The index's tensors by shard.
pub(crate) fn read_index(index: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let invalid = |key: &str, reason: String| Error::InvalidConfig {
        path: index.to_owned(),
        key: key.to_owned(),
        reason,
    };
    let text = json::text(index).map_err(Error::io("read", index))?;
    let parsed: Map<String, Value> = serde_json::from_str(&text).map_err(Error::json(index))?;
    let Some(Value::Object(weight_map)) = parsed.get("weight_map") else {
        return Err(invalid("weight_map", "is missing or no object".to_owned()));
    };
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let Some(shard) = shard.as_str().filter(|name| is_file_name(name)) else {
            return Err(invalid(tensor, format!("is `{shard}`, expected a plain file name")));
        };
        shards.entry(shard.to_owned()).or_default().push(tensor.clone());
    }
    Ok(shards)
}

/// Maps a weight file and checks what it says of its tensors.
pub(crate) fn map_file(path: &Path) -> Result<(WeightFile, Vec<(String, Entry)>)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the mapping is read-only, and every bit pattern is a valid value of what is read from
    // it, so the only hazard is another process truncating the file while it is in use, which ends
    // this one with SIGBUS; checkpoints are not edited in place, and the writer here renames.
    #[expect(unsafe_code, reason = "mapping a checkpoint instead of reading all of it")]
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    let owned = || path.to_owned();
    if map.starts_with(LFS_POINTER) {
        return Err(Error::LfsPointer { path: owned() });
    }
    let (entries, metadata) = if path.extension().is_some_and(|e| e == "safetensors") {
        header::parse(&map).map_err(|reason| Error::InvalidHeader { path: owned(), reason })?
    } else {
        let entries = pytorch::parse(&map)
            .map_err(|reason| Error::InvalidPyTorch { path: owned(), reason })?;
        (entries, BTreeMap::new())
    };
    release(&map, 0..map.len());
    Ok((
        WeightFile { path: owned(), metadata, unindexed: Vec::new(), absent: Vec::new(), map },
        entries,
    ))
}
