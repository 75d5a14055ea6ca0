//! Compiled kernels on disk.
//!
//! A file holds the sha256 of a cubin and the cubin. It is written under another name and renamed,
//! so that a reader sees a whole file or none; a file whose digest does not match is compiled again.
//! The cache only saves time: a folder that cannot be written is no error.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest, Sha256};

use crate::hex::hex;

const DIGEST_BYTES: usize = 32;

/// What this program keeps between runs to save time: `$XDG_CACHE_HOME/gptq`, or the same under
/// `~/.cache`; none without a home.
pub fn cache_folder() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("gptq"))
}

/// Where kernels are.
pub(super) fn folder() -> Option<PathBuf> {
    Some(cache_folder()?.join("cubin"))
}

/// Name of the entry for these parts: their sha256, each part preceded by its length.
pub(super) fn key(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// The cubin of `key`, when its file is whole.
pub(super) fn load(folder: &Path, key: &str) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path(folder, key)).ok()?;
    if bytes.len() <= DIGEST_BYTES {
        return None;
    }
    let cubin = bytes.split_off(DIGEST_BYTES);
    (Sha256::digest(&cubin).as_slice() == bytes).then_some(cubin)
}

/// Keeps `cubin` under `key`; gives up silently where the folder cannot be written.
pub(super) fn store(folder: &Path, key: &str, cubin: &[u8]) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    if fs::create_dir_all(folder).is_err() {
        return;
    }
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!("{key}.{}.{count}.tmp", std::process::id()));
    let contents = [Sha256::digest(cubin).as_slice(), cubin].concat();
    let kept =
        fs::write(&temporary, contents).and_then(|()| fs::rename(&temporary, path(folder, key)));
    if kept.is_err() {
        // A file left behind would only take room.
        let _ = fs::remove_file(&temporary);
    }
}

fn path(folder: &Path, key: &str) -> PathBuf {
    folder.join(format!("{key}.cubin"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_corrupt_or_truncated_entry_is_not_used() {
        let folder = std::env::temp_dir().join(format!("gptq-cache-test-{}", std::process::id()));
        let key = key(&[b"source", b"sm_80"]);
        assert!(load(&folder, &key).is_none());
        store(&folder, &key, b"machine code");
        assert_eq!(load(&folder, &key).as_deref(), Some(&b"machine code"[..]));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "a temporary file was left");

        let file = path(&folder, &key);
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(load(&folder, &key).is_none());
        fs::write(&file, &bytes[..10]).unwrap();
        assert!(load(&folder, &key).is_none());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[b"x"]).len(), 64);
    }
}
