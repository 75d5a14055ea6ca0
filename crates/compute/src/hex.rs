//! Digests as text.

/// Bytes in hexadecimal, two small letters or digits each.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
