//! Texts that are gone on with together, a token each at a step.
//!
//! A prompt is read alone, in one pass; what follows is made for all sequences at once, since a step
//! costs the reading of the weights, however many tokens it makes. On the CPU a sequence's tokens are
//! the same to the bit alone and among up to fifteen others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gptq_compute::Tensor;
use gptq_model::{Cache, Decoder, PASS_TOKENS};
use gptq_text::token_stream::TokenStream;
use gptq_text::tokens::TextTokenizer;

use crate::error::{Error, Result};
use crate::log_probabilities::LogProbabilities;
use crate::sampler::{Choice, Sampler};
use crate::sampling::Sampling;
use crate::stop::{StopStrings, Stopping};

/// Rows of a prompt whose logits are there at a time: a vocabulary of numbers each.
const SCORED_TOKENS: usize = 64;

/// What is to be made of a prompt.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's tokens, one at least.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What the choices depend on besides.
    pub seed: u64,
    /// New tokens at most, one at least.
    pub max_tokens: usize,
    /// Tokens that end the text and are no part of it.
    pub end: Vec<u32>,
    /// Texts that end the text and are no part of it.
    pub stop: Vec<String>,
    /// With each choice, so many of the likeliest tokens are named.
    pub top: usize,
    /// Read the prompt whole, though its beginning may be kept. What is read in another number of
    /// passes differs in the last bits, and a draw at the edge of two tokens with them.
    pub whole: bool,
}

/// What the model says of a token that is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The natural logarithm of the raw probability of the token after those before it.
    pub logprob: f64,
    /// The likeliest tokens in its place.
    pub top: Vec<Choice>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model said so.
    EndOfText,
    /// A stop string came.
    Stop,
    /// There are as many tokens as were asked for.
    MaxTokens,
    /// The context is full.
    ContextFull,
}

/// A step of a sequence.
#[derive(Clone, Debug)]
pub struct Step {
    /// The sequence.
    pub slot: usize,
    /// The token that was chosen.
    pub choice: Choice,
    /// The likeliest tokens, as many as were asked for.
    pub top: Vec<Choice>,
    /// Text that is certain now: whole characters, and nothing that may be part of a stop string.
    pub text: String,
    /// Set with the last token; the slot is free again.
    pub finish: Option<Finish>,
}

/// A text being made.
struct Sequence<'a> {
    /// The prompt and what was made.
    ids: Vec<u32>,
    made: usize,
    max_tokens: usize,
    end: Vec<u32>,
    top: usize,
    sampler: Sampler,
    stream: TokenStream<'a>,
    stop: StopStrings,
}

impl Sequence<'_> {
    /// Takes the row of logits after the last token: the next one, the text that is certain with it,
    /// and whether that is the end. A `full` cache takes no more tokens.
    fn go_on(&mut self, logits: &[f32], full: bool) -> Result<(Choice, String, Option<Finish>)> {
        let choice = self.sampler.sample(logits, &self.ids)?;
        self.made += 1;
        if self.end.contains(&choice.id) {
            return Ok((choice, String::new(), Some(Finish::EndOfText)));
        }
        self.ids.push(choice.id);
        let finish = match () {
            () if self.made >= self.max_tokens => Some(Finish::MaxTokens),
            () if full => Some(Finish::ContextFull),
            () => None,
        };
        let part = self.stream.push(choice.id)?.unwrap_or_default();
        Ok(match self.stop.push(&part) {
            Stopping::Text(text) => (choice, text, finish),
            Stopping::Stopped { text_before, .. } => (choice, text_before, Some(Finish::Stop)),
        })
    }

    /// What was held back, once the text has ended.
    fn rest(mut self) -> Result<String> {
        let rest = self.stream.finish()?;
        Ok(match self.stop.push(&rest) {
            Stopping::Text(text) => text + &self.stop.finish(),
            Stopping::Stopped { text_before, .. } => text_before,
        })
    }
}

/// That a prompt has tokens, and leaves room for so many more in a context.
///
/// # Errors
/// [`Error::PromptEmpty`] and [`Error::PromptTooLong`].
pub fn check_length(prompt: &[u32], room: usize, capacity: usize) -> Result<()> {
    match prompt.len() {
        0 => Err(Error::PromptEmpty),
        tokens if tokens + room > capacity => Err(Error::PromptTooLong { tokens, capacity }),
        _ => Ok(()),
    }
}

/// Makes texts side by side.
pub struct Engine<'a> {
    decoder: &'a Decoder<'a>,
    tokenizer: &'a TextTokenizer,
    cache: Cache,
    active: Vec<Option<Sequence<'a>>>,
    /// Tokens whose keys and values each slot holds, also of what has ended.
    kept: Vec<Vec<u32>>,
    /// Time in prompts and in steps.
    spent: [Duration; 2],
    /// Set from elsewhere when prompts are no longer wanted.
    interrupted: Option<Arc<AtomicBool>>,
}

impl<'a> Engine<'a> {
    /// Room for `slots` texts of up to `capacity` tokens each, prompts included.
    ///
    /// # Errors
    /// Those of [`Decoder::cache`].
    pub fn new(
        decoder: &'a Decoder<'a>,
        tokenizer: &'a TextTokenizer,
        slots: usize,
        capacity: usize,
    ) -> Result<Self> {
        Ok(Self {
            decoder,
            tokenizer,
            cache: decoder.cache(slots, capacity)?,
            active: (0..slots).map(|_| None).collect(),
            kept: vec![Vec::new(); slots],
            spent: [Duration::ZERO; 2],
            interrupted: None,
        })
    }

    /// From now on a flag that is set ends [`start`](Self::start) with [`Error::Interrupted`], within a
    /// part of a long prompt.
    pub fn heed(&mut self, interrupted: Arc<AtomicBool>) {
        self.interrupted = Some(interrupted);
    }

    /// Time spent on prompts, and on the steps after them.
    #[must_use]
    pub fn spent(&self) -> [Duration; 2] {
        self.spent
    }

    /// How many texts are being made.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.iter().flatten().count()
    }

    /// Reads a prompt into a free slot and chooses the first token. Of a prompt that begins as the
    /// tokens kept in some free slot do, only the rest is read, unless it is to be read whole.
    ///
    /// # Errors
    /// [`Error::PromptEmpty`], [`Error::PromptTooLong`], [`Error::NoSlot`], [`Error::Interrupted`], and
    /// those of the device and of the choice, after which the slot is free.
    pub fn start(&mut self, request: Request) -> Result<Step> {
        let start = Instant::now();
        check_length(&request.prompt, 1, self.cache.capacity())?;
        let stop = StopStrings::new(request.stop.iter().cloned())?;
        let (slot, hidden) = self.read_in_parts(&request.prompt, request.whole)?;
        self.begin(slot, &hidden, request, stop, start)
    }

    /// As [`start`](Self::start), and says of each token of the prompt but the first what the model
    /// thinks of it, with the `top` likeliest. The prompt is read whole.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_scored(&mut self, request: Request, top: usize) -> Result<(Vec<Scored>, Step)> {
        let start = Instant::now();
        check_length(&request.prompt, 1, self.cache.capacity())?;
        let stop = StopStrings::new(request.stop.iter().cloned())?;
        let (slot, hidden) = self.read(&request.prompt)?;
        let scored = self.score_rows(&hidden, &request.prompt, top)?;
        Ok((scored, self.begin(slot, &hidden, request, stop, start)?))
    }

    /// The scores alone; the slot is free again.
    ///
    /// # Errors
    /// As [`start`](Self::start), but that the prompt may fill the context.
    pub fn score(&mut self, prompt: &[u32], top: usize) -> Result<Vec<Scored>> {
        let start = Instant::now();
        check_length(prompt, 0, self.cache.capacity())?;
        let (_, hidden) = self.read(prompt)?;
        let scored = self.score_rows(&hidden, prompt, top);
        self.spent[0] += start.elapsed();
        scored
    }

    /// Reads a whole prompt into a free slot: the final hidden states of all its rows.
    fn read(&mut self, prompt: &[u32]) -> Result<(usize, Tensor)> {
        let (slot, _) = self.free_slot(prompt).ok_or(Error::NoSlot)?;
        self.keep(slot, 0);
        let hidden = self.feed(slot, prompt)?;
        Ok((slot, hidden))
    }

    /// Reads a prompt into a free slot while it is wanted: the final hidden states of its last rows.
    fn read_in_parts(&mut self, prompt: &[u32], whole: bool) -> Result<(usize, Tensor)> {
        let (slot, shared) = self.free_slot(prompt).ok_or(Error::NoSlot)?;
        let shared = if whole { 0 } else { shared };
        self.keep(slot, shared);
        let mut last = None;
        // Between two looks at whether it is still wanted the decoder makes a pass of its own, so that
        // the same numbers come of it.
        for part in prompt[shared..].chunks(PASS_TOKENS) {
            if self.interrupted.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(Error::Interrupted);
            }
            last = Some(self.feed(slot, part)?);
        }
        Ok((slot, last.ok_or(Error::PromptEmpty)?))
    }

    /// Forgets all but the first tokens of a slot.
    fn keep(&mut self, slot: usize, tokens: usize) {
        self.cache.truncate(slot, tokens);
        self.kept[slot].truncate(tokens);
    }

    fn feed(&mut self, slot: usize, ids: &[u32]) -> Result<Tensor> {
        let hidden = self.decoder.feed(&mut self.cache, slot, ids)?;
        self.kept[slot].extend_from_slice(ids);
        Ok(hidden)
    }

    /// What each row of a whole prompt says of the token after it.
    fn score_rows(&self, hidden: &Tensor, prompt: &[u32], top: usize) -> Result<Vec<Scored>> {
        let mut scored = Vec::with_capacity(prompt.len() - 1);
        for next in prompt[1..].chunks(SCORED_TOKENS) {
            let first = scored.len();
            let rows: Vec<u32> = (first..first + next.len()).map(|row| row as u32).collect();
            let band = self.decoder.device().select_rows(hidden, &rows);
            let logits = self.decoder.logits(&band.map_err(gptq_model::Error::from)?)?;
            for (row, &id) in logits.rows().into_iter().zip(next) {
                let row = LogProbabilities::new(row.to_slice().ok_or(Error::NoSlot)?)?;
                scored.push(Scored { logprob: row.of(id), top: row.top(top) });
            }
        }
        Ok(scored)
    }

    /// Chooses the first token after a prompt.
    fn begin(
        &mut self,
        slot: usize,
        hidden: &Tensor,
        request: Request,
        stop: StopStrings,
        start: Instant,
    ) -> Result<Step> {
        let Request { prompt, sampling, seed, max_tokens, end, top, .. } = request;
        let hidden = self.decoder.last_row(hidden)?;
        let stream = TokenStream::new(self.tokenizer, &prompt)?;
        let sampler = Sampler::new(sampling, seed);
        let sequence =
            Sequence { ids: prompt, made: 0, max_tokens, end, top, sampler, stream, stop };
        self.active[slot] = Some(sequence);
        let steps = self.choose(&hidden, &[slot]);
        self.spent[0] += start.elapsed();
        if steps.is_err() {
            self.active[slot] = None;
        }
        // One slot, one step.
        steps?.pop().ok_or(Error::NoSlot)
    }

    /// Goes on with every text by a token.
    ///
    /// # Errors
    /// Those of the device and of the choice.
    pub fn step(&mut self) -> Result<Vec<Step>> {
        let start = Instant::now();
        let mut next = Vec::new();
        for (slot, sequence) in self.active.iter().enumerate() {
            if let Some(&last) = sequence.as_ref().and_then(|sequence| sequence.ids.last()) {
                next.push((slot, last));
            }
        }
        if next.is_empty() {
            return Ok(Vec::new());
        }
        let hidden = self.decoder.step(&mut self.cache, &next)?;
        for &(slot, id) in &next {
            self.kept[slot].push(id);
        }
        let slots: Vec<_> = next.into_iter().map(|(slot, _)| slot).collect();
        let steps = self.choose(&hidden, &slots);
        self.spent[1] += start.elapsed();
        steps
    }

    /// Ends a text where it is, and gives what was held back of it.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn cancel(&mut self, slot: usize) -> Result<String> {
        self.active[slot].take().map_or(Ok(String::new()), Sequence::rest)
    }

    /// The free slot that holds most of the prompt's beginning, and how much of it: at least its last
    /// token is read again, whose hidden state is not kept.
    fn free_slot(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let shared = |slot: usize| {
            let pairs = self.kept[slot].iter().zip(&prompt[..prompt.len() - 1]);
            pairs.take_while(|(kept, wanted)| kept == wanted).count()
        };
        let free = (0..self.active.len()).filter(|&slot| self.active[slot].is_none());
        // Of several the first, and of those that share nothing the one that holds least.
        free.map(|slot| (slot, shared(slot)))
            .min_by_key(|&(slot, shared)| (usize::MAX - shared, self.kept[slot].len(), slot))
    }

    /// Chooses the next token of each slot from its row.
    fn choose(&mut self, hidden: &Tensor, slots: &[usize]) -> Result<Vec<Step>> {
        let logits = self.decoder.logits(hidden)?;
        let mut steps = Vec::with_capacity(slots.len());
        for (&slot, row) in slots.iter().zip(logits.rows()) {
            // With the one that is chosen now.
            let full = self.cache.len(slot) + 1 >= self.cache.capacity();
            let Some(sequence) = self.active[slot].as_mut() else { continue };
            let row = row.to_slice().ok_or(Error::NoSlot)?;
            let top = match sequence.top {
                0 => Vec::new(),
                count => LogProbabilities::new(row)?.top(count),
            };
            let (choice, mut text, finish) = sequence.go_on(row, full)?;
            if finish.is_some()
                && let Some(ended) = self.active[slot].take()
                && finish != Some(Finish::Stop)
            {
                text += &ended.rest()?;
            }
            steps.push(Step { slot, choice, top, text, finish });
        }
        Ok(steps)
    }
}
