//! Rows of text out of local files: plain text, JSON lines and parquet.
//!
//! Nothing here repairs what it reads. A row that is absent, null or not UTF-8 is an error that
//! names it, because a dataset that is silently shorter shifts every calibration window. The one
//! thing left out is a byte order mark at the start of a file, which is no part of its text.
//!
//! Texts may be as large as they are, but they have an end: pipes, which nobody may write to, and
//! devices are refused.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use gptq_checkpoint::{open_regular, read_small};
use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::error::{Error, Result};

/// UTF-8's byte order mark, which some editors put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Rows of a parquet column that are decoded at a time.
const BATCH: usize = 4096;

/// Bytes without the byte order mark that may stand before them.
pub(crate) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

/// A small file; None where it is absent.
pub(crate) fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>> {
    match read_small(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

/// The whole file, verbatim, as one text.
///
/// # Errors
/// When the file cannot be read or is not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut file = open_regular(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    String::from_utf8(bytes)
        .map_err(|_| Error::NotUtf8 { path: path.to_owned(), place: String::new() })
}

/// The string field `field` of each line's JSON object; blank lines are skipped.
///
/// # Errors
/// When the file cannot be read, or a line is not UTF-8 or has no such string (named by number).
pub(crate) fn read_jsonl(path: &Path, field: &str) -> Result<Vec<String>> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut file = BufReader::new(open_regular(path).map_err(failed)?);
    let (mut rows, mut bytes) = (Vec::new(), Vec::new());
    for number in 1.. {
        bytes.clear();
        if file.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
            break;
        }
        let bytes = if number == 1 { without_mark(&bytes) } else { &bytes };
        let line = std::str::from_utf8(bytes).map_err(|_| Error::NotUtf8 {
            path: path.to_owned(),
            place: format!(" at line {number}"),
        })?;
        let Some(line) = line.lines().next().filter(|line| !line.trim().is_empty()) else {
            continue;
        };
        let text = json_field(line, field).map_err(|reason| Error::JsonLine {
            path: path.to_owned(),
            line: number,
            reason,
        })?;
        rows.push(text);
    }
    Ok(rows)
}

fn json_field(line: &str, field: &str) -> Result<String, String> {
    let mut value: serde_json::Value =
        serde_json::from_str(line).map_err(|error| format!("it is not JSON ({error})"))?;
    let object = value.as_object_mut().ok_or("it is not a JSON object")?;
    match object.get_mut(field) {
        Some(serde_json::Value::String(text)) => Ok(std::mem::take(text)),
        Some(_) => Err(format!("field `{field}` is not a string")),
        None => {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(format!("there is no field `{field}` among {}", names.join(", ")))
        }
    }
}

/// Makes an error of this crate of the decoder's.
pub(crate) fn damaged(path: &Path) -> impl Fn(ParquetError) -> Error {
    move |error| Error::Parquet { path: path.to_owned(), reason: error.to_string() }
}

/// What `decode` makes of a file. The decoder panics at some damage, as at a page that refers to a
/// dictionary which is not there: that is the file's fault.
pub(crate) fn decoded<T>(path: &Path, decode: impl FnOnce() -> Result<T>) -> Result<T> {
    // What was decoded until then is dropped.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(decode)).unwrap_or_else(|_| {
        let reason = "its pages do not fit together".to_owned();
        Err(Error::Parquet { path: path.to_owned(), reason })
    })
}

/// A parquet file and its footer.
pub(crate) fn open_parquet(path: &Path) -> Result<SerializedFileReader<File>> {
    let file =
        open_regular(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    SerializedFileReader::new(file).map_err(damaged(path))
}

/// The text column `column` of a parquet file, in row order.
///
/// # Errors
/// When the file cannot be read or decoded, has no text column of that name, or a row is null or
/// not UTF-8.
pub(crate) fn read_parquet(path: &Path, column: &str) -> Result<Vec<String>> {
    let rows = read_nullable(path, column)?.into_iter().enumerate();
    let text = |(index, text): (usize, Option<String>)| {
        text.ok_or_else(|| Error::NullText {
            path: path.to_owned(),
            row: index + 1,
            column: column.to_owned(),
        })
    };
    rows.map(text).collect()
}

/// As [`read_parquet`], of a column whose rows may be null.
///
/// # Errors
/// As [`read_parquet`], but for nulls.
pub(crate) fn read_nullable(path: &Path, column: &str) -> Result<Vec<Option<String>>> {
    decoded(path, || read_texts(path, column))
}

fn read_texts(path: &Path, column: &str) -> Result<Vec<Option<String>>> {
    let reader = open_parquet(path)?;
    let damaged = damaged(path);
    let index = text_column(&reader, path, column)?;
    let mut rows = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(&damaged)?;
        let ColumnReader::ByteArrayColumnReader(values) =
            group.get_column_reader(index).map_err(&damaged)?
        else {
            // `text_column` admits this physical type alone.
            return Err(column_not_found(&reader, path, column));
        };
        let before = rows.len();
        read_column(values, path, &mut rows)?;
        let (found, promised) = (rows.len() - before, group.metadata().num_rows());
        if i64::try_from(found).ok() != Some(promised) {
            return Err(Error::RowCount { path: path.to_owned(), found, promised });
        }
    }
    Ok(rows)
}

/// Adds all values of one column of a row group to `rows`. How many there are is seen by reading
/// them: the footer's number may be anything.
fn read_column(
    mut reader: ColumnReaderImpl<ByteArrayType>,
    path: &Path,
    rows: &mut Vec<Option<String>>,
) -> Result<()> {
    let mut values: Vec<ByteArray> = Vec::new();
    // For an optional column, level 0 marks a null; for a required one no levels are written.
    let mut levels = Vec::new();
    loop {
        values.clear();
        levels.clear();
        let (records, _, _) = reader
            .read_records(BATCH, Some(&mut levels), None, &mut values)
            .map_err(damaged(path))?;
        if records == 0 {
            return Ok(());
        }
        if levels.is_empty() {
            levels.resize(values.len(), 1);
        }
        let mut values = values.iter();
        for &level in &levels {
            let row = rows.len() + 1;
            let value = if level == 0 { None } else { values.next() };
            let text = value.map(|value| std::str::from_utf8(value.data()).map(str::to_owned));
            rows.push(text.transpose().map_err(|_| Error::NotUtf8 {
                path: path.to_owned(),
                place: format!(" at row {row}"),
            })?);
        }
    }
}

/// The index of the top-level, unrepeated byte-array column named `column`.
fn text_column(reader: &SerializedFileReader<File>, path: &Path, column: &str) -> Result<usize> {
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

fn column_not_found(reader: &SerializedFileReader<File>, path: &Path, column: &str) -> Error {
    let columns = reader.metadata().file_metadata().schema_descr().columns();
    let available: Vec<String> = columns
        .iter()
        .map(|descriptor| format!("{} ({})", descriptor.path(), descriptor.physical_type()))
        .collect();
    Error::ColumnNotFound {
        path: path.to_owned(),
        column: column.to_owned(),
        available: available.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::data_type::Int64Type;
    use parquet::file::metadata::{ParquetMetaDataReader, ParquetMetaDataWriter};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// Writes `text` (None = null) beside an integer column, in two row groups of the same rows.
    fn write_parquet(folder: &Path, text: &[Option<&[u8]>]) -> PathBuf {
        write_compressed(folder, text, Compression::UNCOMPRESSED)
    }

    fn write_compressed(
        folder: &Path,
        text: &[Option<&[u8]>],
        compression: Compression,
    ) -> PathBuf {
        let path = folder.join("rows.parquet");
        let schema = "message rows { REQUIRED INT64 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let file = fs::File::create(&path).unwrap();
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
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
    fn parquet_pages_of_every_codec_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let long = "the same words again ".repeat(500);
        for codec in [
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::BROTLI(Default::default()),
            Compression::LZ4,
            Compression::LZ4_RAW,
            Compression::ZSTD(Default::default()),
        ] {
            let text = [Some(long.as_bytes()), Some(b"end")];
            let path = write_compressed(folder.path(), &text, codec);
            assert!(fs::metadata(&path).unwrap().len() < long.len() as u64, "{codec}");
            assert_eq!(read_parquet(&path, "text").unwrap(), [&long, "end", &long, "end"]);
        }
    }

    /// A footer that promises 2^50 rows, over the pages of a file of six.
    #[test]
    fn a_row_count_that_is_not_true_takes_no_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_parquet(folder.path(), &[Some(b"one"), Some(b"two"), Some(b"three")]);
        let file = fs::File::open(&path).unwrap();
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file).unwrap();
        let groups: Vec<_> = metadata.row_groups().to_vec();
        let lie = |rows| {
            let groups = groups
                .iter()
                .map(|group| group.clone().into_builder().set_num_rows(rows).build().unwrap());
            let metadata = metadata.clone().into_builder().set_row_groups(groups.collect());
            let mut bytes = fs::read(&path).unwrap();
            let footer = bytes.len() - 8;
            let length = u32::from_le_bytes(bytes[footer..footer + 4].try_into().unwrap());
            bytes.truncate(footer - length as usize);
            ParquetMetaDataWriter::new(&mut bytes, &metadata.build()).finish().unwrap();
            let path = folder.path().join("lie.parquet");
            fs::write(&path, bytes).unwrap();
            read_parquet(&path, "text")
        };
        assert_eq!(lie(3).unwrap().len(), 6);
        for rows in [1 << 50, 2, 0] {
            let error = lie(rows).unwrap_err();
            assert!(matches!(error, Error::RowCount { found: 3, .. }), "{rows}: {error}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "\u{feff}a\u{feff}").unwrap();
        assert_eq!(read_text(&path).unwrap(), "a\u{feff}");
        fs::write(&path, "\u{feff}{\"text\": \"a\"}\r\n{\"text\": \"\u{feff}b\"}").unwrap();
        assert_eq!(read_jsonl(&path, "text").unwrap(), ["a", "\u{feff}b"]);
        fs::write(&path, "\u{feff}\n{\"text\": \"a\"}\n").unwrap();
        assert_eq!(read_jsonl(&path, "text").unwrap(), ["a"]);
        fs::write(&path, b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n").unwrap();
        let error = read_jsonl(&path, "text").unwrap_err().to_string();
        assert!(error.ends_with("is not UTF-8 at line 2"), "{error}");
    }

    #[test]
    fn parquet_nulls_and_bad_utf8_name_the_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_parquet(folder.path(), &[Some(b"one"), None]);
        let error = read_parquet(&path, "text").unwrap_err();
        assert!(matches!(error, Error::NullText { row: 2, .. }), "{error}");
        let path = write_parquet(folder.path(), &[Some(b"one"), Some(b"two"), Some(b"\xff\xfe")]);
        let error = read_parquet(&path, "text").unwrap_err().to_string();
        assert!(error.ends_with("is not UTF-8 at row 3"), "{error}");
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
        assert!(matches!(error, Error::Parquet { .. }), "{error}");
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
        assert!(matches!(read_text(&path), Err(Error::NotUtf8 { .. })));
        assert!(matches!(read_text(&folder.path().join("b.txt")), Err(Error::Read { .. })));
    }

    #[test]
    fn what_has_no_end_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let zero = folder.path().join("zero");
        std::os::unix::fs::symlink("/dev/zero", &zero).unwrap();
        for path in [&fifo, &zero] {
            for read in [
                read_text(path).map(drop),
                read_jsonl(path, "text").map(drop),
                read_parquet(path, "text").map(drop),
            ] {
                let Err(Error::Read { path: named, source }) = read else { panic!("{read:?}") };
                assert_eq!((&named, source.to_string().as_str()), (path, "it is no regular file"));
            }
        }
    }
}
