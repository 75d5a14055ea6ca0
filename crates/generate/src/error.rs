//! What can go wrong between what a person says and the tokens of an answer, but for the model.
//!
//! Every message is one sentence that names the file, key or option; [`Error::hint`] says what to do
//! when the message alone does not make it plain.

use std::borrow::Cow;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of templates, settings, sampling or stop strings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("Could not read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("`{}` could not be understood: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with the key where it is one.
        reason: String,
    },
    /// A model has no chat template.
    #[error(
        "`{}` has no chat template: neither chat_template.jinja nor chat_template in \
         tokenizer_config.json",
        folder.display()
    )]
    NoChatTemplate {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// A chat template could not be compiled or rendered.
    #[error("Chat template {origin} failed{}: {reason}", at(*line))]
    Template {
        /// The file, in backticks, and where in it the template is.
        origin: String,
        /// The line of the template, counted from 1, where it is known.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A chat template refused the conversation, with `raise_exception`.
    #[error("Chat template {origin} refuses the conversation{}: {message}", at(*line))]
    TemplateRefused {
        /// The file, in backticks, and where in it the template is.
        origin: String,
        /// The line of the template, counted from 1, where it is known.
        line: Option<usize>,
        /// What the template says.
        message: String,
    },
    /// A chat template does more, or writes more, than any sound one.
    #[error("Chat template {origin} was stopped{}: it {what}", at(*line))]
    TemplateTooLarge {
        /// The file, in backticks, and where in it the template is.
        origin: String,
        /// The line of the template, counted from 1, where it is known.
        line: Option<usize>,
        /// What it does, with the bound.
        what: String,
    },
    /// A prompt template has no place for the prompt.
    #[error("The prompt template has no {{prompt}}")]
    NoPlaceForPrompt,
    /// A setting of the caller is out of its range.
    #[error("{name} is {value}, which is not {range}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is possible.
        range: &'static str,
    },
    /// Logits of which no token can be chosen.
    #[error("The model's logits are broken: {reason}")]
    Logits {
        /// What is wrong with them.
        reason: String,
    },
    /// A stop string of no characters would stop every text at once.
    #[error("A stop string is empty")]
    EmptyStop,
    /// Nothing to go on with.
    #[error("The prompt has no tokens")]
    PromptEmpty,
    /// A prompt that leaves no room in its context.
    #[error(
        "The prompt has {tokens} tokens, and with one more it exceeds the context of {capacity}"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens that a text may have.
        capacity: usize,
    },
    /// A prompt template has no place for what somebody says.
    #[error("A prompt template of a card has no place for messages of the role `{role}`")]
    UnknownRole {
        /// Who it is.
        role: String,
    },
    /// The caller no longer wants what was begun.
    #[error("Interrupted while a prompt was read")]
    Interrupted,
    /// More texts at a time than there is room for.
    #[error("All places for texts are taken")]
    NoSlot,
    /// The model failed.
    #[error(transparent)]
    Model(#[from] gptq_model::Error),
    /// The tokenizer failed.
    #[error(transparent)]
    Text(#[from] gptq_text::Error),
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::NoChatTemplate { .. } => {
                "give a prompt template with `--template`; a base model only continues a text"
                    .into()
            }
            Self::Logits { .. } => "check the model with `gptq verify` or `gptq ppl`; a GPU's \
                                    activations are fp16, those of --device cpu f32"
                .into(),
            Self::PromptTooLong { .. } => {
                "shorten it, or raise --context up to the model's limit".into()
            }
            Self::UnknownRole { .. } => "roles are system, user and assistant".into(),
            Self::Text(error) => return error.hint(),
            Self::Model(error) => return error.hint(),
            _ => return None,
        })
    }

    /// True for a fault of this program, see [`gptq_model::Error::is_internal`].
    #[must_use]
    pub fn is_internal(&self) -> bool {
        match self {
            Self::Model(error) => error.is_internal(),
            Self::NoSlot => true,
            _ => false,
        }
    }
}

/// A line's number as a part of a sentence.
fn at(line: Option<usize>) -> String {
    line.map(|line| format!(" in line {line}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_named_where_it_is_known() {
        let error = |line| Error::Template {
            origin: "`chat_template.jinja`".to_owned(),
            line,
            reason: "unexpected end".to_owned(),
        };
        assert_eq!(
            error(Some(3)).to_string(),
            "Chat template `chat_template.jinja` failed in line 3: unexpected end"
        );
        assert_eq!(
            error(None).to_string(),
            "Chat template `chat_template.jinja` failed: unexpected end"
        );
        assert_eq!(Error::NoPlaceForPrompt.to_string(), "The prompt template has no {prompt}");
    }
}
