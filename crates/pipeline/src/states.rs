//! Hidden states of all windows, in chunks of whole windows.
//!
//! A model is walked layer by layer with the states of every window held, so a chunk is what one
//! matrix product sees: several short windows, or one long one.

use gptq_compute::Tensor;
use gptq_model::{Block, Model};

use crate::error::Result;

/// Tokens of a chunk: products this tall run at full speed, and intermediates stay small.
const CHUNK_TOKENS: usize = 4096;

/// Whole windows of one length.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) hidden: Tensor,
    pub(crate) seq_len: usize,
}

/// Embeds windows; consecutive windows of equal length share chunks.
pub(crate) fn embed(model: &Model<'_>, windows: &[&[u32]]) -> Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    for range in chunk_ranges(windows) {
        let seq_len = windows[range.start].len();
        let ids: Vec<u32> = windows[range].concat();
        chunks.push(Chunk { hidden: model.embed(&ids)?, seq_len });
    }
    Ok(chunks)
}

/// Ranges of windows that make up the chunks.
pub(crate) fn chunk_ranges(windows: &[&[u32]]) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < windows.len() {
        let seq_len = windows[start].len();
        let most = (CHUNK_TOKENS / seq_len.max(1)).max(1);
        let same = windows[start..].iter().take(most).take_while(|w| w.len() == seq_len).count();
        ranges.push(start..start + same);
        start += same;
    }
    ranges
}

/// Runs a whole block over every chunk.
pub(crate) fn forward(model: &Model<'_>, block: &Block, chunks: &mut [Chunk]) -> Result<()> {
    for chunk in chunks {
        block.forward(model.device(), &mut chunk.hidden, model.rope(), chunk.seq_len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_hold_whole_windows_of_one_length() {
        let long = vec![0; 3000];
        let short = vec![0; 1000];
        let windows: Vec<&[u32]> = vec![&long, &short, &short, &short, &short, &short, &long];
        assert_eq!(chunk_ranges(&windows), [0..1, 1..5, 5..6, 6..7]);
        let huge = vec![0; 5000];
        assert_eq!(chunk_ranges(&[&huge, &huge]), [0..1, 1..2]);
        assert!(chunk_ranges(&[]).is_empty());
    }
}
