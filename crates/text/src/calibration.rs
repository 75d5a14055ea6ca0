//! Calibration windows: what a recipe's sources give under one tokenizer.
//!
//! Windows of a text start at offsets drawn by Python's generator, which is how the published branches
//! were calibrated; rows and conversations are taken in the order in which it shuffles them. The digest
//! of the tokens makes "the same calibration" a checkable statement.

use std::collections::BTreeMap;

use gptq_records::dataset_identity::DatasetIdentity;
use gptq_records::digest::hex;
use sha2::{Digest, Sha256};

use crate::chat::{Message, Render, Unrendered, has_empty_answer};
use crate::dataset::Dataset;
use crate::error::{Error, PassedOver, Result};
use crate::python_random::PythonRandom;
pub use crate::recipe::{CalibrationOverrides, CalibrationRecipe, Cut, MOST_TOKENS, RecipeSource};
use crate::tokens::TextTokenizer;

/// The windows of a recipe, as tokens of one tokenizer.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Tokens of each window, in the order of calibration: those of several sources are mixed evenly,
    /// so that any run of them holds every source by its share. At most `seq_len` each, and at least 1.
    pub windows: Vec<Vec<u32>>,
    /// Where each is from.
    pub places: Vec<Place>,
    /// Windows to judge by, which share no token or row with those: one for each [`HELD_OUT`] of a source's,
    /// or as many as its text has room for.
    pub held_out: Vec<Vec<u32>>,
    /// Length of a window; the most that one may have where they are rows.
    pub seq_len: usize,
    /// SHA-256 (hex) of all windows' tokens as little-endian u32; where one is shorter than `seq_len`,
    /// the number of each one's tokens, as such, goes before them.
    pub sha256: String,
    /// Seed of the places.
    pub seed: u64,
    /// The text, or texts, they were drawn from.
    pub dataset: DatasetIdentity,
    /// What each source gave.
    pub sources: Vec<DrawnSource>,
}

/// Windows of a source for each that is held out.
pub const HELD_OUT: usize = 8;

/// Where a window begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its source.
    pub source: usize,
    /// Where in it.
    pub start: Start,
}

/// A beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// In a joined text, by tokens.
    Token(usize),
    /// In or at a row, counted from 0.
    Row(usize),
}

/// What a source gave.
#[derive(Debug, Clone)]
pub struct DrawnSource {
    /// What it is.
    pub dataset: DatasetIdentity,
    /// How it was cut.
    pub cut: Cut,
    /// Its rows.
    pub rows: usize,
    /// Tokens of the joined text; `None` where only rows that were drawn were encoded.
    pub tokens_in_text: Option<usize>,
    /// Windows.
    pub windows: usize,
    /// Tokens of these.
    pub tokens: usize,
    /// Those among them that an earlier window holds, too.
    pub repeated: usize,
    /// Rows that the join lets run into the next.
    pub glued: usize,
    /// Conversations that the chat template refused, which others were taken for, and what it said of
    /// the first.
    pub refused: Option<(usize, String)>,
    /// Conversations with an empty answer, which others were taken for.
    pub unanswered: usize,
}

impl Calibration {
    /// Tokens of all windows.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// Tokens of the longest window.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.windows.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Whether every window has `seq_len` tokens.
    #[must_use]
    pub fn is_even(&self) -> bool {
        self.windows.iter().all(|window| window.len() == self.seq_len)
    }

    /// Windows of the longest's length that have as many tokens, and that length: what they cost.
    #[must_use]
    pub fn workload(&self) -> (usize, usize) {
        let longest = self.longest();
        (self.tokens().div_ceil(longest.max(1)), longest)
    }
}

impl CalibrationRecipe {
    /// Reads the sources, encodes them and draws the windows. Conversations need `chat`, the model's
    /// chat template.
    ///
    /// # Errors
    /// When a source cannot be read, rendered or encoded, or is too short for its windows.
    pub fn sample(
        &self,
        tokenizer: &TextTokenizer,
        chat: Option<&Render<'_>>,
    ) -> Result<Calibration> {
        let mut drawn = Vec::with_capacity(self.sources.len());
        for (index, source) in self.sources.iter().enumerate() {
            let random = PythonRandom::new(self.seed.wrapping_add(index as u64));
            let draw = Draw { source, seq_len: self.seq_len, random, tokenizer };
            drawn.push(draw.windows(chat)?);
        }
        Ok(self.mixed(drawn))
    }

    /// The windows of all sources as one calibration.
    fn mixed(&self, drawn: Vec<Drawn>) -> Calibration {
        let counts: Vec<usize> = drawn.iter().map(|drawn| drawn.windows.len()).collect();
        let (mut sources, mut left, mut held_out) = (Vec::new(), Vec::new(), Vec::new());
        for drawn in drawn {
            sources.push(drawn.source);
            held_out.extend(drawn.held_out);
            left.push(drawn.windows.into_iter());
        }
        let (mut windows, mut places) = (Vec::new(), Vec::new());
        for source in evenly(&counts) {
            if let Some((start, window)) = left[source].next() {
                places.push(Place { source, start });
                windows.push(window);
            }
        }
        let identities = sources.iter().map(|source| source.dataset.clone()).collect();
        let mut calibration = Calibration {
            windows,
            places,
            held_out,
            seq_len: self.seq_len,
            sha256: String::new(),
            seed: self.seed,
            dataset: DatasetIdentity::of_sources(identities),
            sources,
        };
        calibration.sha256 = digest(&calibration.windows, calibration.is_even());
        calibration
    }
}

/// The order of sources that mixes them evenly: window j of a source's n is due at (j + ½) / n of the
/// way; of two that are due at once the earlier source's is first.
fn evenly(counts: &[usize]) -> Vec<usize> {
    let windows = counts.iter().enumerate();
    let due =
        windows.flat_map(|(source, &count)| (0..count).map(move |j| (2 * j + 1, count, source)));
    let mut due: Vec<(usize, usize, usize)> = due.collect();
    // Exact: a / b < c / d where a d < c b.
    due.sort_by(|a, b| (a.0 as u128 * b.1 as u128).cmp(&(b.0 as u128 * a.1 as u128)));
    due.into_iter().map(|(_, _, source)| source).collect()
}

/// One source about to be drawn from.
struct Draw<'d> {
    source: &'d RecipeSource,
    seq_len: usize,
    random: PythonRandom,
    tokenizer: &'d TextTokenizer,
}

/// Windows of one source, in the order drawn.
struct Drawn {
    windows: Vec<(Start, Vec<u32>)>,
    held_out: Vec<Vec<u32>>,
    source: DrawnSource,
}

impl Draw<'_> {
    fn windows(self, chat: Option<&Render<'_>>) -> Result<Drawn> {
        match self.source.cut {
            Cut::Text(join) => {
                let Dataset { rows, identity } = self.source.dataset.load()?;
                let (count, glued) = (rows.len(), join.glued(&rows));
                let ids = self.tokenizer.encode(&join.text(rows))?;
                let drawn = self.of_text(&ids, identity)?;
                Ok(Drawn { source: DrawnSource { rows: count, glued, ..drawn.source }, ..drawn })
            }
            Cut::Rows => {
                let Dataset { rows, identity } = self.source.dataset.load()?;
                self.of_rows(&rows, identity)
            }
            Cut::Chats | Cut::ChatRows => {
                let dataset = || self.source.dataset.to_string();
                let chat = chat.ok_or_else(|| Error::NoChatTemplate { dataset: dataset() })?;
                let (chats, identity) = self.source.dataset.conversations()?;
                self.of_chats(&chats, identity, chat)
            }
        }
    }

    /// Windows at random offsets of an encoded text, which may overlap.
    fn of_text(mut self, ids: &[u32], dataset: DatasetIdentity) -> Result<Drawn> {
        let (windows, seq_len) = (self.source.windows, self.seq_len);
        // Python's randint includes its upper end, N − seq_len − 1; so the text must exceed a
        // window by one token, and its last token is never drawn.
        let needed = seq_len.saturating_add(1);
        let Some(last_offset) = ids.len().checked_sub(needed) else {
            return Err(Error::CalibrationTextTooShort {
                dataset: dataset.name,
                tokens: ids.len(),
                needed,
            });
        };
        let offsets: Vec<usize> =
            (0..windows).map(|_| self.random.up_to(last_offset as u64) as usize).collect();
        let window = |&start: &usize| (Start::Token(start), ids[start..start + seq_len].to_vec());
        let drawn = self.drawn(offsets.iter().map(window).collect(), dataset, 1);
        let held_out = between(&offsets, ids.len(), seq_len, self.to_hold_out());
        let held_out = held_out.iter().map(|start| window(start).1).collect();
        let source = DrawnSource {
            tokens_in_text: Some(ids.len()),
            repeated: overlap(&offsets, seq_len),
            ..drawn.source
        };
        Ok(Drawn { source, held_out, ..drawn })
    }

    /// Windows that are held out, where there are as many.
    fn to_hold_out(&self) -> usize {
        self.source.windows.div_ceil(HELD_OUT)
    }

    /// The beginnings of rows in random order, each row once.
    fn of_rows(mut self, rows: &[String], dataset: DatasetIdentity) -> Result<Drawn> {
        let (mut windows, most) = (Vec::new(), self.source.windows + self.to_hold_out());
        for row in self.random.shuffled(rows.len()) {
            if windows.len() == most {
                break;
            }
            if rows[row].trim().is_empty() {
                continue;
            }
            let mut ids = self.tokenizer.encode_at_least(&rows[row], self.seq_len)?.ids;
            ids.truncate(self.seq_len);
            if !ids.is_empty() {
                windows.push((Start::Row(row), ids));
            }
        }
        let held_out = windows.split_off(windows.len().min(self.source.windows));
        self.enough(&windows, &dataset, PassedOver::default())?;
        let held_out = held_out.into_iter().map(|(_, ids)| ids).collect();
        Ok(Drawn { held_out, ..self.drawn(windows, dataset, rows.len()) })
    }

    /// Windows of conversations in random order, each once.
    fn of_chats(
        mut self,
        chats: &[Vec<Message>],
        dataset: DatasetIdentity,
        chat: &Render<'_>,
    ) -> Result<Drawn> {
        let (windows, seq_len) = (self.source.windows, self.seq_len);
        let packed = self.source.cut.is_packed();
        let mut texts = Rendered { refused: None, taken: 0 };
        let mut unanswered = 0;
        let (mut all, mut starts) = (Vec::new(), BTreeMap::new());
        let mut rows = Vec::new();
        let mut order = self.random.shuffled(chats.len()).into_iter();
        while rows.len() < windows && all.len() < windows.saturating_mul(seq_len) {
            let Some(row) = order.next() else { break };
            if has_empty_answer(&chats[row]) {
                unanswered += 1;
                continue;
            }
            let Some(text) = texts.text(chat, &chats[row], row, &dataset)? else { continue };
            // The template has written all special tokens, the first one too.
            let mut ids = self.tokenizer.encode_chat(&text)?;
            if ids.is_empty() {
                continue;
            }
            if packed {
                starts.insert(all.len(), row);
                all.append(&mut ids);
            } else {
                ids.truncate(seq_len);
                rows.push((Start::Row(row), ids));
            }
        }
        if let (0, Some((_, reason))) = (texts.taken, &texts.refused) {
            let (dataset, reason) = (dataset.name, reason.clone());
            return Err(Error::EveryChatRefused { dataset, reason });
        }
        let passed =
            PassedOver { refused: texts.refused.as_ref().map_or(0, |of| of.0), unanswered };
        if packed {
            if all.len() < windows.saturating_mul(seq_len) {
                let (dataset, tokens) = (dataset.name, all.len());
                let short =
                    Error::ConversationsTooShort { dataset, tokens, windows, seq_len, passed };
                return Err(short);
            }
            let begun =
                |token: usize| starts.range(..=token).next_back().map_or(0, |(_, &row)| row);
            let cut = all.chunks_exact(seq_len).take(windows).enumerate();
            rows = cut.map(|(i, ids)| (Start::Row(begun(i * seq_len)), ids.to_vec())).collect();
        } else {
            self.enough(&rows, &dataset, passed)?;
        }
        let rest = all.split_off(all.len().min(windows.saturating_mul(seq_len)));
        let held_out = self.of_more_chats(rest, order.map(|row| &*chats[row]), chat);
        let drawn = self.drawn(rows, dataset, chats.len());
        let source = DrawnSource { refused: texts.refused, unanswered, ..drawn.source };
        Ok(Drawn { source, held_out, ..drawn })
    }

    /// Windows to hold out, of what was left of the last conversation and of those behind it. These are worth
    /// no error: what cannot be written or encoded is passed over.
    fn of_more_chats<'c>(
        &self,
        mut left: Vec<u32>,
        mut chats: impl Iterator<Item = &'c [Message]>,
        chat: &Render<'_>,
    ) -> Vec<Vec<u32>> {
        let (wanted, seq_len) = (self.to_hold_out(), self.seq_len);
        let mut rows = Vec::new();
        while rows.len() < wanted && left.len() < wanted.saturating_mul(seq_len) {
            let Some(messages) = chats.next() else { break };
            let text = Some(messages).filter(|chat| !has_empty_answer(chat)).map(chat);
            let ids = text.and_then(Result::ok).map(|text| self.tokenizer.encode_chat(&text));
            let Some(Ok(mut ids)) = ids else { continue };
            if self.source.cut.is_packed() {
                left.append(&mut ids);
            } else if !ids.is_empty() {
                ids.truncate(seq_len);
                rows.push(ids);
            }
        }
        rows.extend(left.chunks_exact(seq_len).map(<[u32]>::to_vec));
        rows.truncate(wanted);
        rows
    }

    fn enough(
        &self,
        windows: &[(Start, Vec<u32>)],
        dataset: &DatasetIdentity,
        passed: PassedOver,
    ) -> Result<()> {
        if windows.len() == self.source.windows {
            return Ok(());
        }
        let (dataset, rows) = (dataset.name.clone(), windows.len());
        Err(Error::TooFewRows { dataset, rows, windows: self.source.windows, passed })
    }

    fn drawn(
        &self,
        windows: Vec<(Start, Vec<u32>)>,
        dataset: DatasetIdentity,
        rows: usize,
    ) -> Drawn {
        let source = DrawnSource {
            dataset,
            cut: self.source.cut,
            rows,
            tokens_in_text: None,
            windows: windows.len(),
            tokens: windows.iter().map(|(_, ids)| ids.len()).sum(),
            repeated: 0,
            glued: 0,
            refused: None,
            unanswered: 0,
        };
        Drawn { windows, held_out: Vec::new(), source }
    }
}

/// Conversations on their way through a chat template.
struct Rendered {
    refused: Option<(usize, String)>,
    taken: usize,
}

impl Rendered {
    /// The text of a conversation; `None` where the template refuses it, which is counted.
    fn text(
        &mut self,
        chat: &Render<'_>,
        messages: &[Message],
        row: usize,
        dataset: &DatasetIdentity,
    ) -> Result<Option<String>> {
        match chat(messages) {
            Ok(text) => {
                self.taken += 1;
                Ok(Some(text))
            }
            Err(Unrendered::Refused(reason)) => {
                self.refused.get_or_insert((0, reason)).0 += 1;
                Ok(None)
            }
            Err(Unrendered::Failed(source)) => {
                Err(Error::ChatTemplate { dataset: dataset.name.clone(), row: row + 1, source })
            }
        }
    }
}

/// Offsets of windows that share no token with each other or those at `offsets`, in a text of `length` tokens:
/// `wanted` of them, spread evenly over all that have room, or as many as do.
fn between(offsets: &[usize], length: usize, seq_len: usize, wanted: usize) -> Vec<usize> {
    let mut sorted = offsets.to_vec();
    sorted.sort_unstable();
    let (mut free, mut end) = (Vec::new(), 0);
    for start in sorted.into_iter().chain([length]) {
        free.extend((end..(start + 1).saturating_sub(seq_len)).step_by(seq_len));
        end = end.max(start + seq_len);
    }
    let count = wanted.min(free.len());
    (0..count).map(|i| free[(2 * i + 1) * free.len() / (2 * count)]).collect()
}

/// Tokens of windows at these offsets that an earlier one holds, too: all, less those of the text that
/// any holds.
fn overlap(offsets: &[usize], seq_len: usize) -> usize {
    let mut sorted = offsets.to_vec();
    sorted.sort_unstable();
    let (mut held, mut end) = (0, 0);
    for start in sorted {
        let stop = start + seq_len;
        held += stop - start.max(end).min(stop);
        end = stop;
    }
    offsets.len() * seq_len - held
}

fn digest(windows: &[Vec<u32>], even: bool) -> String {
    let mut hash = Sha256::new();
    for window in windows {
        if !even {
            hash.update((window.len() as u32).to_le_bytes());
        }
        let bytes: Vec<u8> = window.iter().flat_map(|id| id.to_le_bytes()).collect();
        hash.update(bytes);
    }
    hex(&hash.finalize())
}

#[cfg(test)]
#[path = "calibration_tests.rs"]
mod tests;
