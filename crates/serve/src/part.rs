//! Parts of texts, on their way from the engine to a client.

use gptq_generate::{Choice, Finish, Scored, Step};

/// A token with what the model said of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    pub(crate) id: u32,
    /// None for a prompt's first token, before which there is nothing.
    pub(crate) logprob: Option<f64>,
    pub(crate) top: Vec<Choice>,
}

/// What is new of a text. Parts put together are the whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    /// The text, by its place among those of the request.
    pub(crate) index: usize,
    pub(crate) tokens: Vec<Token>,
    pub(crate) text: String,
    /// How many of the tokens were made; those of a prompt were not.
    pub(crate) made: usize,
    pub(crate) finish: Option<Finish>,
}

impl Part {
    pub(crate) fn new(index: usize) -> Self {
        Self { index, ..Self::default() }
    }

    /// The tokens of a prompt.
    pub(crate) fn of_prompt(index: usize, tokens: Vec<Token>) -> Self {
        Self { tokens, ..Self::new(index) }
    }

    pub(crate) fn of_step(index: usize, step: Step) -> Self {
        let Step { choice, top, text, finish, .. } = step;
        let token = Token { id: choice.id, logprob: Some(choice.logprob), top };
        Self { index, tokens: vec![token], text, made: 1, finish }
    }

    pub(crate) fn push(&mut self, next: Self) {
        self.tokens.extend(next.tokens);
        self.text.push_str(&next.text);
        self.made += next.made;
        self.finish = next.finish.or(self.finish);
    }
}

/// A prompt's tokens with their scores.
pub(crate) fn scored_tokens(prompt: &[u32], scored: Vec<Scored>) -> Vec<Token> {
    let first = (None, Vec::new());
    let rest = scored.into_iter().map(|scored| (Some(scored.logprob), scored.top));
    let said = std::iter::once(first).chain(rest);
    prompt.iter().zip(said).map(|(&id, (logprob, top))| Token { id, logprob, top }).collect()
}

/// `finish_reason`.
pub(crate) fn reason(finish: Option<Finish>) -> Option<&'static str> {
    finish.map(|finish| match finish {
        Finish::EndOfText | Finish::Stop => "stop",
        Finish::MaxTokens | Finish::ContextFull => "length",
    })
}
