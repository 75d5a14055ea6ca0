//! The text of tokens, one after the other while a model makes them.
//!
//! A token is not always a text: it may be a part of a character, and whether a space stands before
//! a word depends on what stands before that. What is given here is whole characters, and all of it
//! together is what decoding everything at once would have given.
//!
//! The `tokenizers` library has a stream of its own, which does not serve: it knows no text before
//! the first token, never gives what it holds back at the end, decodes everything again for as long
//! as only special tokens come, and fails where a byte makes a run of `<0x..>` tokens invalid of
//! which it has given the beginning.

use crate::error::Result;
use crate::tokens::TextTokenizer;

/// Tokens of the prompt that are decoded with the first new ones: a character has four bytes at most,
/// so no more tokens than that.
const CONTEXT: usize = 4;

/// The text of tokens that follow a prompt.
///
/// Special tokens give no text. What is given for some tokens, put together, is the text of the
/// prompt and these tokens without the text of the prompt: the space before a word is there where
/// the word follows a text, and not where it is the first of all.
///
/// Held back is what a next token may still change: the beginning of a character and, where a
/// vocabulary writes unknown characters as bytes (`<0xE2>`), a run of such tokens, since one that is
/// no UTF-8 makes U+FFFD of each byte of the run.
pub struct TokenStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// Tokens with text that are decoded together: the context, then those with text still to come.
    window: Vec<u32>,
    /// How many of them are context.
    context: usize,
    /// The window's text up to where it has been given.
    shown: String,
}

impl<'a> TokenStream<'a> {
    /// A stream of what follows the tokens of a prompt, which may be none.
    ///
    /// # Errors
    /// [`Error::Decode`](crate::Error::Decode), where the tokenizer refuses the prompt.
    pub fn new(tokenizer: &'a TextTokenizer, prompt: &[u32]) -> Result<Self> {
        let mut window = Vec::new();
        let mut whole = 0;
        for &id in prompt.iter().rev() {
            let Some(token) = text_token(tokenizer, id) else { continue };
            window.push(id);
            // A run of bytes is decoded as one.
            whole += usize::from(!is_byte(&token));
            if whole == CONTEXT {
                break;
            }
        }
        window.reverse();
        let shown = tokenizer.decode(&window, true)?;
        Ok(Self { tokenizer, context: window.len(), window, shown })
    }

    /// Takes the next token, and gives the text that is whole with it, if there is any.
    ///
    /// # Errors
    /// [`Error::Decode`](crate::Error::Decode).
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let Some(token) = text_token(self.tokenizer, id) else { return Ok(None) };
        self.window.push(id);
        if is_byte(&token) {
            return Ok(None);
        }
        let text = self.tokenizer.decode(&self.window, true)?;
        // The mark of a broken character may be that of one which is not yet whole.
        let whole = text.strip_suffix(char::REPLACEMENT_CHARACTER);
        let new = after(whole.unwrap_or(&text), &self.shown).to_owned();
        if new.is_empty() {
            return Ok(None);
        }
        if let Some(whole) = whole {
            self.shown = whole.to_owned();
        } else {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.shown = self.tokenizer.decode(&self.window, true)?;
        }
        Ok(Some(new))
    }

    /// What was held back, now that no token follows; empty where there is nothing.
    ///
    /// # Errors
    /// [`Error::Decode`](crate::Error::Decode).
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window, true)?;
        Ok(after(&text, &self.shown).to_owned())
    }
}

/// The token, unless it is special or none at all.
fn text_token(tokenizer: &TextTokenizer, id: u32) -> Option<String> {
    tokenizer.id_to_token(id).filter(|_| !tokenizer.is_special(id))
}

/// A byte of a character that the vocabulary has no token for.
fn is_byte(token: &str) -> bool {
    token.len() == 6
        && token.starts_with("<0x")
        && token.ends_with('>')
        && u8::from_str_radix(&token[3..5], 16).is_ok()
}

/// What a text has after another one that it begins with. Where it does not, because a character that
/// the prompt left unfinished has become whole, it is what comes after all that they share.
fn after<'a>(text: &'a str, shown: &str) -> &'a str {
    text.strip_prefix(shown).unwrap_or_else(|| {
        let same = text.chars().zip(shown.chars()).take_while(|(a, b)| a == b);
        &text[same.map(|(c, _)| c.len_utf8()).sum()..]
    })
}

#[cfg(test)]
#[path = "token_stream_tests.rs"]
mod tests;
