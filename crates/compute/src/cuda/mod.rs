//! The NVIDIA backend: cudarc, kernels compiled at run time, cuBLAS and cuSOLVER.
//!
//! Nothing of CUDA is needed to build or start this program. Libraries are opened when a device is
//! first asked for (`libraries`), kernels are compiled for the card present and kept on disk
//! (`nvrtc`, `cache`, `kernels`), and all work of one [`Cuda`] is queued on one stream, so that a
//! buffer may be freed or reused as soon as its last use has been queued. Other streams carry
//! uploads (`transfer`, `upload`) and offload tensors to pinned host memory and fetch them back
//! (`offload`).
//!
//! Activations and weights are fp16, row-major. Hidden states between blocks are f32: adding
//! hundreds of small updates to a few large features is where fp16 loses perplexity and where
//! bf16-trained models overflow it. Grams, Hessians and solver matrices are f32.
//!
//! Text is made from weights that stay as their file has them, in tiles (`coded`), with a cache of keys
//! and values (`kv`): prompts by the operations of all other passes, `product` in place of `gemm`, and
//! each token after them by one recorded graph (`step`, `step_launch`, `dependent`).

#![expect(unsafe_code, reason = "kernel launches and C libraries; each use states why it is sound")]

pub(crate) mod attention;
pub(crate) mod attention_backward;
pub(crate) mod backward;
pub(crate) mod block_parts;
mod boxes;
pub(crate) mod buffer;
mod cache;
pub(crate) mod coded;
mod context;
mod dense;
mod dependent;
mod driver;
pub(crate) mod elementwise;
mod error;
mod factor;
mod fault;
pub(crate) mod fourth_powers;
pub(crate) mod gemm;
pub(crate) mod gram;
pub(crate) mod kernels;
pub(crate) mod kv;
mod libraries;
mod library_places;
pub(crate) mod matrix;
mod memory;
pub(crate) mod nccl;
mod nccl_api;
mod nvrtc;
pub(crate) mod offload;
mod ordered;
pub(crate) mod orthogonal;
mod pack;
mod permutation;
mod pinned;
mod plan;
mod probe;
pub(crate) mod product;
mod read_rate;
pub(crate) mod residual_shift;
mod rope_table;
pub(crate) mod scaled_codes;
mod shares;
mod solve;
mod split;
mod staging;
pub(crate) mod step;
mod step_launch;
mod timing;
pub(crate) mod token_loss;
mod transfer;
pub(crate) mod turning;
pub(crate) mod upload;

pub use cache::cache_folder;
pub use context::Cuda;
pub(crate) use factor::shared_upper_factor;
pub use factor::upper_factor;
pub use fault::Fault;
pub use kernels::{KernelReport, compile_all, kernel_files};
pub use libraries::Library;
pub use library_places::LibraryPlace;
pub use memory::MemoryInfo;
pub use nccl::prepare_environment;
pub use offload::{Offloaded, Prefetched};
pub use pack::{PackedLinear, dequantize};
pub use probe::{Card, LibraryFacts, Probe, probe};
pub use read_rate::read_rate;
pub use solve::{ClipSearch, SolveOptions, Solved, solve};
pub use timing::Timer;

pub(crate) use matrix::Matrix;
pub(crate) use permutation::inverse_of;
pub(crate) use rope_table::DeviceTableCell;
pub(crate) use timing::Mark;
