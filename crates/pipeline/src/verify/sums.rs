//! Files against the SHA-256 sums recorded when the checkpoint was written.
//!
//! A sweep leaves `gptq_manifest.json` in the folder of every branch. Where there is one, a single
//! changed bit of any listed file is found, whatever else is known.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Check, Findings};
use crate::error::{Error, Result};
use crate::identity::hex;

const MANIFEST: &str = "gptq_manifest.json";

/// What is read of a manifest: the rest is the sweep's own.
#[derive(Deserialize)]
struct Manifest {
    files: BTreeMap<String, FileSum>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct FileSum {
    bytes: u64,
    sha256: String,
}

/// Compares every file that the folder's manifest lists; without a manifest there is no check.
pub(super) fn check(dir: &Path, findings: &mut Findings) -> Result<()> {
    let path = dir.join(MANIFEST);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::ReadFile { path, source }),
    };
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(e) => {
            findings.examine(Check::Sums, 1);
            findings.add(Check::Sums, MANIFEST, format!("is not a manifest of files: {e}"));
            return Ok(());
        }
    };
    findings.examine(Check::Sums, manifest.files.len());
    let files: Vec<(&String, &FileSum)> = manifest.files.iter().collect();
    let wrong = files.par_iter().filter_map(|(name, sum)| Some((name, fault(dir, name, sum)?)));
    for (name, message) in wrong.collect::<Vec<_>>() {
        findings.add(Check::Sums, name.as_str(), message);
    }
    Ok(())
}

/// How a file differs from its record.
fn fault(dir: &Path, name: &str, recorded: &FileSum) -> Option<String> {
    match sum(&dir.join(name)) {
        Ok(found) if found == *recorded => None,
        Ok(found) if found.bytes != recorded.bytes => {
            Some(format!("has {} bytes, {} when it was written", found.bytes, recorded.bytes))
        }
        Ok(_) => Some("has another content than when it was written".to_owned()),
        Err(e) => Some(format!("cannot be read: {e}")),
    }
}

fn sum(path: &Path) -> std::io::Result<FileSum> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(FileSum { bytes, sha256: hex(&hash.finalize()) });
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
}
