//! Perplexity and KL divergence, layer by layer: a block is loaded once for all windows.

use gptq_compute::Tensor;
use gptq_model::{Block, Head, Model};
use gptq_quant::{QuantSpec, round_to_nearest};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::memory::{BlockSizes, Workload, parking};
use crate::progress::Progress;
use crate::protocol::EvalWindow;
use crate::quantise::{linear_name, next_block, read_ahead};
use crate::states::{States, chunk_ranges, chunk_tokens, embed, forward};

/// Normed final hidden states of every scored position, with the tokens that follow them.
///
/// Kept by a sweep for the fp16 model, so that each branch's KL costs no second forward pass.
#[derive(Debug)]
pub struct Scored {
    chunks: Vec<(Tensor, Vec<u32>)>,
    head: Head,
    windows: usize,
}

/// Mean loss over all scored tokens.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Perplexity {
    /// exp of the mean negative log likelihood.
    pub perplexity: f64,
    /// Mean negative log likelihood in nats.
    pub mean_nll: f64,
    /// Standard error of the mean over tokens, in nats.
    pub standard_error: f64,
    /// Windows evaluated.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
}

/// Runs the model as it is stored over `windows`.
pub fn score(model: &Model<'_>, windows: &[EvalWindow], progress: &dyn Progress) -> Result<Scored> {
    walk(model, windows, progress, |_| Ok(()))
}

/// Runs the model with every linear rounded to nearest on the way: the baseline without a file.
pub fn score_rounded(
    model: &Model<'_>,
    spec: &QuantSpec,
    windows: &[EvalWindow],
    progress: &dyn Progress,
) -> Result<Scored> {
    walk(model, windows, progress, |block| {
        for id in gptq_model::LinearId::ALL {
            let rounded = round_to_nearest(model.device(), block.linear(id), spec)
                .map_err(|source| Error::Solve { linear: linear_name(model, block, id), source })?;
            block.set_linear(id, rounded.weight);
        }
        Ok(())
    })
}

/// One pass over the blocks; `prepare` may change a block's weights before it runs.
fn walk(
    model: &Model<'_>,
    windows: &[EvalWindow],
    progress: &dyn Progress,
    prepare: impl Fn(&mut Block) -> Result<()>,
) -> Result<Scored> {
    let mut states = begin(model, windows)?;
    let blocks = model.config().num_hidden_layers;
    progress.begin("perplexity", blocks);
    std::thread::scope(|scope| {
        let ahead = read_ahead(scope, model, None);
        for _ in 0..blocks {
            let mut block = next_block(&ahead)?;
            prepare(&mut block)?;
            forward(model, &block, &mut states)?;
            progress.step();
        }
        Ok::<_, Error>(())
    })?;
    progress.end();
    Scored::of(model, windows, states)
}

/// The states of all windows before the first block.
pub(crate) fn begin(model: &Model<'_>, windows: &[EvalWindow]) -> Result<States> {
    let tokens = tokens(windows);
    let held = windows.iter().map(|w| w.tokens.len()).sum();
    let work = Workload { tokens: held, reference: false };
    let parked = parking(model.device(), BlockSizes::of(model.config()), work)?;
    embed(model, &tokens, parked.hidden)
}

fn tokens(windows: &[EvalWindow]) -> Vec<&[u32]> {
    windows.iter().map(|w| w.tokens.as_slice()).collect()
}

/// Rows of a chunk whose next token is scored, and those tokens.
fn scored_rows(windows: &[EvalWindow]) -> (Vec<u32>, Vec<u32>) {
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    let mut first_row = 0;
    for window in windows {
        for target in window.score_from..window.tokens.len() {
            rows.push((first_row + target - 1) as u32);
            targets.push(window.tokens[target]);
        }
        first_row += window.tokens.len();
    }
    (rows, targets)
}

impl Scored {
    /// Of the states after the last block.
    pub(crate) fn of(
        model: &Model<'_>,
        windows: &[EvalWindow],
        mut states: States,
    ) -> Result<Self> {
        let head = model.load_head()?;
        let ranges = chunk_ranges(&tokens(windows), chunk_tokens(model.device()));
        let mut chunks = Vec::with_capacity(ranges.len());
        for (chunk, range) in ranges.into_iter().enumerate() {
            let (rows, targets) = scored_rows(&windows[range]);
            let rows = model.device().select_rows(&states.hidden.take(chunk)?, &rows)?;
            chunks.push((head.norm(model.device(), &rows)?, targets));
        }
        Ok(Self { chunks, head, windows: windows.len() })
    }

    /// Perplexity of the scored tokens: exp of the mean over all of them. Under `paper` all windows
    /// score equally many tokens, so this is the mean over windows too.
    pub fn perplexity(&self, model: &Model<'_>) -> Result<Perplexity> {
        let mut losses = Vec::new();
        for (hidden, targets) in &self.chunks {
            losses.extend(model.device().token_nll(hidden, self.head.weight(), targets)?);
        }
        let tokens = losses.len();
        let mean = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / tokens as f64;
        if !mean.is_finite() {
            return Err(Error::Activations { linear: "lm_head".to_owned() });
        }
        let variance = losses.iter().map(|&l| (f64::from(l) - mean).powi(2)).sum::<f64>();
        Ok(Perplexity {
            perplexity: mean.exp(),
            mean_nll: mean,
            standard_error: variance.sqrt() / tokens as f64,
            windows: self.windows,
            tokens,
        })
    }

    /// Mean KL(base ‖ self) in nats over the scored positions of the same windows.
    pub fn kl_from(&self, base: &Self, model: &Model<'_>) -> Result<f64> {
        let (mine, theirs) = (self.head.weight().rows(), base.head.weight().rows());
        if mine != theirs {
            return Err(Error::Vocabulary { base: theirs, other: mine });
        }
        let (mut sum, mut tokens) = (0.0_f64, 0_usize);
        for ((p, _), (q, _)) in base.chunks.iter().zip(&self.chunks) {
            let kl = model.device().token_kl((p, base.head.weight()), (q, self.head.weight()))?;
            sum += kl.iter().map(|&k| f64::from(k)).sum::<f64>();
            tokens += kl.len();
        }
        Ok(sum / tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_scored_token_is_predicted_by_the_row_before_it() {
        let windows = [
            EvalWindow { tokens: vec![10, 11, 12], score_from: 1 },
            EvalWindow { tokens: vec![20, 21, 22], score_from: 2 },
        ];
        let (rows, targets) = scored_rows(&windows);
        assert_eq!(rows, [0, 1, 4]);
        assert_eq!(targets, [11, 12, 22]);
    }
}
