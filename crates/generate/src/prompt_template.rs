//! A prompt's frame as model cards write it: a text with `{prompt}` and perhaps `{system_message}`.

use crate::error::{Error, Result};

const PROMPT: &str = "{prompt}";
const SYSTEM: &str = "{system_message}";

/// A template of the kind that a card shows: `### User:\n{prompt}\n\n### Assistant:\n`.
///
/// Only the two places are filled in; all other text, braces too, stays as it is, and what is put in
/// is not read again: a prompt may speak of `{system_message}`.
///
/// Without a system text its place is filled with nothing, and what stands around it stays: that is
/// what a card's reader gets who replaces it with an empty string, and a heading such as
/// `### System:` cannot be told from a text that belongs there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    text: String,
}

impl PromptTemplate {
    /// A template from its text.
    ///
    /// # Errors
    /// [`Error::NoPlaceForPrompt`] where it has no `{prompt}`.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        if text.contains(PROMPT) { Ok(Self { text }) } else { Err(Error::NoPlaceForPrompt) }
    }

    /// Whether the template has a place for a system text; one that is given to a template without
    /// is lost, which a caller should say.
    #[must_use]
    pub fn takes_system(&self) -> bool {
        self.text.contains(SYSTEM)
    }

    /// The template with its places filled in.
    #[must_use]
    pub fn render(&self, prompt: &str, system: Option<&str>) -> String {
        let mut rest = self.text.as_str();
        let mut filled = String::new();
        while let Some(at) = rest.find('{') {
            let (before, from) = rest.split_at(at);
            filled.push_str(before);
            rest = if let Some(rest) = from.strip_prefix(PROMPT) {
                filled.push_str(prompt);
                rest
            } else if let Some(rest) = from.strip_prefix(SYSTEM) {
                filled.push_str(system.unwrap_or_default());
                rest
            } else {
                filled.push('{');
                &from[1..]
            };
        }
        filled + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_filled_once() {
        let template = PromptTemplate::new("S: {system_message}\nU: {prompt} {x} {\nA:").unwrap();
        assert!(template.takes_system());
        assert_eq!(
            template.render("{system_message}?", Some("be {prompt}")),
            "S: be {prompt}\nU: {system_message}? {x} {\nA:"
        );
        assert_eq!(template.render("hi", None), "S: \nU: hi {x} {\nA:");
    }

    #[test]
    fn a_template_has_a_place_for_the_prompt() {
        assert!(matches!(PromptTemplate::new("hi"), Err(Error::NoPlaceForPrompt)));
        let template = PromptTemplate::new("{prompt}{prompt}").unwrap();
        assert!(!template.takes_system());
        assert_eq!(template.render("a", Some("lost")), "aa");
    }
}
