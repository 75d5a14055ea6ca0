//! Hidden states of all windows, in chunks of whole windows.
//!
//! A model is walked layer by layer with the states of every window held, so a chunk is what one
//! matrix product sees: several short windows, or one long one.

use gptq_compute::Device;
use gptq_model::{Block, Model, Ropes};

use crate::chunk_store::ChunkStore;
use crate::error::Result;

/// Hidden states `[tokens, hidden]` of every chunk.
#[derive(Debug)]
pub(crate) struct States {
    pub(crate) hidden: ChunkStore,
    /// Tokens of a window, for each chunk.
    pub(crate) seq_lens: Vec<usize>,
}

/// Embeds windows; consecutive windows of equal length share chunks.
pub(crate) fn embed(model: &Model<'_>, windows: &[&[u32]], offloaded: f64) -> Result<States> {
    let ranges = chunk_ranges(windows, model.device().chunk_tokens());
    let mut hidden = ChunkStore::new(model.device(), ranges.len(), offloaded);
    let mut seq_lens = Vec::with_capacity(ranges.len());
    for (chunk, range) in ranges.into_iter().enumerate() {
        seq_lens.push(windows[range.start].len());
        hidden.put(chunk, model.embed(&windows[range].concat())?)?;
    }
    Ok(States { hidden, seq_lens })
}

/// Ranges of windows that make up the chunks.
pub(crate) fn chunk_ranges(windows: &[&[u32]], tokens: usize) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < windows.len() {
        let seq_len = windows[start].len();
        let most = (tokens / seq_len.max(1)).max(1);
        let same = windows[start..].iter().take(most).take_while(|w| w.len() == seq_len).count();
        ranges.push(start..start + same);
        start += same;
    }
    ranges
}

/// Runs a whole block of a model over every chunk.
pub(crate) fn forward(model: &Model<'_>, block: &Block, states: &mut States) -> Result<()> {
    states.past_block(model.device(), block, |seq_len| model.ropes(seq_len))
}

impl States {
    /// Moves all chunks past a block; `ropes` has the angles for windows of so many tokens.
    pub(crate) fn past_block<'r>(
        &mut self,
        device: &Device,
        block: &Block,
        ropes: impl Fn(usize) -> &'r Ropes,
    ) -> Result<()> {
        for (chunk, &seq_len) in self.seq_lens.iter().enumerate() {
            let mut hidden = self.hidden.take(chunk)?;
            block.forward(device, &mut hidden, ropes(seq_len), seq_len)?;
            self.hidden.put(chunk, hidden)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_whole_windows_of_one_length() {
        let long = vec![0; 3000];
        let short = vec![0; 1000];
        let windows: Vec<&[u32]> = vec![&long, &short, &short, &short, &short, &short, &long];
        assert_eq!(chunk_ranges(&windows, 4096), [0..1, 1..5, 5..6, 6..7]);
        let huge = vec![0; 5000];
        assert_eq!(chunk_ranges(&[&huge, &huge], 4096), [0..1, 1..2]);
        assert!(chunk_ranges(&[], 4096).is_empty());
    }
}
