//! The dense model measured, for every branch of a sweep to be compared with.
//!
//! Windows are shared out to the devices. The final states are kept where memory holds those of all
//! windows at once. Where it does not, the model is walked again beside each branch, a batch of windows
//! after another.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};
use gptq_records::branch_report::{BranchReport, EvaluationRecord, Measured};
use gptq_records::source_dtype::SourceDtype;
use gptq_text::evaluation::EvalText;

use super::dense_along::{self as along, Evaluation, Walked, shares};
use crate::batches::{Batch, Batches, Beside};
use crate::error::{Error, Result, with_causes};
use crate::job::precision;
use crate::perplexity::{Perplexity, Scored, Tally, score, score_rounded};
use crate::progress::{Progress, Silent};
use crate::states::States;

/// The dense model on the evaluation text, each device with some of the windows.
pub(crate) struct DenseMeasure<'a> {
    text: EvalText,
    parts: Vec<Part<'a>>,
    pub(crate) perplexity: Perplexity,
    pub(super) rounded: Rounded,
}

/// Rounded grids, by all that they depend on; `None` where there is nothing to measure.
pub(super) type Rounded = BTreeMap<Grid, Option<Measured>>;

/// Bits and group size: the order of columns does not matter to a grid.
pub(super) type Grid = (u8, Option<usize>);

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

    /// Of a walk that ended. Branches are measured in as few batches as memory allows for then.
    fn of_walk(part: along::Part<'a>, kept: Scored, text: &EvalText) -> Result<Self> {
        let beside = Beside { base: true, ..Beside::default() };
        let own = &text.windows[part.windows.clone()];
        let found = Batches::new(&part.model, own, beside, &Silent)?;
        let batches = if found.count() == 1 { found } else { part.batches };
        Ok(Self { model: part.model, windows: part.windows, batches, kept: Some(kept) })
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
        let measured = side_by_side(shares(&text, devices), progress, |share, progress| {
            let (device, windows) = share;
            let device = devices[device].clone();
            let model = Model::new(source, device, precision(dtype), text.seq_len)?;
            Part::measure(model, windows, &text, progress)
        })?;
        let (parts, tallies): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
        let perplexity = Tally::of_parts(tallies).perplexity(text.windows.len())?;
        Ok(Self { text, parts, perplexity, rounded: BTreeMap::new() })
    }

    /// Of walks that ended, over the parts' windows.
    pub(super) fn of_walks(
        evaluation: Evaluation,
        walked: Vec<(along::Part<'a>, Walked)>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let Evaluation { text, grids } = evaluation;
        let (mut parts, mut tallies) = (Vec::new(), Vec::new());
        let mut of_grids: Vec<Result<Vec<Tally>>> = grids.iter().map(|_| Ok(Vec::new())).collect();
        // Of a weight that no grid can be rounded from.
        let mut of_all = None;
        for (part, Walked { dense, grids: states }) in walked {
            let batch = part.batch(&text)?;
            let kept = Scored::of(&part.model, batch, dense)?;
            let mut tally = Tally::default();
            tally.add(&kept, &part.model)?;
            tallies.push(tally);
            let states = states.unwrap_or_else(|error| {
                of_all = Some(error);
                Vec::new()
            });
            for (of_grid, states) in of_grids.iter_mut().zip(states) {
                let Ok(done) = of_grid else { continue };
                match states.and_then(|states| compared(&part, batch, states, &kept)) {
                    Ok(tally) => done.push(tally),
                    Err(error) => *of_grid = Err(error),
                }
            }
            parts.push(Part::of_walk(part, kept, &text)?);
        }
        let windows = text.windows.len();
        let perplexity = Tally::of_parts(tallies).perplexity(windows)?;
        if let Some(error) = of_all {
            if !is_missing(&error) {
                return Err(error);
            }
            grids.iter().for_each(|spec| warn_missing(&error, spec, progress));
            let rounded = grids.iter().map(|spec| (grid(spec), None)).collect();
            return Ok(Self { text, parts, perplexity, rounded });
        }
        let measured = |(spec, tallies): (&QuantSpec, Result<Vec<Tally>>)| {
            let measured = tallies.and_then(|of| measured(&Tally::of_parts(of), windows));
            Ok((grid(spec), unless_missing(measured, spec, progress)?))
        };
        let rounded = grids.iter().zip(of_grids).map(measured).collect::<Result<_>>()?;
        Ok(Self { text, parts, perplexity, rounded })
    }

    /// A branch, from its file, and its grid without calibration.
    pub(crate) fn record(
        &mut self,
        spec: &QuantSpec,
        dir: &Path,
        progress: &dyn Progress,
    ) -> Result<EvaluationRecord> {
        let checkpoint = Checkpoint::open(dir)?;
        let tally = self.compare(progress, |part, progress| {
            let device = part.model.device().clone();
            let stored = SourcePrecision::Stored;
            let model = Model::new(&checkpoint, device, stored, self.text.seq_len)?;
            part.compare(&self.text, progress, &model, |batch| score(&model, batch, progress))
        })?;
        let result = tally.perplexity(self.text.windows.len())?;
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
            kl: Some(tally.kl()?),
            base_perplexity: Some(self.perplexity.perplexity),
            rtn,
        })
    }

    /// The grid of a branch, rounded to nearest.
    fn round(&mut self, spec: &QuantSpec, progress: &dyn Progress) -> Result<Option<Measured>> {
        let key = grid(spec);
        if let Some(measured) = self.rounded.get(&key) {
            return Ok(*measured);
        }
        let measured = unless_missing(self.measure_rounded(spec, progress), spec, progress)?;
        self.rounded.insert(key, measured);
        Ok(measured)
    }

    fn measure_rounded(&self, spec: &QuantSpec, progress: &dyn Progress) -> Result<Measured> {
        let spec = QuantSpec { recipe: Recipe::Rtn, ..spec.clone() };
        let tally = self.compare(progress, |part, progress| {
            let round = |batch: Batch<'_>| score_rounded(&part.model, &spec, batch, progress);
            part.compare(&self.text, progress, &part.model, round)
        })?;
        measured(&tally, self.text.windows.len())
    }

    /// What a model gives beside the dense one, over all parts' windows.
    fn compare(
        &self,
        progress: &dyn Progress,
        part: impl Fn(&Part<'a>, &dyn Progress) -> Result<Tally> + Sync,
    ) -> Result<Tally> {
        let parts = self.parts.iter().collect();
        Ok(Tally::of_parts(side_by_side(parts, progress, part)?))
    }
}

/// The grid of a branch.
pub(super) fn grid(spec: &QuantSpec) -> Grid {
    (spec.bits, spec.group_size)
}

/// Takes the rounded grid of a branch that was compared with the same model on the same text.
pub(super) fn rounded_of(report: &BranchReport, rounded: &mut Rounded) {
    for rtn in report.evaluations.iter().filter_map(|e| e.rtn) {
        rounded.insert((report.bits, report.group_size), Some(rtn));
    }
}

fn measured(tally: &Tally, windows: usize) -> Result<Measured> {
    Ok(Measured { perplexity: tally.perplexity(windows)?.perplexity, kl: tally.kl()? })
}

/// What a grid's walk gives beside the dense model's.
fn compared(
    part: &along::Part<'_>,
    batch: Batch<'_>,
    states: States,
    base: &Scored,
) -> Result<Tally> {
    let scored = Scored::of(&part.model, batch, states)?;
    let mut tally = Tally::default();
    tally.add(&scored, &part.model)?;
    tally.compare(&scored, base, &part.model)?;
    Ok(tally)
}

/// A rounded grid, or `None` and a warning for one that cannot be. A branch that was made is worth
/// more than what it is compared with: weights that cannot be rounded, or compute nothing once they
/// are, cost a number of the table, not the branch.
fn unless_missing(
    measured: Result<Measured>,
    spec: &QuantSpec,
    progress: &dyn Progress,
) -> Result<Option<Measured>> {
    match measured {
        Err(error) if is_missing(&error) => {
            warn_missing(&error, spec, progress);
            Ok(None)
        }
        measured => measured.map(Some),
    }
}

/// Whether an error is of weights that cannot be rounded, or compute nothing once they are.
fn is_missing(error: &Error) -> bool {
    matches!(
        error,
        Error::Solve { .. }
            | Error::Activations { .. }
            | Error::Model(gptq_model::Error::Overflow { .. })
    )
}

/// Warns of a grid that is missing for such an error.
fn warn_missing(error: &Error, spec: &QuantSpec, progress: &dyn Progress) {
    progress.warn(&format!(
        "the baseline rounded to nearest is missing at {} bits: {}",
        spec.bits,
        with_causes(error)
    ));
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
