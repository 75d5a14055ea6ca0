//! Jinja as chat templates know it: what transformers adds, and what they take from Python.

use std::fmt;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::to_json::to_json;

/// What a template may spend: an instruction costs one, and so do 64 bytes of text. A conversation of
/// a thousand turns takes a quarter of it; a loop without end is stopped within a second.
const FUEL: u64 = 400_000;

/// What `raise_exception` was given.
#[derive(Debug)]
pub(crate) struct Raised(pub(crate) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment without templates.
pub(crate) fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python_method);
    environment.add_filter("tojson", to_json);
    environment.add_test("sequence", is_sequence);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("cycler", minijinja_contrib::globals::cycler);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    Ok(environment)
}

/// Methods of Python's texts and dictionaries; those of the library, but for the ones that it lacks
/// or has otherwise.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let argument = arguments.first().and_then(Value::as_str);
    match (value.as_str(), method, argument, arguments.len()) {
        (Some(text), "title", None, 0) => Ok(title(text).into()),
        (Some(text), "removeprefix", Some(prefix), 1) => {
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        (Some(text), "removesuffix", Some(suffix), 1) => {
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        _ => unknown_method_callback(state, value, method, arguments),
    }
}

/// As Python has it: a letter is large after anything but a letter.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            titled.extend(c.to_lowercase());
        } else {
            titled.extend(c.to_uppercase());
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    titled
}

fn raise_exception(message: Value, _: Kwargs) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// In Python a text is a sequence, and whatever has a length and items; templates that take contents
/// of several kinds ask for it.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined
    )
}

/// `strftime_now` at a time.
pub(crate) fn strftime_now(now: NaiveDateTime) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        use fmt::Write;
        let mut text = String::new();
        // A format that is none fails while it is written.
        write!(text, "{}", now.format(format)).map_err(|_| {
            let reason = format!("strftime_now cannot write {format:?}");
            Error::new(ErrorKind::InvalidOperation, reason)
        })?;
        Ok(text)
    })
}
