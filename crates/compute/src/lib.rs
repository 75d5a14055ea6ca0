//! Devices, and the matrix operations that decoder blocks and GPTQ need.
//!
//! [`Device`] says where matrices live and who multiplies them; [`Tensor`] is a row-major matrix on
//! one device. The CPU path computes in f32 with f64 factorizations: it is the oracle for every
//! kernel and the fallback of every command. This crate knows nothing of files, models or recipes,
//! and it is the only one that may hold `unsafe` code besides the readers' mmap.

mod activation;
mod adam;
mod attention_rule;
mod attention_shape;
mod backward;
mod block_parts;
mod cpu;
pub mod cuda;
mod device;
mod error;
mod fourth_powers;
mod gram;
mod hessian_prep;
mod hex;
mod host;
mod kv_cache;
mod lock;
mod orthogonal;
mod ranks;
mod resident;
mod residual_shift;
mod rope;
mod scaled_codes;
mod share;
mod stage_timer;
mod steps;
mod tensor;
#[cfg(test)]
mod testing;
mod turning;

pub use activation::Activation;
pub use adam::Adam;
pub use attention_rule::AttentionRule;
pub use attention_shape::AttentionShape;
pub use cpu::least_squares::NormalEquations;
pub use cpu::linalg;
pub use cuda::cache_folder;
pub use device::{Device, OffloadedTensor, PrefetchedTensor};
pub use error::{Error, Result};
pub use fourth_powers::{FourthPowers, Turned};
pub use gram::Gram;
pub use hessian_prep::{HessianPrep, Precision};
pub use host::{FloatType, HostMatrix};
pub use kv_cache::{CacheShape, KvCache, Span};
pub use ranks::{Agreement, Launch, LossWatch, RankHandle, Ranks, frames, greeting};
pub use resident::{CodedMatrix, Resident};
pub use rope::{RopeLayout, RopeTable};
pub use scaled_codes::{PackedCodes, ScaledCodes};
pub use share::share;
pub use stage_timer::StageTimer;
pub use steps::{StepBlock, StepModel, Steps};
pub use tensor::Tensor;
pub use turning::Turning;
