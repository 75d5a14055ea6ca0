//! SHA-256 sums, as hexadecimal text.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use gptq_checkpoint::{Checkpoint, Sum, open_regular, sum_of_pieces, weight_pieces};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Bytes that are read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The sum of some bytes.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes and sum of a file.
pub(crate) fn of_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = open_regular(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok((bytes, hex(&hash.finalize())));
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
}

/// Bytes and sum of a safetensors file, whose pieces are read side by side; what is wrong with it, in
/// words, where it has none.
///
/// # Errors
/// What is wrong with the file.
pub fn of_weights(path: &Path) -> Result<(u64, String), String> {
    let pieces = weight_pieces(path).map_err(|e| e.to_string())?;
    let file = open_regular(path).map_err(|e| e.to_string())?;
    let sums = pieces.par_iter().map(|piece| of_piece(&file, piece));
    let sums: Vec<Sum> = sums.collect::<io::Result<_>>().map_err(|e| e.to_string())?;
    Ok((pieces.last().map_or(0, |last| last.end), hex(&sum_of_pieces(sums))))
}

/// Bytes of a tensor that are hashed before their pages are given back: of large ones only a few are in
/// memory.
const HASHED_AT_ONCE: usize = 16 << 20;

/// Bytes of all tensors, and their sum, whatever files hold them: as [`sum_of_pieces`] has it from the
/// tensors' own, sorted by name. Each of those is of the name, type and shape on a line, then the
/// values.
///
/// # Errors
/// As [`Checkpoint::stored`].
pub fn of_tensors(checkpoint: &Checkpoint) -> gptq_checkpoint::Result<(u64, String)> {
    let names: Vec<&str> = checkpoint.names().collect();
    let sums: Vec<_> = names.par_iter().map(|name| of_tensor(checkpoint, name)).collect();
    let sums: Vec<(u64, Sum)> = sums.into_iter().collect::<gptq_checkpoint::Result<_>>()?;
    let bytes = sums.iter().map(|(bytes, _)| bytes).sum();
    Ok((bytes, hex(&sum_of_pieces(sums.into_iter().map(|(_, sum)| sum)))))
}

fn of_tensor(checkpoint: &Checkpoint, name: &str) -> gptq_checkpoint::Result<(u64, Sum)> {
    // Also of types that nothing is computed with, as group indices of 64 bits.
    let tensor = checkpoint.stored(name)?;
    let mut hash = Sha256::new();
    hash.update(format!("{name} {} {:?}\n", tensor.dtype, tensor.shape));
    for (index, bytes) in tensor.bytes.chunks(HASHED_AT_ONCE).enumerate() {
        hash.update(bytes);
        let at = index * HASHED_AT_ONCE;
        checkpoint.release_part(name, at..at + bytes.len());
    }
    checkpoint.release(name);
    Ok((tensor.bytes.len() as u64, hash.finalize().into()))
}

fn of_piece(file: &File, piece: &Range<u64>) -> io::Result<Sum> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; PIECE_BYTES.min((piece.end - piece.start) as usize)];
    let mut at = piece.start;
    while at < piece.end {
        let count = buffer.len().min((piece.end - at) as usize);
        file.read_exact_at(&mut buffer[..count], at)?;
        hash.update(&buffer[..count]);
        at += count as u64;
    }
    Ok(hash.finalize().into())
}
