//! Perplexity and KL divergence, layer by layer: a block is loaded once for all windows that memory
//! holds at once (see [`crate::batches`]).

use gptq_compute::Tensor;
use gptq_model::{Block, Head, Linear, Model, SourcePrecision};
use gptq_quant::{QuantSpec, round_to_nearest, rounded_weight};
use gptq_text::protocol::EvalWindow;
use serde::{Deserialize, Serialize};

use crate::batches::Batch;
use crate::error::{Error, Result};
use crate::one_reading::Seat;
use crate::progress::{Progress, Silent};
use crate::read_ahead::{next_block, read_ahead};
use crate::states::{States, chunk_ranges, embed, forward};

/// Normed final hidden states of a batch's scored positions, with the tokens that follow them.
///
/// Kept by a sweep for the dense model where one batch holds all windows, so that each branch's KL
/// costs no second forward pass.
#[derive(Debug)]
pub struct Scored {
    chunks: Vec<(Tensor, Vec<u32>)>,
    head: Head,
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

/// Runs the model as it is stored over the windows of a batch.
pub fn score(model: &Model<'_>, batch: Batch<'_>, progress: &dyn Progress) -> Result<Scored> {
    let mut states = begin(model, batch)?;
    each_block(model, batch, false, None, progress, |block| forward(model, block, &mut states))?;
    Scored::of(model, batch, states)
}

/// Runs the model with every linear rounded to nearest on the way: the baseline without a file.
pub fn score_rounded(
    model: &Model<'_>,
    spec: &QuantSpec,
    batch: Batch<'_>,
    progress: &dyn Progress,
) -> Result<Scored> {
    let mut states = begin(model, batch)?;
    let exact = model.precision() == SourcePrecision::Stored;
    each_block(model, batch, exact, None, progress, |block| {
        let exact = block.take_exact();
        round(model, block, &exact, spec)?;
        forward(model, block, &mut states)
    })?;
    Scored::of(model, batch, states)
}

/// Rounds every linear of a block to nearest; `exact` is what its weights are a rounding of, where
/// they are one.
pub(crate) fn round(
    model: &Model<'_>,
    block: &mut Block,
    exact: &[Tensor],
    spec: &QuantSpec,
) -> Result<()> {
    for (place, id) in block.ids().into_iter().enumerate() {
        let Linear { name, weight, .. } = block.linear(id);
        let rounded = match exact.get(place) {
            // Wider than the device's: in host memory.
            Some(exact) => round_to_nearest(model.device(), exact, spec).map(|q| q.weight),
            None => rounded_weight(model.device(), weight, spec),
        };
        let rounded = rounded.map_err(|source| Error::Solve { linear: name.clone(), source })?;
        block.set_weight(id, rounded);
    }
    Ok(())
}

/// One pass over the blocks, each of which `compute` runs; with `exact` it finds, too, what a GPU's
/// weights are a rounding of. With a `seat`, other walks read the model at the same time.
pub(crate) fn each_block(
    model: &Model<'_>,
    batch: Batch<'_>,
    exact: bool,
    seat: Option<Seat<'_>>,
    progress: &dyn Progress,
    mut compute: impl FnMut(&mut Block) -> Result<()>,
) -> Result<()> {
    let progress = if model.ranks().is_first() { progress } else { &Silent };
    let blocks = model.config().num_hidden_layers;
    progress.begin(&batch.label("perplexity"), blocks);
    std::thread::scope(|scope| {
        let ahead = read_ahead(scope, model, None, exact, seat.map(|seat| seat.reader));
        for _ in 0..blocks {
            let mut block = next_block(&ahead)?;
            let _turn = seat.map(Seat::turn);
            compute(&mut block)?;
            // Nothing here waits for a GPU: without this, blocks are read ahead until its memory is
            // full of them, and a step is said before it is done.
            model.device().synchronize("a block")?;
            progress.step();
        }
        Ok::<_, Error>(())
    })?;
    progress.end();
    Ok(())
}

/// The states of a batch before the first block.
pub(crate) fn begin(model: &Model<'_>, batch: Batch<'_>) -> Result<States> {
    embed(model, &tokens(batch.windows), batch.offloaded)
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
    /// Of the states of a batch after the last block.
    pub(crate) fn of(model: &Model<'_>, batch: Batch<'_>, mut states: States) -> Result<Self> {
        let head = model.load_head()?;
        let ranges = chunk_ranges(&tokens(batch.windows), model.device().chunk_tokens());
        let mut chunks = Vec::with_capacity(ranges.len());
        for (chunk, range) in ranges.into_iter().enumerate() {
            let (rows, targets) = scored_rows(&batch.windows[range]);
            let rows = model.device().select_rows(&states.hidden.take(chunk)?, &rows)?;
            chunks.push((head.norm(model.device(), &rows)?, targets));
        }
        Ok(Self { chunks, head })
    }

    /// Negative log likelihoods of the scored tokens in nats, in the order of the windows.
    pub fn losses(&self, model: &Model<'_>) -> Result<Vec<f32>> {
        let mut losses = Vec::new();
        for (hidden, targets) in &self.chunks {
            losses.extend(model.device().token_nll(
                hidden,
                self.head.weight(),
                targets,
                cap(model),
            )?);
        }
        Ok(losses)
    }

    /// KL(base ‖ self) in nats at the scored positions of the same windows.
    pub fn divergences(&self, base: &Self, model: &Model<'_>) -> Result<Vec<f32>> {
        let (mine, theirs) = (self.head.weight().rows(), base.head.weight().rows());
        if mine != theirs {
            return Err(Error::Vocabulary { base: theirs, other: mine });
        }
        let mut all = Vec::new();
        for ((p, _), (q, _)) in base.chunks.iter().zip(&self.chunks) {
            let heads = (base.head.weight(), self.head.weight());
            all.extend(model.device().token_kl((p, heads.0), (q, heads.1), cap(model))?);
        }
        Ok(all)
    }
}

/// What logits stay below.
fn cap(model: &Model<'_>) -> Option<f32> {
    model.config().logit_softcap
}

/// What the scored tokens of all batches gave, in order.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Losses.
    pub losses: Vec<f32>,
    /// KL divergences from a base, where there is one.
    pub divergences: Vec<f32>,
}

impl Tally {
    /// Adds the losses of a batch.
    pub fn add(&mut self, scored: &Scored, model: &Model<'_>) -> Result<()> {
        self.losses.extend(scored.losses(model)?);
        Ok(())
    }

    /// Adds the divergences of a batch from a base.
    pub fn compare(&mut self, scored: &Scored, base: &Scored, model: &Model<'_>) -> Result<()> {
        self.divergences.extend(scored.divergences(base, model)?);
        Ok(())
    }

    /// The values of parts of the windows, in their order.
    pub(crate) fn of_parts(parts: Vec<Self>) -> Self {
        parts.into_iter().fold(Self::default(), |mut all, part| {
            all.losses.extend(part.losses);
            all.divergences.extend(part.divergences);
            all
        })
    }

    /// The values of every rank's windows, in the windows' order.
    pub fn of_all_ranks(self, model: &Model<'_>) -> Result<Self> {
        let of_all = |values: Vec<f32>| -> Result<Vec<f32>> {
            let parts = model.ranks().exchange(bytemuck::cast_slice(&values).to_vec())?;
            Ok(parts.into_iter().flatten().map(f32::from_bits).collect())
        };
        Ok(Self { losses: of_all(self.losses)?, divergences: of_all(self.divergences)? })
    }

    /// Perplexity over so many windows.
    pub fn perplexity(&self, windows: usize) -> Result<Perplexity> {
        Perplexity::of(&self.losses, windows)
    }

    /// Mean KL(base ‖ model) in nats a token.
    ///
    /// # Errors
    /// [`Error::Activations`] where it is not finite.
    pub fn kl(&self) -> Result<f64> {
        let sum = self.divergences.iter().map(|&k| f64::from(k)).sum::<f64>();
        let mean = sum / self.divergences.len() as f64;
        if !mean.is_finite() {
            return Err(Error::Activations { linear: "lm_head".to_owned() });
        }
        Ok(mean)
    }
}

impl Perplexity {
    /// Perplexity of the scored tokens: exp of the mean over all of them. Under `paper` all windows
    /// score equally many tokens, so this is the mean over windows too.
    pub fn of(losses: &[f32], windows: usize) -> Result<Self> {
        let tokens = losses.len();
        let mean = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / tokens as f64;
        // The exponential of a finite mean may be infinite: no report can hold that either.
        if !mean.exp().is_finite() {
            return Err(Error::Activations { linear: "lm_head".to_owned() });
        }
        let variance = losses.iter().map(|&l| (f64::from(l) - mean).powi(2)).sum::<f64>();
        Ok(Self {
            perplexity: mean.exp(),
            mean_nll: mean,
            standard_error: variance.sqrt() / tokens as f64,
            windows,
            tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use gptq_checkpoint::Checkpoint;
    use gptq_compute::Device;
    use gptq_quant::Recipe;
    use gptq_text::protocol::Protocol;

    use super::*;
    use crate::batches::{Batches, Beside};

    /// Cut between chunks, batches change nothing, to the last bit: neither losses nor divergences.
    #[test]
    fn batches_of_single_chunks_give_the_losses_of_the_whole() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let source = Checkpoint::open(&root.join("tests/fixtures/demo-llama")).unwrap();
        let vocab = source.config().vocab_size as u32;
        let ids: Vec<u32> = (0..9000).map(|i: u32| i.wrapping_mul(i / 7 + 11) % vocab).collect();
        let device = Device::best().unwrap();
        let model = Model::new(&source, device, SourcePrecision::Stored, 512).unwrap();
        let spec = QuantSpec::new(3, Some(64), false, 0.01, Recipe::Rtn);
        for (protocol, seq_len, least) in
            [(Protocol::Paper, 500, 2), (Protocol::Strided, 512, 4), (Protocol::LlamaCpp, 96, 2)]
        {
            let windows = protocol.windows(&ids, seq_len, Some(1), None).unwrap();
            let tally = |batches: Batches| {
                let mut tally = Tally::default();
                for batch in batches.iter(&windows) {
                    let base = score(&model, batch, &Silent).unwrap();
                    let rounded = score_rounded(&model, &spec, batch, &Silent).unwrap();
                    tally.add(&rounded, &model).unwrap();
                    tally.compare(&rounded, &base, &model).unwrap();
                }
                tally.of_all_ranks(&model).unwrap()
            };
            let beside = Beside { base: true, grams: false };
            let whole = Batches::new(&model, &windows, beside, &Silent).unwrap();
            assert_eq!(whole.count(), 1);
            let single = Batches::of_single_chunks(&model, &windows);
            assert!(single.count() >= least, "{protocol}: {}", single.count());
            let (whole, single) = (tally(whole), tally(single));
            let scored = windows.iter().map(EvalWindow::scored).sum::<usize>();
            assert_eq!(whole.losses.len(), scored);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            for (whole, single) in
                [(&whole.losses, &single.losses), (&whole.divergences, &single.divergences)]
            {
                assert_eq!(bits(whole), bits(single), "{protocol}");
            }
            let (whole, single) = (whole.perplexity(7).unwrap(), single.perplexity(7).unwrap());
            assert_eq!(whole.perplexity.to_bits(), single.perplexity.to_bits());
        }
    }

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
