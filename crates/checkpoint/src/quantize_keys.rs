//! How settings are read from the places that may say them: names of keys, types, and what two places
//! contradict each other in.

use std::path::Path;

use serde_json::{Map, Value};

use crate::names::is_file_name;
use crate::{Bits, CheckpointFormat, Error, GroupSize, MAX_GROUP_SIZE, Result};

/// The key of config.json that holds the settings.
pub(crate) const OBJECT: &str = "quantization_config";

/// The places that say how a checkpoint is quantized: one, or two that complete each other.
pub(crate) struct Sources<'a> {
    pub(crate) keys: Vec<Keys<'a>>,
    /// Whether they may not contradict each other.
    pub(crate) agreeing: bool,
}

/// A setting, and the key that says it.
pub(crate) type Keyed<T> = (&'static str, T);

impl<'a> Sources<'a> {
    /// What the places say of a setting: `None` where none does.
    pub(crate) fn merged<T: PartialEq>(
        &self,
        read: impl Fn(&Keys<'a>) -> Result<Option<Keyed<T>>>,
    ) -> Result<Option<T>> {
        let mut found: Option<(&Keys<'a>, Keyed<T>)> = None;
        for keys in &self.keys {
            let Some((key, value)) = read(keys)? else { continue };
            match &found {
                Some((first, (first_key, other))) if *other != value && self.agreeing => {
                    let (mine, theirs) = (first.shown(first_key), keys.shown(key));
                    let reason = format!(
                        "is `{mine}`, but `{key}` in {} is `{theirs}`: correct the wrong one",
                        keys.place
                    );
                    let (path, key) = (first.file.to_owned(), (*first_key).to_owned());
                    return Err(Error::ContradictingConfig { path, key, reason });
                }
                Some(_) => {}
                None => found = Some((keys, (key, value))),
            }
        }
        Ok(found.map(|(_, (_, value))| value))
    }

    /// What the first place that says a setting says of it.
    pub(crate) fn first<T>(
        &self,
        read: impl Fn(&Keys<'a>) -> Result<Option<Keyed<T>>>,
    ) -> Result<Option<T>> {
        let found = self.keys.iter().find_map(|keys| read(keys).transpose()).transpose()?;
        Ok(found.map(|(_, value)| value))
    }

    /// The error of a key that has to be there; one of the names that others give it is pointed out.
    pub(crate) fn missing(&self, key: &str, others: &[&str]) -> Error {
        let renamed = |keys: &Keys<'_>| others.iter().find(|other| keys.get(other).is_some());
        let found = self.keys.iter().find_map(|keys| Some((keys, renamed(keys)?)));
        let instead = found.map(|(_, other)| format!("; `{other}` is there instead"));
        // There is one at least.
        let keys = found.map_or(&self.keys[0], |(keys, _)| keys);
        keys.invalid(key, format!("is missing{}", instead.unwrap_or_default()))
    }
}

/// Typed access to the keys of one place, with errors that name them.
pub(crate) struct Keys<'a> {
    pub(crate) map: &'a Map<String, Value>,
    pub(crate) file: &'a Path,
    /// The place, for messages about another one.
    pub(crate) place: String,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn invalid(&self, key: &str, reason: String) -> Error {
        Error::InvalidConfig { path: self.file.to_owned(), key: key.to_owned(), reason }
    }

    /// A value as it is written, but for the quotes of a word.
    fn shown(&self, key: &str) -> String {
        match self.map.get(key) {
            Some(Value::String(word)) => word.clone(),
            other => other.unwrap_or(&Value::Null).to_string(),
        }
    }

    /// Refuses what would give the tensors another meaning.
    pub(crate) fn check(&self) -> Result<()> {
        self.only("quant_method", |v| v == "gptq", "`gptq`")?;
        self.only("is_marlin_format", |v| v == false, "`false`")?;
        self.only("lm_head", |v| v == false, "`false`")?;
        self.only(
            "dynamic",
            |v| v.as_object().is_some_and(Map::is_empty),
            "the same for all linears",
        )?;
        self.only("pack_dtype", |v| v == "int32", "`int32`")
    }

    /// Refuses a key with any value but the accepted ones; absent is fine.
    fn only(&self, key: &str, ok: impl Fn(&Value) -> bool, supported: &'static str) -> Result<()> {
        let Some(value) = self.get(key).filter(|value| !ok(value)) else { return Ok(()) };
        let (path, key) = (self.file.to_owned(), key.to_owned());
        Err(Error::UnsupportedConfig { path, key, value: value.to_string(), supported })
    }

    pub(crate) fn typed<T>(
        &self,
        key: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Keyed<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.invalid(key, format!("is `{value}`, of the wrong type"));
        Ok(Some((key, read(value).ok_or_else(wrong)?)))
    }

    /// How zeros are stored, with the key that says so: `checkpoint_format` in GPTQModel's files,
    /// `format` in optimum's.
    pub(crate) fn format(&self) -> Result<Option<Keyed<CheckpointFormat>>> {
        let mut found: Option<Keyed<CheckpointFormat>> = None;
        for key in ["checkpoint_format", "format"] {
            self.only(key, |v| v == "gptq" || v == "gptq_v2", "`gptq` or `gptq_v2`")?;
            let Some(value) = self.get(key) else { continue };
            let v2 = value == "gptq_v2";
            let format = if v2 { CheckpointFormat::GptqV2 } else { CheckpointFormat::Gptq };
            match found {
                Some((first, other)) if other != format => {
                    let (mine, other) = (format.name(), other.name());
                    let reason = format!("is `{mine}`, but `{first}` is `{other}`");
                    return Err(self.invalid(key, reason));
                }
                Some(_) => {}
                None => found = Some((key, format)),
            }
        }
        Ok(found)
    }

    /// The linears that are quantized, sorted: a list of names, or of lists that were solved
    /// together.
    pub(crate) fn modules(&self) -> Result<Option<Keyed<Vec<String>>>> {
        let key = "modules_in_block_to_quantize";
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.invalid(key, format!("is `{value}`, expected lists of names"));
        let mut names = Vec::new();
        for entry in value.as_array().ok_or_else(wrong)? {
            let several = match entry {
                Value::Array(several) => several.as_slice(),
                one => std::slice::from_ref(one),
            };
            for name in several {
                names.push(name.as_str().ok_or_else(wrong)?.to_owned());
            }
        }
        names.sort();
        names.dedup();
        Ok(Some((key, names)))
    }

    pub(crate) fn bits(&self) -> Result<Option<Keyed<Bits>>> {
        let key = "bits";
        let Some(value) = self.get(key) else { return Ok(None) };
        let bits = value.as_u64().and_then(|bits| u8::try_from(bits).ok());
        bits.and_then(|bits| Bits::new(bits).ok())
            .map(|bits| Some((key, bits)))
            .ok_or_else(|| self.invalid(key, format!("is `{value}`, expected 2, 3, 4 or 8")))
    }

    pub(crate) fn group_size(&self) -> Result<Option<Keyed<Option<usize>>>> {
        let key = "group_size";
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_i64().map(|number| number.to_string());
        let size = number.and_then(|number| number.parse().ok()).map(|GroupSize(size)| size);
        size.map(|size| Some((key, size))).ok_or_else(|| {
            let reason = format!("is `{value}`, expected -1, or 1 to {MAX_GROUP_SIZE}");
            self.invalid(key, reason)
        })
    }

    /// A base name becomes a path, so it has to be a plain file name.
    pub(crate) fn base_name(&self) -> Result<Option<Keyed<String>>> {
        let key = "model_file_base_name";
        let Some(value) = self.get(key) else { return Ok(None) };
        let name = value.as_str().filter(|name| is_file_name(name)).map(str::to_owned);
        name.map(|name| Some((key, name)))
            .ok_or_else(|| self.invalid(key, format!("is `{value}`, expected a plain file name")))
    }
}
