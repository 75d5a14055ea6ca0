//! Digests as text.
//!
//! `records` and `hub` have their own such line: this crate knows nothing of theirs, nor they of it.

/// Bytes in hexadecimal, two small letters or digits each.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
