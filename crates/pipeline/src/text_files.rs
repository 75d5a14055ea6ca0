//! Rows of text out of local files: plain text, JSON lines and parquet.
//!
//! Nothing here repairs what it reads. A row that is absent, null or not UTF-8 is an error that
//! names it, because a dataset that is silently shorter shifts every calibration window.

use std::fs;
use std::path::Path;

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::text_error::TextError;

/// The whole file, verbatim, as one text.
///
/// # Errors
/// When the file cannot be read or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String, TextError> {
    let bytes =
        fs::read(path).map_err(|source| TextError::Read { path: path.to_owned(), source })?;
    String::from_utf8(bytes)
        .map_err(|_| TextError::NotUtf8 { path: path.to_owned(), place: String::new() })
}

/// The string field `field` of each line's JSON object; blank lines are skipped.
///
/// # Errors
/// When the file cannot be read, is not UTF-8, or a line has no such string (named by number).
pub(crate) fn read_jsonl(path: &Path, field: &str) -> Result<Vec<String>, TextError> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            json_field(line, field).map_err(|reason| TextError::JsonLine {
                path: path.to_owned(),
                line: index + 1,
                reason,
            })
        })
        .collect()
}

fn json_field(line: &str, field: &str) -> Result<String, String> {
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|error| format!("it is not JSON ({error})"))?;
    let object = value.as_object().ok_or("it is not a JSON object")?;
    match object.get(field) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("field `{field}` is not a string")),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(format!("there is no field `{field}` among {}", names.join(", ")))
        }
    }
}

/// The text column `column` of a parquet file, in row order.
///
/// # Errors
/// When the file cannot be read or decoded, has no text column of that name, or a row is null or
/// not UTF-8.
pub(crate) fn read_parquet(path: &Path, column: &str) -> Result<Vec<String>, TextError> {
    let file =
        fs::File::open(path).map_err(|source| TextError::Read { path: path.to_owned(), source })?;
    let damaged = |source| TextError::Parquet { path: path.to_owned(), source };
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let index = text_column(&reader, path, column)?;
    let mut rows = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(damaged)?;
        let count = usize::try_from(group.metadata().num_rows()).unwrap_or(0);
        let ColumnReader::ByteArrayColumnReader(values) =
            group.get_column_reader(index).map_err(damaged)?
        else {
            // `text_column` admits this physical type alone.
            return Err(column_not_found(&reader, path, column));
        };
        let first_row = rows.len() + 1;
        for (offset, value) in
            read_column(values, count, path, column, first_row)?.iter().enumerate()
        {
            let text = std::str::from_utf8(value.data()).map_err(|_| TextError::NotUtf8 {
                path: path.to_owned(),
                place: format!(" at row {}", first_row + offset),
            })?;
            rows.push(text.to_owned());
        }
    }
    Ok(rows)
}

/// All `count` values of one column of a row group; `first_row` is the number of its first row.
fn read_column(
    mut reader: ColumnReaderImpl<ByteArrayType>,
    count: usize,
    path: &Path,
    column: &str,
    first_row: usize,
) -> Result<Vec<ByteArray>, TextError> {
    let mut values = Vec::with_capacity(count);
    // For an optional column, level 0 marks a null; for a required one no levels are written.
    let mut levels = Vec::new();
    loop {
        let (records, _, _) = reader
            .read_records(count, Some(&mut levels), None, &mut values)
            .map_err(|source| TextError::Parquet { path: path.to_owned(), source })?;
        if records == 0 {
            break;
        }
    }
    match levels.iter().position(|&level| level == 0) {
        Some(offset) => Err(TextError::NullText {
            path: path.to_owned(),
            row: first_row + offset,
            column: column.to_owned(),
        }),
        None => Ok(values),
    }
}

/// The index of the top-level, unrepeated byte-array column named `column`.
fn text_column(
    reader: &SerializedFileReader<fs::File>,
    path: &Path,
    column: &str,
) -> Result<usize, TextError> {
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    columns
        .iter()
        .position(|descriptor| {
            descriptor.path().parts() == [column]
                && descriptor.physical_type() == PhysicalType::BYTE_ARRAY
                && descriptor.max_rep_level() == 0
        })
        .ok_or_else(|| column_not_found(reader, path, column))
}

fn column_not_found(
    reader: &SerializedFileReader<fs::File>,
    path: &Path,
    column: &str,
) -> TextError {
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let available: Vec<String> = columns
        .iter()
        .map(|descriptor| format!("{} ({})", descriptor.path(), descriptor.physical_type()))
        .collect();
    TextError::ColumnNotFound {
        path: path.to_owned(),
        column: column.to_owned(),
        available: available.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use parquet::data_type::Int64Type;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// Writes `text` (None = null) beside an integer column, in two row groups of the same rows.
    fn write_parquet(folder: &Path, text: &[Option<&[u8]>]) -> PathBuf {
        let path = folder.join("rows.parquet");
        let schema = "message rows { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = fs::File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
        let ids: Vec<i64> = (0..text.len() as i64).collect();
        let values: Vec<ByteArray> =
            text.iter().flatten().map(|&bytes| ByteArray::from(bytes.to_vec())).collect();
        let levels: Vec<i16> = text.iter().map(|value| i16::from(value.is_some())).collect();
        for _ in 0..2 {
            let mut group = writer.next_row_group().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
        path
    }

    #[test]
    fn parquet_rows_come_in_order_across_row_groups() {
        let folder = tempfile::tempdir().unwrap();
        let path =
            write_parquet(folder.path(), &[Some(b"one\n"), Some(b""), Some("zwölf".as_bytes())]);
        let rows = read_parquet(&path, "text").unwrap();
        assert_eq!(rows, ["one\n", "", "zwölf", "one\n", "", "zwölf"]);
    }

    #[test]
    fn parquet_nulls_and_bad_utf8_name_the_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_parquet(folder.path(), &[Some(b"one"), None]);
        let error = read_parquet(&path, "text").unwrap_err();
        assert!(matches!(error, TextError::NullText { row: 2, .. }), "{error}");
        let path = write_parquet(folder.path(), &[Some(b"one"), Some(b"two"), Some(b"\xff\xfe")]);
        let error = read_parquet(&path, "text").unwrap_err().to_string();
        assert!(error.ends_with("is not UTF-8 at row 3; convert it first"), "{error}");
    }

    #[test]
    fn parquet_without_the_column_lists_the_columns() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_parquet(folder.path(), &[Some(b"one")]);
        for column in ["content", "id"] {
            let error = read_parquet(&path, column).unwrap_err().to_string();
            assert!(error.contains(&format!("no text column `{column}`")), "{error}");
            assert!(error.contains(r#""id" (INT64), "text" (BYTE_ARRAY)"#), "{error}");
        }
        fs::write(&path, "not parquet").unwrap();
        let error = read_parquet(&path, "text").unwrap_err();
        assert!(matches!(error, TextError::Parquet { .. }), "{error}");
    }

    #[test]
    fn jsonl_errors_name_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        fs::write(&path, "{\"text\": \"a\\n\"}\n\n{\"text\": \"b\", \"id\": 1}\n").unwrap();
        assert_eq!(read_jsonl(&path, "text").unwrap(), ["a\n", "b"]);
        for (line, reason) in [
            ("{\"id\": 1, \"body\": \"x\"}", "there is no field `text` among id, body"),
            ("{\"text\": 1}", "field `text` is not a string"),
            ("[1]", "it is not a JSON object"),
            ("{", "it is not JSON (EOF while parsing an object at line 1 column 1)"),
        ] {
            fs::write(&path, format!("{{\"text\": \"a\"}}\n\n{line}\n")).unwrap();
            let error = read_jsonl(&path, "text").unwrap_err().to_string();
            assert_eq!(error, format!("Line 3 of `{}` has no text: {reason}", path.display()));
        }
    }

    #[test]
    fn text_is_verbatim_and_must_be_utf8() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "\n a\r\nb").unwrap();
        assert_eq!(read_text(&path).unwrap(), "\n a\r\nb");
        fs::write(&path, [0x61, 0xff]).unwrap();
        assert!(matches!(read_text(&path), Err(TextError::NotUtf8 { .. })));
        assert!(matches!(read_text(&folder.path().join("b.txt")), Err(TextError::Read { .. })));
    }
}
