//! Typed access to the keys of config.json, with errors that name them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of a file, or of an object in it.
pub(crate) struct Fields<'a> {
    pub(crate) raw: &'a Map<String, Value>,
    pub(crate) file: &'a Path,
    /// What keys of a nested object are named after in messages, such as `rope_scaling.`.
    pub(crate) within: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(raw: &'a Map<String, Value>, file: &'a Path) -> Self {
        Self { raw, file, within: "" }
    }

    pub(crate) fn invalid(&self, key: &str, reason: String) -> Error {
        let key = format!("{}{key}", self.within);
        Error::InvalidConfig { path: self.file.to_owned(), key, reason }
    }

    pub(crate) fn unsupported(&self, key: &str, value: &Value, supported: &'static str) -> Error {
        let (path, key) = (self.file.to_owned(), format!("{}{key}", self.within));
        Error::UnsupportedConfig { path, key, value: value.to_string(), supported }
    }

    /// A key that is there and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.raw.get(key).filter(|value| !value.is_null())
    }

    /// A size from 1 to `max`.
    pub(crate) fn size(&self, key: &str, default: Option<usize>, max: u64) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| self.invalid(key, "is missing".to_owned()));
        };
        match value.as_u64() {
            Some(size) if (1..=max).contains(&size) => Ok(size as usize),
            _ => Err(self.invalid(key, format!("is `{value}`, expected 1 to {max}"))),
        }
    }

    /// A finite number above zero; `None` where the key is absent or null.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.invalid(key, format!("is `{value}`, expected a positive number"))),
        }
    }

    /// As [`Self::positive`], for a key that has to be there.
    pub(crate) fn required(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.invalid(key, "is missing".to_owned()))
    }

    /// A boolean; absent and null are false.
    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value
            .as_bool()
            .ok_or_else(|| self.invalid(key, format!("is `{value}`, expected a boolean")))
    }

    /// A token id; `None` where the key is absent or null.
    pub(crate) fn token(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| self.invalid(key, format!("is `{value}`, expected an id")))
    }
}
