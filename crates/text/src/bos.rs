//! What the files beside a tokenizer say of the token that begins a text.

use std::path::Path;

use gptq_checkpoint::{CONFIG_FILE, TEXT_CONFIG};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::text_files::{read_if_present, without_mark};

/// `add_bos_token` of `tokenizer_config.json`, where it is there.
pub(crate) fn adds_bos(folder: &Path) -> Result<Option<bool>> {
    let path = folder.join("tokenizer_config.json");
    match read_field(&path, "add_bos_token")? {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(adds)) => Ok(Some(adds)),
        Some(other) => Err(Error::ConfigInvalid {
            path,
            reason: format!("add_bos_token is {other}, which is neither true nor false"),
        }),
    }
}

/// The BOS of `tokenizer_config.json` by its text, or else of `config.json` by its number.
///
/// An explicit null in the former is an answer: several models list a BOS number in `config.json`
/// that their tokenizer never uses.
pub(crate) fn find_bos(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<u32>> {
    const KEY: &str = "bos_token_id";
    let path = folder.join("tokenizer_config.json");
    if let Some(token) = read_field(&path, "bos_token")? {
        // A plain string, or a description of an added token with the string as its content.
        let content = match &token {
            Value::Null => return Ok(None),
            Value::Object(added) => added.get("content").and_then(Value::as_str),
            other => other.as_str(),
        };
        let Some(content) = content else {
            return Err(Error::ConfigInvalid {
                path,
                reason: format!("bos_token is {token}, which is not a token's text"),
            });
        };
        return match tokenizer.token_to_id(content) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::ConfigInvalid {
                path,
                reason: format!("bos_token `{content}` is not in tokenizer.json"),
            }),
        };
    }
    let path = folder.join(CONFIG_FILE);
    let is_said = |value: &Value| !value.is_null();
    let value = match read_field(&path, KEY)?.filter(is_said) {
        // Of a multimodal model the language model may say it.
        None => read_field(&path, TEXT_CONFIG)?.and_then(|text| text.get(KEY).cloned()),
        said => said,
    };
    let Some(value) = value.filter(is_said) else { return Ok(None) };
    match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::ConfigInvalid {
            path,
            reason: format!("{KEY} is {value}, which is not a token"),
        }),
    }
}

/// One field of a JSON object in a file; None where the file or the field is absent.
fn read_field(path: &Path, field: &str) -> Result<Option<Value>> {
    let Some(bytes) = read_if_present(path)? else { return Ok(None) };
    let invalid = |reason: String| Error::ConfigInvalid { path: path.to_owned(), reason };
    match serde_json::from_slice(without_mark(&bytes))
        .map_err(|error| invalid(error.to_string()))?
    {
        Value::Object(mut object) => Ok(object.remove(field)),
        _ => Err(invalid("it is not a JSON object".to_owned())),
    }
}
