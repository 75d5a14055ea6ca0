//! What a checkpoint's folder holds, by name: one list each of tensors and of files, for all who read
//! such a folder, write one, or bring one from the Hub.

/// The embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the head.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The head.
pub const HEAD: &str = "lm_head.weight";
/// How the names of all tensors of blocks begin; the block's number follows.
pub(crate) const BLOCKS: &str = "model.layers.";

/// Last part of a packed linear's codes.
pub const QWEIGHT: &str = "qweight";
/// Last part of a packed linear's zeros.
pub const QZEROS: &str = "qzeros";
/// Last part of a packed linear's scales.
pub const SCALES: &str = "scales";
/// Last part of a packed linear's groups.
pub const G_IDX: &str = "g_idx";
/// Last parts of the names of a packed linear's tensors.
pub const LEAVES: [&str; 4] = [QWEIGHT, QZEROS, SCALES, G_IDX];

/// The model's configuration.
pub const CONFIG_FILE: &str = "config.json";
/// The key of `config.json` for the settings of a multimodal model's language model.
pub const TEXT_CONFIG: &str = "text_config";
/// The tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The quantization settings.
pub const QUANTIZE_CONFIG_FILE: &str = "quantize_config.json";
/// How a branch was made.
pub const REPORT_FILE: &str = "gptq_report.json";
/// What a branch consists of.
pub const MANIFEST_FILE: &str = "gptq_manifest.json";
/// The model card.
pub const CARD_FILE: &str = "README.md";
/// The end of the name of a folder in the making.
pub const PARTIAL_END: &str = ".partial";

/// The end of the names of safetensors files.
pub(crate) const SAFETENSORS_END: &str = ".safetensors";
/// The end of the name of an index of shards, which follows the name that one file would have.
pub const INDEX_END: &str = ".index.json";
/// The weights of a dense model, or their index.
pub(crate) const SAFETENSORS_FILES: [&str; 2] =
    ["model.safetensors", "model.safetensors.index.json"];
/// The same of PyTorch's format.
pub(crate) const PYTORCH_FILES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Names of weights, or of their index, in the order in which they are looked for.
pub fn weight_file_names() -> impl Iterator<Item = &'static str> {
    [SAFETENSORS_FILES, PYTORCH_FILES].into_iter().flatten()
}

/// Whether a name from a file stays inside the folder that it is joined to.
pub(crate) fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// A name in the Hub's characters that is no hidden or parent folder.
#[must_use]
pub fn is_hub_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}
