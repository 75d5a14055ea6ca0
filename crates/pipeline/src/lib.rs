//! The walk over a model, and the jobs that are made of it: quantize, measure, sweep, verify, plan.
//!
//! Every job walks a model block by block with the hidden states of all windows held: [`quantize`] in
//! stages, looking at each linear's inputs on the way; [`perplexity`] with plain forwards. At the root
//! of this crate is the walk and what it is made of. Two wings stand beside it: [`sweep`] makes and
//! measures every branch of a configuration, and reuses what earlier runs left; [`verify`] checks a
//! checkpoint against its files, its base and a text. Callers listen through [`progress::Progress`].
//!
//! This is where tensors and devices (`gptq-model`, `gptq-quant`, `gptq-compute`) meet windows
//! (`gptq-text`) and what is written down of them (`gptq-records`). What needs no tensor is in those
//! crates and in `gptq-report`.

pub mod agreement;
pub mod batches;
pub mod bench;
pub mod bench_decode;
pub mod bench_disk;
mod calibrate;
pub mod cards;
mod chunk_store;
mod error;
pub mod families;
pub mod first_gram;
mod fit_head;
mod head_rows;
pub mod host_memory;
pub mod job;
mod learn_rotation;
mod lock;
pub mod memory;
mod memory_evaluation;
mod memory_text;
mod one_reading;
pub mod operations;
pub mod perplexity;
pub mod plan;
pub mod progress;
pub mod quantize;
pub mod rates;
mod rates_file;
mod read_ahead;
pub mod recipe_fit;
mod recording;
mod rotate;
mod row_shards;
mod stage_rates;
mod states;
pub mod sweep;
pub mod tune;
pub mod verify;
mod width;
mod work;
pub mod write;

pub use error::{Error, Result, hint_of};
