//! Tuning the scales of a whole quantized model, its codes fixed.
//!
//! The solver makes each linear's outputs as they were; what the errors of all of them together do to the
//! next token it cannot see. Here every group's scale s becomes s · exp(m), and all m together descend
//! KL(unquantized ‖ quantized) of next-token distributions over calibration windows, by Adam with a cosine
//! decay (EfficientQAT, Chen et al., arXiv 2407.11062, trains scales end to end by cross-entropy; by KL the
//! model keeps to the one that it was made of, and does not learn the text instead).
//!
//! - A step is a batch of windows through the model and back. The states between blocks are kept,
//!   in host memory where a GPU has no room for them; what is in a block is computed again on the way back.
//! - Scales are rounded to fp16 in every pass: what is trained is what the file will hold. None becomes
//!   zero or infinite, or changes its sign.
//! - Some windows are never trained on, nor seen by the solver and the fit of the head: they are drawn from the
//!   text beside the calibration's, and where that has no room for them, which the report says, they are the
//!   last of the calibration's. The KL on them is measured before the first step and after every epoch, and the
//!   scales with which it is least are kept, those of the start among them: by that measure no file becomes
//!   worse.
//! - Batches have a fixed order and sums a fixed one, so that the same windows give the same scales.

mod bench;
mod block;
mod cost;
mod schedule;
mod split;
mod student;
mod teacher;

use std::time::Instant;

use gptq_checkpoint::{CheckpointWriter, ModelConfig};
use gptq_model::{BlockParts, Model, without_backward};
use gptq_quant::{Choices, QuantSpec};
use gptq_records::branch_report::TuningRecord;
use gptq_report::units::{number, plural};
use half::f16;

use crate::calibrate::Streams;
use crate::error::{Error, Result};
use crate::job::QuantizeJob;
use crate::progress::Progress;
use crate::rotate::FusedRotations;
use crate::states::States;
pub(crate) use bench::{bench_tuning, check_tuning};
pub(crate) use cost::{TuneBytes, operations, planned_held_out};
use split::Split;
use student::Student;
use teacher::Teacher;

/// What the walk over the blocks leaves for tuning.
pub(crate) struct Walked<'a> {
    /// Every block but for its weights, as the file holds it.
    frames: Vec<BlockParts<()>>,
    /// The unquantized model's states after the last block.
    reference: States,
    /// Those of the windows to judge by, where they are none of the calibration's.
    held_out: Option<States>,
    /// The head `[vocab, hidden]` where it was fitted; otherwise it is the unquantized model's.
    head: Option<&'a [f16]>,
}

impl<'a> Walked<'a> {
    /// Takes the unquantized model's states out of `streams`; the quantized model's are not needed any more.
    ///
    /// # Panics
    /// Without states of the unquantized model: a recipe that tunes walks it.
    pub(crate) fn of(
        streams: Streams,
        frames: Vec<BlockParts<()>>,
        head: Option<&'a [f16]>,
    ) -> Self {
        let Some(reference) = streams.reference else {
            panic!("scales are tuned without the unquantized model's states")
        };
        Self { frames, reference, held_out: streams.held_out, head }
    }
}

/// What tuning did.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// For the branch's report.
    pub record: TuningRecord,
    /// Wall-clock.
    pub seconds: f64,
}

/// That a job's steps of tuning cannot be made, and why.
fn refused(spec: &QuantSpec, why: &str) -> Error {
    let (choice, steps) = (Choices::TUNE, spec.choices.tune);
    Error::Choice { note: format!("{choice}=0 (or the recipe best) instead of {steps}: {why}") }
}

/// The windows of a job that tunes.
fn split(job: &QuantizeJob<'_>) -> Result<Split> {
    let windows = job.windows().len();
    Split::of(windows, job.held_out().len()).ok_or_else(|| {
        let why = format!(
            "one calibration window at least is to train on and one to judge by, and there are {windows}"
        );
        refused(&job.spec, &why)
    })
}

/// Refuses a model whose scales cannot be tuned, where its branch asks for that.
pub(crate) fn check_model(model: &ModelConfig, spec: &QuantSpec) -> Result<()> {
    if spec.choices.tune == 0 || !spec.recipe.calibrates() {
        return Ok(());
    }
    let Some(why) = without_backward(model) else { return Ok(()) };
    let family = model.family;
    let why = format!(
        "the scales of a {family} model cannot be tuned, as its blocks have no backward pass: {why}"
    );
    Err(refused(spec, &why))
}

/// Refuses a job that asks for tuning where it cannot be done, before anything is computed.
pub(crate) fn check(job: &QuantizeJob<'_>) -> Result<()> {
    if job.spec.choices.tune == 0 || !job.spec.recipe.calibrates() {
        return Ok(());
    }
    check_model(job.source.config(), &job.spec)?;
    if job.ranks.size() > 1 {
        let ranks = job.ranks.size();
        let why = format!("scales are tuned on one device, and {ranks} make this branch");
        return Err(refused(&job.spec, &why));
    }
    cost::check(job, &split(job)?)
}

/// Tunes the scales of the linears that `writer` has written, and writes those that are better over them.
pub(crate) fn tune(
    model: &Model<'_>,
    rotations: Option<&FusedRotations>,
    job: &QuantizeJob<'_>,
    walked: Walked<'_>,
    writer: &mut CheckpointWriter,
    progress: &dyn Progress,
) -> Result<Tuned> {
    let start = Instant::now();
    let windows = job.windows();
    let split = split(job)?;
    let Walked { frames, reference, held_out, head } = walked;
    let held_out = held_out.map(|states| (job.held_out(), states));
    let (trained, heads) = ((windows, &split, reference), (rotations, head));
    let mut teacher = Teacher::new(model, heads, trained, held_out)?;
    let offloaded = cost::offloaded(model, job, &split)?;
    let mut student = Student::new(model, frames, writer, offloaded)?;
    let (steps, rate) = (job.spec.choices.tune, job.spec.choices.tune_rate);
    progress.begin_steps("tune", steps as usize);
    let before = student.judge(model, &mut teacher)?;
    let mut best = Best { step: 0, kl: before, scales: Vec::new() };
    for step in 0..steps {
        student.train(model, &mut teacher, split.batch(step), schedule::step(rate, step, steps))?;
        if (step + 1) % split.epoch() == 0 || step + 1 == steps {
            let kl = student.judge(model, &mut teacher)?;
            if kl < best.kl {
                best = Best { step: step + 1, kl, scales: student.scales(model.device())? };
            }
        }
        progress.step();
    }
    progress.end();
    for (name, scales) in student.names().zip(&best.scales) {
        writer.replace_scales(name, scales)?;
    }
    let record = TuningRecord {
        steps,
        windows: split.trained(),
        held_out: split.held_out(),
        unseen: split.unseen(),
        kl_before: before,
        kl_after: best.kl,
        best_step: best.step,
    };
    let also =
        if record.unseen { "" } else { ", but that the solver has seen: the text has no others" };
    progress.note(&format!(
        "tuned scales: KL {} before and {} after {}, on {} not trained on{also}",
        number(before, 4),
        number(best.kl, 4),
        plural(best.step as usize, "step"),
        plural(record.held_out, "window")
            + if record.held_out == 1 { " that was" } else { " that were" },
    ));
    Ok(Tuned { record, seconds: start.elapsed().as_secs_f64() })
}

/// The best that was measured.
struct Best {
    step: u32,
    kl: f64,
    /// Of every linear, in order; none where nothing is better than the start.
    scales: Vec<Vec<f16>>,
}

#[cfg(test)]
mod tests;
