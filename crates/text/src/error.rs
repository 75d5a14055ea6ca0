//! What can go wrong between a dataset's name and a list of token windows.
//!
//! Every message is one sentence that names the file, dataset or option; [`Error::hint`] says what to
//! do when the message alone does not make it plain. Variants are named by what went wrong, so that a
//! caller can tell "not downloaded yet" from "damaged".

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Conversations that others were looked for in place of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassedOver {
    /// By the model's chat template.
    pub refused: usize,
    /// For an answer that is empty.
    pub unanswered: usize,
}

impl fmt::Display for PassedOver {
    /// The end of a sentence about those that are left.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.refused > 0 {
            write!(f, "; the model's chat template refuses {} more", self.refused)?;
        }
        if self.unanswered > 0 {
            write!(f, "; {} more have an empty answer", self.unanswered)?;
        }
        Ok(())
    }
}

/// An error of datasets, tokenizers, calibration recipes or perplexity protocols.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A dataset was named in a way that is neither of the two accepted forms.
    #[error(
        "Dataset `{text}` cannot be read: {reason}; a dataset is `ORG/NAME:CONFIG:SPLIT`, or the path of \
         a .txt, .jsonl or .parquet file, or builtin:addresses"
    )]
    DatasetSyntax {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The Hub dataset is not in the local cache.
    #[error("Dataset `{dataset}` is not in the Hub cache")]
    NotCached {
        /// The dataset as named by the user.
        dataset: String,
        /// What the cache lookup found.
        source: gptq_checkpoint::Error,
    },
    /// The dataset's snapshot has no files for the configuration and split.
    #[error(
        "Dataset `{dataset}` has no {looked_for} in `{}`; it holds {available}",
        folder.display()
    )]
    SplitNotFound {
        /// The dataset as named by the user.
        dataset: String,
        /// The file patterns that were looked for.
        looked_for: String,
        /// The snapshot folder.
        folder: PathBuf,
        /// The `CONFIG:SPLIT` pairs that are there.
        available: String,
    },
    /// Part of a split's files is absent, so its text would be silently shorter.
    #[error(
        "Dataset `{dataset}` is incomplete in `{}`: {found} of {expected} parquet files are \
         there",
        folder.display()
    )]
    SplitIncomplete {
        /// The dataset as named by the user.
        dataset: String,
        /// The folder with the split's files.
        folder: PathBuf,
        /// Files present.
        found: usize,
        /// Files that the names announce.
        expected: usize,
    },
    /// A file or folder could not be read.
    #[error("Could not read `{}`", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A text is not UTF-8.
    #[error("`{}` is not UTF-8{place}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Where in the file: empty, or ` at row 3`.
        place: String,
    },
    /// A line of a `.jsonl` file is not an object with the text field.
    #[error("Line {line} of `{}` has no text: {reason}", path.display())]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with the line.
        reason: String,
    },
    /// A parquet file could not be decoded.
    #[error("Parquet file `{}` could not be decoded: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The decoder's reason, which prints its own causes.
        reason: String,
    },
    /// A parquet file has no text column of that name.
    #[error(
        "Parquet file `{}` has no text column `{column}`; its columns are {available}",
        path.display()
    )]
    ColumnNotFound {
        /// The file.
        path: PathBuf,
        /// The column looked for.
        column: String,
        /// Columns and their types.
        available: String,
    },
    /// A row has no value in the text column.
    #[error("Row {row} of `{}` has a null in column `{column}`", path.display())]
    NullText {
        /// The file.
        path: PathBuf,
        /// The row, counted from 1.
        row: usize,
        /// The text column.
        column: String,
    },
    /// A parquet file's rows are not as many as its footer says.
    #[error(
        "A row group of `{}` holds {found} rows where the footer says {promised}; the file is \
         damaged",
        path.display()
    )]
    RowCount {
        /// The file.
        path: PathBuf,
        /// Rows that are there.
        found: usize,
        /// Rows that the footer promises.
        promised: i64,
    },
    /// A text without rows was asked for conversations.
    #[error("Dataset `{dataset}` is one text, which holds no conversations")]
    NoConversations {
        /// The dataset as named by the user.
        dataset: String,
    },
    /// A parquet file has no columns of conversations.
    #[error(
        "Parquet file `{}` has no conversations: none of its columns {available} is {}",
        path.display(),
        column.as_deref().unwrap_or(crate::chat::COLUMNS)
    )]
    NoChatColumns {
        /// The file.
        path: PathBuf,
        /// The column that was named, if one was.
        column: Option<String>,
        /// Its columns.
        available: String,
    },
    /// A parquet column is no list of messages.
    #[error(
        "Column `{column}` of `{}` is no list of messages with texts in role and content, or in \
         from and value",
        path.display()
    )]
    NoMessages {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
    },
    /// A row is no conversation.
    #[error("{place} of `{}` is no conversation: {reason}", path.display())]
    NoConversation {
        /// The file.
        path: PathBuf,
        /// `Line 3` or `Row 3`.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has more rows than any dataset.
    #[error("`{}` has more than {most} conversations", path.display())]
    TooManyRows {
        /// The file.
        path: PathBuf,
        /// The bound.
        most: usize,
    },
    /// The dataset holds no text at all.
    #[error("Dataset `{dataset}` holds no text")]
    NoText {
        /// The dataset as named by the user.
        dataset: String,
    },
    /// The checkpoint folder has no tokenizer file.
    #[error(
        "`{}` has no tokenizer.json, which is needed to turn text into tokens",
        folder.display()
    )]
    TokenizerMissing {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// The tokenizer file could not be understood.
    #[error("Tokenizer `{}` could not be loaded: {reason}", path.display())]
    TokenizerInvalid {
        /// The tokenizer file.
        path: PathBuf,
        /// The tokenizer library's reason.
        reason: String,
    },
    /// A JSON file beside the tokenizer could not be understood.
    #[error("`{}` could not be understood: {reason}", path.display())]
    ConfigInvalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("The tokenizer of `{}` could not encode the text: {reason}", folder.display())]
    Encode {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The tokenizer library's reason.
        reason: String,
    },
    /// The tokenizer refused tokens.
    #[error("The tokenizer of `{}` could not decode tokens: {reason}", folder.display())]
    Decode {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The tokenizer library's reason.
        reason: String,
    },
    /// The tokenizer makes tokens that the model has no embedding for.
    #[error(
        "The tokenizer of `{}` gives token {token} but the model's vocabulary has {vocab_size} \
         entries; tokenizer and model do not belong together",
        folder.display()
    )]
    TokenOutsideVocabulary {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The offending token.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// Neither a built-in recipe nor a file.
    #[error(
        "Calibration recipe `{name}` is neither built in ({built_in}) nor the path of a .toml file"
    )]
    RecipeUnknown {
        /// What was given.
        name: String,
        /// The built-in names.
        built_in: String,
    },
    /// A calibration recipe could not be understood.
    #[error("Calibration recipe `{origin}` is invalid: {reason}")]
    RecipeInvalid {
        /// The built-in name or the file.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The text is too short for the windows asked for.
    #[error("Dataset `{dataset}` gives {tokens} tokens but one window needs {needed}")]
    CalibrationTextTooShort {
        /// The dataset as named by the user.
        dataset: String,
        /// Tokens in the text.
        tokens: usize,
        /// Tokens needed for one window.
        needed: usize,
    },
    /// All rows together do not fill the windows asked for.
    #[error(
        "The conversations of dataset `{dataset}` give {tokens} tokens but {windows} windows of \
         {seq_len} need {}{passed}",
        windows.saturating_mul(*seq_len)
    )]
    ConversationsTooShort {
        /// The dataset as named by the user.
        dataset: String,
        /// Tokens in all of them.
        tokens: usize,
        /// Windows asked for.
        windows: usize,
        /// Tokens of each.
        seq_len: usize,
        /// What gives none of these.
        passed: PassedOver,
    },
    /// There are fewer rows than windows.
    #[error(
        "Dataset `{dataset}` has {rows} rows with text but {windows} windows were asked for{passed}"
    )]
    TooFewRows {
        /// The dataset as named by the user.
        dataset: String,
        /// Rows that give a window.
        rows: usize,
        /// Windows asked for.
        windows: usize,
        /// Rows that give none.
        passed: PassedOver,
    },
    /// A source of conversations, and a model that has no words for them.
    #[error("Dataset `{dataset}` holds conversations, and the model has no chat template for them")]
    NoChatTemplate {
        /// The dataset as named by the user.
        dataset: String,
    },
    /// The model's chat template refuses every conversation.
    #[error("The model's chat template refuses every conversation of `{dataset}`: {reason}")]
    EveryChatRefused {
        /// The dataset as named by the user.
        dataset: String,
        /// What it says of the first.
        reason: String,
    },
    /// The model's chat template failed.
    #[error("Conversation {row} of `{dataset}` could not be written in the model's chat template")]
    ChatTemplate {
        /// The dataset as named by the user.
        dataset: String,
        /// The conversation, counted from 1.
        row: usize,
        /// The template's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No protocol has that name.
    #[error("Protocol `{name}` is unknown: it is none of paper, llama-cpp and strided")]
    ProtocolUnknown {
        /// What was given.
        name: String,
    },
    /// A window of this length would score nothing.
    #[error("Protocol {protocol} needs a seq_len of at least {least}, but {seq_len} was asked for")]
    WindowTooShort {
        /// The protocol's name.
        protocol: &'static str,
        /// The `seq_len` asked for.
        seq_len: usize,
        /// The shortest that scores a token.
        least: usize,
    },
    /// A limit of zero windows would leave nothing to average.
    #[error("The limit on windows is 0, which leaves nothing to score")]
    NoWindows,
    /// The evaluation text does not fill one window.
    #[error("The evaluation text has {tokens} tokens but protocol {protocol} needs {needed}")]
    EvaluationTextTooShort {
        /// The protocol's name.
        protocol: &'static str,
        /// Tokens in the text.
        tokens: usize,
        /// Tokens needed for one window.
        needed: usize,
    },
}

impl Error {
    /// What to do about it, where the message does not make that plain.
    #[must_use]
    pub fn hint(&self) -> Option<Cow<'_, str>> {
        Some(match self {
            Self::NotCached { dataset, .. } => {
                format!("download it with `gptq fetch --dataset {dataset}`, or give a local file")
                    .into()
            }
            Self::SplitNotFound { dataset, .. } => {
                format!("download it with `gptq fetch --dataset {dataset}`").into()
            }
            Self::SplitIncomplete { .. } => "download the rest".into(),
            Self::NoText { .. } => "give a file that holds some".into(),
            Self::JsonLine { reason, .. } if reason.contains("field") => {
                "another field is chosen as `FILE.jsonl#FIELD`".into()
            }
            Self::NotUtf8 { .. } => "convert it first".into(),
            Self::ColumnNotFound { .. } => "choose one as `DATASET#COLUMN`".into(),
            Self::TokenizerMissing { .. } => {
                "copy it from the original model, or make it from tokenizer.model by saving the \
                 fast tokenizer with transformers"
                    .into()
            }
            Self::CalibrationTextTooShort { .. } | Self::EvaluationTextTooShort { .. } => {
                "use a longer text or a smaller seq_len".into()
            }
            Self::ConversationsTooShort { .. } => {
                "ask for fewer windows, a smaller share or a smaller seq_len".into()
            }
            Self::TooFewRows { .. } => "ask for fewer windows or a smaller share".into(),
            Self::NoConversation { .. } => "mend the row or take it out: what a shorter data set is calibrated \
                                            on is for you to say"
                .into(),
            Self::NoConversations { .. } => "leave `template` out, and say how to `join` it".into(),
            Self::NoChatColumns { .. } => "name a list of messages as `DATASET#COLUMN`".into(),
            Self::NoChatTemplate { .. } => "a base model continues a text: calibrate it on a recipe \
                                            without `template`, or put chat_template.jinja beside it"
                .into(),
            Self::NoWindows => "ask for at least 1".into(),
            Self::RecipeUnknown { .. } => {
                "to calibrate on a text of your own, use --calib-dataset TEXT.txt".into()
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_no_part_of_the_message() {
        let error =
            Error::CalibrationTextTooShort { dataset: "t.txt".to_owned(), tokens: 1, needed: 2 };
        assert_eq!(error.to_string(), "Dataset `t.txt` gives 1 tokens but one window needs 2");
        assert_eq!(error.hint().unwrap(), "use a longer text or a smaller seq_len");
        let name = Error::ProtocolUnknown { name: "mine".to_owned() };
        assert_eq!(name.hint(), None);
    }
}
