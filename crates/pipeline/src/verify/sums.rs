//! Files against the SHA-256 sums recorded when the checkpoint was written.
//!
//! A sweep leaves a manifest in the folder of every branch. Where there is one, a single changed bit
//! of any listed file, or a changed digit of the report, is found, whatever else is known.

use std::path::Path;

use gptq_checkpoint::{MANIFEST_FILE, REPORT_FILE};
use gptq_records::Error;
use gptq_records::branch_report::BranchReport;
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

/// Looks whether a report can be read, unless its sum is a finding already. One that cannot would pass for one
/// that was left out, and the base's head would be held to less than what is recorded.
pub(super) fn check_report(dir: &Path, findings: &mut Findings) {
    let known = findings.list.iter().any(|finding| finding.place == REPORT_FILE);
    match BranchReport::read(dir) {
        Ok(_) | Err(Error::NoReport(_)) => {}
        Err(_) if known => {}
        Err(Error::Report { message, .. }) => {
            let message = format!("is not a report of this program: {message}");
            findings.add(Check::Configuration, REPORT_FILE, message);
        }
        Err(error) => findings.add_error(Check::Configuration, REPORT_FILE, error),
    }
}
