//! Calibrating one block: the staged forward, looking at every linear's inputs on the way.
//!
//! Each stage's inputs feed a Gram, the solved weights replace the dense ones, and the same inputs
//! go through them to become the next stage's: what AutoGPTQ computes with five forwards a block,
//! with one, and the same mathematics.
//!
//! A recipe may have o and down, which write to the residual stream, make up for what the stream
//! lacks: the unquantized model's states then go through the block as it was before, and what they
//! differ by becomes a shift of the weights before they are solved (see [`Device::over_hessian`]).
//! Shifting the other linears by the drift of their inputs as well was tried: a percent of KL for
//! seven of time (tests/bench).
//!
//! Blocks with experts have the same two stages of attention, o's shift included; what comes after them is
//! in `experts`.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{Device, Gram, Ranks, StageTimer, Tensor};
use gptq_model::{Block, Linear, LinearId, Ropes, Stage};
use gptq_quant::{Factored, QuantSpec, Quantized, factor, solve};
use gptq_records::branch_report::LinearRecord;

use crate::chunk_store::ChunkStore;
use crate::error::{Error, Result};
use crate::first_gram::FirstGrams;
use crate::memory::Offload;
use crate::recording::solved;
use crate::row_shards::{RowShards, SHARD_ROWS, rows_of, summed};
use crate::states::States;
use crate::work::{StageSeconds, Work};

mod experts;
mod values;

pub(crate) use values::Sample;

/// Rows of a weight from which the energy of its outputs is estimated: the exact figure costs as
/// much as two solves, and it only scales an error in a report.
const ENERGY_ROWS: usize = 512;

/// What every block of a run shares.
pub(crate) struct Calibrator<'a> {
    pub(crate) device: &'a Device,
    /// For windows of every length.
    pub(crate) ropes: &'a Ropes,
    pub(crate) spec: &'a QuantSpec,
    /// Who else calibrates the block: each on its own windows, solving its own rows.
    pub(crate) ranks: &'a Ranks,
    /// Number of calibration windows of all ranks: the n of H = 2/n · XᵀX.
    pub(crate) windows: usize,
    pub(crate) offload: Offload,
    /// The first block's first Gram, shared with other branches.
    pub(crate) shared: Option<&'a FirstGrams>,
}

/// A calibrated block.
pub(crate) struct Calibrated {
    pub(crate) linears: Vec<LinearRecord>,
    pub(crate) stages: StageSeconds,
}

/// Receives each quantized linear, by name; on rank 0 alone.
pub(crate) type Sink<'s> = dyn FnMut(&str, RowShards) -> Result<()> + 's;

/// The states that a block moves: of the model being quantized, and of the unquantized one where
/// targets are shifted.
pub(crate) struct Streams {
    pub(crate) quantized: States,
    pub(crate) reference: Option<States>,
    /// The unquantized model's of windows that calibrate nothing.
    pub(crate) held_out: Option<States>,
}

impl Calibrator<'_> {
    /// Quantizes every linear of `block` and moves `streams` past it.
    pub(crate) fn block(
        &self,
        block: &mut Block,
        streams: &mut Streams,
        sink: &mut Sink<'_>,
    ) -> Result<Calibrated> {
        let exact = block.take_exact().into_iter().map(Some).collect();
        let dense = streams.reference.is_some().then(|| block.clone());
        let mut timer = StageTimer::start(self.device)?;
        if let Some(states) = &mut streams.held_out {
            states.past_block(self.device, block, |seq_len| self.ropes.for_windows(seq_len))?;
            timer.mark(Work::Reference)?;
        }
        let mut run = BlockRun {
            all: self,
            timer,
            linears: Vec::with_capacity(block.linears().len()),
            sink,
            stream: Stream { states: &mut streams.quantized, kept: None },
            reference: dense.as_ref().zip(streams.reference.as_mut()),
            exact,
        };
        for stage in [Stage::Qkv, Stage::Output] {
            run.stage(block, stage)?;
        }
        if block.mixture().is_some() {
            run.experts(block)?;
        } else {
            for stage in [Stage::GateUp, Stage::Down] {
                run.stage(block, stage)?;
            }
            run.stream.output(self, block)?;
            run.timer.mark(Work::Forward)?;
        }
        let mut stages = StageSeconds::new();
        for (work, time) in run.timer.finish()? {
            *stages.entry(work).or_insert(0.0) += time.as_secs_f64();
        }
        Ok(Calibrated { linears: run.linears, stages })
    }
}

/// States on their way through the block that is being quantized.
struct Stream<'s> {
    states: &'s mut States,
    /// Inputs of o, then of down, from the stage that sees them to the one that needs their product; in
    /// a parallel block, whose down follows from states that are no more, those of gate between.
    kept: Option<ChunkStore>,
}

impl Stream<'_> {
    /// Inputs of a stage's linears for one chunk, through `block` as it is at that stage.
    fn input(
        &mut self,
        all: &Calibrator<'_>,
        block: &Block,
        stage: Stage,
        chunk: usize,
    ) -> Result<Tensor> {
        let device = all.device;
        let seq_len = self.states.seq_lens[chunk];
        let ropes = all.ropes.for_windows(seq_len);
        let parallel = block.rule().parallel;
        if stage == Stage::GateUp {
            let context = self.kept(all).take(chunk)?;
            let mut hidden = self.states.hidden.take(chunk)?;
            if parallel {
                let input = block.stage_input(device, stage, &hidden, ropes, seq_len)?;
                block.stage_output(device, Stage::Output, &context, &mut hidden)?;
                self.states.hidden.put(chunk, hidden)?;
                self.kept(all).put(chunk, input.clone())?;
                return Ok(input);
            }
            block.stage_output(device, Stage::Output, &context, &mut hidden)?;
            let input = block.stage_input(device, stage, &hidden, ropes, seq_len)?;
            self.states.hidden.put(chunk, hidden)?;
            return Ok(input);
        }
        if parallel && stage == Stage::Down {
            let before = self.kept(all).take(chunk)?;
            return Ok(block.next_input(device, stage, &before, ropes, seq_len)?);
        }
        self.states
            .hidden
            .read(chunk, |hidden| Ok(block.stage_input(device, stage, hidden, ropes, seq_len)?))
    }

    /// Adds what one chunk of the residual stream lacks against `reference` before o's or down's
    /// products, but not their `bias`, are added to it, times the inputs of these: Dᵀ X.
    fn drift(
        &mut self,
        all: &Calibrator<'_>,
        chunk: usize,
        bias: Option<&[f32]>,
        reference: &Tensor,
        sum: &mut Tensor,
    ) -> Result<()> {
        let device = all.device;
        let drift = self.states.hidden.read(chunk, |hidden| {
            let Some(bias) = bias else { return Ok(device.difference(reference, hidden)?) };
            let mut hidden = hidden.clone();
            device.add_bias(&mut hidden, bias)?;
            Ok(device.difference(reference, &hidden)?)
        })?;
        self.kept(all).read(chunk, |input| Ok(device.cross_add(sum, &drift, input)?))
    }

    fn kept(&mut self, all: &Calibrator<'_>) -> &mut ChunkStore {
        let chunks = self.states.seq_lens.len();
        let offload = all.offload.inputs;
        self.kept.get_or_insert_with(|| ChunkStore::new(all.device, chunks, offload))
    }

    /// Adds down's products: the block's outputs.
    fn output(&mut self, all: &Calibrator<'_>, block: &Block) -> Result<()> {
        for chunk in 0..self.states.seq_lens.len() {
            let activation = self.kept(all).take(chunk)?;
            let mut hidden = self.states.hidden.take(chunk)?;
            block.stage_output(all.device, Stage::Down, &activation, &mut hidden)?;
            self.states.hidden.put(chunk, hidden)?;
        }
        Ok(())
    }
}

impl States {
    /// One chunk of the unquantized model's states with the products of o or down added, for the
    /// caller to put back. Nothing here waits for a solve, so nothing is kept.
    fn past(
        &mut self,
        all: &Calibrator<'_>,
        dense: &Block,
        stage: Stage,
        chunk: usize,
    ) -> Result<Tensor> {
        let device = all.device;
        let seq_len = self.seq_lens[chunk];
        let ropes = all.ropes.for_windows(seq_len);
        let mut hidden = self.hidden.take(chunk)?;
        if dense.rule().parallel {
            // Its attention and MLP are added at once.
            if stage == Stage::Down {
                dense.forward(device, &mut hidden, ropes, seq_len)?;
            }
            return Ok(hidden);
        }
        let of =
            if stage == Stage::Down && dense.mixture().is_some() { Stage::GateUp } else { stage };
        let input = dense.stage_input(device, of, &hidden, ropes, seq_len)?;
        match of {
            Stage::GateUp => dense.mixed(device, &input, &mut hidden, &mut |_, _| Ok(()))?,
            _ => dense.stage_output(device, stage, &input, &mut hidden)?,
        }
        Ok(hidden)
    }
}

/// The factored Hessians of the linears of a stage.
#[derive(Clone, Copy)]
struct Along<'f> {
    all: &'f Factored,
    /// That of v, where it is another.
    values: Option<&'f Factored>,
}

impl<'f> Along<'f> {
    fn of(self, id: LinearId) -> &'f Factored {
        self.values.filter(|_| id == LinearId::V).unwrap_or(self.all)
    }
}

/// One block on its way.
struct BlockRun<'r, 's, 'a> {
    all: &'r Calibrator<'a>,
    timer: StageTimer<Work>,
    linears: Vec<LinearRecord>,
    sink: &'r mut Sink<'s>,
    stream: Stream<'r>,
    /// The unquantized block and its states.
    reference: Option<(&'r Block, &'r mut States)>,
    /// In host memory, the weights that the block's are a rounding of, until they are solved; in the
    /// block's order, or empty.
    exact: Vec<Option<Tensor>>,
}

impl BlockRun<'_, '_, '_> {
    /// One stage: every chunk's inputs into the statistics, then its linears solved.
    fn stage(&mut self, block: &mut Block, stage: Stage) -> Result<()> {
        let device = self.all.device;
        // Nothing is quantized yet before the first block's first stage.
        let shared = self.all.shared.filter(|_| block.index() == 0 && stage == Stage::Qkv);
        let gram = match shared {
            Some(grams) => {
                grams.get_or_make(self.all.spec.choices.rotate, || self.gram(block, stage))?
            }
            None => Arc::new(self.gram(block, stage)?),
        };
        if stage == Stage::GateUp && !block.rule().parallel {
            // All of o's inputs are used up; give their memory back before down's are made.
            self.stream.kept = None;
        }
        let scale = self.scale();
        let first = first_of(block, stage).name.clone();
        let ids: Vec<LinearId> = block.stage(stage).map(|linear| linear.id).collect();
        let factored = self.factor(&gram, &first)?;
        let values = self.values(block, stage, &factored)?;
        let mut energies = self.energies(block, &ids, &gram)?;
        let values = match values {
            Some((gram, factored)) => {
                let places = ids.iter().zip(&mut energies).filter(|(id, _)| **id == LinearId::V);
                for (&id, energy) in places {
                    *energy = self.energies(block, &[id], &gram)?[0];
                }
                Some(factored)
            }
            None => None,
        };
        // The shift needs the room.
        drop(gram);
        self.timer.mark(Work::Factor)?;
        let shift = match stage {
            Stage::Output | Stage::Down => self.shift(stage, &factored, scale)?,
            Stage::Qkv | Stage::GateUp => None,
        };
        if let Some(shift) = &shift
            && !device.all_finite(shift)?
        {
            return Err(Error::Activations { linear: first });
        }
        let share = scale * self.all.spec.choices.residual;
        let along = Along { all: &factored, values: values.as_ref() };
        self.solve(block, &ids, along, shift.map(|s| (s, share)).as_ref(), &energies)
    }

    /// s of every Hessian s XᵀX: one for all linears, an expert's too, however few tokens it sees. Damping
    /// is relative to H, so that it changes no code; errors and energies of all linears are of one unit.
    fn scale(&self) -> f32 {
        2.0 / self.all.windows as f32
    }

    /// The factored Hessian of the inputs of `first` and what else reads them.
    fn factor(&self, gram: &Gram, first: &str) -> Result<Factored> {
        factor(gram, self.scale(), self.all.spec).map_err(|source| match source {
            gptq_quant::Error::NotFinite { .. } => Error::Activations { linear: first.to_owned() },
            source => Error::Solve { linear: first.to_owned(), source },
        })
    }

    /// XᵀX of a stage's inputs over all chunks.
    fn gram(&mut self, block: &Block, stage: Stage) -> Result<Gram> {
        let device = self.all.device;
        let mut gram = device.gram(first_of(block, stage).weight.cols())?;
        for chunk in 0..self.stream.states.seq_lens.len() {
            let input = self.stream.input(self.all, block, stage, chunk)?;
            self.timer.mark(Work::Forward)?;
            device.gram_add(&mut gram, &input)?;
            self.timer.mark(Work::Gram)?;
            // The products of o and down are added one stage later, with the quantized weights.
            if matches!(stage, Stage::Output | Stage::Down) {
                self.stream.kept(self.all).put(chunk, input)?;
            }
        }
        gram.sum_over(self.all.ranks)?;
        self.exchanged()?;
        Ok(gram)
    }

    /// What this rank's rows of o or down should move by to give the residual stream all that it
    /// lacks, `[rows, in]`, over the Hessian's scale s; moves the unquantized model's states past the
    /// stage.
    ///
    /// With the unquantized W the stream would lack L = D − X Wᵀ, D being the distance of the
    /// unquantized model's states behind the linear from those before it, and from its bias.
    /// H = s XᵀX + λ, so s LᵀX H⁻¹ = (s DᵀX + λ W) H⁻¹ − W: the products X Wᵀ need not be made.
    fn shift(&mut self, stage: Stage, factored: &Factored, scale: f32) -> Result<Option<Tensor>> {
        let all = self.all;
        let Some((dense, states)) = &mut self.reference else { return Ok(None) };
        let Linear { weight, bias, .. } = first_of(dense, stage);
        let factor = dense.rule().residual;
        let bias: Option<Vec<f32>> =
            bias.as_ref().map(|bias| bias.iter().map(|b| b * factor).collect());
        let shape = weight.shape();
        let wanted = all.spec.choices.residual > 0.0;
        let mut drift = wanted.then(|| all.device.zeros(shape.0, shape.1)).transpose()?;
        for chunk in 0..states.seq_lens.len() {
            let hidden = states.past(all, dense, stage, chunk)?;
            self.timer.mark(Work::Reference)?;
            if let Some(sum) = &mut drift {
                self.stream.drift(all, chunk, bias.as_deref(), &hidden, sum)?;
                self.timer.mark(Work::Shift)?;
            }
            states.hidden.put(chunk, hidden)?;
        }
        let Some(mut drift) = drift else { return Ok(None) };
        all.ranks.sum(&mut drift)?;
        if factor != 1.0 {
            // What the products would have to be before they are multiplied.
            all.device.scale(&mut drift, 1.0 / factor)?;
        }
        let rows = all.ranks.share(shape.0, SHARD_ROWS);
        let weight = rows_of(all.device, weight, rows.clone())?;
        let wanted = {
            let drift = rows_of(all.device, &drift, rows)?;
            all.device.shifted(&drift, &weight, factored.added / scale)?
        };
        drop(drift);
        self.exchanged()?;
        let target = all.device.over_hessian(&wanted, &factored.upper, &factored.order)?;
        drop(wanted);
        let shift = all.device.shifted(&target, &weight, -1.0 / scale)?;
        self.timer.mark(Work::Shift)?;
        Ok(Some(shift))
    }

    /// One solve for each of the linears that read what was factored.
    fn solve(
        &mut self,
        block: &mut Block,
        ids: &[LinearId],
        along: Along<'_>,
        shift: Option<&(Tensor, f32)>,
        energies: &[f64],
    ) -> Result<()> {
        let Calibrator { device, ranks, .. } = *self.all;
        let mut numbers = Vec::with_capacity(2 * energies.len());
        for (&id, &energy) in ids.iter().zip(energies) {
            let linear = block.linear(id);
            let (name, rows) = (linear.name.clone(), linear.weight.rows());
            let solved = self.solve_rows(block, id, &name, along.of(id), shift)?;
            numbers.extend([solved.as_ref().map_or(0.0, |s| s.loss.unwrap_or(f64::NAN)), energy]);
            let (stored, weight) = match solved {
                Some(solved) => (Some(solved.stored), solved.weight),
                None => (None, rows_of(device, &block.linear(id).weight, 0..0)?.into_owned()),
            };
            block.set_weight(id, ranks.gather_rows(weight, rows, SHARD_ROWS)?);
            self.exchanged()?;
            if let Some(shards) = RowShards::collect(ranks, stored, rows)? {
                (self.sink)(&name, shards)?;
            }
            self.timer.mark(Work::Pack)?;
        }
        let numbers = summed(ranks, numbers)?;
        for (&id, number) in ids.iter().zip(numbers.chunks_exact(2)) {
            let name = block.linear(id).name.clone();
            self.linears.push(report(name, number[0], number[1], along.of(id)));
        }
        Ok(())
    }

    /// Solves this rank's rows of a linear; `None` when there are more ranks than shards of rows.
    fn solve_rows(
        &mut self,
        block: &Block,
        id: LinearId,
        name: &str,
        factored: &Factored,
        shift: Option<&(Tensor, f32)>,
    ) -> Result<Option<Quantized>> {
        let Calibrator { device, ranks, spec, .. } = *self.all;
        let weight = &block.linear(id).weight;
        let own = ranks.share(weight.rows(), SHARD_ROWS);
        if own.is_empty() {
            return Ok(None);
        }
        let mut rows = match self.exact_rows(block.place_of(id), own.clone())? {
            Some(exact) => Cow::Owned(exact),
            None => rows_of(device, weight, own)?,
        };
        if let Some((shift, share)) = shift {
            rows = Cow::Owned(device.shifted(&rows, shift, *share)?);
            self.timer.mark(Work::Shift)?;
        }
        let solved = solve(&rows, factored, spec)
            .map_err(|source| Error::Solve { linear: name.to_owned(), source })?;
        self.timer.mark(Work::Solve)?;
        Ok(Some(solved))
    }

    /// These rows of the weights that the block's are a rounding of, where it keeps them.
    fn exact_rows(&mut self, place: usize, own: Range<usize>) -> Result<Option<Tensor>> {
        let Some(exact) = self.exact.get_mut(place).and_then(Option::take) else { return Ok(None) };
        let whole = own.len() == exact.rows();
        let rows = if whole { exact } else { rows_of(&Device::Cpu, &exact, own)?.into_owned() };
        Ok(Some(self.all.device.upload_f32(rows.into_host())?))
    }

    /// Ends a stage of work that only several ranks have.
    fn exchanged(&mut self) -> Result<()> {
        if self.all.ranks.size() > 1 {
            self.timer.mark(Work::Exchange)?;
        }
        Ok(())
    }

    /// This rank's part of tr(W H Wᵀ) of linears that read the same, H undamped.
    fn energies(&self, block: &Block, ids: &[LinearId], gram: &Gram) -> Result<Vec<f64>> {
        let scale = f64::from(self.scale());
        let energy = |&id: &LinearId| Ok(self.energy(&block.linear(id).weight, gram)? * scale);
        ids.iter().map(energy).collect()
    }

    /// tr(W G Wᵀ), from evenly spaced rows of W, which the ranks share.
    fn energy(&self, weight: &Tensor, gram: &Gram) -> Result<f64> {
        let rows = weight.rows();
        let count = rows.min(ENERGY_ROWS);
        let own = self.all.ranks.share(count, 1);
        if own.is_empty() {
            return Ok(0.0);
        }
        let sample: Vec<u32> = own.map(|i| (i * rows / count) as u32).collect();
        let sampled = self.all.device.select_rows(weight, &sample)?;
        Ok(gram.quadratic_form(&sampled)? * rows as f64 / count as f64)
    }
}

/// The first linear of a stage, whose inputs are those of all.
///
/// # Panics
/// When the block has no linear in the stage.
pub(crate) fn first_of(block: &Block, stage: Stage) -> &Linear {
    let first = block.stage(stage).next();
    first.unwrap_or_else(|| panic!("block {} has no linear in {stage:?}", block.index()))
}

/// An error is relative to an energy: a linear of zeros, which a shift may move all the same, has none.
fn report(name: String, loss: f64, energy: f64, factored: &Factored) -> LinearRecord {
    let error = Some(loss / energy).filter(|error| energy > 0.0 && error.is_finite());
    solved(name, error, factored)
}
