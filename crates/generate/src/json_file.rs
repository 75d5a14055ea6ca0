//! JSON objects in the files beside a checkpoint.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object with the file that it came from, which errors name.
#[derive(Clone, Debug)]
pub(crate) struct JsonFile {
    path: PathBuf,
    fields: Map<String, Value>,
    /// What keys are named after in messages, such as `text_config.`.
    within: String,
}

impl JsonFile {
    /// Reads a file; `None` where there is none.
    pub(crate) fn open(path: PathBuf) -> Result<Option<Self>> {
        let Some(text) = read_if_present(&path)? else { return Ok(None) };
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Some(Self { path, fields, within: String::new() })),
            Ok(_) => Err(Error::Invalid { path, reason: "it is not a JSON object".to_owned() }),
            Err(error) => Err(Error::Invalid { path, reason: error.to_string() }),
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A field; one that is null is as if it were absent, as Python's readers of these files have it.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// The object that a field holds, where it holds one.
    pub(crate) fn object(&self, key: &str) -> Option<Self> {
        let fields = self.get(key)?.as_object()?.clone();
        Some(Self { path: self.path.clone(), fields, within: format!("{}{key}.", self.within) })
    }

    /// A field that must be what `read` understands.
    pub(crate) fn read<T>(
        &self,
        key: &str,
        read: impl FnOnce(&Value) -> Option<T>,
        what: &str,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            self.invalid(format!("{}{key} is {value}, which is not {what}", self.within))
        })
    }

    /// The error of what a field says.
    pub(crate) fn invalid(&self, reason: String) -> Error {
        Error::Invalid { path: self.path.clone(), reason }
    }
}

/// The text of a small file without a byte order mark; `None` where there is none.
pub(crate) fn read_if_present(path: &Path) -> Result<Option<String>> {
    match gptq_checkpoint::read_small_text(path) {
        Ok(text) => Ok(Some(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}
