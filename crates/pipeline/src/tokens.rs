//! From text to tokens, with the tokeniser that lies beside a checkpoint.
//!
//! A corpus is encoded as one string and once, as the reference scripts do: encoding it in pieces
//! would put a BOS before each and split words at the seams, which moves every window.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::text_error::TextError;

/// A checkpoint's tokeniser, tied to the vocabulary of the model that will read its tokens.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    folder: PathBuf,
    vocab_size: usize,
    bos: Option<u32>,
}

impl TextTokenizer {
    /// Loads `tokenizer.json` from a checkpoint folder and finds its BOS token.
    ///
    /// `vocab_size` is the number of rows of the model's embedding.
    ///
    /// # Errors
    /// When `tokenizer.json` is absent or invalid, or when the configuration files beside it are
    /// invalid or name a BOS token that the tokeniser does not know.
    pub fn open(folder: &Path, vocab_size: usize) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        let Some(bytes) = read_if_present(&path)? else {
            return Err(TextError::TokenizerMissing { folder: folder.to_owned() });
        };
        let invalid = |error: tokenizers::Error| TextError::TokenizerInvalid {
            path: path.clone(),
            reason: error.to_string(),
        };
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(invalid)?;
        // Some checkpoints ship a tokeniser set up for training batches; a corpus must neither be
        // cut to their length nor filled up to it.
        tokenizer.with_truncation(None).map_err(invalid)?;
        tokenizer.with_padding(None);
        let bos = find_bos(folder, &tokenizer)?;
        Ok(Self { tokenizer, folder: folder.to_owned(), vocab_size, bos })
    }

    /// The BOS token of the model, if it has one. That encoding a text begins with it is not
    /// implied: some tokenisers know a BOS and add none.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Encodes a text in one call, with the special tokens the tokeniser adds by itself.
    ///
    /// # Errors
    /// When the tokeniser fails, or gives a token that the model has no embedding for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|error| {
            TextError::Encode { folder: self.folder.clone(), reason: error.to_string() }
        })?;
        let ids = encoding.get_ids();
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&token) => Err(TextError::TokenOutsideVocabulary {
                folder: self.folder.clone(),
                token,
                vocab_size: self.vocab_size,
            }),
            None => Ok(ids.to_vec()),
        }
    }
}

/// The BOS of `tokenizer_config.json` by its text, or else of `config.json` by its number.
///
/// An explicit null in the former is an answer: several models list a BOS number in `config.json`
/// that their tokeniser never uses.
fn find_bos(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<u32>, TextError> {
    let path = folder.join("tokenizer_config.json");
    if let Some(token) = read_field(&path, "bos_token")? {
        // A plain string, or a description of an added token with the string as its content.
        let content = match &token {
            Value::Null => return Ok(None),
            Value::Object(added) => added.get("content").and_then(Value::as_str),
            other => other.as_str(),
        };
        let Some(content) = content else {
            return Err(TextError::ConfigInvalid {
                path,
                reason: format!("bos_token is {token}, which is not a token's text"),
            });
        };
        return match tokenizer.token_to_id(content) {
            Some(id) => Ok(Some(id)),
            None => Err(TextError::ConfigInvalid {
                path,
                reason: format!("bos_token `{content}` is not in tokenizer.json"),
            }),
        };
    }
    let path = folder.join("config.json");
    match read_field(&path, "bos_token_id")? {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(TextError::ConfigInvalid {
                path,
                reason: format!("bos_token_id is {value}, which is not a token"),
            }),
        },
    }
}

/// One field of a JSON object in a file; None where the file or the field is absent.
fn read_field(path: &Path, field: &str) -> Result<Option<Value>, TextError> {
    let Some(bytes) = read_if_present(path)? else { return Ok(None) };
    let invalid = |reason: String| TextError::ConfigInvalid { path: path.to_owned(), reason };
    match serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))? {
        Value::Object(mut object) => Ok(object.remove(field)),
        _ => Err(invalid("it is not a JSON object".to_owned())),
    }
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match fs::read(path) {
        // Some editors put a byte order mark first, which JSON does not know.
        Ok(bytes) => Ok(Some(match bytes.strip_prefix(b"\xef\xbb\xbf") {
            Some(rest) => rest.to_vec(),
            None => bytes,
        })),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words a, b, c and `<s>`, with a truncation that must not apply and a BOS that is added.
    const TOKENIZER: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1, "b": 2, "c": 3},
                  "unk_token": "a"}
    }"#;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn bos(files: &[(&str, &str)]) -> Result<Option<u32>, TextError> {
        let folder = folder(files);
        fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        TextTokenizer::open(folder.path(), 4).map(|tokenizer| tokenizer.bos())
    }

    #[test]
    fn a_text_is_neither_truncated_nor_padded() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 4).unwrap();
        assert_eq!(tokenizer.encode("c b a b").unwrap(), [0, 3, 2, 1, 2]);
        assert_eq!(tokenizer.encode(&"a ".repeat(20)).unwrap().len(), 21);
    }

    #[test]
    fn tokens_beyond_the_vocabulary_are_refused() {
        let folder = folder(&[("tokenizer.json", TOKENIZER)]);
        let tokenizer = TextTokenizer::open(folder.path(), 3).unwrap();
        assert_eq!(tokenizer.encode("a b").unwrap(), [0, 1, 2]);
        let error = tokenizer.encode("a b c").unwrap_err();
        assert!(
            matches!(error, TextError::TokenOutsideVocabulary { token: 3, vocab_size: 3, .. }),
            "{error}"
        );
    }

    #[test]
    fn bos_comes_from_the_tokenizer_config_first() {
        let config = ("config.json", r#"{"bos_token_id": 3}"#);
        let tokenizer = |content| [("tokenizer_config.json", content), config];
        assert_eq!(bos(&[]).unwrap(), None);
        assert_eq!(bos(&[config]).unwrap(), Some(3));
        assert_eq!(bos(&[("config.json", r#"{"bos_token_id": null}"#)]).unwrap(), None);
        assert_eq!(bos(&tokenizer("{}")).unwrap(), Some(3));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": "<s>"}"#)).unwrap(), Some(0));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": {"content": "b"}}"#)).unwrap(), Some(2));
        assert_eq!(bos(&tokenizer(r#"{"bos_token": null}"#)).unwrap(), None);
    }

    #[test]
    fn a_wrong_bos_names_the_file() {
        for (file, content) in [
            ("tokenizer_config.json", r#"{"bos_token": "<bos>"}"#),
            ("tokenizer_config.json", r#"{"bos_token": 1}"#),
            ("tokenizer_config.json", "[]"),
            ("config.json", r#"{"bos_token_id": -1}"#),
            ("config.json", "{"),
        ] {
            let error = bos(&[(file, content)]).unwrap_err();
            assert!(matches!(error, TextError::ConfigInvalid { .. }), "{content}: {error}");
            assert!(error.to_string().contains(file), "{error}");
        }
    }

    #[test]
    fn an_absent_or_broken_tokenizer_says_what_is_needed() {
        let absent = TextTokenizer::open(folder(&[]).path(), 4).map(|_| ()).unwrap_err();
        assert!(absent.to_string().contains("has no tokenizer.json, which is needed"));
        let broken = folder(&[("tokenizer.json", "{}")]);
        let error = TextTokenizer::open(broken.path(), 4).map(|_| ()).unwrap_err();
        assert!(matches!(error, TextError::TokenizerInvalid { .. }), "{error}");
    }
}
