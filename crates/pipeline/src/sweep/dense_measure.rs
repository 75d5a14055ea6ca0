//! The dense model measured, for every branch of a sweep to be compared with.
//!
//! Its final states are kept where memory holds those of all windows at once. Where it does not,
//! it is walked again beside each branch, a batch of windows after another.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::branch_report::{BranchReport, EvaluationRecord, Measured};
use gptq_records::source_dtype::SourceDtype;
use gptq_text::evaluation::EvalText;

use crate::batches::{Batch, Batches, Beside};
use crate::error::{Error, Result, with_causes};
use crate::job::precision;
use crate::perplexity::{Perplexity, Scored, Tally, score, score_rounded};
use crate::progress::Progress;

/// The dense model on the evaluation text.
pub(crate) struct DenseMeasure<'a> {
    text: EvalText,
    model: Model<'a>,
    /// The text's windows, as memory holds them beside a second model's.
    batches: Batches,
    /// Its final states, where one batch holds all windows.
    kept: Option<Scored>,
    pub(crate) perplexity: Perplexity,
    /// Rounded grids by bits and group size: the order of columns does not matter to them. `None`
    /// where there is nothing to measure.
    rounded: BTreeMap<(u8, Option<usize>), Option<Measured>>,
}

impl<'a> DenseMeasure<'a> {
    pub(crate) fn measure(
        (source, dtype): (&'a Checkpoint, SourceDtype),
        text: EvalText,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // What the branches are made from is what they are compared with.
        let model = Model::new(source, device.clone(), precision(dtype), text.seq_len)?;
        let beside = Beside { base: true, ..Beside::default() };
        let batches = Batches::new(&model, &text.windows, beside, progress)?;
        let (mut kept, mut tally) = (None, Tally::default());
        for batch in batches.iter(&text.windows) {
            let scored = score(&model, batch, progress)?;
            tally.add(&scored, &model)?;
            kept = Some(scored).filter(|_| batches.count() == 1);
        }
        let perplexity = tally.perplexity(text.windows.len())?;
        Ok(Self { text, model, batches, kept, perplexity, rounded: BTreeMap::new() })
    }

    /// Takes the rounded grid of a branch that was compared with the same model on the same text.
    pub(crate) fn remember(&mut self, report: &BranchReport) {
        for rtn in report.evaluations.iter().filter_map(|e| e.rtn) {
            self.rounded.insert((report.bits, report.group_size), Some(rtn));
        }
    }

    /// A branch, from its file, and its grid without calibration.
    pub(crate) fn record(
        &mut self,
        spec: &QuantSpec,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<EvaluationRecord> {
        let checkpoint = Checkpoint::open(dir)?;
        let device = self.model.device().clone();
        let dtype = device.dtype().to_owned();
        let model = Model::new(&checkpoint, device, SourcePrecision::Stored, self.text.seq_len)?;
        let (result, kl) =
            self.compare(&model, progress, |batch| score(&model, batch, progress))?;
        let rtn = self.round(spec, progress)?;
        Ok(EvaluationRecord {
            protocol: self.text.protocol.clone(),
            dataset: self.text.identity.portable(),
            tokens_in_text: self.text.tokens_in_text,
            seq_len: self.text.seq_len,
            window_bos: self.text.window_bos,
            windows: result.windows,
            tokens: result.tokens,
            dtype,
            contaminated: self.text.contaminated == Some(true) && spec.recipe.calibrates(),
            perplexity: result.perplexity,
            standard_error: result.standard_error,
            kl: Some(kl),
            base_perplexity: Some(self.perplexity.perplexity),
            rtn,
        })
    }

    /// The grid of a branch, rounded to nearest. A branch that was made is worth more than what it is
    /// compared with: weights that cannot be rounded, or compute nothing once they are, cost a number
    /// of the table and a warning, not the branch.
    fn round(&mut self, spec: &QuantSpec, progress: &dyn Progress) -> Result<Option<Measured>> {
        let key = (spec.bits, spec.group_size);
        if let Some(measured) = self.rounded.get(&key) {
            return Ok(*measured);
        }
        let measured = match self.measure_rounded(spec, progress) {
            Ok(measured) => Some(measured),
            Err(
                error @ (Error::Solve { .. }
                | Error::Activations { .. }
                | Error::Model(gptq_model::Error::Overflow { .. })),
            ) => {
                progress.warn(&format!(
                    "the baseline rounded to nearest is missing at {} bits: {}",
                    spec.bits,
                    with_causes(&error)
                ));
                None
            }
            Err(error) => return Err(error),
        };
        self.rounded.insert(key, measured);
        Ok(measured)
    }

    fn measure_rounded(&self, spec: &QuantSpec, progress: &dyn Progress) -> Result<Measured> {
        let spec = QuantSpec { recipe: Recipe::Rtn, ..spec.clone() };
        let round = |batch: Batch<'_>| score_rounded(&self.model, &spec, batch, progress);
        let (result, kl) = self.compare(&self.model, progress, round)?;
        Ok(Measured { perplexity: result.perplexity, kl })
    }

    /// Perplexity of a model, and its KL divergence from the dense one.
    fn compare(
        &self,
        model: &Model<'_>,
        progress: &dyn Progress,
        walk: impl Fn(Batch<'_>) -> Result<Scored>,
    ) -> Result<(Perplexity, f64)> {
        let mut tally = Tally::default();
        for batch in self.batches.iter(&self.text.windows) {
            let scored = walk(batch)?;
            tally.add(&scored, model)?;
            match &self.kept {
                Some(base) => tally.compare(&scored, base, model)?,
                None => tally.compare(&scored, &score(&self.model, batch, progress)?, model)?,
            }
        }
        Ok((tally.perplexity(self.text.windows.len())?, tally.kl()?))
    }
}
