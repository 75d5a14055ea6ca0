//! What single tokens look like.

use std::sync::Arc;

use gptq_text::tokens::TextTokenizer;

/// The texts of tokens as they stand within a text, the space before a word with them.
pub(crate) struct TokenTexts {
    tokenizer: Arc<TextTokenizer>,
    /// Tokens that stand before the one that is looked at, and their text.
    anchor: Vec<u32>,
    anchor_text: String,
}

impl TokenTexts {
    pub(crate) fn new(tokenizer: Arc<TextTokenizer>) -> Self {
        // Any text does; a tokenizer that knows no letter has nothing before its tokens.
        let anchor = tokenizer.encode_chat("a").unwrap_or_default();
        let anchor_text = tokenizer.decode(&anchor, true).unwrap_or_default();
        Self { tokenizer, anchor, anchor_text }
    }

    pub(crate) fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// The bytes that a token gives to a text: none of a special one. `first` has no text before it.
    pub(crate) fn text_bytes(&self, id: u32, first: bool) -> Vec<u8> {
        if self.tokenizer.is_special(id) {
            return Vec::new();
        }
        let text = if first { self.alone(id) } else { self.after_anchor(id) };
        if !text.contains(char::REPLACEMENT_CHARACTER) {
            return text.into_bytes();
        }
        // Part of a character, which only the vocabulary knows.
        let token = self.tokenizer.id_to_token(id).unwrap_or_default();
        byte_token(&token)
            .map(|byte| vec![byte])
            .or_else(|| token.chars().map(byte_of_letter).collect())
            .unwrap_or_else(|| text.into_bytes())
    }

    /// The bytes by which a token is shown: a special one by its name.
    pub(crate) fn shown_bytes(&self, id: u32) -> Vec<u8> {
        if self.tokenizer.is_special(id) {
            return self.tokenizer.id_to_token(id).unwrap_or_default().into_bytes();
        }
        self.text_bytes(id, false)
    }

    /// A token as a string: as OpenAI has it, parts of characters as `bytes:\xe2\x80`.
    pub(crate) fn shown(&self, id: u32) -> String {
        String::from_utf8(self.shown_bytes(id)).unwrap_or_else(|error| {
            let mut text = "bytes:".to_owned();
            error.as_bytes().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
            text
        })
    }

    fn alone(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], true).unwrap_or_default()
    }

    fn after_anchor(&self, id: u32) -> String {
        let both: Vec<u32> = self.anchor.iter().copied().chain([id]).collect();
        let text = self.tokenizer.decode(&both, true).unwrap_or_default();
        text.strip_prefix(&self.anchor_text).map_or_else(|| self.alone(id), str::to_owned)
    }
}

/// `<0xE2>`.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2)?;
    u8::from_str_radix(hex, 16).ok()
}

/// The byte that a letter stands for in vocabularies of the kind of GPT-2: printable ones stand for
/// themselves, and the others, in order, are the letters from U+0100 on.
fn byte_of_letter(letter: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    match u32::from(letter) {
        code @ 0..=255 => u8::try_from(code).ok().filter(printable),
        code => (0..=255).filter(|byte| !printable(byte)).nth(code as usize - 256),
    }
}

/// Counts the characters of a text of which bytes come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Offset {
    /// Characters that have begun.
    pub(crate) characters: usize,
}

impl Offset {
    /// Where a token begins whose bytes come next: within the last character, or after it.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> usize {
        let continues = |byte: &u8| byte & 0xc0 == 0x80;
        let inside = bytes.first().is_some_and(continues);
        let at = self.characters.saturating_sub(usize::from(inside));
        self.characters += bytes.iter().filter(|byte| !continues(byte)).count();
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_stand_for_bytes() {
        assert_eq!(byte_of_letter('a'), Some(b'a'));
        assert_eq!(byte_of_letter('Ġ'), Some(b' '));
        assert_eq!(byte_of_letter('Ċ'), Some(b'\n'));
        assert_eq!(byte_of_letter('â'), Some(0xe2));
        assert_eq!(byte_of_letter('Ń'), Some(0xad));
        assert_eq!(byte_of_letter('ń'), None);
        let bytes: Option<Vec<u8>> = "âĢĻ".chars().map(byte_of_letter).collect();
        assert_eq!(bytes.unwrap(), "’".as_bytes());
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xZZ>"), None);
    }

    #[test]
    fn offsets_count_characters() {
        let mut offset = Offset::default();
        let parts: [&[u8]; 5] = [b"a", &[0xe2, 0x80], &[0x99], b"", b"bc"];
        assert_eq!(parts.map(|bytes| offset.take(bytes)), [0, 1, 1, 2, 2]);
        assert_eq!(offset.characters, 4);
    }
}
