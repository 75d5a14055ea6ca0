//! Calibrating one block: the staged forward, looking at every linear's inputs on the way.
//!
//! Each stage's inputs feed a Gram, the solved weights replace the dense ones, and the same inputs
//! go through them to become the next stage's: what AutoGPTQ computes with five forwards a block,
//! with one, and the same mathematics.

use std::collections::BTreeMap;

use gptq_compute::{Device, Gram, Laps, RopeTable};
use gptq_model::{Block, LinearId, Stage};
use gptq_quant::{Factored, QuantSpec, Quantised, Stored, factor, solve};

use crate::error::{Error, Result};
use crate::memory::Parking;
use crate::progress::LinearReport;
use crate::stash::Stash;
use crate::states::States;

/// Rows of a weight from which the energy of its outputs is estimated: the exact figure costs as
/// much as two solves, and it only scales an error in a report.
const ENERGY_ROWS: usize = 512;

/// Seconds by stage name.
pub(crate) type StageSeconds = BTreeMap<&'static str, f64>;

/// What every block of a run shares.
pub(crate) struct Calibrator<'a> {
    pub(crate) device: &'a Device,
    pub(crate) rope: &'a RopeTable,
    pub(crate) spec: &'a QuantSpec,
    /// Number of calibration windows: the n of H = 2/n · XᵀX.
    pub(crate) windows: usize,
    pub(crate) parking: Parking,
    /// Name of a linear in messages and reports.
    pub(crate) name: &'a dyn Fn(&Block, LinearId) -> String,
}

/// A calibrated block.
pub(crate) struct Calibrated {
    pub(crate) linears: Vec<LinearReport>,
    pub(crate) stages: StageSeconds,
}

/// Receives each quantised linear, by name.
pub(crate) type Sink<'s> = dyn FnMut(&str, Stored) -> Result<()> + 's;

impl Calibrator<'_> {
    /// Quantises every linear of `block` and moves `states` past it.
    pub(crate) fn block(
        &self,
        block: &mut Block,
        states: &mut States,
        sink: &mut Sink<'_>,
    ) -> Result<Calibrated> {
        let mut run = BlockRun {
            all: self,
            laps: Laps::start(self.device)?,
            linears: Vec::with_capacity(LinearId::ALL.len()),
            sink,
        };
        run.attention_inputs(block, states)?;
        let contexts = run.contexts(block, states)?;
        run.mlp_inputs(block, states, contexts)?;
        let activations = run.activations(block, states)?;
        run.outputs(block, states, activations)?;
        let mut stages = StageSeconds::new();
        for (name, time) in run.laps.finish()? {
            *stages.entry(name).or_insert(0.0) += time.as_secs_f64();
        }
        Ok(Calibrated { linears: run.linears, stages })
    }
}

/// One block on its way.
struct BlockRun<'r, 's, 'a> {
    all: &'r Calibrator<'a>,
    laps: Laps,
    linears: Vec<LinearReport>,
    sink: &'r mut Sink<'s>,
}

impl BlockRun<'_, '_, '_> {
    /// Norm → Gram → q, k, v.
    fn attention_inputs(&mut self, block: &mut Block, states: &mut States) -> Result<()> {
        let device = self.all.device;
        let mut gram = device.gram(block.linear(LinearId::Q).cols())?;
        for chunk in 0..states.seq_lens.len() {
            let hidden = states.hidden.take(chunk)?;
            let input = block.attention_input(device, &hidden)?;
            states.hidden.put(chunk, hidden)?;
            self.laps.lap("forward")?;
            device.gram_add(&mut gram, &input)?;
            self.laps.lap("gram")?;
        }
        self.solve(block, Stage::Qkv, &gram)
    }

    /// Attention with the quantised q, k, v → Gram → o. Returns o's inputs.
    fn contexts(&mut self, block: &mut Block, states: &mut States) -> Result<Stash> {
        let device = self.all.device;
        let chunks = states.seq_lens.len();
        let mut contexts = Stash::new(device, chunks, self.all.parking.activations());
        let mut gram = device.gram(block.linear(LinearId::O).cols())?;
        for (chunk, &seq_len) in states.seq_lens.iter().enumerate() {
            let hidden = states.hidden.take(chunk)?;
            // Normed again rather than kept: one pass over memory against holding all of it.
            let input = block.attention_input(device, &hidden)?;
            states.hidden.put(chunk, hidden)?;
            let context = block.attention_context(device, &input, self.all.rope, seq_len)?;
            self.laps.lap("forward")?;
            device.gram_add(&mut gram, &context)?;
            self.laps.lap("gram")?;
            contexts.put(chunk, context)?;
        }
        self.solve(block, Stage::Output, &gram)?;
        Ok(contexts)
    }

    /// Residual, norm → Gram → gate, up.
    fn mlp_inputs(
        &mut self,
        block: &mut Block,
        states: &mut States,
        mut contexts: Stash,
    ) -> Result<()> {
        let device = self.all.device;
        let mut gram = device.gram(block.linear(LinearId::Gate).cols())?;
        for chunk in 0..states.seq_lens.len() {
            let mut hidden = states.hidden.take(chunk)?;
            block.attention_output(device, &contexts.take(chunk)?, &mut hidden)?;
            let input = block.mlp_input(device, &hidden)?;
            states.hidden.put(chunk, hidden)?;
            self.laps.lap("forward")?;
            device.gram_add(&mut gram, &input)?;
            self.laps.lap("gram")?;
        }
        drop(contexts);
        self.solve(block, Stage::GateUp, &gram)
    }

    /// silu(gate) · up with the quantised weights → Gram → down. Returns down's inputs.
    fn activations(&mut self, block: &mut Block, states: &mut States) -> Result<Stash> {
        let device = self.all.device;
        let chunks = states.seq_lens.len();
        let mut activations = Stash::new(device, chunks, self.all.parking.activations());
        let mut gram = device.gram(block.linear(LinearId::Down).cols())?;
        for chunk in 0..chunks {
            let hidden = states.hidden.take(chunk)?;
            let input = block.mlp_input(device, &hidden)?;
            states.hidden.put(chunk, hidden)?;
            let activation = block.mlp_activation(device, &input)?;
            self.laps.lap("forward")?;
            device.gram_add(&mut gram, &activation)?;
            self.laps.lap("gram")?;
            activations.put(chunk, activation)?;
        }
        self.solve(block, Stage::Down, &gram)?;
        Ok(activations)
    }

    /// The block's outputs.
    fn outputs(
        &mut self,
        block: &Block,
        states: &mut States,
        mut activations: Stash,
    ) -> Result<()> {
        for chunk in 0..states.seq_lens.len() {
            let mut hidden = states.hidden.take(chunk)?;
            block.mlp_output(self.all.device, &activations.take(chunk)?, &mut hidden)?;
            states.hidden.put(chunk, hidden)?;
        }
        Ok(self.laps.lap("forward")?)
    }

    /// One factor, and one solve for each linear of a stage.
    fn solve(&mut self, block: &mut Block, stage: Stage, gram: &Gram) -> Result<()> {
        let spec = self.all.spec;
        let scale = 2.0 / self.all.windows as f32;
        let first = (self.all.name)(block, stage.linears()[0]);
        let factored = factor(gram, scale, spec).map_err(|source| match source {
            gptq_quant::Error::NotFinite { .. } => Error::Activations { linear: first.clone() },
            source => Error::Solve { linear: first, source },
        })?;
        self.laps.lap("factor")?;
        for &id in stage.linears() {
            let name = (self.all.name)(block, id);
            let energy = self.energy(block, id, gram)? * f64::from(scale);
            let solved = solve(block.linear(id), &factored, spec)
                .map_err(|source| Error::Solve { linear: name.clone(), source })?;
            self.laps.lap("solve")?;
            self.linears.push(report(name.clone(), &solved, energy, &factored));
            (self.sink)(&name, solved.stored)?;
            block.set_linear(id, solved.weight);
            self.laps.lap("pack")?;
        }
        Ok(())
    }

    /// tr(W G Wᵀ), from evenly spaced rows of W.
    fn energy(&self, block: &Block, id: LinearId, gram: &Gram) -> Result<f64> {
        let weight = block.linear(id);
        let rows = weight.rows();
        let count = rows.min(ENERGY_ROWS);
        let sample: Vec<u32> = (0..count).map(|i| (i * rows / count) as u32).collect();
        let sampled = self.all.device.select_rows(weight, &sample)?;
        Ok(gram.quadratic_form(&sampled)? * rows as f64 / count as f64)
    }
}

fn report(name: String, solved: &Quantised, energy: f64, factored: &Factored) -> LinearReport {
    LinearReport {
        name,
        relative_error: solved.loss.map(|loss| loss / energy.max(f64::MIN_POSITIVE)),
        damp: Some(factored.damp),
        damp_retries: factored.damp_retries,
    }
}
