//! What the cache holds of a model or a split, where the network is forbidden.

use std::fs;
use std::path::Path;

use gptq_checkpoint::read_small;

use crate::cache::RepoCache;
use crate::fetch::{blobs, choose};
use crate::hub::split_id;
use crate::listing::RemoteFile;
use crate::needed::{Needed, announced, shards};
use crate::tree;
use crate::{Error, Fetched, Hub, Result, Source};

/// Names of missing files that a message holds.
const NAMED: usize = 3;

/// The snapshot of `source` in the cache `root`, if nothing of it is missing.
pub(crate) fn fetched(
    hub: &Hub,
    source: &Source,
    revision: &str,
    root: &Path,
    verified: bool,
) -> Result<Fetched> {
    let (kind, id) = source.repository();
    split_id(id)?;
    let Err(Error::Offline { variable, .. }) = hub.check_online(id) else {
        return Err(Error::Answer { what: id.to_owned(), reason: "it was not asked".to_owned() });
    };
    let missing =
        |reason: String| Error::NotInCache { what: format!("{id}@{revision}"), variable, reason };
    let cache = RepoCache::at(root, kind, id);
    let commit = cache.referred(revision).filter(|commit| cache.snapshot(commit).is_dir());
    let commit = commit.ok_or_else(|| missing(format!("{} lacks it", root.display())))?;
    let folder = cache.snapshot(&commit);

    let known = tree::read(&cache, &commit);
    let is_known = known.is_some();
    let listing = known.unwrap_or_else(|| tree::of_snapshot(&cache, &commit));
    let Needed { mut files, indices } =
        choose(source, &listing).map_err(|e| missing(e.to_string()))?;
    for index in &indices {
        let what = format!("{id}/{}", index.path);
        let text = read_small(&folder.join(&index.path))
            .map_err(|_| missing(format!("`{}` is missing", index.path)))?;
        let found = shards(&what, &text, &listing).map_err(|e| missing(e.to_string()))?;
        files.extend(found.into_iter().filter(|shard| !indices.contains(shard)));
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup_by(|a, b| a.path == b.path);
    // The names of a split's files show how many there are.
    let expected = files.iter().find_map(|file| announced(&file.path));
    if let (false, Source::Dataset { .. }, Some(count)) = (is_known, source, expected)
        && files.len() != count
    {
        return Err(missing(format!("{} of {count} files are there", files.len())));
    }
    look(&folder, &files, verified).map_err(missing)?;
    let bytes = blobs(&files).iter().map(|file| file.bytes).sum();
    Ok(Fetched { folder, commit, files: files.len(), bytes, downloaded: 0 })
}

/// Says which files are not there whole.
fn look(folder: &Path, files: &[RemoteFile], verified: bool) -> std::result::Result<(), String> {
    let whole = |file: &&RemoteFile| {
        fs::metadata(folder.join(&file.path)).is_ok_and(|meta| meta.len() == file.bytes)
    };
    let list = |files: Vec<&RemoteFile>, what: &str| {
        let names: Vec<&str> = files.iter().take(NAMED).map(|file| file.path.as_str()).collect();
        let more = if files.len() > NAMED { " and others" } else { "" };
        format!("{}{more} {what}", names.join(", "))
    };
    let lacking: Vec<&RemoteFile> = files.iter().filter(|file| !whole(file)).collect();
    if !lacking.is_empty() {
        return Err(list(lacking, "missing or cut short"));
    }
    if !verified {
        return Ok(());
    }
    let damaged =
        |file: &&RemoteFile| !file.digest.is_of(&folder.join(&file.path)).unwrap_or(false);
    if files.iter().any(|file| file.digest.hex() == tree::UNKNOWN) {
        return Err("the hashes to verify it by are not in the cache".to_owned());
    }
    let wrong: Vec<&RemoteFile> = files.iter().filter(damaged).collect();
    if wrong.is_empty() { Ok(()) } else { Err(list(wrong, "damaged")) }
}
