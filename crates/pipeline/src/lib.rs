//! Calibration, the block walk, quantisation runs, perplexity, plans and sweeps.
//!
//! The two jobs walk a model block by block with the hidden states of all windows held:
//! [`quantise`] in stages, looking at each linear's inputs on the way; [`perplexity`] with plain
//! forwards. [`sweep`] runs both for every branch of a [`config`], and finds what earlier runs left by
//! [`resume`] and [`manifest`]; [`jobs`] splits it over machines. Text becomes windows in
//! [`dataset`], [`calibration`] and [`protocol`]. Callers listen through [`progress::Progress`].
//! What a sweep leaves in its folders is shown by [`report`], held by [`check`] and published with a
//! [`card`].

pub mod agreement;
mod bands;
mod baseline;
pub mod batches;
pub mod bench;
mod calibrate;
pub mod config;
mod error;
pub mod first_gram;
mod fold;
mod head;
pub mod host_memory;
pub mod job;
pub mod jobs;
pub mod memory;
mod memory_evaluation;
pub mod output;
pub mod perplexity;
pub mod plan;
pub mod progress;
pub mod quantise;
mod read_ahead;
mod recording;
pub mod resume;
mod stash;
mod states;
pub mod sweep;
pub mod sweep_log;
pub mod verify;

pub use error::{Error, Result};
