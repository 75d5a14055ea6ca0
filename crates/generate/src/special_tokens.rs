//! The texts of the tokens that frame a conversation.

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::json_file::JsonFile;

/// The tokens that a chat template may name, as texts; a token that a model has not is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<String>,
    /// Ends a text.
    pub eos: Option<String>,
    /// Stands for what has no token.
    pub unk: Option<String>,
    /// Fills a batch.
    pub pad: Option<String>,
}

impl SpecialTokens {
    /// Reads `tokenizer_config.json`, and for what it does not say `special_tokens_map.json`. In
    /// both, a token is its text or an object with the text as its `content`.
    ///
    /// # Errors
    /// [`Error::Read`](crate::Error::Read) and [`Error::Invalid`](crate::Error::Invalid); an absent
    /// file says nothing.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = Vec::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            files.extend(JsonFile::open(folder.join(name))?);
        }
        let token = |key: &str| -> Result<Option<String>> {
            for file in &files {
                if let Some(token) = file.read(key, content, "a token's text")? {
                    return Ok(Some(token));
                }
            }
            Ok(None)
        };
        Ok(Self {
            bos: token("bos_token")?,
            eos: token("eos_token")?,
            unk: token("unk_token")?,
            pad: token("pad_token")?,
        })
    }
}

fn content(token: &Value) -> Option<String> {
    token.get("content").unwrap_or(token).as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn tokens_are_texts_or_objects_in_either_file() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(SpecialTokens::open(folder.path()).unwrap(), SpecialTokens::default());
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "pad_token": null}"#);
        write("special_tokens_map.json", r#"{"bos_token": "<b>", "eos_token": "</s>"}"#);
        let tokens = SpecialTokens::open(folder.path()).unwrap();
        assert_eq!((tokens.bos.as_deref(), tokens.eos.as_deref()), (Some("<s>"), Some("</s>")));
        assert_eq!((tokens.unk, tokens.pad), (None, None));
        write("tokenizer_config.json", r#"{"unk_token": 3}"#);
        let error = SpecialTokens::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains("unk_token"), "{error}");
    }
}
