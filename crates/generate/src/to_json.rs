//! JSON as Python's `json.dumps` writes it, which models have seen in their training: `tojson` of
//! chat templates.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest nesting that is written: more than any tool's schema has, and less than a stack holds.
const DEEPEST: usize = 200;

/// Bytes that one unit of fuel pays for; as many as for the library's own.
const BYTES_PER_FUEL: usize = 4;

/// The filter: no escapes for HTML, and Python's arguments; the last two, `separators` and
/// `sort_keys`, by their names only.
pub(crate) fn to_json(
    state: &State,
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let argument = |given: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let given = if given.is_some() { given } else { named.get(name)? };
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(ensure_ascii, "ensure_ascii")?;
    let indent = argument(indent, "indent")?.map(|value| indentation(&value)).transpose()?;
    let separators = argument(None, "separators")?;
    let sort_keys = argument(None, "sort_keys")?;
    named.assert_all_used()?;
    let (item, key) = match &separators {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => (text_at(pair, 0)?, text_at(pair, 1)?),
    };
    let mut writer = Writer {
        state,
        written: String::new(),
        paid: 0,
        ascii: ensure_ascii.is_some_and(|value| value.is_true()),
        sorted: sort_keys.is_some_and(|value| value.is_true()),
        indent,
        item,
        key,
    };
    writer.write(value, 0)?;
    Ok(writer.written)
}

fn refused(reason: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

fn indentation(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let spaces = value.as_i64().filter(|spaces| *spaces <= 100);
    let spaces = spaces.ok_or_else(|| refused("tojson cannot indent by that".to_owned()))?;
    Ok(" ".repeat(spaces.max(0) as usize))
}

fn text_at(pair: &Value, place: usize) -> Result<String, Error> {
    let text = pair.get_item_by_index(place)?;
    let text = text.as_str().map(str::to_owned);
    text.ok_or_else(|| refused("separators of tojson are two strings".to_owned()))
}

struct Writer<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    written: String,
    /// Bytes that fuel was taken for.
    paid: usize,
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Writer<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let due = (self.written.len() - self.paid) / BYTES_PER_FUEL;
        self.paid += due * BYTES_PER_FUEL;
        self.state.consume_fuel(due as u64)?;
        if depth > DEEPEST {
            return Err(refused(format!("tojson writes no more than {DEEPEST} levels")));
        }
        match value.kind() {
            ValueKind::None => self.written.push_str("null"),
            ValueKind::Bool => {
                self.written.push_str(if value.is_true() { "true" } else { "false" });
            }
            ValueKind::Number => self.written.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', items.into_iter().map(|item| (None, item)), depth)?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    pairs.push((Some(key_text(&key)?), item));
                }
                if self.sorted {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.list('{', '}', pairs.into_iter(), depth)?;
            }
            other => return Err(refused(format!("tojson cannot write an {other} value"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        items: impl ExactSizeIterator<Item = (Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        let count = items.len();
        self.written.push(open);
        for (place, (key, item)) in items.enumerate() {
            if place > 0 {
                self.written.push_str(&self.item);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.string(&key);
                self.written.push_str(&self.key);
            }
            self.write(&item, depth + 1)?;
        }
        if count > 0 {
            self.line(depth);
        }
        self.written.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.written.push('\n');
            for _ in 0..depth {
                self.written.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.written.push('"');
        for c in text.chars() {
            match c {
                '"' => self.written.push_str("\\\""),
                '\\' => self.written.push_str("\\\\"),
                '\n' => self.written.push_str("\\n"),
                '\r' => self.written.push_str("\\r"),
                '\t' => self.written.push_str("\\t"),
                '\u{8}' => self.written.push_str("\\b"),
                '\u{c}' => self.written.push_str("\\f"),
                c if c < ' ' || self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.written.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.written.push(c),
            }
        }
        self.written.push('"');
    }
}

/// A key as Python makes a text of it.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        other => Err(refused(format!("tojson cannot write a key of kind {other}"))),
    }
}

/// A number as Python's `repr` has it: `1.0`, `1e-05`, `1e+16`.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = power.parse().unwrap_or_default();
    if float == 0.0 || (-4..16).contains(&power) {
        return format!("{float:?}");
    }
    let sign = if power < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", power.abs())
}

#[cfg(test)]
mod tests {
    use minijinja::Value;

    use super::number;

    #[test]
    fn floats_are_pythons() {
        for (float, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123_456_789_012_345.6, "123456789012345.6"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e100, "-2.5e+100"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(number(&Value::from(float)), text);
        }
        assert_eq!(number(&Value::from(-3)), "-3");
    }
}
