//! What can go wrong with a checkpoint folder.
//!
//! One enum for the crate, which hands on that of output folders, [`OutputError`]. A variant is named
//! after the cause and carries the tensor, file and shape that a user needs in order to act;
//! [`Error::hint`] says what to do where that is not obvious.
//! Sources are kept as sources, so that a caller printing the chain does not repeat them.

use std::io;
use std::path::{Path, PathBuf};

use crate::cause::Cause;
use crate::output_error::OutputError;

/// The result of this crate's fallible functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure to read, check or write a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("Cannot {action} `{}`", path.display())]
    Io {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that should be JSON is not, or has another structure than expected.
    #[error("`{}` is not valid JSON of the expected form", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A configuration value is missing, malformed or contradicts another one.
    #[error("`{}`: `{key}` {reason}", path.display())]
    InvalidConfig {
        /// The configuration file.
        path: PathBuf,
        /// The key at fault.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The two files that say how a checkpoint is quantized contradict each other.
    #[error("`{}`: `{key}` {reason}", path.display())]
    ContradictingConfig {
        /// The first of the files.
        path: PathBuf,
        /// The key at fault.
        key: String,
        /// What it is there and in the other file.
        reason: String,
    },
    /// A configuration value that is meaningful but not supported here.
    #[error("`{}`: `{key}` is `{value}`, which is not supported; only {supported} is", path.display())]
    UnsupportedConfig {
        /// The configuration file.
        path: PathBuf,
        /// The key at fault.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// The folder holds no weight file that can be read.
    #[error(
        "`{}` has no weights: expected `model.safetensors` or `pytorch_model.bin`, or shards with \
         `model.safetensors.index.json` or `pytorch_model.bin.index.json`",
        dir.display()
    )]
    NoWeights {
        /// The checkpoint folder.
        dir: PathBuf,
    },
    /// Something well known lies where a model should.
    #[error("`{}` {what}", path.display())]
    NoModel {
        /// The folder or file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// A folder without a model.
    #[error("`{}` has no config.json", dir.display())]
    NoConfig {
        /// The folder.
        dir: PathBuf,
        /// What to do.
        advice: String,
    },
    /// A quantized folder with several candidates and nothing that chooses among them.
    #[error(
        "`{}` has {count} safetensors files and none is named by its quantization config",
        dir.display()
    )]
    AmbiguousWeights {
        /// The checkpoint folder.
        dir: PathBuf,
        /// How many candidates there are.
        count: usize,
    },
    /// The index names a weight file that is not there.
    #[error("`{}` names the shard `{shard}`, which is missing", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard's name as written there.
        shard: String,
    },
    /// A shard that was to come did not.
    #[error("Cannot get the shard `{shard}`")]
    Bring {
        /// The shard's name.
        shard: String,
        /// Why.
        source: Cause,
    },
    /// A model whose shards come and go has parts beside the language model.
    #[error(
        "`{}` is a {wrapper} model: of shards that are discarded only language models by themselves can be \
         read",
        dir.display()
    )]
    ArrivingParts {
        /// The folder of its configuration.
        dir: PathBuf,
        /// Its `model_type`.
        wrapper: &'static str,
    },
    /// A weight is read again although its shard may be gone.
    #[error("`{tensor}` was read and discarded; shards that are discarded can be read once")]
    Discarded {
        /// The tensor.
        tensor: String,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error("`{}` places tensor `{tensor}` in `{shard}`, which does not hold it", index.display())]
    IndexMismatch {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard's name as written in the index.
        shard: String,
    },
    /// A weight file that breaks the safetensors format.
    #[error("`{}` is not a valid safetensors file: {reason}", path.display())]
    InvalidHeader {
        /// The weight file.
        path: PathBuf,
        /// What is wrong, naming the tensor where one is at fault.
        reason: String,
    },
    /// Git's stand-in for a large file.
    #[error("`{}` is a Git LFS pointer, not the weights", path.display())]
    LfsPointer {
        /// The weight file.
        path: PathBuf,
    },
    /// A `.bin` file that is no plain state dict, or breaks PyTorch's format.
    #[error("`{}` cannot be read as PyTorch weights: {reason}", path.display())]
    InvalidPyTorch {
        /// The weight file.
        path: PathBuf,
        /// What is wrong, naming the tensor, global or opcode where one is at fault.
        reason: String,
        /// What to do, where something helps.
        advice: Option<&'static str>,
    },
    /// A tensor that the checkpoint should have is not there.
    #[error("`{}` has no tensor `{tensor}`", dir.display())]
    MissingTensor {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Every name has a prefix that the model's do not have.
    #[error(
        "`{}` has no tensor `{tensor}`, but one with `{prefix}` before that name: its weights are \
         those of a wrapper or of a larger model",
        dir.display()
    )]
    Prefixed {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// What stands before its name.
        prefix: String,
    },
    /// Names lack the prefix that a whole model's have.
    #[error(
        "`{}` has no tensor `{tensor}`, but `{bare}`: its weights are those of a model without a \
         head",
        dir.display()
    )]
    Unprefixed {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is there.
        bare: String,
    },
    /// A block holds a weight that the model's family does not have.
    #[error(
        "Tensor `{tensor}` is no part of a `{family}` block; the model has parts that are not \
         supported"
    )]
    UnknownWeight {
        /// The tensor.
        tensor: String,
        /// The model's family.
        family: &'static str,
    },
    /// The experts of a block lie in one tensor, as transformers has them in memory.
    #[error("Tensor `{tensor}` holds all experts of a block; they are read one by one only")]
    FusedExperts {
        /// The tensor.
        tensor: String,
    },
    /// A multimodal model's file has a tensor of the language model under two names, or under one that its
    /// others do not have.
    #[error(
        "Tensor `{tensor}` is called as no others of this language model are, and programs may read it as \
         `{own}`"
    )]
    Alias {
        /// The tensor.
        tensor: String,
        /// The name that it would have.
        own: String,
    },
    /// A shard holds a tensor that the index does not name.
    #[error(
        "`{shard}` holds `{tensor}`, which the index does not name: some programs read it and others do not",
        shard = shard.display()
    )]
    Unindexed {
        /// The file.
        shard: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A block holds a part of an adapter.
    #[error("Tensor `{tensor}` is of an adapter that was not merged into the model")]
    Adapter {
        /// The tensor.
        tensor: String,
    },
    /// A tensor is stored in a type that this crate does not read.
    #[error("Tensor `{tensor}` is stored as `{dtype}`; only F32, F16, BF16 and I32 are supported")]
    UnsupportedDType {
        /// The tensor.
        tensor: String,
        /// Its stored type.
        dtype: String,
    },
    /// A tensor is stored in another type than its role requires.
    #[error("Tensor `{tensor}` is stored as `{found}`, expected {expected}")]
    DType {
        /// The tensor.
        tensor: String,
        /// What its role requires.
        expected: &'static str,
        /// What the file holds.
        found: &'static str,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("Tensor `{tensor}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("Tensor `{tensor}` holds `{value}` at flat index {index}; the weights are damaged")]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Flat row-major index of the first offender.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A finite value does not fit in fp16.
    #[error("Tensor `{tensor}` holds `{value}` at flat index {index}, which overflows fp16")]
    F16Overflow {
        /// The tensor.
        tensor: String,
        /// Flat row-major index of the first offender.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A scale is too small for fp16, which GPTQ computes with.
    #[error(
        "Tensor `{tensor}` holds `{value}` at flat index {index}, which is too small for fp16, the \
         type that scales are computed with"
    )]
    F16Underflow {
        /// The tensor.
        tensor: String,
        /// Flat row-major index of the first offender.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// A linear has a bias that the configuration does not give it.
    #[error(
        "Tensor `{tensor}` holds non-zero values, but by config.json this linear has no bias \
         (`attention_bias` and `mlp_bias` of Llama models give one)"
    )]
    LinearBias {
        /// The bias tensor.
        tensor: String,
    },
    /// A column belongs to a group that does not exist.
    #[error("Tensor `{tensor}` assigns column {index} to group {group}, but there are {groups}")]
    GroupIndex {
        /// The tensor.
        tensor: String,
        /// The column, an index into `in_features`.
        index: usize,
        /// The group found.
        group: i64,
        /// How many groups the linear has.
        groups: usize,
    },
    /// A quantized linear was asked of a checkpoint without a quantization config.
    #[error("`{}` is not a GPTQ checkpoint: it has no quantization config", dir.display())]
    NotQuantized {
        /// The checkpoint folder.
        dir: PathBuf,
    },
    /// Packed tensors of which nothing says how they are quantized.
    #[error("`{}` holds packed tensors such as `{tensor}`, but {reason}", dir.display())]
    NoSettings {
        /// The checkpoint folder.
        dir: PathBuf,
        /// The first packed tensor.
        tensor: String,
        /// What is known of them.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// A head or an embedding that is packed.
    #[error(
        "Tensor `{tensor}` is packed: quantized heads and embeddings are not supported, only \
         linears of blocks are"
    )]
    PackedHead {
        /// The tensor.
        tensor: String,
    },
    /// The order of a linear's columns is nowhere.
    #[error(
        "Tensor `{tensor}` {lost}, but with act-order (`desc_act` true) and groups only it says \
         which group a column belongs to; the order cannot be known"
    )]
    LostOrder {
        /// The group index.
        tensor: String,
        /// What is wrong with it.
        lost: &'static str,
    },
    /// A code width that the format does not have.
    #[error("Cannot use {bits} bits; GPTQ files hold 2, 3, 4 or 8")]
    UnsupportedBits {
        /// The width asked for.
        bits: u8,
    },
    /// A linear whose sides the format cannot hold.
    #[error(
        "Linear `{linear}` is {in_features} -> {out_features}; the AutoGPTQ format needs both to \
         be non-zero multiples of 32"
    )]
    LinearSize {
        /// The linear.
        linear: String,
        /// Its input width.
        in_features: usize,
        /// Its output width.
        out_features: usize,
    },
    /// A buffer has another length than its shape says.
    #[error("`{what}` has {found} elements, expected {expected}")]
    Length {
        /// The buffer or tensor.
        what: String,
        /// Elements that the shape implies.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A value that does not fit its field.
    #[error("`{what}` holds {value} at flat index {index}, expected {min} to {max}")]
    ValueRange {
        /// The buffer or tensor.
        what: &'static str,
        /// Flat index of the first offender.
        index: usize,
        /// The value found.
        value: u32,
        /// Smallest value allowed.
        min: u32,
        /// Largest value allowed.
        max: u32,
    },
    /// Values to be packed do not fill whole 32-bit words.
    #[error("Cannot pack {len} values per row: a multiple of 32 is needed")]
    PackLength {
        /// Values per packed row or column.
        len: usize,
    },
    /// The output folder cannot be begun, filled or given its name.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// An id that cannot name a Hub repository or revision.
    #[error("`{id}` is neither an existing path nor a valid Hub id of the form `org/name`")]
    InvalidHubId {
        /// The id as given.
        id: String,
    },
    /// A Hub revision that cannot be one.
    #[error("`{revision}` is not a valid Hub revision")]
    InvalidRevision {
        /// The revision as given.
        revision: String,
    },
    /// A Hub repository or revision that is not in the local cache.
    #[error(
        "`{id}` at revision `{revision}` is neither a local path nor in the Hub cache (looked in \
         `{}`)",
        looked_in.display()
    )]
    NotInHubCache {
        /// The id as given.
        id: String,
        /// The revision looked for.
        revision: String,
        /// The place that would hold it.
        looked_in: PathBuf,
        /// What `gptq fetch` takes to download it.
        request: String,
    },
    /// What is no local path may be in the cache, but no environment variable says where that is.
    #[error("`{id}` is no local path, and no Hub cache is known")]
    NoHubCache {
        /// The id as given.
        id: String,
    },
}

impl Error {
    /// For `map_err`: an I/O failure with its action and path.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// For `map_err`: a JSON failure with its path.
    pub(crate) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Json { path, source }
    }
}
