//! Perplexity and KL divergence, layer by layer: a block is loaded once for all windows.

use gptq_compute::Tensor;
use gptq_model::{Block, Head, LinearId, Model, SourcePrecision};
use gptq_quant::{QuantSpec, round_to_nearest};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::{BlockSizes, Workload, parking};
use crate::progress::{Progress, Silent};
use crate::protocol::EvalWindow;
use crate::quantise::{linear_name, next_block, read_ahead};
use crate::states::{States, chunk_ranges, chunk_tokens, embed, forward};

/// Normed final hidden states of every scored position, with the tokens that follow them.
///
/// Every rank has those of its own windows. Kept by a sweep for the dense model, so that each
/// branch's KL costs no second forward pass.
#[derive(Debug)]
pub struct Scored {
    chunks: Vec<(Tensor, Vec<u32>)>,
    head: Head,
    /// Windows of all ranks.
    windows: usize,
}

/// Mean loss over all scored tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
    walk(model, windows, false, progress, |_| Ok(()))
}

/// Runs the model with every linear rounded to nearest on the way: the baseline without a file.
pub fn score_rounded(
    model: &Model<'_>,
    spec: &QuantSpec,
    windows: &[EvalWindow],
    progress: &dyn Progress,
) -> Result<Scored> {
    let exact = model.precision() == SourcePrecision::Stored;
    walk(model, windows, exact, progress, |block| {
        let exact = block.take_exact();
        for id in LinearId::ALL {
            let weight = exact.get(id as usize).unwrap_or_else(|| block.linear(id));
            let rounded = round_to_nearest(model.device(), weight, spec)
                .map_err(|source| Error::Solve { linear: linear_name(model, block, id), source })?;
            block.set_linear(id, rounded.weight);
        }
        Ok(())
    })
}

/// One pass over the blocks; `prepare` may change a block's weights before it runs, and with `exact`
/// finds those that a GPU's are a rounding of.
fn walk(
    model: &Model<'_>,
    windows: &[EvalWindow],
    exact: bool,
    progress: &dyn Progress,
    prepare: impl Fn(&mut Block) -> Result<()>,
) -> Result<Scored> {
    let ranks = model.ranks();
    let progress = if ranks.is_first() { progress } else { &Silent };
    let all = windows.len();
    let windows = &windows[ranks.share(all, 1)];
    let mut states = begin(model, windows, exact)?;
    let blocks = model.config().num_hidden_layers;
    progress.begin("perplexity", blocks);
    std::thread::scope(|scope| {
        let ahead = read_ahead(scope, model, None, exact);
        for _ in 0..blocks {
            let mut block = next_block(&ahead)?;
            prepare(&mut block)?;
            forward(model, &block, &mut states)?;
            progress.step();
        }
        Ok::<_, Error>(())
    })?;
    progress.end();
    Scored::of(model, windows, all, states)
}

/// The states of windows before the first block; `exact` as for [`Workload`].
pub(crate) fn begin(model: &Model<'_>, windows: &[EvalWindow], exact: bool) -> Result<States> {
    let tokens = tokens(windows);
    let held = tokens.iter().map(|window| window.len()).sum();
    let seq_len = tokens.iter().map(|window| window.len()).max().unwrap_or(1);
    let work = Workload { tokens: held, seq_len, reference: false, exact };
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
    /// Of the states of this rank's windows after the last block; `all` windows there are.
    pub(crate) fn of(
        model: &Model<'_>,
        windows: &[EvalWindow],
        all: usize,
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
        Ok(Self { chunks, head, windows: all })
    }

    /// Perplexity of the scored tokens: exp of the mean over all of them. Under `paper` all windows
    /// score equally many tokens, so this is the mean over windows too.
    pub fn perplexity(&self, model: &Model<'_>) -> Result<Perplexity> {
        self.mean(&self.losses(model)?)
    }

    /// Negative log likelihoods of the scored tokens in nats, in the order of the text.
    pub fn losses(&self, model: &Model<'_>) -> Result<Vec<f32>> {
        let mut losses = Vec::new();
        for (hidden, targets) in &self.chunks {
            losses.extend(model.device().token_nll(hidden, self.head.weight(), targets)?);
        }
        of_all_ranks(model, &losses)
    }

    /// Perplexity from [`Self::losses`].
    pub fn mean(&self, losses: &[f32]) -> Result<Perplexity> {
        let tokens = losses.len();
        let mean = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / tokens as f64;
        // The exponential of a finite mean may be infinite: no report can hold that either.
        if !mean.exp().is_finite() {
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
        let mut all = Vec::new();
        for ((p, _), (q, _)) in base.chunks.iter().zip(&self.chunks) {
            let heads = (base.head.weight(), self.head.weight());
            all.extend(model.device().token_kl((p, heads.0), (q, heads.1))?);
        }
        let all = of_all_ranks(model, &all)?;
        let mean = all.iter().map(|&k| f64::from(k)).sum::<f64>() / all.len() as f64;
        if !mean.is_finite() {
            return Err(Error::Activations { linear: "lm_head".to_owned() });
        }
        Ok(mean)
    }
}

/// The values of every rank's windows, in the windows' order.
fn of_all_ranks(model: &Model<'_>, values: &[f32]) -> Result<Vec<f32>> {
    let parts = model.ranks().exchange(bytemuck::cast_slice(values).to_vec())?;
    Ok(parts.into_iter().flatten().map(f32::from_bits).collect())
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
