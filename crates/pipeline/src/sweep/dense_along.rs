//! The dense model and its rounded grids, evaluated along with branches from one reading.
//!
//! A device has two walks of its share of the windows: one of the model as it is, one of all grids,
//! which are rounded from the same block one after the other. Walks end with hidden states; norm and
//! head are applied when all have ended, and branches have given their memory back.

use std::ops::Range;
use std::sync::Mutex;
use std::thread::{Scope, ScopedJoinHandle};

use gptq_compute::{Device, share};
use gptq_model::{Model, SourcePrecision};
use gptq_quant::{QuantSpec, Recipe};
use gptq_text::evaluation::EvalText;

use super::sweep_job::SweepJob;
use crate::batches::{Batch, Batches, Beside};
use crate::error::{Error, Result};
use crate::job::precision;
use crate::memory::Along;
use crate::memory_evaluation::{EvaluationSizes, Room};
use crate::one_reading::{OneReading, Seat};
use crate::perplexity::{begin, each_block, round};
use crate::progress::{Progress, Silent};
use crate::states::{States, forward};

/// What is evaluated from the reading that branches are made from.
#[derive(Debug)]
pub(super) struct Evaluation {
    pub(super) text: EvalText,
    /// One branch of each grid that is to be measured.
    pub(super) grids: Vec<QuantSpec>,
}

/// A device's share of an evaluation, before it is walked.
pub(super) struct Part<'a> {
    /// Number of the device.
    device: usize,
    pub(super) model: Model<'a>,
    pub(super) windows: Range<usize>,
    pub(super) batches: Batches,
}

/// A part's states after the last block.
pub(super) struct Walked {
    pub(super) dense: States,
    /// Of each grid, or why it cannot be rounded.
    pub(super) grids: Result<Vec<Result<States>>>,
}

/// A part's walks.
pub(super) struct Walking<'scope> {
    dense: ScopedJoinHandle<'scope, Result<States>>,
    grids: Option<ScopedJoinHandle<'scope, Result<Vec<Result<States>>>>>,
}

impl Evaluation {
    /// What each device holds of it, in the devices' order.
    ///
    /// # Errors
    /// [`Error::OneBatch`] where memory does not hold all windows at once.
    pub(super) fn along(&self, job: &SweepJob<'_>) -> Result<Vec<Along>> {
        let mut along = vec![Along::default(); job.devices.len()];
        let exact = precision(job.config.source_dtype) == SourcePrecision::Stored;
        for (device, windows) in shares(&self.text, job.devices) {
            let lengths = self.text.windows[windows].iter().map(|w| w.tokens.len());
            let (longest, tokens) = (lengths.clone().max().unwrap_or(1), lengths.sum());
            let beside = Beside { base: true, ..Beside::default() };
            let sizes = EvaluationSizes::of(job.source.config(), longest, beside);
            let room = Room::find(&job.devices[device], 1, sizes)?.tokens();
            check_room(tokens, room)?;
            along[device] = sizes.along(&job.devices[device], tokens, self.grids.len(), exact);
        }
        Ok(along)
    }

    /// The parts of all devices. Their embedding is read, which waits for its shard.
    pub(super) fn parts<'a>(&self, job: &SweepJob<'a>, offloaded: f64) -> Result<Vec<Part<'a>>> {
        let part = |(device, windows): (usize, Range<usize>)| {
            let of = job.devices[device].clone();
            let precision = precision(job.config.source_dtype);
            let model = Model::new(job.source, of, precision, self.text.seq_len)?;
            let offloaded =
                if matches!(job.devices[device], Device::Cpu) { 0.0 } else { offloaded };
            let batches = Batches::whole(&self.text.windows[windows.clone()], offloaded);
            Ok(Part { device, model, windows, batches })
        };
        shares(&self.text, job.devices).into_iter().map(part).collect()
    }

    /// Walks of a part.
    pub(super) fn walks(&self) -> usize {
        1 + usize::from(!self.grids.is_empty())
    }

    /// Begins the walks of all parts, which are those of the reading from `first` on; the first part
    /// shows its progress, which the others' is like.
    pub(super) fn spawn<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        parts: &'env [Part<'_>],
        (reading, first): (&'env OneReading, usize),
        turns: &'env [Mutex<()>],
        progress: &'env dyn Progress,
    ) -> Vec<Walking<'scope>> {
        let begin = |(number, part)| {
            let from = (reading, first + number * self.walks());
            let progress = if number == 0 { progress } else { &Silent };
            self.spawn_part(scope, part, from, turns, progress)
        };
        parts.iter().enumerate().map(begin).collect()
    }

    /// Begins the walks of one part.
    fn spawn_part<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        part: &'env Part<'_>,
        (reading, first): (&'env OneReading, usize),
        turns: &'env [Mutex<()>],
        progress: &'env dyn Progress,
    ) -> Walking<'scope> {
        let turn = &turns[part.device];
        let dense = reading.reader(first);
        let dense = scope.spawn(move || {
            // Dropped with this thread, however it ends: the others wait for it no more.
            let reader = dense;
            part.dense(&self.text, Seat { reader: &reader, turn }, progress)
        });
        let grids = (!self.grids.is_empty()).then(|| {
            let reader = reading.reader(first + 1);
            scope.spawn(move || {
                let reader = reader;
                part.rounded(&self.text, &self.grids, Seat { reader: &reader, turn })
            })
        });
        Walking { dense, grids }
    }
}

/// Each device's share of the windows, by its number; cut between chunks. Some may have none.
pub(super) fn shares(text: &EvalText, devices: &[Device]) -> Vec<(usize, Range<usize>)> {
    let chunk = devices.first().map_or(1, Device::chunk_tokens) / text.seq_len.max(1);
    let of_device =
        |device| (device, share(text.windows.len(), chunk.max(1), device, devices.len()));
    (0..devices.len()).map(of_device).filter(|(_, windows)| !windows.is_empty()).collect()
}

/// Refuses windows that memory does not hold at once.
fn check_room(tokens: usize, room: usize) -> Result<()> {
    if tokens > room { Err(Error::OneBatch { tokens, room }) } else { Ok(()) }
}

impl Walking<'_> {
    pub(super) fn join(self) -> Result<Walked> {
        let dense = self.dense.join();
        let grids = self.grids.map_or(Ok(Ok(Vec::new())), ScopedJoinHandle::join);
        let ended = |_| Error::Thread("measuring");
        Ok(Walked { dense: dense.map_err(ended)??, grids: grids.map_err(ended)? })
    }
}

impl Part<'_> {
    pub(super) fn batch<'t>(&self, text: &'t EvalText) -> Result<Batch<'t>> {
        let own = &text.windows[self.windows.clone()];
        self.batches.only(own).ok_or(Error::Thread("measuring"))
    }

    /// The dense model's states after the last block.
    fn dense(&self, text: &EvalText, seat: Seat<'_>, progress: &dyn Progress) -> Result<States> {
        let batch = self.batch(text)?;
        let mut states = self.begin(batch, seat)?;
        each_block(&self.model, batch, false, Some(seat), progress, |block| {
            forward(&self.model, block, &mut states)
        })?;
        Ok(states)
    }

    /// Every grid's. One that cannot be rounded takes no other down.
    fn rounded(
        &self,
        text: &EvalText,
        grids: &[QuantSpec],
        seat: Seat<'_>,
    ) -> Result<Vec<Result<States>>> {
        let batch = self.batch(text)?;
        let exact = self.model.precision() == SourcePrecision::Stored;
        let specs: Vec<QuantSpec> =
            grids.iter().map(|spec| QuantSpec { recipe: Recipe::Rtn, ..spec.clone() }).collect();
        let mut all: Vec<Result<States>> = specs.iter().map(|_| self.begin(batch, seat)).collect();
        each_block(&self.model, batch, exact, Some(seat), &Silent, |block| {
            let exact = block.take_exact();
            for (states, spec) in all.iter_mut().zip(&specs) {
                let Ok(of_grid) = states else { continue };
                let mut block = block.clone();
                let done = round(&self.model, &mut block, &exact, spec)
                    .and_then(|()| forward(&self.model, &block, of_grid));
                if let Err(error) = done {
                    *states = Err(error);
                }
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// The states before the first block.
    fn begin(&self, batch: Batch<'_>, seat: Seat<'_>) -> Result<States> {
        let _turn = seat.turn();
        begin(&self.model, batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_need_a_second_batch_are_refused() {
        check_room(4096, 4096).unwrap();
        let error = check_room(4097, 4096).unwrap_err();
        assert!(error.to_string().contains("4096 tokens") && error.to_string().contains("4097"));
        assert!(error.hint().unwrap().contains("--discard-shards"));
    }
}
