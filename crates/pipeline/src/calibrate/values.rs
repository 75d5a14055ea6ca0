//! The Hessian of v by what attention makes of its inputs.
//!
//! A head's contexts are A X Wᵀ: A are the weights that it gives to the tokens of a window, X the inputs of
//! q, k and v, W v's rows. An error of W reaches the contexts through A X, so (A X)ᵀ A X is its Hessian, as
//! XᵀX is that of q and k, which see tokens one by one (BoA, Kim et al., arXiv 2406.13474, has a row group of
//! v for each head). Here one Hessian serves all rows of v: the sum over some heads of some windows, which
//! stands for that over all (tests/bench/2026-11-29-forward-only.md).
//!
//! A is that of the weights of q and k as they are before they are solved, on the quantized model's inputs.

use gptq_compute::Gram;
use gptq_model::{Block, LinearId, Stage};
use gptq_quant::{Factored, ValueInputs, factor_in_order};

use super::{BlockRun, Work};
use crate::error::{Error, Result};

/// Of so many windows one is looked at.
const WINDOWS: usize = 4;
/// Key and value heads that are looked at in one window, at most.
const HEADS: usize = 4;
/// Tokens of windows looked at, over a Hessian's order: with fewer, more windows are.
const TOKENS: usize = 16;

/// Which windows and heads are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Of so many windows the first is.
    every: usize,
    /// Key and value heads of each, and of the model.
    heads: usize,
    kv_heads: usize,
}

impl Sample {
    /// Of `windows` windows of `seq_len` tokens, for a Hessian of order `n`.
    pub(crate) fn of((windows, seq_len): (usize, usize), n: usize, kv_heads: usize) -> Self {
        let enough = TOKENS * n.max(1);
        let every = (windows * seq_len / enough).clamp(1, WINDOWS);
        Self { every, heads: HEADS.min(kv_heads), kv_heads }
    }

    /// How many of so many windows.
    pub(crate) fn windows(self, windows: usize) -> usize {
        windows.div_ceil(self.every)
    }

    /// Heads of each of them.
    pub(crate) fn heads(self) -> usize {
        self.heads
    }

    /// Query heads to look at in a window, of `queries` for each head of keys: the heads take turns.
    fn queries(self, window: usize, queries: usize) -> Vec<usize> {
        if !window.is_multiple_of(self.every) {
            return Vec::new();
        }
        let turn = window / self.every;
        let of = |i| (turn * self.heads + i) % self.kv_heads * queries + turn % queries;
        (0..self.heads).map(of).collect()
    }
}

impl BlockRun<'_, '_, '_> {
    /// The Hessian of v where it is not that of q and k, and its factor in the order of theirs.
    pub(super) fn values(
        &mut self,
        block: &Block,
        stage: Stage,
        factored: &Factored,
    ) -> Result<Option<(Gram, Factored)>> {
        let all = self.all;
        let attended = all.spec.choices.values == ValueInputs::Attended;
        if !attended || stage != Stage::Qkv || !block.has(LinearId::V) {
            return Ok(None);
        }
        let gram = self.attended(block)?;
        let linear = || block.linear(LinearId::V).name.clone();
        let factored = factor_in_order(&gram, self.scale(), all.spec, &factored.order);
        let factored = factored.map_err(|source| match source {
            gptq_quant::Error::NotFinite { .. } => Error::Activations { linear: linear() },
            source => Error::Solve { linear: linear(), source },
        })?;
        self.timer.mark(Work::Factor)?;
        Ok(Some((gram, factored)))
    }

    /// (A X)ᵀ A X, summed over the heads and windows looked at on all ranks.
    fn attended(&mut self, block: &Block) -> Result<Gram> {
        let (all, device) = (self.all, self.all.device);
        let n = block.linear(LinearId::V).weight.cols();
        let (heads, kv_heads) = (block.rule().heads, block.rule().kv_heads);
        let mut gram = device.gram(n)?;
        let seq_lens = self.stream.states.seq_lens.clone();
        let longest = seq_lens.iter().copied().max().unwrap_or(1);
        let sample = Sample::of((all.windows, longest), n, kv_heads);
        // Windows have one number for all ranks.
        let mut window = all.ranks.share(all.windows, 1).start;
        for (chunk, seq_len) in seq_lens.into_iter().enumerate() {
            let ropes = all.ropes.for_windows(seq_len);
            let input = self.stream.input(all, block, Stage::Qkv, chunk)?;
            for first in (0..input.rows()).step_by(seq_len) {
                let queries = sample.queries(window, heads / kv_heads);
                window += 1;
                if queries.is_empty() {
                    continue;
                }
                let rows: Vec<u32> = (first..first + seq_len).map(|row| row as u32).collect();
                let input = device.select_rows(&input, &rows)?;
                let placed = block.queries_keys(device, &input, ropes, seq_len)?;
                for head in queries {
                    let attended = block.attended(device, &placed, &input, head, seq_len)?;
                    self.timer.mark(Work::Forward)?;
                    device.gram_add(&mut gram, &attended)?;
                    self.timer.mark(Work::Gram)?;
                }
            }
        }
        gram.sum_over(all.ranks)?;
        self.exchanged()?;
        Ok(gram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_take_turns_in_every_fourth_window() {
        // SmolLM2: 3 heads of keys, 3 of queries for each.
        let sample = Sample::of((128, 2048), 576, 3);
        assert_eq!((sample.windows(128), sample.heads()), (32, 3));
        assert_eq!(sample.queries(0, 3), [0, 3, 6]);
        assert!(sample.queries(1, 3).is_empty());
        let mut seen: Vec<usize> = (0..12).flat_map(|window| sample.queries(window, 3)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..9).collect::<Vec<_>>());
        // 70B: 8 and 8.
        let sample = Sample::of((128, 4096), 8192, 8);
        assert_eq!((sample.windows(128), sample.heads()), (32, 4));
        let mut seen: Vec<usize> = (0..64).flat_map(|window| sample.queries(window, 8)).collect();
        assert_eq!(seen.len(), 64);
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.iter().all(|&head| head < 64) && seen.len() > 24, "{seen:?}");
        // Few tokens: all windows.
        assert_eq!(Sample::of((8, 512), 576, 3).windows(8), 8);
        assert_eq!(Sample::of((1, 1), 8192, 1).queries(0, 4), [0]);
    }
}
