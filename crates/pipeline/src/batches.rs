//! Windows of an evaluation in batches, each of which is walked through the whole model.
//!
//! The states of all windows are held while a model is walked, which for windows that overlap is
//! many times the text: of Llama 3's 128k tokens at a stride of 512, each token's 256 times. Where
//! memory does not hold them all, a batch is walked after another. Batches are cut between the chunks
//! that matrix products see, so every token's loss is the same, whatever the batches.

use std::ops::Range;

use gptq_model::Model;
use gptq_text::protocol::EvalWindow;

use crate::error::Result;
use crate::memory_evaluation::{EvaluationSizes, Room};
use crate::progress::Progress;
use crate::states::chunk_ranges;

pub use crate::memory_evaluation::Beside;

/// How this rank's windows are cut into batches.
#[derive(Clone, Debug)]
pub struct Batches {
    /// Ranges of the windows of all ranks.
    ranges: Vec<Range<usize>>,
    offloaded: f64,
}

/// Windows that are walked together.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The windows.
    pub windows: &'a [EvalWindow],
    /// Share of their states that waits in host memory beside a GPU.
    pub(crate) offloaded: f64,
    number: usize,
    of: usize,
}

impl Batch<'_> {
    /// What progress calls the walk.
    pub(crate) fn label(self, walk: &str) -> String {
        let Self { number, of, .. } = self;
        if of > 1 { format!("{walk}, batch {number} of {of}") } else { walk.to_owned() }
    }
}

impl Batches {
    /// Batches that memory holds beside what else an evaluation holds.
    ///
    /// # Errors
    /// [`Error::HostMemory`](crate::Error::HostMemory) where it does not hold one window.
    pub fn new(
        model: &Model<'_>,
        windows: &[EvalWindow],
        beside: Beside,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let ranks = model.ranks();
        let own = &windows[ranks.share(windows.len(), 1)];
        let longest = own.iter().map(|window| window.tokens.len()).max().unwrap_or(1);
        let sizes = EvaluationSizes::of(model.config(), longest, beside);
        let room = Room::find(model.device(), ranks.size(), sizes)?;
        let mut batches = Self::cut(model, windows, room.tokens());
        let held = batches.ranges.iter().map(|range| tokens(&windows[range.clone()])).max();
        batches.offloaded = room.offloaded(held.unwrap_or(0));
        if batches.count() > 1 && ranks.is_first() {
            progress.note(&format!(
                "memory does not hold the states of {} tokens: {} batches of windows, one after \
                 another",
                tokens(own),
                batches.count()
            ));
        }
        Ok(batches)
    }

    /// All windows in one batch, for a walk that is one of several in a reading; `offloaded` is the
    /// share of its states that waits in host memory beside a GPU.
    pub(crate) fn whole(windows: &[EvalWindow], offloaded: f64) -> Self {
        Self { ranges: std::iter::once(0..windows.len()).collect(), offloaded }
    }

    /// Batches of as many chunks as `room` tokens hold, and of one at least.
    fn cut(model: &Model<'_>, windows: &[EvalWindow], room: usize) -> Self {
        let own = model.ranks().share(windows.len(), 1);
        let shown: Vec<&[u32]> = windows[own.clone()].iter().map(|w| w.tokens.as_slice()).collect();
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut held = 0;
        for chunk in chunk_ranges(&shown, model.device().chunk_tokens()) {
            let chunk = own.start + chunk.start..own.start + chunk.end;
            let more = tokens(&windows[chunk.clone()]);
            match ranges.last_mut() {
                Some(last) if held + more <= room => {
                    last.end = chunk.end;
                    held += more;
                }
                _ => {
                    ranges.push(chunk);
                    held = more;
                }
            }
        }
        Self { ranges, offloaded: 0.0 }
    }

    /// Batches of one chunk each.
    #[cfg(test)]
    pub(crate) fn of_single_chunks(model: &Model<'_>, windows: &[EvalWindow]) -> Self {
        Self::cut(model, windows, 0)
    }

    /// The batches of the windows that they were made for, in order.
    pub fn iter<'w>(&self, windows: &'w [EvalWindow]) -> impl Iterator<Item = Batch<'w>> {
        let (offloaded, of) = (self.offloaded, self.count());
        let ranges = self.ranges.iter().enumerate();
        ranges.map(move |(i, range)| Batch {
            windows: &windows[range.clone()],
            offloaded,
            number: i + 1,
            of,
        })
    }

    /// The windows, where there is one batch.
    pub(crate) fn only<'w>(&self, windows: &'w [EvalWindow]) -> Option<Batch<'w>> {
        self.iter(windows).next().filter(|_| self.count() == 1)
    }

    /// Number of batches.
    pub(crate) fn count(&self) -> usize {
        self.ranges.len()
    }
}

fn tokens(windows: &[EvalWindow]) -> usize {
    windows.iter().map(|window| window.tokens.len()).sum()
}
