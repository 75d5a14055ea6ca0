//! The weight files of a folder: which they are, and what each holds.
//!
//! Either all are there and mapped ([`Mapped`]), or they come one after the other and go when they
//! have been read ([`Arriving`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::arriving::Arriving;
use crate::header::Entry;
use crate::names::{INDEX_END, PYTORCH_FILES, SAFETENSORS_END, SAFETENSORS_FILES};
use crate::weight_files::{View, WeightFile, map_file, read_index};
use crate::{Error, QuantizeConfig, Result, foreign};

/// Where tensors come from.
#[derive(Debug)]
pub(crate) enum Weights {
    Mapped(Mapped),
    Arriving(Arriving),
}

impl Weights {
    /// All names, sorted.
    pub(crate) fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Mapped(mapped) => Box::new(mapped.names()),
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

    /// All names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name).map(|(_, entry)| entry)
    }

    fn view(&self, name: &str) -> Option<View<'_>> {
        let (name, (file, entry)) = self.tensors.get_key_value(name)?;
        let bytes = Cow::Borrowed(self.files[*file].bytes_of(entry.range.clone()));
        Some(View { name, entry, bytes })
    }

    pub(crate) fn release(&self, name: &str) {
        let Some((file, entry)) = self.tensors.get(name) else { return };
        self.files[*file].release(entry.range.clone());
    }

    pub(crate) fn release_part(&self, name: &str, part: Range<usize>) {
        let Some((file, entry)) = self.tensors.get(name) else { return };
        let (start, end) = (entry.range.start, entry.range.end);
        self.files[*file].release((start + part.start).min(end)..(start + part.end).min(end));
    }

    pub(crate) fn announce(&self, name: &str) {
        let Some((file, entry)) = self.tensors.get(name) else { return };
        self.files[*file].announce(entry.range.clone());
    }
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
    let found = |name: &str| {
        let path = dir.join(name);
        let is_index = name.ends_with(INDEX_END);
        let found = if is_index { Found::Index } else { Found::Single };
        path.is_file().then(|| found(path))
    };
    for stem in stems {
        let single = format!("{stem}{SAFETENSORS_END}");
        if let Some(found) = found(&single).or_else(|| found(&format!("{single}{INDEX_END}"))) {
            return Ok(found);
        }
    }
    if let Some(found) = SAFETENSORS_FILES.into_iter().find_map(found) {
        return Ok(found);
    }
    let mut named = list_extension(dir, "safetensors")?;
    match (quantize, named.len()) {
        (Some(_), 1) => return Ok(Found::Single(named.remove(0))),
        (Some(_), count) if count > 1 => {
            return Err(Error::AmbiguousWeights { dir: dir.to_owned(), count });
        }
        _ => {}
    }
    let nothing =
        || foreign::recognize(dir).unwrap_or_else(|| Error::NoWeights { dir: dir.to_owned() });
    PYTORCH_FILES.into_iter().find_map(found).ok_or_else(nothing)
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
