//! What surrounds a model that writes: text before its tokens, and choices among them after.
//!
//! [`ChatTemplate`] and [`PromptTemplate`] make a prompt of what a person says;
//! [`GenerationConfig`] and [`Sampling`] are how the next token is chosen, where each setting comes
//! from and which tokens end a text; [`Sampler`] chooses, and [`StopStrings`] finds where a text is to
//! end while it streams. Text from tokens is [`TokenStream`] of `gptq-text`.
//!
//! An [`Engine`] goes on with several texts at once, from prompts to their ends. It alone knows models;
//! all else here knows files beside a checkpoint, texts and rows of logits.

mod chat_template;
mod engine;
mod error;
mod exp;
mod generation_config;
mod generation_tag;
mod json_file;
mod log_probabilities;
mod prompt_template;
mod sampler;
mod sampling;
mod special_tokens;
mod stop;
mod stop_tokens;
mod template_environment;
mod to_json;

pub use chat_template::{ChatTemplate, Conversation};
pub use engine::{Engine, Finish, Request, Scored, Step, check_length};
pub use error::{Error, Result};
pub use generation_config::{GENERATION_CONFIG_FILE, GenerationConfig};
pub use gptq_text::chat::Message;
pub use gptq_text::token_stream::TokenStream;
pub use log_probabilities::LogProbabilities;
pub use prompt_template::PromptTemplate;
pub use sampler::{Choice, Sampler};
pub use sampling::{Origin, Sampling, SamplingOptions, Setting};
pub use special_tokens::SpecialTokens;
pub use stop::{StopStrings, Stopping};
pub use stop_tokens::{StopOrigin, StopTokens};
