//! What tuning takes of a block, measured.

use std::collections::BTreeMap;
use std::time::Instant;

use gptq_compute::{Device, Ranks, Tensor};
use gptq_model::Ropes;
use gptq_quant::{Choices, QuantSpec};

use super::block::TunedBlock;
use super::cost::of_block;
use super::schedule;
use super::split::BATCH;
use crate::bench::{Measurement, RUNS, Width, synthetic_block, synthetic_states};
use crate::calibrate::{Calibrator, Streams};
use crate::error::{Error, Result};
use crate::memory::Offload;
use crate::operations::{Extras, Operations};
use crate::states::States;
use crate::work::Work;
use crate::write::packed;

/// Refuses what tuning cannot be measured with.
pub(crate) fn check_tuning(
    spec: &QuantSpec,
    ranks: &Ranks,
    width: Width,
    windows: usize,
) -> Result<()> {
    let fits = ranks.size() == 1 && windows >= 2 && width.experts.is_none();
    if spec.choices.tune == 0 || fits {
        return Ok(());
    }
    let note = format!(
        "{}=0 instead of {}: tuning is measured on one device, with two windows at least, and of a block \
         without experts",
        Choices::TUNE,
        spec.choices.tune
    );
    Err(Error::Choice { note })
}

/// What tuning a block takes, of all its steps, where the recipe tunes: one chunk's step, measured, as often as there are
/// such. The head is no part of it.
pub(crate) fn bench_tuning(
    calibrator: &Calibrator<'_>,
    width: Width,
    (windows, seq_len): (usize, usize),
) -> Result<Option<Measurement>> {
    let Calibrator { device, spec, ropes, .. } = *calibrator;
    if spec.choices.tune == 0 {
        return Ok(None);
    }
    // A batch is enough to quantize a block by, and no more is taken through it at once.
    let batch = windows.min(BATCH);
    let states = || synthetic_states(device, width, (0..batch, seq_len), Offload::default());
    let block = solved(calibrator, width, (states()?, states()?))?;
    let hidden = states()?.hidden.take(0)?;
    let chunk = (hidden.rows() / seq_len) as f64;
    let seconds = step_seconds(device, block, (&hidden, ropes, seq_len))?;
    let forward = Operations::of_block(&width.kind(), (1, seq_len), Extras::default()).forward;
    let operations = of_block(forward, spec, windows);
    let seconds = seconds * operations / (4.0 * chunk * forward);
    Ok(Some(Measurement::new(Work::Tune.name(), String::new(), seconds, operations, None)))
}

/// A synthetic block, quantized: all of its linears are.
fn solved(
    calibrator: &Calibrator<'_>,
    width: Width,
    (quantized, reference): (States, States),
) -> Result<TunedBlock> {
    let Calibrator { device, spec, .. } = *calibrator;
    let mut block = synthetic_block(device, width, None)?;
    let mut streams = Streams { quantized, reference: Some(reference), held_out: None };
    let mut linears = BTreeMap::new();
    calibrator.block(&mut block, &mut streams, &mut |name, shards| {
        linears.insert(name.to_owned(), packed(shards, spec)?);
        Ok(())
    })?;
    TunedBlock::new(device, block.frame(), |name| {
        let solved = linears.remove(name);
        Ok(solved.unwrap_or_else(|| panic!("`{name}` of the benchmark was not solved")))
    })
}

/// Seconds in which a block is taken forward, and back with a step, over one chunk of `hidden` states in windows of
/// `seq_len` tokens; the median of some runs.
fn step_seconds(
    device: &Device,
    mut block: TunedBlock,
    (hidden, ropes, seq_len): (&Tensor, &Ropes, usize),
) -> Result<f64> {
    let mut seconds = Vec::with_capacity(RUNS);
    let steps = RUNS as u32 + 1;
    // The first run compiles, allocates and fills caches.
    for run in 0..steps {
        // Its values do not matter, but that products of it are finite.
        let mut gradient = hidden.clone();
        device.synchronize("preparing the benchmark")?;
        let start = Instant::now();
        let mut states = hidden.clone();
        block.block(device)?.forward(device, &mut states, ropes, seq_len)?;
        block.clear(device)?;
        block.backward(device, hidden, &mut gradient, ropes, seq_len)?;
        block.step(device, &schedule::step(1e-6, run, steps))?;
        device.synchronize("the benchmark")?;
        if run > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}
