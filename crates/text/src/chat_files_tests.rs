//! Tests of conversations out of files; those in parquet were written by pyarrow
//! (`tests/fixtures/chats/make.py`).

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chats").join(name)
}

fn parquet(path: &Path, column: Option<&str>) -> Result<Vec<Vec<Message>>> {
    let mut chats = Vec::new();
    chats_of_parquet(path, column, &mut chats)?;
    Ok(chats)
}

fn said(chat: &[Message]) -> Vec<(&str, &str)> {
    chat.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect()
}

#[test]
fn lists_of_messages_are_read_by_their_levels() {
    let chats = parquet(&fixture("messages.parquet"), None).unwrap();
    assert_eq!(chats.len(), 3);
    assert_eq!(
        said(&chats[0]),
        [("system", "Be brief."), ("user", "What is a hill?"), ("assistant", "A small mountain.")]
    );
    assert_eq!(said(&chats[1]), [("user", "Zwölf?"), ("assistant", "12")]);
    // In a row group of its own.
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    assert_eq!(said(&chats[2]), turns);
}

#[test]
fn lists_of_each_field_are_lists_of_messages() {
    let error = parquet(&fixture("sequences.parquet"), None).unwrap_err().to_string();
    assert!(error.starts_with("Row 3 of `") && error.contains("not as many roles as"), "{error}");
    let mut chats = Vec::new();
    chats_of_parquet(&fixture("sequences.parquet"), None, &mut chats).unwrap_err();
    assert_eq!(said(&chats[0]), [("user", "Q"), ("assistant", "A")]);
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    assert_eq!(said(&chats[1]), turns);
}

#[test]
fn prompts_and_completions_may_be_lists_and_a_system_column_begins() {
    let chats = parquet(&fixture("completions.parquet"), None).unwrap();
    let turns = [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ];
    assert_eq!(said(&chats[0]), turns);
    assert_eq!(said(&chats[1]), [("user", "Q"), ("assistant", "A")]);
    assert_eq!(said(&chats[2]), [("system", "S"), ("user", "Q"), ("assistant", "A")]);
}

#[test]
fn a_row_without_messages_is_named() {
    let error = parquet(&fixture("conversations.parquet"), None).unwrap_err().to_string();
    assert!(error.starts_with("Row 2 of `") && error.ends_with("it has no messages"), "{error}");
}

#[test]
fn an_answer_may_be_null_and_a_question_not() {
    let mut chats = Vec::new();
    let error = chats_of_parquet(&fixture("calls.parquet"), None, &mut chats).unwrap_err();
    let error = error.to_string();
    assert!(error.starts_with("Row 3 of `") && error.ends_with("message 1 has no text"), "{error}");
    let turns = [("user", "Q"), ("assistant", ""), ("tool", "T"), ("assistant", "A")];
    assert_eq!(said(&chats[0]), turns);
    assert_eq!(said(&chats[1]), [("user", "Q"), ("assistant", "A")]);
}

#[test]
fn columns_that_hold_no_conversations_are_named() {
    let error = parquet(&fixture("messages.parquet"), Some("turns")).unwrap_err();
    assert!(error.to_string().ends_with("columns prompt, messages is turns"), "{error}");
    assert!(error.hint().unwrap().contains("#COLUMN"));
    let error = parquet(&fixture("messages.parquet"), Some("prompt")).unwrap_err();
    assert!(matches!(error, Error::NoMessages { .. }), "{error}");
}

/// Writes rows of texts, by column.
fn write(path: &Path, columns: &[(&str, &[&str])]) {
    let fields: String =
        columns.iter().map(|(name, _)| format!("REQUIRED BYTE_ARRAY {name} (UTF8); ")).collect();
    let schema = Arc::new(parse_message_type(&format!("message rows {{ {fields} }}")).unwrap());
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (_, texts) in columns {
        let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn columns_of_prompts_and_responses_are_conversations() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let (asked, about, answered) = (["Q", "Sum up"], ["", "T"], ["A", "S"]);
    write(&path, &[("instruction", &asked), ("output", &answered), ("input", &about)]);
    let chats = parquet(&path, None).unwrap();
    assert_eq!(said(&chats[0]), [("user", "Q"), ("assistant", "A")]);
    assert_eq!(said(&chats[1]), [("user", "Sum up\n\nT"), ("assistant", "S")]);
    write(&path, &[("text", &asked)]);
    let error = parquet(&path, None).unwrap_err().to_string();
    assert!(error.contains("none of its columns text is messages, conversations"), "{error}");
}

#[test]
fn lines_are_conversations_and_errors_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let good = "{\"prompt\": \"Q\", \"response\": \"A\"}";
    fs::write(&path, format!("\u{feff}{good}\r\n\n{good}")).unwrap();
    assert_eq!(chats_of_jsonl(&path, None).unwrap().len(), 2);
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(500), "]".repeat(500));
    for (line, reason) in [
        ("{\"text\": 1}", "none of its fields text"),
        ("{", "it is not JSON (EOF"),
        (&deep, "recursion limit"),
        ("\u{1}", "it is not JSON"),
    ] {
        fs::write(&path, format!("{good}\n{line}\n")).unwrap();
        let error = chats_of_jsonl(&path, None).unwrap_err().to_string();
        let begins = format!("Line 2 of `{}` is no conversation: ", path.display());
        assert!(error.starts_with(&begins) && error.contains(reason), "{error}");
    }
    fs::write(&path, b"{\"prompt\": \"\xff\", \"response\": \"A\"}").unwrap();
    assert!(chats_of_jsonl(&path, None).is_err());
}

/// Bytes of a real file, one after the other changed: an error or other text, but no panic.
#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let whole = fs::read(fixture("messages.parquet")).unwrap();
    for at in (0..whole.len()).step_by(3) {
        for bits in [1, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= bits;
            fs::write(&path, bytes).unwrap();
            let _ = parquet(&path, None);
        }
    }
    for length in (0..whole.len()).step_by(97) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(parquet(&path, None).is_err());
    }
}
