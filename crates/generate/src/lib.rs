//! What surrounds a model that writes: text before its tokens, and choices among them after.
//!
//! [`ChatTemplate`] and [`PromptTemplate`] make a prompt of what a person says;
//! [`GenerationConfig`] and [`Sampling`] are how the next token is chosen, where each setting comes
//! from and which tokens end a text; [`Sampler`] chooses, and [`StopStrings`] finds where a text is to
//! end while it streams. Text from tokens is [`TokenStream`] of `gptq-text`.
//!
//! This crate knows files beside a checkpoint, texts and rows of logits; it computes no logits, and
//! prints nothing.

mod chat_template;
mod error;
mod exp;
mod generation_config;
mod generation_tag;
mod json_file;
mod prompt_template;
mod sampler;
mod sampling;
mod special_tokens;
mod stop;
mod stop_tokens;
mod template_environment;
mod to_json;

pub use chat_template::{ChatTemplate, Conversation, Message};
pub use error::{Error, Result};
pub use generation_config::{GENERATION_CONFIG_FILE, GenerationConfig};
pub use gptq_text::token_stream::TokenStream;
pub use prompt_template::PromptTemplate;
pub use sampler::{Choice, Sampler};
pub use sampling::{Origin, Sampling, SamplingOptions, Setting};
pub use special_tokens::SpecialTokens;
pub use stop::{StopStrings, Stopping};
pub use stop_tokens::{StopOrigin, StopTokens};
