//! The sum of a safetensors file, in pieces that can be had in any order and side by side.
//!
//! Tensors are written as they are solved, which is not their order in the file, and one SHA-256 of
//! a whole 70B file is most of a minute of one core. So each tensor is summed by itself while it is
//! written, and the file's sum is that of the pieces' sums:
//!
//! ```text
//! SHA-256( SHA-256(header) ‖ SHA-256(tensor 1) ‖ SHA-256(tensor 2) ‖ … )
//! ```
//!
//! with the header (its length prefix included) and every tensor's bytes in the order of the file,
//! each sum as its 32 bytes. As ranges tile the file, no byte is outside of all pieces.

use std::ops::Range;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::names::SAFETENSORS_END;
use crate::weight_files::map_file;
use crate::{Error, Result};

/// A SHA-256.
pub type Sum = [u8; 32];

/// The sum of a file from those of its header and its tensors, in the order of the file.
pub fn sum_of_pieces(pieces: impl IntoIterator<Item = Sum>) -> Sum {
    let mut all = Sha256::new();
    pieces.into_iter().for_each(|piece| all.update(piece));
    all.finalize().into()
}

/// A weight file as it was written.
#[derive(Debug, Clone)]
pub struct WeightSum {
    /// Its name in the checkpoint's folder.
    pub file_name: String,
    /// Bytes.
    pub bytes: u64,
    /// As [`sum_of_pieces`] has it.
    pub sum: Sum,
}

/// The bytes of a safetensors file that are summed together: the header, then each tensor, in the
/// order of the file.
///
/// # Errors
/// [`Error::Io`], and [`Error::InvalidHeader`] for what is no sound safetensors file.
pub fn weight_pieces(path: &Path) -> Result<Vec<Range<u64>>> {
    if !path.to_string_lossy().ends_with(SAFETENSORS_END) {
        let reason = format!("its name does not end in {SAFETENSORS_END}");
        return Err(Error::InvalidHeader { path: path.to_owned(), reason });
    }
    let (file, entries) = map_file(path)?;
    let start = entries.first().map_or(file.bytes(), |(_, first)| first.range.start as u64);
    let tensors = entries.iter().map(|(_, e)| e.range.start as u64..e.range.end as u64);
    Ok(std::iter::once(0..start).chain(tensors).collect())
}
