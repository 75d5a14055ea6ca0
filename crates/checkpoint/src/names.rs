//! Names of tensors and files.

/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head.
pub const HEAD: &str = "lm_head.weight";
/// Name of the norm before the head.
pub(crate) const FINAL_NORM: &str = "model.norm.weight";

/// Whether a name from a file stays inside the folder that it is joined to.
pub(crate) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}
