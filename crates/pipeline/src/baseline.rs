//! The dense model measured once, for every branch of a sweep to be compared with.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};

use crate::branch_report::{BranchReport, EvaluationRecord};
use crate::error::{Error, Result};
use crate::evaluation::EvalText;
use crate::perplexity::{Perplexity, Scored, score, score_rounded};
use crate::progress::Progress;
use crate::source_dtype::SourceDtype;
use crate::sweep::Measured;

/// The dense model on the evaluation text.
pub(crate) struct Baseline<'a> {
    text: EvalText,
    model: Model<'a>,
    scored: Scored,
    pub(crate) perplexity: Perplexity,
    /// Rounded grids by bits and group size: the order of columns does not matter to them. `None`
    /// where there is nothing to measure.
    rounded: BTreeMap<(u8, Option<usize>), Option<Measured>>,
}

impl<'a> Baseline<'a> {
    pub(crate) fn measure(
        (source, dtype): (&'a Checkpoint, SourceDtype),
        text: EvalText,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // What the branches are made from is what they are compared with.
        let model = Model::new(source, device.clone(), dtype.precision(), text.seq_len)?;
        let scored = score(&model, &text.windows, progress)?;
        let perplexity = scored.perplexity(&model)?;
        Ok(Self { text, model, scored, perplexity, rounded: BTreeMap::new() })
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
        let scored = score(&model, &self.text.windows, progress)?;
        let result = scored.perplexity(&self.model)?;
        let kl = scored.kl_from(&self.scored, &self.model)?;
        drop(scored);
        let rtn = self.round(spec, progress)?;
        Ok(EvaluationRecord {
            protocol: self.text.protocol.clone(),
            dataset: self.text.identity.portable(),
            tokens_in_text: self.text.tokens_in_text,
            seq_len: self.text.seq_len,
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
            Err(error @ (Error::Solve { .. } | Error::Activations { .. })) => {
                progress.warn(&format!(
                    "the baseline rounded to nearest is missing at {} bits: {error}",
                    spec.bits
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
        let scored = score_rounded(&self.model, &spec, &self.text.windows, progress)?;
        let perplexity = scored.perplexity(&self.model)?.perplexity;
        let kl = scored.kl_from(&self.scored, &self.model)?;
        Ok(Measured { perplexity, kl })
    }
}
