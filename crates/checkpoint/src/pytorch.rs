//! A file of `torch.save`: a ZIP archive of one pickle, which says what the tensors are, and one
//! entry of raw bytes for each storage.
//!
//! Tensors are views: several may share a storage, at offsets and with strides of their own. What
//! comes out is the same as of a safetensors header, a range of the mapped file for each tensor, so
//! everything downstream reads both alike.

use std::collections::HashMap;
use std::ops::Range;

use crate::fault::Fault;
use crate::header::Entry;
use crate::pickle::{self, TensorClaim};
use crate::pickle_names;
use crate::zip;

/// How every ZIP archive of at least one entry begins.
const ZIP: &[u8] = b"PK\x03\x04";
/// How pickles of protocol 2 begin: the format before 1.6 was several of them in a row.
const LEGACY: &[u8] = b"\x80\x02";

/// The tensors of a mapped file, or what is wrong with it.
pub(crate) fn parse(file: &[u8]) -> Result<Vec<(String, Entry)>, Fault> {
    if file.starts_with(LEGACY) {
        return Err(Fault {
            reason: "it is in the format that PyTorch had before 1.6".to_owned(),
            advice: Some(
                "load it with torch.load(…, weights_only=True) and save it again with torch.save \
                 or safetensors",
            ),
        });
    }
    if !file.starts_with(ZIP) {
        let what = "it is no ZIP archive, as torch.save writes; it is damaged or truncated, or \
                    something else";
        return Err(what.to_owned().into());
    }
    let archive = Archive::open(file)?;
    let claims = pickle::state_dict(&file[archive.range("data.pkl")?])
        .map_err(|reason| format!("its pickle is refused: {reason}"))?;
    let mut entries = Vec::with_capacity(claims.len());
    for (name, claim) in claims {
        let entry = archive.place(claim).map_err(|reason| format!("tensor `{name}` {reason}"))?;
        entries.push((name.to_owned(), entry));
    }
    Ok(entries)
}

/// Entries by name, without the folder that they all lie in.
struct Archive<'a>(HashMap<&'a str, Range<usize>>);

impl<'a> Archive<'a> {
    fn open(file: &'a [u8]) -> Result<Self, Fault> {
        let mut root = None;
        let mut entries = HashMap::new();
        for entry in zip::entries(file)? {
            let (folder, name) = entry.name.split_once('/').unwrap_or(("", entry.name));
            if *root.get_or_insert(folder) != folder {
                let what = "its entries lie in several folders; it is not of torch.save";
                return Err(what.to_owned().into());
            }
            entries.insert(name, entry.range);
        }
        let archive = Self(entries);
        if let Ok(range) = archive.range("byteorder")
            && &file[range.clone()] != b"little"
        {
            return Err("its values are not little-endian".to_owned().into());
        }
        Ok(archive)
    }

    fn range(&self, name: &str) -> Result<Range<usize>, String> {
        self.0.get(name).cloned().ok_or_else(|| format!("it has no entry `{name}`"))
    }

    /// A tensor's place in the file. Its values must lie in its storage, and be no more than that
    /// has: a tensor that repeats values would take more memory than the file.
    fn place(&self, claim: TensorClaim<'_>) -> Result<Entry, String> {
        let TensorClaim { storage, storage_bytes, dtype, offset, shape, strides } = claim;
        let range = self.range(&format!("data/{storage}"))?;
        if range.len() != storage_bytes {
            return Err(format!(
                "needs {storage_bytes} bytes of storage `{storage}`, which has {}",
                range.len()
            ));
        }
        let size = pickle_names::size(dtype);
        let available = storage_bytes / size;
        let elements = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
        let outside = || format!("of shape {shape:?} lies outside of its storage `{storage}`");
        elements.filter(|&n| n <= available).ok_or_else(outside)?;
        let end = end(offset, &shape, &strides).filter(|&end| end <= available);
        let end = end.ok_or_else(outside)?;
        let range = range.start + offset * size..range.start + end * size;
        let strides = (!is_contiguous(&shape, &strides)).then_some(strides);
        Ok(Entry { dtype, shape, range, strides })
    }
}

/// The end of a tensor's values in its storage: one past the last.
fn end(offset: usize, shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(offset);
    }
    let mut last = offset;
    for (&size, &stride) in shape.iter().zip(strides) {
        last = last.checked_add((size - 1).checked_mul(stride)?)?;
    }
    last.checked_add(1)
}

/// Whether values lie row-major and without gaps. The stride of a single row means nothing.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    })
}

/// The values of a strided tensor in row-major order; `bytes` begin with its first value and end
/// with its last.
pub(crate) fn gather(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Vec<u8> {
    let mut values = Vec::with_capacity(shape.iter().product::<usize>() * size);
    gather_into(bytes, size, shape, strides, &mut values);
    values
}

fn gather_into(bytes: &[u8], size: usize, shape: &[usize], strides: &[usize], to: &mut Vec<u8>) {
    match (shape, strides) {
        // A run of neighbors.
        (&[len], &[1]) => to.extend_from_slice(&bytes[..len * size]),
        (&[len, ref shape @ ..], &[stride, ref strides @ ..]) => {
            for i in 0..len {
                gather_into(&bytes[i * stride * size..], size, shape, strides, to);
            }
        }
        _ => to.extend_from_slice(&bytes[..size]),
    }
}
