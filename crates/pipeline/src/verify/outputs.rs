//! What the checkpoint computes on a text: errors of its linears, perplexity, distance from the base.
//!
//! One walk of the checkpoint serves them all. A linear's output error is measured on the inputs
//! that the checkpoint itself gives it, against the base's weights in the same coordinates: the
//! number that calibration reports, on another text. Hidden states are never compared with the
//! base's, whose coordinates may be others; logits are.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, Gram, Tensor};
use gptq_model::{Block, Model, Reading, SourcePrecision};
use gptq_text::evaluation::{EvalText, EvaluationSpec, evaluation_text};
use ndarray::Array2;
use serde::Serialize;

use super::findings::{Check, Findings};
use super::job::VerifyJob;
use super::pairs::block_starts;
use super::weights::Weights;
use crate::batches::{Batch, Batches, Beside};
use crate::error::{Error, Result};
use crate::perplexity::{Perplexity, Scored, Tally, begin, score};
use crate::progress::Progress;
use crate::read_ahead::{next_block, read_ahead};
use crate::rotate::FusedRotations;
use crate::states::States;

/// Measured on a text.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Outputs {
    /// Of the checkpoint.
    #[serde(flatten)]
    pub result: Perplexity,
    /// Of the base in fp16, on the same windows.
    pub base_perplexity: Option<f64>,
    /// Perplexity over the base's.
    pub ratio: Option<f64>,
    /// Mean KL(base ‖ checkpoint) in nats a token.
    pub kl: Option<f64>,
}

/// The walks of a job with a text.
pub(super) struct Run<'a> {
    pub(super) job: &'a VerifyJob<'a>,
    pub(super) checkpoint: &'a Checkpoint,
    /// Rotations that the checkpoint has over the base.
    pub(super) rotations: Option<Arc<FusedRotations>>,
}

impl Run<'_> {
    /// Measures all that there are means for; output errors go to `weights`.
    pub(super) fn measure(
        &self,
        spec: &EvaluationSpec,
        weights: Option<&mut Weights>,
        progress: &dyn Progress,
    ) -> Result<(EvalText, Outputs)> {
        let text = evaluation_text(self.checkpoint, spec, None)?;
        let device = &self.job.device;
        let model =
            Model::new(self.checkpoint, device.clone(), SourcePrecision::Stored, text.seq_len)?;
        let base = self.job.base;
        let precision = SourcePrecision::Half;
        let dense = base.map(|b| Model::new(b, device.clone(), precision, text.seq_len));
        let dense = dense.transpose()?;
        // Differences are made in f32 in host memory, whatever the device computes in.
        let on_host = base.map(|b| Model::new(b, Device::Cpu, precision, 1)).transpose()?;
        let beside = Beside { base: base.is_some(), grams: weights.is_some() };
        let batches = Batches::new(&model, &text.windows, beside, progress)?;
        let (mut tally, mut reference) = (Tally::default(), Tally::default());
        let mut errors =
            vec![OutputError::default(); weights.as_ref().map_or(0, |w| w.linears.len())];
        for batch in batches.iter(&text.windows) {
            let scored = match &on_host {
                Some(host) if weights.is_some() => {
                    self.walk(&model, host, batch, &mut errors, progress)?
                }
                _ => score(&model, batch, progress)?,
            };
            tally.add(&scored, &model)?;
            if let Some(dense) = &dense {
                let wanted = score(dense, batch, progress)?;
                reference.add(&wanted, dense)?;
                tally.compare(&scored, &wanted, &model)?;
            }
        }
        for (linear, error) in weights.into_iter().flat_map(|w| &mut w.linears).zip(&errors) {
            linear.output_error = error.relative();
        }
        let result = tally.perplexity(text.windows.len())?;
        let mut outputs = Outputs { result, base_perplexity: None, ratio: None, kl: None };
        if dense.is_some() {
            let perplexity = reference.perplexity(text.windows.len())?.perplexity;
            outputs.base_perplexity = Some(perplexity);
            outputs.ratio = Some(result.perplexity / perplexity);
            outputs.kl = Some(tally.kl()?);
        }
        Ok((text, outputs))
    }

    /// Walks the checkpoint beside the base's weights, and adds to the output errors of all linears,
    /// block by block.
    fn walk(
        &self,
        model: &Model<'_>,
        dense: &Model<'_>,
        batch: Batch<'_>,
        errors: &mut [OutputError],
        progress: &dyn Progress,
    ) -> Result<Scored> {
        let mut states = begin(model, batch)?;
        let blocks = dense.config().num_hidden_layers;
        progress.begin(&batch.label("output errors"), blocks);
        std::thread::scope(|scope| {
            let ahead = read_ahead(scope, model, None, false, None);
            let ahead_of_base = read_ahead(scope, dense, self.rotations.as_deref(), false, None);
            for first in block_starts(dense.config()).take(blocks) {
                let (block, wanted) = (next_block(&ahead)?, next_block(&ahead_of_base)?);
                let grams = forward(model, &block, &mut states)?;
                let linears = block.linears().iter().zip(wanted.linears());
                for ((given, wanted), error) in linears.zip(&mut errors[first..]) {
                    if let Some(gram) = grams.get(&Reading::of(given.id)) {
                        error.add(model, (&given.weight, &wanted.weight), gram)?;
                    }
                }
                progress.step();
            }
            Ok::<_, Error>(())
        })?;
        progress.end();
        Scored::of(model, batch, states)
    }
}

/// Runs a whole block over every chunk; gives XᵀX of the inputs of each stage, of experts those that tokens go
/// through.
fn forward(
    model: &Model<'_>,
    block: &Block,
    states: &mut States,
) -> Result<BTreeMap<Reading, Gram>> {
    let device = model.device();
    let mut grams = BTreeMap::new();
    for (chunk, &seq_len) in states.seq_lens.iter().enumerate() {
        let mut hidden = states.hidden.take(chunk)?;
        let ropes = model.ropes(seq_len);
        block.forward_looking(device, &mut hidden, ropes, seq_len, |reading, input| {
            let gram = match grams.entry(reading) {
                Entry::Vacant(place) => place.insert(device.gram(input.cols())?),
                Entry::Occupied(gram) => gram.into_mut(),
            };
            Ok(device.gram_add(gram, input)?)
        })?;
        states.hidden.put(chunk, hidden)?;
    }
    Ok(grams)
}

/// What a linear's difference from the base's makes of its inputs, over all batches.
#[derive(Clone, Copy, Debug, Default)]
struct OutputError {
    /// tr(D G Dᵀ) with D the difference.
    difference: f64,
    /// tr(W G Wᵀ) with W the base's weights.
    base: f64,
}

impl OutputError {
    /// Adds a batch, given by the Gram of its inputs.
    fn add(
        &mut self,
        model: &Model<'_>,
        (given, wanted): (&Tensor, &Tensor),
        gram: &Gram,
    ) -> Result<()> {
        let (given, wanted): (Array2<f32>, Array2<f32>) = (given.to_host()?, wanted.to_host()?);
        let energy = |weight: Array2<f32>| -> Result<f64> {
            Ok(gram.quadratic_form(&model.device().upload_f32(weight)?)?)
        };
        self.difference += energy(&given - &wanted)?;
        self.base += energy(wanted)?;
        Ok(())
    }

    /// The quotient, infinite where it cannot be held; `None` where there is nothing to compare with
    /// and nothing that differs.
    fn relative(self) -> Option<f64> {
        let Self { difference, base } = self;
        if base == 0.0 && difference == 0.0 { None } else { Some(difference / base) }
    }
}

/// Whether a value is not within its limit: one that is no number is not.
fn is_above(value: f64, limit: f64) -> bool {
    !matches!(value.partial_cmp(&limit), Some(Ordering::Less | Ordering::Equal))
}

/// What the user set a limit on.
pub(super) fn check_limits(
    job: &VerifyJob<'_>,
    outputs: &Outputs,
    weights: Option<&Weights>,
    findings: &mut Findings,
) {
    let limits = &job.limits;
    for (name, value, limit) in [
        ("perplexity", Some(outputs.result.perplexity), limits.perplexity),
        ("perplexity over the base's", outputs.ratio, limits.ratio),
        ("KL divergence", outputs.kl, limits.kl),
    ] {
        let (Some(value), Some(limit)) = (value, limit) else { continue };
        findings.examine(Check::Limits, 1);
        if is_above(value, limit) {
            findings.add(Check::Limits, name, format!("is {value:.5}, above the limit {limit}"));
        }
    }
    let Some(limit) = limits.output_error else { return };
    for linear in weights.into_iter().flat_map(|w| &w.linears) {
        let Some(error) = linear.output_error else { continue };
        findings.examine(Check::Limits, 1);
        if is_above(error, limit) {
            let message = format!("has an output error of {error:.5}, above the limit {limit}");
            findings.add(Check::Limits, linear.name.clone(), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_is_within_a_limit_but_one_at_most_as_large() {
        assert!(!is_above(1.0, 1.0) && !is_above(0.0, 1.0));
        for value in [1.1, f64::INFINITY, f64::NAN] {
            assert!(is_above(value, 1.0), "{value}");
        }
    }

    #[test]
    fn an_error_that_cannot_be_held_is_an_error() {
        let relative = |difference, base| OutputError { difference, base }.relative();
        assert_eq!(relative(1.0, 2.0), Some(0.5));
        assert_eq!(relative(0.0, 0.0), None);
        assert_eq!(relative(1.0, 0.0), Some(f64::INFINITY));
        assert_eq!(relative(f64::INFINITY, 1.0), Some(f64::INFINITY));
        assert!(relative(f64::NAN, 1.0).unwrap().is_nan());
    }
}
