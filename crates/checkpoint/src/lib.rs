//! Checkpoint folders: reading Hugging Face models, reading and writing AutoGPTQ files.
//!
//! A *checkpoint* is a folder of weights and config. This crate knows what such a folder looks
//! like, and nothing about how its weights are made or used: no GPU, no network, no numerics
//! beyond exact conversions between stored types.
//!
//! - Reading: [`Checkpoint::open`] maps the weight files, safetensors or PyTorch's, and hands out
//!   [`TensorRef`] views, or a whole quantized linear as a [`GptqLinear`].
//!   [`Checkpoint::open_arriving`] takes shards as they come, and deletes them when they are read.
//! - Writing: [`plan_files`] says to the byte what a quantized checkpoint will be, and
//!   [`CheckpointWriter`] fills it in any order and publishes it by one rename.
//! - Finding: [`resolve_model`] and [`resolve_dataset`] look a Hub id up in the local cache.
//! - Judging: [`loaders`] says which programs load a quantized checkpoint, and why the others do not.

#[cfg(test)]
#[path = "../../../tests/util/needs.rs"]
mod needs;

mod arriving;
mod bits;
mod block_attention;
mod block_shape;
mod cause;
mod checkpoint_format;
mod config;
mod dtype;
mod error;
mod expert_rules;
mod experts;
mod families;
mod family;
mod fault;
mod fields;
mod file_plan;
mod foreign;
mod gptq;
mod group_size;
mod head;
mod header;
mod hint;
mod hub_cache;
mod json;
mod layout;
mod linear_shape;
pub mod loaders;
mod names;
mod output_error;
mod packed;
mod partial;
mod parts;
mod pickle;
mod pickle_names;
mod pytorch;
mod quantize_config;
mod quantize_keys;
mod reader;
mod rope;
mod rope_settings;
mod settings;
mod side_files;
mod small_file;
mod stored_names;
mod strays;
mod tensor;
mod weight_files;
mod weight_sum;
mod weights;
mod wrappers;
mod writer;
mod zip;

pub use arriving::Bring;
pub use bits::{Bits, pack_rows, pack_transposed, unpack_rows};
pub use block_attention::{BlockAttention, RopeKind};
pub use cause::Cause;
pub use checkpoint_format::CheckpointFormat;
pub use config::{Factors, ModelConfig};
pub use dtype::DType;
pub use error::{Error, Result};
pub use experts::{Experts, Router, Scores, SharedExpert};
pub use families::family_names;
pub use family::{Activation, NormKind};
pub use file_plan::{FilePlan, PlacedTensor, ShardPlan, TensorSpec, plan_files, tensor_specs};
pub use gptq::GptqLinear;
pub use group_size::{BadGroupSize, GroupSize, MAX_GROUP_SIZE};
pub use head::Head;
pub use hub_cache::{hub_cache_root, hub_token_file, resolve_dataset, resolve_model};
pub use json::text as json_text;
pub use layout::Layout;
pub use linear_shape::{DenseId, DenseShape, Expert, LinearId, LinearShape, NormId, NormShape};
pub use names::{
    CARD_FILE, CONFIG_FILE, EMBEDDING, FINAL_NORM, G_IDX, HEAD, INDEX_END, LEAVES, MANIFEST_FILE,
    PARTIAL_END, QUANTIZE_CONFIG_FILE, QWEIGHT, QZEROS, REPORT_FILE, SCALES, TEXT_CONFIG,
    TOKENIZER_FILE, is_hub_name, weight_file_names,
};
pub use output_error::OutputError;
pub use packed::{PackedGrid, PackedNotes, StoredZeros};
pub use partial::{
    Partial, bytes_free, check_folder, check_output, finish_rename, free_space, has_no_locks,
};
pub use quantize_config::QuantizeConfig;
pub use reader::{Checkpoint, StoredTensor};
pub use rope::{LongRope, Rope, RopeScaling, Yarn};
pub use small_file::{open_regular, read_small, read_small_text};
pub use strays::Strays;
pub use tensor::TensorRef;
pub use weight_files::WeightFile;
pub use weight_sum::{Sum, WeightSum, sum_of_pieces, weight_pieces};
pub use wrappers::wrapper_names;
pub use writer::{CheckpointWriter, Sealed, Written};

// Tensors move between memory and files by reinterpreting bytes, and safetensors is little-endian.
const _: () = assert!(cfg!(target_endian = "little"), "only little-endian targets are supported");
