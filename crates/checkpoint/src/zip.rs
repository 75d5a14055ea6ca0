//! The directory of a ZIP archive as PyTorch writes it: where each entry's bytes lie in the file.
//!
//! PyTorch stores its entries uncompressed, so that a mapped archive is a set of byte ranges. This
//! reader knows that much of ZIP and zip64 and no more, which lets it check what general readers
//! take on trust: equal names, entries that overlap, and sizes that local headers could contradict.
//! Nothing is allocated from a claim, and no entry is read.

use std::collections::HashSet;
use std::ops::Range;

use crate::fault::Fault;

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";

/// Bytes of the fixed part of each record.
const LOCAL_LEN: usize = 30;
const CENTRAL_LEN: usize = 46;
const END_LEN: usize = 22;
const END_64_LEN: usize = 56;
const LOCATOR_64_LEN: usize = 20;
/// A comment may follow the end record.
const MAX_COMMENT: usize = u16::MAX as usize;
/// Tag of the extra field that holds 64-bit values.
const EXTRA_64: u16 = 1;

/// An entry's name and the range of its bytes in the file.
#[derive(Debug)]
pub(crate) struct ZipEntry<'a> {
    pub(crate) name: &'a str,
    pub(crate) range: Range<usize>,
}

/// All entries of a mapped archive in order of position, or what is wrong with it.
pub(crate) fn entries(file: &[u8]) -> Result<Vec<ZipEntry<'_>>, Fault> {
    let directory = directory(file)?;
    let mut found = Vec::new();
    let mut names = HashSet::new();
    let mut at = directory.range.start;
    while at < directory.range.end {
        let central = Central::read(&file[..directory.range.end], at)?;
        at = central.end;
        let name = central.name;
        if !names.insert(name) {
            return Err(format!("its entry `{name}` appears twice").into());
        }
        found.push((central.local, local(file, &central)?));
    }
    if found.len() as u64 != directory.count {
        return Err(format!(
            "its directory holds {} entries, but claims {}",
            found.len(),
            directory.count
        )
        .into());
    }
    found.sort_by_key(|(local, _)| *local);
    check_apart(&found, directory.range.start)?;
    Ok(found.into_iter().map(|(_, entry)| entry).collect())
}

/// Where the directory lies and how many entries it should have.
struct Directory {
    range: Range<usize>,
    count: u64,
}

fn directory(file: &[u8]) -> Result<Directory, Fault> {
    let end = find_end(file).ok_or_else(|| Fault {
        reason: "it begins as a ZIP archive, but has no directory at its end; it is truncated"
            .to_owned(),
        advice: Some("download it again"),
    })?;
    let damaged = || "its directory's end record is damaged".to_owned();
    let word = |at: usize| u16_at(file, end + at).map(u64::from);
    let long = |at: usize| u32_at(file, end + at).map(u64::from);
    let read = || Some((word(10)?, long(12)?, long(16)?));
    let (mut count, mut size, mut start) = read().ok_or_else(damaged)?;
    let mut limit = end;
    let locator = end.checked_sub(LOCATOR_64_LEN).filter(|&at| file[at..].starts_with(LOCATOR_64));
    if let Some(locator) = locator {
        let read = || {
            let at = usize::try_from(u64_at(file, locator + 8)?).ok()?;
            let fits =
                file.get(at..)?.starts_with(END_64) && at.checked_add(END_64_LEN)? <= locator;
            fits.then_some((
                at,
                u64_at(file, at + 32)?,
                u64_at(file, at + 40)?,
                u64_at(file, at + 48)?,
            ))
        };
        let wide = read().ok_or_else(damaged)?;
        let agrees = |narrow: u64, wide: u64, max: u64| narrow == wide || narrow == max;
        if !agrees(count, wide.1, u64::from(u16::MAX))
            || !agrees(size, wide.2, u64::from(u32::MAX))
            || !agrees(start, wide.3, u64::from(u32::MAX))
        {
            return Err(damaged().into());
        }
        (limit, count, size, start) = wide;
    }
    let range = || {
        let start = usize::try_from(start).ok()?;
        let range = start..start.checked_add(usize::try_from(size).ok()?)?;
        (range.end == limit).then_some(range)
    };
    Ok(Directory { range: range().ok_or_else(damaged)?, count })
}

/// The end record: the last one whose comment reaches the end of the file.
fn find_end(file: &[u8]) -> Option<usize> {
    let last = file.len().checked_sub(END_LEN)?;
    (last.saturating_sub(MAX_COMMENT)..=last).rev().find(|&at| {
        file[at..].starts_with(END)
            && u16_at(file, at + 20).is_some_and(|n| at + END_LEN + usize::from(n) == file.len())
    })
}

/// An entry of the directory.
struct Central<'a> {
    name: &'a str,
    size: usize,
    /// Position of the entry's own header.
    local: usize,
    /// Where the next one begins.
    end: usize,
}

impl<'a> Central<'a> {
    fn read(directory: &'a [u8], at: usize) -> Result<Self, String> {
        let damaged = || format!("its directory is damaged at byte {at}");
        let record = directory.get(at..).filter(|r| r.len() >= CENTRAL_LEN).ok_or_else(damaged)?;
        if !record.starts_with(CENTRAL) {
            return Err(damaged());
        }
        let word = |at: usize| u16_at(record, at).unwrap_or_default();
        let long = |at: usize| u64::from(u32_at(record, at).unwrap_or_default());
        let (flags, method) = (word(8), word(10));
        let name_end = CENTRAL_LEN + usize::from(word(28));
        let extra_end = name_end + usize::from(word(30));
        let end = extra_end + usize::from(word(32));
        if end > record.len() {
            return Err(damaged());
        }
        let name = std::str::from_utf8(&record[CENTRAL_LEN..name_end]).map_err(|_| damaged())?;
        if !is_plain_path(name) {
            return Err(format!(
                "its entry `{}` has a name that PyTorch never writes",
                name.escape_debug()
            ));
        }
        if method != 0 || flags & 1 != 0 {
            return Err(format!(
                "its entry `{name}` is compressed or encrypted, which PyTorch's entries never are"
            ));
        }
        let mut wide = Wide::find(&record[name_end..extra_end]);
        let mut value = |at: usize| match long(at) {
            narrow if narrow < u64::from(u32::MAX) => Some(narrow),
            _ => wide.next(),
        };
        // The order in which saturated values appear in the extra field.
        let mut read = || {
            let (size, stored, local) = (value(24)?, value(20)?, value(42)?);
            let size = (size == stored).then_some(size)?;
            Some((usize::try_from(size).ok()?, usize::try_from(local).ok()?))
        };
        let (size, local) = read().ok_or_else(|| {
            format!("the sizes of its entry `{name}` are damaged or do not fit each other")
        })?;
        Ok(Self { name, size, local, end: at + end })
    }
}

/// The 64-bit values of an entry whose 32-bit fields are saturated.
struct Wide<'a>(&'a [u8]);

impl<'a> Wide<'a> {
    fn find(mut extra: &'a [u8]) -> Self {
        while let (Some(tag), Some(len)) = (u16_at(extra, 0), u16_at(extra, 2)) {
            let Some(body) = extra.get(4..4 + usize::from(len)) else { break };
            if tag == EXTRA_64 {
                return Self(body);
            }
            extra = &extra[4 + body.len()..];
        }
        Self(&[])
    }

    fn next(&mut self) -> Option<u64> {
        let value = u64_at(self.0, 0)?;
        self.0 = &self.0[8..];
        Some(value)
    }
}

/// Finds an entry's bytes behind its own header. That header's sizes are not used (PyTorch leaves
/// them zero in places), but its name must agree.
fn local<'a>(file: &[u8], central: &Central<'a>) -> Result<ZipEntry<'a>, String> {
    let Central { name, size, local, .. } = *central;
    let read = || {
        let header = file.get(local..)?;
        let name_end = LOCAL_LEN + usize::from(u16_at(header, 26)?);
        let own = header.get(LOCAL_LEN..name_end)?;
        let agrees = header.starts_with(LOCAL) && own == name.as_bytes();
        let start = local.checked_add(name_end + usize::from(u16_at(header, 28)?))?;
        let end = start.checked_add(size)?;
        (agrees && end <= file.len()).then_some(start..end)
    };
    let range = read().ok_or_else(|| {
        format!("its entry `{name}` lies outside of the file, or its header is damaged")
    })?;
    Ok(ZipEntry { name, range })
}

/// Entries must not share bytes, with each other or with the directory.
fn check_apart(found: &[(usize, ZipEntry<'_>)], directory: usize) -> Result<(), String> {
    let mut next = found.iter().skip(1).map(|(local, _)| *local).chain([directory]);
    for (_, entry) in found {
        if next.next().is_some_and(|next| entry.range.end > next) {
            return Err(format!("its entry `{}` overlaps what follows it", entry.name));
        }
    }
    Ok(())
}

/// Relative, without parent folders, in printable characters.
fn is_plain_path(name: &str) -> bool {
    let plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && !part.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
    };
    name.split('/').all(plain)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
