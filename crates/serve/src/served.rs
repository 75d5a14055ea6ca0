//! The model that is served, as far as requests need to know it.

use std::sync::Arc;

use gptq_generate::{GenerationConfig, Message};
use gptq_text::tokens::TextTokenizer;

use crate::refusal::Refusal;

/// Makes a prompt's tokens of a conversation.
pub type Chat = Box<dyn Fn(&[Message]) -> gptq_generate::Result<Vec<u32>> + Send + Sync>;

/// What is said of the model to clients, and what makes its prompts.
pub struct Served {
    /// What clients call it.
    pub name: String,
    /// Other names that it goes by.
    pub aliases: Vec<String>,
    /// Its tokenizer.
    pub tokenizer: Arc<TextTokenizer>,
    /// Tokens that it knows.
    pub vocabulary: usize,
    /// Tokens that a prompt and its text may have together.
    pub context: usize,
    /// What its makers say of how it writes; requests come first.
    pub generation: Option<GenerationConfig>,
    /// Tokens that end a text.
    pub end: Vec<u32>,
    /// How a conversation becomes a prompt, or why that cannot be.
    pub chat: Result<Chat, String>,
}

impl Served {
    /// That a request is for this model. One that names none is.
    pub(crate) fn check_name(&self, asked: Option<&str>) -> Result<(), Refusal> {
        match asked {
            Some(asked) if asked != self.name && !self.aliases.iter().any(|name| name == asked) => {
                Err(Refusal::no_model(asked, &self.name))
            }
            _ => Ok(()),
        }
    }
}
