//! JSON files as they are read, and JSON text as Python's `json.dumps(indent=2)` writes it.
//!
//! Published checkpoints were written by Python, and our files should equal them byte for byte.
//! The pretty printer of `serde_json` differs from it in two things. Python writes floats as
//! `1e-05` where Rust writes `1e-5`, and switches to exponents at other magnitudes; and it escapes
//! every character outside printable ASCII.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use crate::small_file::read_small_text;

/// The text of a JSON file, without the byte order mark that some editors put first.
///
/// # Errors
/// Those of [`read_small_text`].
pub fn text(path: &Path) -> io::Result<String> {
    let text = read_small_text(path)?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// `map` with indent 2 and no newline at the end.
pub(crate) fn indented(map: &Map<String, Value>) -> serde_json::Result<String> {
    let mut text = Vec::new();
    map.serialize(&mut Serializer::with_formatter(&mut text, Python(PrettyFormatter::new())))?;
    // All of it is ASCII, so nothing is replaced.
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Python's `repr` of a finite float: shortest digits, exponents below 1e-4 and from 1e16 on.
pub(crate) fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if value != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        // Debug keeps the `.0` of whole numbers, but has exponents of its own for large ones.
        _ => {
            let text = format!("{value}");
            if text.contains('.') { text } else { text + ".0" }
        }
    }
}

struct Python<'a>(PrettyFormatter<'a>);

impl Formatter for Python<'_> {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }

    /// The stretches of a string that `serde_json` escapes nothing in.
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // UTF-16, as JSON has it: two escapes for a character beyond U+FFFF.
        let mut units = [0; 2];
        for character in fragment.chars() {
            if matches!(character, ' '..='~') {
                writer.write_all(&[character as u8])?;
                continue;
            }
            for unit in character.encode_utf16(&mut units) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_look_like_python() {
        for (value, text) in [
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (0.0001, "0.0001"),
            (0.01, "0.01"),
            (0.0, "0.0"),
            (10000.0, "10000.0"),
            (500000.0, "500000.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5, "-2.5"),
            (1e100, "1e+100"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn structure_looks_like_python() {
        let map = serde_json::from_str(r#"{"b":[1,"x"],"a":{},"c":[],"d":1e-5}"#).unwrap();
        assert_eq!(
            indented(&map).unwrap(),
            "{\n  \"b\": [\n    1,\n    \"x\"\n  ],\n  \"a\": {},\n  \"c\": [],\n  \"d\": 1e-05\n}"
        );
    }

    /// `json.dumps({"ü😀": "…"}, indent=2)` of Python 3.
    #[test]
    fn strings_are_escaped_as_python_escapes_them() {
        let text = "ü\u{7f}\u{1f}\n\u{2028}😀/\"\\é€~ <s>";
        let map = Map::from_iter([("ü😀".to_owned(), Value::from(text))]);
        let expected = r#"{
  "\u00fc\ud83d\ude00": "\u00fc\u007f\u001f\n\u2028\ud83d\ude00/\"\\\u00e9\u20ac~ <s>"
}"#;
        assert_eq!(indented(&map).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Map<String, Value>>(expected).unwrap(), map);
    }
}
