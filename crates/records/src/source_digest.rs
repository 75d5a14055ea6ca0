//! Which model a branch was made from: a digest that another copy of it has too.

use std::collections::BTreeMap;

use gptq_checkpoint::{CONFIG_FILE, Checkpoint, StoredTensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::digest::{hex, of_file};
use crate::error::{Error, Result};

/// Pieces of a tensor that its digest looks at, and bytes of each.
const PIECES: usize = 16;
const PIECE: usize = 4096;

/// Tells one source from another: SHA-256 (hex) over config.json and the files that are carried
/// over, in full, and over every tensor's name, type, shape and 16 pieces of 4 KiB spread over it.
///
/// Reading all of a 70B source (276 GB in f32) would cost minutes at every start. A piece of every
/// tensor tells as much: training, merging, casting and editing a matrix change all of it, however
/// little. File names, shards and times do not count, so a copy on another machine is the same
/// source, and resharding does not start a sweep over. What goes unseen is damage to a few bytes
/// between the pieces, which the source's own checksums are for.
///
/// # Errors
/// Files that cannot be read.
pub fn source_digest(source: &Checkpoint) -> Result<String> {
    SourceDigest::default().finish(source)
}

/// A [`source_digest`] on its way, of a source whose tensors are there one after the other.
#[derive(Debug, Default)]
pub struct SourceDigest {
    tensors: BTreeMap<String, Option<Vec<u8>>>,
}

impl SourceDigest {
    /// Looks at a tensor while it is there.
    ///
    /// # Errors
    /// As [`source_digest`].
    pub fn look(&mut self, source: &Checkpoint, name: &str) -> Result<()> {
        self.tensors.insert(name.to_owned(), tensor_digest(source, name)?);
        Ok(())
    }

    /// Looks at the tensors that were not looked at, and at everything else.
    ///
    /// # Errors
    /// As [`source_digest`].
    pub fn finish(mut self, source: &Checkpoint) -> Result<String> {
        let mut hash = Sha256::new();
        let mut files = source.side_files()?;
        files.push(CONFIG_FILE.into());
        for name in files {
            let path = source.dir().join(&name);
            let (_, sum) = of_file(&path).map_err(Error::io("read", &path))?;
            part(&mut hash, name.to_string_lossy().as_bytes());
            part(&mut hash, sum.as_bytes());
        }
        let names: Vec<_> = source.names().map(|name| (name, self.tensors.remove(name))).collect();
        let digests = names.into_par_iter().map(|(name, known)| match known {
            Some(digest) => Ok(digest),
            None => tensor_digest(source, name),
        });
        for digest in digests.collect::<Result<Vec<_>>>()?.into_iter().flatten() {
            part(&mut hash, &digest);
        }
        Ok(hex(&hash.finalize()))
    }
}

/// `None` for a name that only an index has, which is no tensor of a whole folder either.
fn tensor_digest(source: &Checkpoint, name: &str) -> Result<Option<Vec<u8>>> {
    let mut hash = Sha256::new();
    part(&mut hash, name.as_bytes());
    let carried = source.config().carried().unwrap_or_default();
    if carried.iter().any(|spec| spec.name == name) {
        // Copied whatever its type.
        let StoredTensor { dtype, shape, bytes } = source.stored(name)?;
        part(&mut hash, format!("{dtype} {shape:?}").as_bytes());
        pieces(&bytes).into_iter().for_each(|piece| part(&mut hash, piece));
        source.release(name);
        return Ok(Some(hash.finalize().to_vec()));
    }
    let tensor = match source.tensor(name) {
        Ok(tensor) => tensor,
        // Nothing here reads such a tensor.
        Err(gptq_checkpoint::Error::UnsupportedDType { .. }) => {
            return Ok(Some(hash.finalize().to_vec()));
        }
        Err(gptq_checkpoint::Error::IndexMismatch { .. }) => return Ok(None),
        Err(other) => return Err(other.into()),
    };
    part(&mut hash, format!("{} {:?}", tensor.dtype.name(), tensor.shape).as_bytes());
    for piece in pieces(&tensor.bytes) {
        part(&mut hash, piece);
    }
    source.release(name);
    Ok(Some(hash.finalize().to_vec()))
}

/// What is looked at of a tensor: all of a small one, its ends and what lies evenly between them of
/// a large one.
fn pieces(bytes: &[u8]) -> Vec<&[u8]> {
    let Some(room) = bytes.len().checked_sub(PIECES * PIECE) else { return vec![bytes] };
    let start = |piece: usize| piece * PIECE + piece * room / (PIECES - 1);
    (0..PIECES).map(|piece| &bytes[start(piece)..start(piece) + PIECE]).collect()
}

/// A part of what is hashed, which cannot run into the next.
fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_small_tensors_and_both_ends_of_large_ones() {
        for bytes in [0, 1, PIECES * PIECE - 1, PIECES * PIECE, PIECES * PIECE + 1, 1 << 20] {
            let tensor: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
            let pieces = pieces(&tensor);
            let looked_at: usize = pieces.iter().map(|p| p.len()).sum();
            assert_eq!(looked_at, bytes.min(PIECES * PIECE));
            assert_eq!(pieces[0].first(), tensor.first());
            assert_eq!(pieces[pieces.len() - 1].last(), tensor.last());
        }
    }
}
