//! The parameters of a request, each of the kind that it has to be.

use gptq_generate::StopStrings;
use serde_json::{Map, Value};

use crate::refusal::Refusal;

/// Stop strings that a request may have, and bytes of each: every new character is held against all.
const MOST_STOPS: usize = 16;
const MOST_STOP_BYTES: usize = 1024;

/// What a body says. A parameter that is null is not said.
#[derive(Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(Refusal::invalid("The body is JSON, but no object")),
            Err(error) => Err(Refusal::invalid(format!("The body is not JSON: {error}"))),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A parameter as `read` understands it; `expected` says what that is.
    pub(crate) fn read<'a, T>(
        &'a self,
        name: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
        expected: &str,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            Refusal::param(name, format!("`{name}` is {}, which is not {expected}", shown(value)))
        })
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        Ok(self.read(name, Value::as_bool, "true or false")?.unwrap_or(false))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>, Refusal> {
        self.read(name, Value::as_f64, "a number")
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, Refusal> {
        self.read(name, Value::as_str, "a string")
    }

    /// A whole number within bounds.
    pub(crate) fn whole(
        &self,
        name: &str,
        least: usize,
        most: usize,
    ) -> Result<Option<usize>, Refusal> {
        let within = |value: &Value| {
            let value = usize::try_from(value.as_u64()?).ok()?;
            (least..=most).contains(&value).then_some(value)
        };
        let expected = match most {
            usize::MAX => format!("a whole number of at least {least}"),
            _ => format!("a whole number from {least} to {most}"),
        };
        self.read(name, within, &expected)
    }

    /// `stop`: a string or some.
    pub(crate) fn stops(&self) -> Result<Vec<String>, Refusal> {
        let text = |value: &Value| {
            value.as_str().filter(|text| text.len() <= MOST_STOP_BYTES).map(str::to_owned)
        };
        let read = |value: &Value| match value {
            Value::Array(stops) if stops.len() <= MOST_STOPS => stops.iter().map(text).collect(),
            Value::Array(_) => None,
            one => text(one).map(|stop| vec![stop]),
        };
        let expected = format!(
            "a string or up to {MOST_STOPS} of them, of up to {MOST_STOP_BYTES} bytes each"
        );
        let stops: Vec<String> = self.read("stop", read, &expected)?.unwrap_or_default();
        StopStrings::new(stops.iter().cloned())
            .map_err(|error| Refusal::param("stop", error.to_string()))?;
        Ok(stops)
    }

    /// All names with values, for those who look for what they do not know.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.0.iter().filter(|(_, value)| !value.is_null())
    }
}

/// A value in an error's sentence.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.len() > 40 => "a string".to_owned(),
        short => short.to_string(),
    }
}
