//! The main job: every block calibrated, quantized and written, in one walk over the model.
//!
//! Three threads share it: one reads the next block ahead, this one computes, one packs and writes
//! behind. Channels are bounded, so memory stays at two blocks of weights and a few linears.

use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use gptq_checkpoint::{EMBEDDING, HEAD, REPORT_FILE, Sealed, Written};
use gptq_model::{Block, BlockParts, Model};
use gptq_quant::round_to_nearest;
use gptq_records::branch_report::{BranchReport, LinearRecord, TOOL};
use gptq_records::manifest::{MadeFrom, Manifest};
use gptq_records::source_dtype::SourceDtype;
use half::f16;

use crate::agreement;
use crate::calibrate::{Calibrated, Calibrator, Streams};
use crate::error::{Error, Result};
use crate::fit_head;
use crate::job::{QuantizeJob, precision};
use crate::learn_rotation::{self, Learned};
use crate::memory::{BlockSizes, offload};
use crate::progress::{BlockReport, Progress, Silent};
use crate::read_ahead::{next_block, read_ahead};
use crate::recipe_fit;
use crate::recording::{
    branch_report, few_tokens, refuse_fallbacks, retries, rounded as rounded_record,
};
use crate::rotate::{FusedRotations, random_stream};
use crate::row_shards::RowShards;
use crate::states::embed;
use crate::tune::{self, Tuned, Walked};
use crate::write::{Outbox, copy_ahead, copy_dense, join, send, write_behind, writer};

/// A branch that was made.
#[derive(Debug)]
pub struct QuantizeOutcome {
    /// Folder, files and bytes.
    pub written: Written,
    /// Every block, in order.
    pub blocks: Vec<BlockReport>,
    /// Linears whose damping had to be raised.
    pub damp_retries: u32,
    /// Linears whose Hessian a GPU had to factor in f64.
    pub f64_retries: u32,
    /// Linears of experts that saw too few tokens, and were calibrated on all tokens of their blocks.
    pub few_tokens: u32,
    /// What tuning did, where scales were tuned.
    pub tuned: Option<Tuned>,
}

/// A branch that was made, in its working folder still.
pub(crate) struct Made {
    pub(crate) sealed: Sealed,
    pub(crate) report: BranchReport,
    blocks: Vec<BlockReport>,
    tuned: Option<Tuned>,
    /// The states after the last block, which should be those that the file gives.
    #[cfg(test)]
    streams: Option<Streams>,
}

/// Makes one branch, on every rank of the job; rank 0 learns what was made. Nothing is left under
/// the output name unless everything succeeded.
pub fn quantize(job: &QuantizeJob<'_>, progress: &dyn Progress) -> Result<Option<QuantizeOutcome>> {
    job.ranks.agree(|| agreement::quantize(job))?;
    let outcome = match make(job, progress)? {
        Some(Made { sealed, report, blocks, tuned, .. }) => {
            // The sums by which verify finds what has changed since.
            let mut made_from = MadeFrom::from([("tool".to_owned(), TOOL.to_owned())]);
            if job.ranks.size() > 1 {
                made_from.insert("the number of ranks".to_owned(), job.ranks.size().to_string());
            }
            Manifest::list(&sealed.folder, &sealed.files, &made_from, &report)?;
            let BranchReport { damp_retries, f64_retries, few_tokens, .. } = report;
            let written = sealed.publish()?;
            Some(QuantizeOutcome { written, blocks, damp_retries, f64_retries, few_tokens, tuned })
        }
        None => None,
    };
    // No rank goes on before the files are there.
    job.ranks.exchange(Vec::new())?;
    Ok(outcome)
}

/// Makes one branch, its report included, in rank 0's working folder.
pub(crate) fn make(job: &QuantizeJob<'_>, progress: &dyn Progress) -> Result<Option<Made>> {
    job.spec.validate().map_err(Error::Spec)?;
    if job.source.quantize_config().is_some() {
        return Err(Error::AlreadyQuantized(job.source.dir().to_owned()));
    }
    job.source.check_tensors()?;
    recipe_fit::check(job.source.config(), &job.spec)?;
    tune::check(job)?;
    recipe_fit::check_source(job.source, &job.spec)?;
    let progress = if job.ranks.is_first() { progress } else { &Silent };
    let mut learned_by = None;
    let rotations = FusedRotations::new(job.source.config(), job.spec.choices.rotate, || {
        let learned = learned(job, progress)?;
        learned_by = Some(learned.record);
        Ok(learned.rotation)
    })?;
    let rotations = rotations.map(|rotations| rotations.on(&job.device)).transpose()?;
    let mut writer = job.ranks.is_first().then(|| writer(job)).transpose()?;
    if let Some(writer) = &mut writer {
        copy_ahead(job, rotations.as_ref(), writer)?;
    }
    let precision = precision(job.source_dtype);
    let mut model = Model::new(job.source, job.device.clone(), precision, job.seq_len())?
        .with_ranks(job.ranks.clone());
    if let Some(values) = written_embedding(job, rotations.as_ref())? {
        model = model.with_embedding(values);
    }
    let rotations = rotations.as_ref();

    let (walked, writer) = std::thread::scope(|scope| {
        let (sender, writing) = write_behind(scope, writer, &job.spec);
        let reader = job.beside.map(|beside| beside.seat.reader);
        let exact = job.source_dtype == SourceDtype::Fp32;
        let ahead = read_ahead(scope, &model, rotations, exact, reader);
        let walked = walk(&ahead, &model, job, &sender, progress);
        // A reader that waits to hand its block over learns here that nobody takes it.
        drop(ahead);
        drop(sender);
        // A failed writer closes its channel, which stops the walk: its error is the cause.
        let writer = join(writing)?;
        Ok::<_, Error>((walked?, writer))
    })?;
    let Walk { blocks, mut streams, frames } = walked;
    let (head, head_report) = match &mut streams {
        Some(streams) if job.spec.choices.head > 0.0 => {
            let _turn = job.turn();
            let (head, report) =
                fit_head::fitted(&model, rotations, &job.spec, job.windows().len(), streams)?;
            check_fallbacks(job, std::slice::from_ref(&report), progress)?;
            (head, Some(report))
        }
        _ => (None, None),
    };
    let Some(mut writer) = writer else { return Ok(None) };
    if job.source.is_arriving() {
        // Only now are both of its tables there.
        check_head(job, progress)?;
    }
    let to_tune = streams.take_if(|_| job.spec.choices.tune > 0);
    let tuned = match to_tune {
        Some(streams) => {
            let _turn = job.turn();
            let walked = Walked::of(streams, frames, head.as_deref());
            Some(tune::tune(&model, rotations, job, walked, &mut writer, progress)?)
        }
        None => None,
    };
    if let Some(values) = head {
        writer.write_f16(HEAD, &values)?;
    }
    copy_dense(job.source, rotations, |_| true, &mut writer)?;
    let sealed = writer.seal()?;
    let tuning = tuned.as_ref().map(|tuned| tuned.record);
    let report = branch_report(job, sealed.bytes, &blocks, head_report, tuning, learned_by);
    sealed.folder.replace(REPORT_FILE, &report.to_bytes()?)?;
    Ok(Some(Made {
        sealed,
        report,
        blocks,
        tuned,
        #[cfg(test)]
        streams,
    }))
}

/// The rotation that is learned from the source, once for all branches that are made of it.
fn learned(job: &QuantizeJob<'_>, progress: &dyn Progress) -> Result<Learned> {
    let learn = || {
        let _turn = job.turn();
        let start = random_stream(job.source.config());
        learn_rotation::learned(job.source, &start, (&job.device, &job.ranks), progress)
    };
    match job.shared {
        Some(shared) => shared.get_or_learn(learn),
        None => learn(),
    }
}

/// The embedding that the file will hold, where it is not what the model would read by itself.
fn written_embedding(
    job: &QuantizeJob<'_>,
    rotations: Option<&FusedRotations>,
) -> Result<Option<Vec<f16>>> {
    if let Some(turned) = rotations.map(|f| f.embedding(job.source)).transpose()?.flatten() {
        return Ok(Some(turned));
    }
    match job.source_dtype {
        SourceDtype::Fp16 => Ok(None),
        SourceDtype::Fp32 => Ok(Some(job.source.tensor(EMBEDDING)?.to_f16()?)),
    }
}

/// What a walk over all blocks leaves.
struct Walk {
    blocks: Vec<BlockReport>,
    /// The states after the last block, where the recipe calibrates.
    streams: Option<Streams>,
    /// The blocks without their weights, where these are tuned.
    frames: Vec<BlockParts<()>>,
}

/// All blocks in order; each is read while the one before is computed.
fn walk(
    ahead: &Receiver<Result<Block>>,
    model: &Model<'_>,
    job: &QuantizeJob<'_>,
    writer: &Outbox,
    progress: &dyn Progress,
) -> Result<Walk> {
    let blocks = model.config().num_hidden_layers;
    progress.begin("quantize", blocks);
    let calibrates = job.spec.recipe.calibrates();
    let mut calibration = calibrates.then(|| calibrator(model, job)).transpose()?;
    let mut reports = Vec::with_capacity(blocks);
    let mut frames = Vec::new();
    for index in 0..blocks {
        let start = Instant::now();
        let mut block = next_block(ahead)?;
        let turn = job.turn();
        let done = match &mut calibration {
            Some((calibrator, streams)) => {
                calibrator
                    .block(&mut block, streams, &mut |name, shards| send(writer, name, shards))?
            }
            None => rounded(model, &mut block, job, writer)?,
        };
        drop(turn);
        if job.spec.choices.tune > 0 {
            frames.push(block.frame());
        }
        check_fallbacks(job, &done.linears, progress)?;
        let report = BlockReport {
            block: index,
            seconds: start.elapsed().as_secs_f64(),
            stages: done.stages.into_iter().map(|(work, time)| (work.name(), time)).collect(),
            linears: done.linears,
        };
        progress.block(&report);
        reports.push(report);
    }
    progress.end();
    Ok(Walk { blocks: reports, streams: calibration.map(|(_, streams)| streams), frames })
}

/// What calibrates every block of a job, and this rank's windows, embedded.
fn calibrator<'a>(
    model: &'a Model<'a>,
    job: &'a QuantizeJob<'a>,
) -> Result<(Calibrator<'a>, Streams)> {
    let (windows, seq_len) = (job.windows(), job.seq_len());
    let work = job.workload();
    let offload = match job.beside {
        Some(beside) => beside.offload,
        None => offload(model.device(), BlockSizes::of(model.config()), &[work])?,
    };
    let _turn = job.turn();
    let own = &windows[job.ranks.share(windows.len(), 1)];
    let states = |windows: &[Vec<u32>]| {
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        embed(model, &windows, offload.hidden)
    };
    let reference = work.extras.reference.then(|| states(own)).transpose()?;
    let others = Some(job.held_out()).filter(|windows| !windows.is_empty());
    let held_out = others.map(states).transpose()?;
    let streams = Streams { quantized: states(own)?, reference, held_out };
    let calibrator = Calibrator {
        device: model.device(),
        ropes: model.ropes(seq_len),
        spec: &job.spec,
        ranks: &job.ranks,
        windows: windows.len(),
        offload,
        shared: job.shared,
    };
    Ok((calibrator, streams))
}

/// Warns of a head that its configuration and its file disagree about; refuses it under `--strict`.
fn check_head(job: &QuantizeJob<'_>, progress: &dyn Progress) -> Result<()> {
    let Some(warning) = job.source.head()?.warning() else { return Ok(()) };
    if job.strict {
        return Err(Error::StrictSource(warning));
    }
    progress.warn(warning);
    Ok(())
}

/// Warns of Hessians that needed more than the damping asked for, and of experts that saw too few tokens
/// for one; refuses them under `--strict`.
fn check_fallbacks(
    job: &QuantizeJob<'_>,
    linears: &[LinearRecord],
    progress: &dyn Progress,
) -> Result<()> {
    if job.strict {
        refuse_fallbacks(linears, job.spec.damp)?;
    }
    for linear in linears {
        retries(linear, job.spec.damp).iter().for_each(|warning| progress.warn(warning));
    }
    few_tokens(linears).iter().for_each(|warning| progress.warn(warning));
    Ok(())
}

/// Every linear of a block on its own, without calibration.
fn rounded(
    model: &Model<'_>,
    block: &mut Block,
    job: &QuantizeJob<'_>,
    writer: &Outbox,
) -> Result<Calibrated> {
    let mut linears = Vec::new();
    let exact = block.take_exact();
    for (place, linear) in block.linears().iter().enumerate() {
        let name = linear.name.clone();
        let weight = exact.get(place).unwrap_or(&linear.weight);
        let solved = round_to_nearest(model.device(), weight, &job.spec)
            .map_err(|source| Error::Solve { linear: name.clone(), source })?;
        send(writer, &name, RowShards::whole(solved.stored))?;
        linears.push(rounded_record(name));
    }
    Ok(Calibrated { linears, stages: BTreeMap::new() })
}

#[cfg(test)]
#[path = "quantize_tests.rs"]
pub(crate) mod tests;
