//! Single weight files and their index: found, mapped, checked.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use serde_json::{Map, Value};

use crate::fault::Fault;
use crate::header::{self, Entry};
use crate::names::{INDEX_END, is_file_name, weight_file_names};
use crate::small_file::open_regular;
use crate::{Error, Result, json, pytorch};

/// Largest piece of a file that the system maps at once when one byte of it is touched.
const FOLIO: usize = 2 << 20;
/// How the text begins that Git keeps in place of a large file.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// A tensor as its file holds it.
pub(crate) struct View<'a> {
    pub(crate) name: &'a str,
    pub(crate) entry: &'a Entry,
    /// The bytes of the entry's range.
    pub(crate) bytes: Cow<'a, [u8]>,
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

    /// The bytes of a range of the file.
    pub(crate) fn bytes_of(&self, range: Range<usize>) -> &[u8] {
        &self.map[range]
    }

    /// Has the system read a range from its disk before it is touched.
    pub(crate) fn announce(&self, range: Range<usize>) {
        // Refused advice costs time, not correctness.
        drop(self.map.advise_range(Advice::WillNeed, range.start, range.len()));
    }

    /// Gives back the pages of a range.
    pub(crate) fn release(&self, range: Range<usize>) {
        release(&self.map, range);
    }
}

/// Gives back the pages of a range. One touch may have mapped a neighbor's as well, so they go too.
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

/// The index of a folder whose shards need not be there.
pub(crate) fn find_index(dir: &Path) -> Result<PathBuf> {
    weight_file_names()
        .filter(|name| name.ends_with(INDEX_END))
        .map(|name| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::NoWeights { dir: dir.to_owned() })
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
    let file = open_regular(path).map_err(Error::io("open", path))?;
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
        let entries = pytorch::parse(&map).map_err(|Fault { reason, advice }| {
            Error::InvalidPyTorch { path: owned(), reason, advice }
        })?;
        (entries, BTreeMap::new())
    };
    release(&map, 0..map.len());
    Ok((
        WeightFile { path: owned(), metadata, unindexed: Vec::new(), absent: Vec::new(), map },
        entries,
    ))
}
