//! The dense model measured, for every branch of a sweep to be compared with.
//!
//! Windows are shared out to the devices. The final states are kept where memory holds those of all
//! windows at once. Where it does not, the model is walked again beside each branch, a batch of windows
//! after another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::{Device, share};
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::branch_report::{BranchReport, EvaluationRecord, Measured};
use gptq_records::source_dtype::SourceDtype;
use gptq_text::evaluation::EvalText;

use crate::batches::{Batch, Batches, Beside};
use crate::error::{Error, Result, with_causes};
use crate::job::precision;
use crate::perplexity::{Perplexity, Scored, Tally, score, score_rounded};
use crate::progress::{Progress, Silent};

/// The dense model on the evaluation text, each device with some of the windows.
pub(crate) struct DenseMeasure<'a> {
    text: EvalText,
    parts: Vec<Part<'a>>,
    pub(crate) perplexity: Perplexity,
    /// Rounded grids by bits and group size: the order of columns does not matter to them. `None`
    /// where there is nothing to measure.
    rounded: BTreeMap<(u8, Option<usize>), Option<Measured>>,
}

/// A device's windows.
struct Part<'a> {
    model: Model<'a>,
    /// Of the text's, cut between chunks: losses are those of a device that has all of them.
    windows: Range<usize>,
    /// The windows, as memory holds them beside a second model's.
    batches: Batches,
    /// The dense model's final states, where one batch holds all windows.
    kept: Option<Scored>,
}

impl<'a> Part<'a> {
    /// Walks the dense model over the windows.
    fn measure(
        model: Model<'a>,
        windows: Range<usize>,
        text: &EvalText,
        progress: &dyn Progress,
    ) -> Result<(Self, Tally)> {
        let own = &text.windows[windows.clone()];
        let beside = Beside { base: true, ..Beside::default() };
        let batches = Batches::new(&model, own, beside, progress)?;
        let (mut kept, mut tally) = (None, Tally::default());
        for batch in batches.iter(own) {
            let scored = score(&model, batch, progress)?;
            tally.add(&scored, &model)?;
            kept = Some(scored).filter(|_| batches.count() == 1);
        }
        Ok((Self { model, windows, batches, kept }, tally))
    }

    /// What another walk of the windows gives, beside the dense model.
    fn compare(
        &self,
        text: &EvalText,
        progress: &dyn Progress,
        model: &Model<'_>,
        walk: impl Fn(Batch<'_>) -> Result<Scored>,
    ) -> Result<Tally> {
        let mut tally = Tally::default();
        for batch in self.batches.iter(&text.windows[self.windows.clone()]) {
            let scored = walk(batch)?;
            tally.add(&scored, model)?;
            match &self.kept {
                Some(base) => tally.compare(&scored, base, model)?,
                None => tally.compare(&scored, &score(&self.model, batch, progress)?, model)?,
            }
        }
        Ok(tally)
    }
}

impl<'a> DenseMeasure<'a> {
    /// Measures the model of `source`, as branches are made from it: that is what they are compared
    /// with.
    pub(crate) fn measure(
        (source, dtype): (&'a Checkpoint, SourceDtype),
        text: EvalText,
        devices: &[Device],
        progress: &dyn Progress,
    ) -> Result<Self> {
        let chunk = devices.first().map_or(1, Device::chunk_tokens) / text.seq_len.max(1);
        let shares = (0..devices.len())
            .map(|part| share(text.windows.len(), chunk.max(1), part, devices.len()))
            .zip(devices)
            .filter(|(windows, _)| !windows.is_empty());
        let measured = side_by_side(shares.collect(), progress, |(windows, device), progress| {
            let model = Model::new(source, device.clone(), precision(dtype), text.seq_len)?;
            Part::measure(model, windows, &text, progress)
        })?;
        let (parts, tallies): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
        let perplexity = Tally::of_parts(tallies).perplexity(text.windows.len())?;
        Ok(Self { text, parts, perplexity, rounded: BTreeMap::new() })
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
        let (result, kl) = self.compare(progress, |part, progress| {
            let device = part.model.device().clone();
            let stored = SourcePrecision::Stored;
            let model = Model::new(&checkpoint, device, stored, self.text.seq_len)?;
            part.compare(&self.text, progress, &model, |batch| score(&model, batch, progress))
        })?;
        let dtype = self.parts.first().map_or("f32", |part| part.model.device().dtype()).to_owned();
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
        let (result, kl) = self.compare(progress, |part, progress| {
            let round = |batch: Batch<'_>| score_rounded(&part.model, &spec, batch, progress);
            part.compare(&self.text, progress, &part.model, round)
        })?;
        Ok(Measured { perplexity: result.perplexity, kl })
    }

    /// Perplexity of a model, and its KL divergence from the dense one, over all parts' windows.
    fn compare(
        &self,
        progress: &dyn Progress,
        part: impl Fn(&Part<'a>, &dyn Progress) -> Result<Tally> + Sync,
    ) -> Result<(Perplexity, f64)> {
        let parts = self.parts.iter().collect();
        let tally = Tally::of_parts(side_by_side(parts, progress, part)?);
        Ok((tally.perplexity(self.text.windows.len())?, tally.kl()?))
    }
}

/// One call for each item, each on a thread of its own, unless there is one; the first shows its
/// progress, which the others' is like. Answers come in the items' order.
fn side_by_side<T: Send, R: Send>(
    items: Vec<T>,
    progress: &dyn Progress,
    each: impl Fn(T, &dyn Progress) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let each = &each;
    let mut items = items.into_iter();
    let Some(first) = items.next() else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let others: Vec<_> = items.map(|item| scope.spawn(move || each(item, &Silent))).collect();
        let mut answers = vec![each(first, progress)];
        let joined = others.into_iter().map(std::thread::ScopedJoinHandle::join);
        answers.extend(joined.map(|of| of.unwrap_or(Err(Error::Thread("measuring")))));
        answers.into_iter().collect()
    })
}
