//! A model behind OpenAI's HTTP interface.
//!
//! [`serve`] answers `/v1/completions`, `/v1/chat/completions` and `/v1/models`, and `/health` and
//! `/metrics` for those who watch it. One thread has the [`Engine`](gptq_generate::Engine): it goes on
//! with all texts together, a token each at a step, and takes up what waits in a [bounded
//! queue](Limits::queue) when a place is free. Another thread speaks HTTP; what takes long there,
//! reading a large body and making tokens of it, has two more.
//!
//! What a request asks for and is not done here is refused by name, never left out in silence: a
//! benchmark that ran without its `logit_bias` would be worth nothing. Log-probabilities are those of
//! the model itself, before temperature and the like.
//!
//! The crate knows HTTP and what may be asked; how a text is made it leaves to `gptq-generate`.
//! Without the feature `server` it is empty.

#![cfg(feature = "server")]

mod api_key;
mod chat;
mod completions;
mod engine_loop;
mod error;
mod fields;
mod handlers;
mod job;
mod metrics;
mod neutral;
mod origin;
mod part;
mod patient;
mod queue;
mod refusal;
mod served;
mod server;
mod settings;
mod token_texts;
mod writer;

pub use api_key::ApiKey;
pub use error::{Error, Result};
pub use served::{Chat, Served};
pub use server::{Limits, Listener, serve};
pub use settings::default_sampling;
