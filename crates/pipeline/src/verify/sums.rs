//! Files against the SHA-256 sums recorded when the checkpoint was written.
//!
//! A sweep leaves a manifest in the folder of every branch. Where there is one, a single changed bit
//! of any listed file, or a changed digit of the report, is found, whatever else is known.

use std::path::Path;

use gptq_checkpoint::MANIFEST_FILE;
use gptq_records::manifest::Manifest;

use super::findings::{Check, Findings};
use crate::error::Result;

/// Compares every file that the folder's manifest knows; without a manifest there is no check.
pub(super) fn check(dir: &Path, findings: &mut Findings) -> Result<()> {
    match Manifest::read_or_fault(dir)? {
        None => {}
        Some(Err(fault)) => {
            findings.examine(Check::Sums, 1);
            findings.add(
                Check::Sums,
                MANIFEST_FILE,
                format!("is not a manifest of files: {fault}"),
            );
        }
        Some(Ok(manifest)) => {
            findings.examine(Check::Sums, manifest.sums());
            for (file, fault) in manifest.faults(dir) {
                findings.add(Check::Sums, file, fault);
            }
        }
    }
    Ok(())
}
