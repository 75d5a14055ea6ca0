//! What the Hub lists for a commit, kept in the cache as huggingface_hub keeps it: whoever has no
//! network then still knows what a model lacks.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_checkpoint::read_small;
use serde::{Deserialize, Serialize};
use serde_json::ser::{PrettyFormatter, Serializer};

use crate::cache::RepoCache;
use crate::hash::Digest;
use crate::listing::{Listing, RemoteFile, is_usable};
use crate::{Error, Result};

/// The layout that is written; others are not read.
const VERSION: u32 = 1;

/// The hash of a file whose hash is not known.
pub(crate) const UNKNOWN: &str = "0000000000000000000000000000000000000000";

#[derive(Serialize, Deserialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<String, File>,
}

#[derive(Serialize, Deserialize)]
struct File {
    size: u64,
    blob_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

fn path(cache: &RepoCache, commit: &str) -> PathBuf {
    cache.folder().join("trees").join(format!("{commit}.json"))
}

/// Keeps a listing. One with names that were left out is not all that there is, and is not kept.
pub(crate) fn write(cache: &RepoCache, commit: &str, listing: &Listing) -> Result<()> {
    let path = path(cache, commit);
    // What a commit holds never changes.
    if listing.odd > 0 || path.exists() {
        return Ok(());
    }
    let file = |file: &RemoteFile| {
        let large = matches!(file.digest, Digest::Sha256(_));
        let kept = File {
            size: file.bytes,
            blob_id: file.blob.clone(),
            lfs_sha256: large.then(|| file.digest.hex().to_owned()),
            lfs_size: large.then_some(file.bytes),
            xet_hash: file.xet.clone(),
        };
        (file.path.clone(), kept)
    };
    let files = listing.files.iter().map(file).collect();
    let mut text = Vec::new();
    let mut writer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b" "));
    Tree { format_version: VERSION, files }
        .serialize(&mut writer)
        .map_err(|e| Error::io("write", &path)(e.into()))?;
    cache.replace(&path, &text)
}

/// The listing of a commit, where this or another program kept one that can be read.
pub(crate) fn read(cache: &RepoCache, commit: &str) -> Option<Vec<RemoteFile>> {
    let text = read_small(&path(cache, commit)).ok()?;
    let Tree { format_version, files } = serde_json::from_slice(&text).ok()?;
    let file = |(path, file): (String, File)| {
        if !is_usable(&path) {
            return None;
        }
        let lfs = file.lfs_sha256.map(|hash| (hash, file.lfs_size.unwrap_or(file.size)));
        RemoteFile::checked(path, file.size, file.blob_id, lfs, file.xet_hash).ok()
    };
    if format_version != VERSION {
        return None;
    }
    files.into_iter().map(file).collect()
}

/// What lies in a snapshot, for caches without a list: that a file is missing shows by an index only.
pub(crate) fn of_snapshot(cache: &RepoCache, commit: &str) -> Vec<RemoteFile> {
    let mut files = Vec::new();
    collect(&cache.snapshot(commit), "", &mut files);
    files
}

fn collect(folder: &Path, prefix: &str, files: &mut Vec<RemoteFile>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let (Some(name), Ok(meta)) = (name.to_str(), fs::metadata(entry.path())) else { continue };
        let path = format!("{prefix}{name}");
        if meta.is_dir() {
            collect(&entry.path(), &format!("{path}/"), files);
            continue;
        }
        // The link's target is named by its hash. Of a file that is no link nothing is known.
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let hash = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let lfs = (hash.len() == 64).then(|| (hash.to_owned(), meta.len()));
        let of_link = RemoteFile::checked(path.clone(), meta.len(), hash.to_owned(), lfs, None);
        let unknown = || RemoteFile::checked(path, meta.len(), UNKNOWN.to_owned(), None, None);
        files.extend(of_link.or_else(|_| unknown()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Kind;

    /// The text is what huggingface_hub 2.4's `write_tree_cache` writes of the same entries.
    #[test]
    fn a_listing_is_kept_as_the_hubs_own_client_keeps_it() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let mut weights = RemoteFile::test("model.safetensors", 7, &"b".repeat(64));
        (weights.blob, weights.xet) = ("c".repeat(40), Some("d".repeat(64)));
        let files = vec![weights, RemoteFile::test("config.json", 5, &"a".repeat(40))];
        let mut listing = Listing { files, odd: 1 };
        write(&cache, "c0ffee", &listing).unwrap();
        assert!(read(&cache, "c0ffee").is_none(), "it is not all that there is");
        listing.odd = 0;
        write(&cache, "c0ffee", &listing).unwrap();
        let text = fs::read_to_string(path(&cache, "c0ffee")).unwrap();
        let (a, b, c, d) = ("a".repeat(40), "b".repeat(64), "c".repeat(40), "d".repeat(64));
        let expected = format!(
            "{{\n \"format_version\": 1,\n \"files\": {{\n  \"config.json\": {{\n   \"size\": 5,\n   \
             \"blob_id\": \"{a}\"\n  }},\n  \"model.safetensors\": {{\n   \"size\": 7,\n   \
             \"blob_id\": \"{c}\",\n   \"lfs_sha256\": \"{b}\",\n   \"lfs_size\": 7,\n   \
             \"xet_hash\": \"{d}\"\n  }}\n }}\n}}"
        );
        assert_eq!(text, expected);
        listing.files.reverse();
        assert_eq!(read(&cache, "c0ffee").unwrap(), listing.files);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_none() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::create(root.path(), Kind::Model, "org/name").unwrap();
        let a = "a".repeat(40);
        for text in [
            String::new(),
            "{\"format_version\": 2, \"files\": {}}".to_owned(),
            format!(
                "{{\"format_version\": 1, \"files\": {{\"../x\": {{\"size\": 1, \"blob_id\": \"{a}\"}}}}}}"
            ),
            "{\"format_version\": 1, \"files\": {\"x\": {\"size\": 1, \"blob_id\": \"../x\"}}}"
                .to_owned(),
        ] {
            cache.replace(&path(&cache, "c0ffee"), text.as_bytes()).unwrap();
            assert!(read(&cache, "c0ffee").is_none(), "{text}");
        }
    }
}
