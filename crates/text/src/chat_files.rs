//! Conversations out of local files: JSON lines, and parquet with its nested columns.
//!
//! A list of messages, or a list of each of their fields, is stored in parquet as two columns of texts,
//! the roles and what was said, each
//! with two numbers a value: the definition level says how much of the path to it is there, the
//! repetition level whether it begins a row (Melnik et al. 2010, Dremel). They are read here by these
//! levels, so that a damaged file is an error as everywhere else.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use gptq_checkpoint::open_regular;
use parquet::basic::{Repetition, Type as PhysicalType};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::chat::{
    Columns, Content, FIELDS, Message, SYSTEM, Said, UNEVEN, behind_system, of_json, of_messages,
    of_pair,
};
use crate::error::{Error, Result};
use crate::text_files::{
    damaged, decoded, open_parquet, read_nullable, read_parquet, without_mark,
};

/// Most bytes of a line: a conversation with what JSON writes around it.
const MOST_LINE: u64 = 64 << 20;
/// Most conversations of a file.
const MOST_ROWS: usize = 1 << 24;
/// Rows of a column that are decoded at a time.
const BATCH: usize = 1024;

/// The conversations of a file, one a line; blank lines are skipped.
///
/// # Errors
/// When the file cannot be read, or a line is no conversation (named by number).
pub(crate) fn chats_of_jsonl(path: &Path, column: Option<&str>) -> Result<Vec<Vec<Message>>> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut file = BufReader::new(open_regular(path).map_err(failed)?);
    let (mut chats, mut bytes) = (Vec::new(), Vec::new());
    for number in 1.. {
        bytes.clear();
        let read = file.by_ref().take(MOST_LINE).read_until(b'\n', &mut bytes).map_err(failed)?;
        if read == 0 {
            break;
        }
        let invalid = |reason| no_chat(path, format!("Line {number}"), reason);
        if read as u64 == MOST_LINE {
            return Err(invalid(format!("it has {MOST_LINE} bytes or more")));
        }
        let line = if number == 1 { without_mark(&bytes) } else { &bytes };
        if line.trim_ascii().is_empty() {
            continue;
        }
        let row = serde_json::from_slice(line)
            .map_err(|error| invalid(format!("it is not JSON ({error})")))?;
        push(path, &mut chats, of_json(&row, column).map_err(invalid)?)?;
    }
    Ok(chats)
}

/// Adds the conversations of a parquet file to `chats`, in row order.
///
/// # Errors
/// When the file cannot be read or decoded, has no columns of conversations, or a row is none.
pub(crate) fn chats_of_parquet(
    path: &Path,
    column: Option<&str>,
    chats: &mut Vec<Vec<Message>>,
) -> Result<()> {
    decoded(path, || read_chats(path, column, chats))
}

fn read_chats(path: &Path, column: Option<&str>, chats: &mut Vec<Vec<Message>>) -> Result<()> {
    let reader = open_parquet(path)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<&str> = schema.root_schema().get_fields().iter().map(|f| f.name()).collect();
    let absent = || Error::NoChatColumns {
        path: path.to_owned(),
        column: column.map(str::to_owned),
        available: names.join(", "),
    };
    let invalid = |row: usize, reason| no_chat(path, format!("Row {row}"), reason);
    let nullable =
        |column: Option<&str>| column.map(|column| read_nullable(path, column)).transpose();
    let mut systems = nullable(names.contains(&SYSTEM).then_some(SYSTEM))?.map(Vec::into_iter);
    let mut add = |row: usize, chat: Result<Vec<Message>, String>| {
        let system = systems.as_mut().and_then(Iterator::next).flatten();
        let chat = chat.and_then(|chat| behind_system(chat, system));
        push(path, chats, chat.map_err(|reason| invalid(row, reason))?)
    };
    match Columns::find(&names, column).ok_or_else(absent)? {
        Columns::Pair { prompt, about, response } => {
            let lists = Lists::find(&reader, prompt).zip(Lists::find(&reader, response));
            if let Some((prompts, responses)) = lists {
                let said =
                    prompts.read(&reader, path)?.into_iter().zip(responses.read(&reader, path)?);
                for (index, (asked, answered)) in said.enumerate() {
                    let both = || of_messages(asked?.into_iter().chain(answered?));
                    add(index + 1, both())?;
                }
                return Ok(());
            }
            let mut about = nullable(about)?.map(Vec::into_iter);
            let pairs = read_parquet(path, prompt)?.into_iter().zip(read_nullable(path, response)?);
            for (index, (prompt, response)) in pairs.enumerate() {
                let about = about.as_mut().and_then(Iterator::next).flatten();
                add(index + 1, of_pair(prompt, about, response.unwrap_or_default()))?;
            }
        }
        Columns::List(list) => {
            let lists = Lists::find(&reader, list).ok_or_else(|| Error::NoMessages {
                path: path.to_owned(),
                column: list.to_owned(),
            })?;
            for (index, messages) in lists.read(&reader, path)?.into_iter().enumerate() {
                add(index + 1, messages.and_then(|said| of_messages(said.into_iter())))?;
            }
        }
    }
    Ok(())
}

fn no_chat(path: &Path, place: String, reason: String) -> Error {
    Error::NoConversation { path: path.to_owned(), place, reason }
}

fn push(path: &Path, chats: &mut Vec<Vec<Message>>, chat: Vec<Message>) -> Result<()> {
    if chats.len() == MOST_ROWS {
        return Err(Error::TooManyRows { path: path.to_owned(), most: MOST_ROWS });
    }
    chats.push(chat);
    Ok(())
}

/// The two columns of a list of messages.
struct Lists {
    role: Leaf,
    content: Leaf,
}

impl Lists {
    /// Those of the column `list`; `None` where it is no list of messages.
    fn find(reader: &SerializedFileReader<File>, list: &str) -> Option<Self> {
        FIELDS.into_iter().find_map(|(role, content)| {
            let (role, content) =
                (Leaf::find(reader, list, role)?, Leaf::find(reader, list, content)?);
            Some(Self { role, content })
        })
    }

    /// The messages of every row, or why roles and texts of one do not fit together.
    fn read(
        &self,
        reader: &SerializedFileReader<File>,
        path: &Path,
    ) -> Result<Vec<Result<Vec<Said>, String>>> {
        let mut rows = Vec::new();
        for group in 0..reader.num_row_groups() {
            let roles = self.role.lists(reader, path, group)?;
            let contents = self.content.lists(reader, path, group)?;
            rows.extend(roles.into_iter().zip(contents).map(|(roles, contents)| {
                if roles.len() != contents.len() {
                    return Err(UNEVEN.to_owned());
                }
                Ok(roles.into_iter().zip(contents.into_iter().map(Content::of_text)).collect())
            }));
        }
        Ok(rows)
    }
}

/// A column of texts in a list of messages.
struct Leaf {
    index: usize,
    /// The definition level of a text that is there.
    present: i16,
    /// The least definition level of a message that is there, with a text or without.
    message: i16,
}

impl Leaf {
    /// The texts `field` of the messages in the column `list`: `list.list.element.field`, or with
    /// other names between, as writers have them; or of a list of each field, `list.field.list.element`.
    fn find(reader: &SerializedFileReader<File>, list: &str, field: &str) -> Option<Self> {
        let schema = reader.metadata().file_metadata().schema_descr();
        let index = schema.columns().iter().position(|leaf| {
            let parts = leaf.path().parts();
            leaf.physical_type() == PhysicalType::BYTE_ARRAY
                && leaf.max_rep_level() == 1
                && (3..=4).contains(&parts.len())
                && parts.first().is_some_and(|first| first == list)
                && (parts.last().is_some_and(|last| last == field) || parts[1] == field)
        })?;
        let leaf = schema.column(index);
        let (mut level, mut message) = (0, 0);
        let mut fields = schema.root_schema().get_fields();
        for part in leaf.path().parts() {
            let node = fields.iter().find(|node| node.name() == part)?;
            let repetition = node.get_basic_info().repetition();
            level += i16::from(repetition != Repetition::REQUIRED);
            if repetition == Repetition::REPEATED {
                message = level;
            }
            if node.is_primitive() {
                break;
            }
            fields = node.get_fields();
        }
        Some(Self { index, present: leaf.max_def_level(), message })
    }

    /// The texts of a row group, by row and message.
    fn lists(
        &self,
        reader: &SerializedFileReader<File>,
        path: &Path,
        group: usize,
    ) -> Result<Vec<Vec<Option<String>>>> {
        let group = reader.get_row_group(group).map_err(damaged(path))?;
        let mut lists = Vec::new();
        // `find` admits this physical type alone.
        if let ColumnReader::ByteArrayColumnReader(column) =
            group.get_column_reader(self.index).map_err(damaged(path))?
        {
            self.read(column, path, &mut lists)?;
        }
        let (found, promised) = (lists.len(), group.metadata().num_rows());
        if i64::try_from(found).ok() != Some(promised) {
            return Err(Error::RowCount { path: path.to_owned(), found, promised });
        }
        Ok(lists)
    }

    fn read(
        &self,
        mut column: ColumnReaderImpl<ByteArrayType>,
        path: &Path,
        lists: &mut Vec<Vec<Option<String>>>,
    ) -> Result<()> {
        let mut values: Vec<ByteArray> = Vec::new();
        let (mut defined, mut repeated) = (Vec::new(), Vec::new());
        loop {
            values.clear();
            defined.clear();
            repeated.clear();
            let (records, ..) = column
                .read_records(BATCH, Some(&mut defined), Some(&mut repeated), &mut values)
                .map_err(damaged(path))?;
            if records == 0 {
                return Ok(());
            }
            let mut texts = values.iter();
            for (&defined, &repeated) in defined.iter().zip(&repeated) {
                if repeated == 0 {
                    lists.push(Vec::new());
                }
                let row = lists.len();
                let Some(list) = lists.last_mut().filter(|_| defined >= self.message) else {
                    continue;
                };
                let text = if defined == self.present { texts.next() } else { None };
                let text = text.map(|text| String::from_utf8(text.data().to_vec())).transpose();
                list.push(text.map_err(|_| Error::NotUtf8 {
                    path: path.to_owned(),
                    place: format!(" at row {row} of a row group"),
                })?);
            }
        }
    }
}

#[cfg(test)]
#[path = "chat_files_tests.rs"]
mod tests;
