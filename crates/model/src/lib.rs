//! The forward pass of Llama and its relatives on a compute device, block by block, in stages.
//!
//! A model is never in memory as a whole: [`Model`] knows the checkpoint and the tables that every
//! block shares, [`Model::load_block`] brings one block's weights to the device, and [`Block`]
//! offers what lies between two linears as separate stages ([`Block::stage_input`],
//! [`Block::stage_output`]), so that calibration can look at (and replace) each linear's weights on
//! the way. [`Block::forward`] is nothing but the stages in order. A [`Decoder`] is the exception: it
//! holds every block, its weights as the file has them, and takes the same stages over the ends of
//! sequences that grow.

mod backward;
mod block;
mod block_rule;
mod decoder;
mod decoder_part;
mod error;
mod experts;
mod forward;
mod model;
mod stage;
mod values;

pub use backward::{LinearSink, without_backward};
pub use block::{Block, BlockParts, Gains, Linear};
pub use block_rule::{BlockRule, Norm, Ropes};
pub use decoder::{Cache, Decoder, PASS_TOKENS, context_limit, has_step_program};
pub use error::{Error, Result};
pub use experts::{Mixture, Routes, Share};
pub use forward::Weight;
pub use gptq_checkpoint::{Expert, LinearId, NormId};
pub use model::{FinalNorm, Head, Model, check_context};
pub use stage::{Reading, Stage};
pub use values::SourcePrecision;
