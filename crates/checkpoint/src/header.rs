//! The header of a safetensors file: parsed with every claim checked, and composed.
//!
//! A file is `u64` header length, JSON header, values. The JSON maps names to type, shape and a
//! byte range of the values, which have to tile the rest of the file without gap or overlap. The
//! checks are our own because the safetensors crate drops all but one of two equal names and does
//! not say which tensor is at fault.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// Bytes of the length prefix.
const PREFIX: usize = 8;

/// As in the reference implementation: more is an attack or damage, not a model.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor's claim in a header, with its range in the file.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// What a header says beside its tensors: text by key.
pub(crate) type Metadata = BTreeMap<String, String>;

/// The tensors of a mapped file in order of position and its metadata, or what is wrong with its
/// header.
pub(crate) fn parse(file: &[u8]) -> Result<(Vec<(String, Entry)>, Metadata), String> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(format!("it has {} bytes, too few for a header; it is truncated", file.len()));
    };
    let len = u64::from_le_bytes(*prefix);
    if len > MAX_HEADER {
        return Err(format!("its header claims {len} bytes, more than the {MAX_HEADER} allowed"));
    }
    let len = len as usize;
    let Some(json) = rest.get(..len) else {
        return Err(format!(
            "it is truncated: its header needs {len} bytes, it has {}",
            rest.len()
        ));
    };
    let Header { mut tensors, metadata } =
        serde_json::from_slice(json).map_err(|e| format!("its header is malformed: {e}"))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok((tile(tensors, PREFIX + len, file.len())?, metadata))
}

/// Checks that the ranges cover `start..end` exactly, each with the size of its tensor.
fn tile(
    raw: Vec<(String, Info)>,
    start: usize,
    end: usize,
) -> Result<Vec<(String, Entry)>, String> {
    let available = end - start;
    let mut covered = 0;
    let mut entries = Vec::with_capacity(raw.len());
    for (name, Info { dtype, shape, data_offsets: (from, to) }) in raw {
        if to > available {
            return Err(format!(
                "tensor `{name}` ends at byte {to}, but there are {available}; the file is \
                 truncated or its header damaged"
            ));
        }
        if from < covered {
            return Err(format!("tensor `{name}` overlaps another one"));
        }
        if from > covered {
            return Err(format!("there is a gap before tensor `{name}`"));
        }
        let elements = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| n.checked_mul(dtype.bitsize())).map(|bits| bits / 8);
        if to < from || bytes != Some(to - from) {
            return Err(format!(
                "tensor `{name}` of type {dtype} and shape {shape:?} does not take bytes {from} \
                 to {to}"
            ));
        }
        covered = to;
        entries.push((name, Entry { dtype, shape, range: start + from..start + to }));
    }
    if covered < available {
        return Err(format!("{} bytes follow the last tensor", available - covered));
    }
    Ok(entries)
}

#[derive(serde::Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

struct Header {
    /// All entries in file order; a map would hide duplicates.
    tensors: Vec<(String, Info)>,
    metadata: Metadata,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header { tensors: Vec::new(), metadata: Metadata::new() };
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(serde::de::Error::custom(format!("`{name}` appears twice")));
            }
            if name == "__metadata__" {
                let metadata: Option<Metadata> = map
                    .next_value()
                    .map_err(|e| serde::de::Error::custom(format!("`__metadata__`: {e}")))?;
                header.metadata = metadata.unwrap_or_default();
                continue;
            }
            let info = map
                .next_value()
                .map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
            header.tensors.push((name, info));
        }
        Ok(header)
    }
}

/// The prefix and padded JSON of a header, so that values begin at a multiple of 8.
pub(crate) fn compose(mut json: Vec<u8>) -> Vec<u8> {
    json.resize(json.len().next_multiple_of(PREFIX), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, values: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + values, 0);
        bytes
    }

    fn fails(bytes: &[u8], part: &str) {
        let message = parse(bytes).unwrap_err();
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }

    const A: &str = r#""a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}"#;

    #[test]
    fn entries_come_in_order_of_position() {
        let b = r#""b":{"dtype":"F32","shape":[],"data_offsets":[4,8]}"#;
        let json = format!(r#"{{"__metadata__":{{"format":"pt"}},{b},{A}}}"#);
        let (entries, metadata) = parse(&file(&json, 8)).unwrap();
        assert_eq!(metadata, Metadata::from([("format".to_owned(), "pt".to_owned())]));
        let start = 8 + json.len();
        assert_eq!(entries[0].0, "a");
        assert_eq!(entries[1].1.range, start + 4..start + 8);
        assert!(parse(&file("{}", 0)).unwrap().0.is_empty());
    }

    #[test]
    fn truncated_files_are_named_as_such() {
        let whole = file(&format!("{{{A}}}"), 4);
        for len in 0..whole.len() {
            fails(&whole[..len], "truncated");
        }
        fails(&file(&format!("{{{A}}}"), 5), "1 bytes follow");
    }

    #[test]
    fn giant_headers_are_refused_before_allocation() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        fails(&bytes, "more than the 100000000 allowed");
    }

    #[test]
    fn bad_ranges_name_the_tensor() {
        let b = |range: &str| {
            format!(r#"{{{A},"b":{{"dtype":"F16","shape":[2],"data_offsets":{range}}}}}"#)
        };
        fails(&file(&b("[2,6]"), 8), "`b` overlaps");
        fails(&file(&b("[6,10]"), 10), "gap before tensor `b`");
        fails(&file(&b("[4,80]"), 8), "`b` ends at byte 80");
        fails(&file(&b("[4,6]"), 6), "`b` of type F16 and shape [2]");
        fails(&file(&b("[8,4]"), 8), "`b`");
        fails(&file(&b("[-4,4]"), 8), "`b`");
        let huge = r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#;
        fails(&file(huge, 4), "`x`");
    }

    #[test]
    fn malformed_json_is_an_error() {
        fails(&file(&format!("{{{A},{A}}}"), 4), "`a` appears twice");
        fails(&file(r#"{"__metadata__":{"a":1}}"#, 0), "`__metadata__`");
        assert!(parse(&file(r#"{"__metadata__":null}"#, 0)).unwrap().1.is_empty());
        fails(&file("[]", 0), "malformed");
        fails(&file("{\"a\":", 0), "malformed");
        fails(&file("{\"a\":{\"dtype\":\"X9\",\"shape\":[],\"data_offsets\":[0,0]}}", 0), "`a`");
        fails(&file("\u{0}\u{1}", 0), "malformed");
        let deep = "[".repeat(100_000);
        fails(&file(&deep, 0), "malformed");
    }

    #[test]
    fn composed_headers_align_values() {
        for len in 0..20 {
            let header = compose(vec![b'x'; len]);
            assert_eq!(header.len() % 8, 0);
            assert_eq!(
                u64::from_le_bytes(*header.first_chunk().unwrap()) as usize + 8,
                header.len()
            );
        }
    }
}
