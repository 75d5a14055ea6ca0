//! Calibrating one block: the staged forward, looking at every linear's inputs on the way.
//!
//! Each stage's inputs feed a Gram, the solved weights replace the dense ones, and the same inputs
//! go through them to become the next stage's: what AutoGPTQ computes with five forwards a block,
//! with one, and the same mathematics.
//!
//! A recipe may aim at other targets than the weights as they are, to make up for what is lost
//! upstream: the unquantised model's states then go through the block as it was before, and what
//! they differ by becomes a shift of the weights before they are solved (see
//! [`Device::over_hessian`]). Linears that write to the residual stream make up for what the stream
//! as a whole lacks after them; the others for the drift of their inputs.

use std::collections::BTreeMap;

use gptq_compute::{Device, Gram, Laps, RopeTable, Tensor};
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

/// The states that a block moves: of the model being quantised, and of the unquantised one where
/// targets are shifted.
pub(crate) struct Streams {
    pub(crate) quantised: States,
    pub(crate) reference: Option<States>,
}

impl Calibrator<'_> {
    /// Quantises every linear of `block` and moves `streams` past it.
    pub(crate) fn block(
        &self,
        block: &mut Block,
        streams: &mut Streams,
        sink: &mut Sink<'_>,
    ) -> Result<Calibrated> {
        let dense = streams.reference.is_some().then(|| block.clone());
        let mut run = BlockRun {
            all: self,
            laps: Laps::start(self.device)?,
            linears: Vec::with_capacity(LinearId::ALL.len()),
            sink,
            stream: Stream { states: &mut streams.quantised, kept: None },
            reference: dense.as_ref().zip(streams.reference.as_mut()),
        };
        for stage in Stage::ALL {
            run.stage(block, stage)?;
        }
        run.stream.output(self, block)?;
        run.laps.lap("forward")?;
        let mut stages = StageSeconds::new();
        for (name, time) in run.laps.finish()? {
            *stages.entry(name).or_insert(0.0) += time.as_secs_f64();
        }
        Ok(Calibrated { linears: run.linears, stages })
    }
}

/// States on their way through the block that is being quantised.
struct Stream<'s> {
    states: &'s mut States,
    /// Inputs of o, then of down, from the stage that sees them to the one that needs their product.
    kept: Option<Stash>,
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
        if stage == Stage::GateUp {
            let context = self.kept(all).take(chunk)?;
            let mut hidden = self.states.hidden.take(chunk)?;
            block.attention_output(device, &context, &mut hidden)?;
            let input = block.mlp_input(device, &hidden)?;
            self.states.hidden.put(chunk, hidden)?;
            return Ok(input);
        }
        self.states.hidden.read(chunk, |hidden| {
            Ok(match stage {
                // Normed again for the next stage rather than kept: one pass over memory against
                // holding all of it.
                Stage::Qkv => block.attention_input(device, hidden)?,
                Stage::Output => {
                    let input = block.attention_input(device, hidden)?;
                    block.attention_context(device, &input, all.rope, seq_len)?
                }
                Stage::GateUp | Stage::Down => {
                    block.mlp_activation(device, &block.mlp_input(device, hidden)?)?
                }
            })
        })
    }

    /// Adds to `sum` what this stage lacks against the `reference` for one chunk, times its inputs:
    /// the drift of the inputs of q, k, v or of gate, up; or what the residual stream would lack if
    /// the unquantised o or down got the inputs that there are.
    fn lacking(
        &mut self,
        all: &Calibrator<'_>,
        dense: &Block,
        stage: Stage,
        chunk: usize,
        reference: &Tensor,
        sum: &mut Tensor,
    ) -> Result<()> {
        let device = all.device;
        if let Stage::Qkv | Stage::GateUp = stage {
            return self.states.hidden.read(chunk, |hidden| {
                let input = match stage {
                    Stage::Qkv => dense.attention_input(device, hidden)?,
                    _ => dense.mlp_input(device, hidden)?,
                };
                let drift = device.difference(reference, &input)?;
                Ok(device.cross_add(sum, &drift, &input)?)
            });
        }
        let mut output = self.states.hidden.read(chunk, |hidden| Ok(hidden.clone()))?;
        self.kept(all).read(chunk, |input| {
            match stage {
                Stage::Output => dense.attention_output(device, input, &mut output)?,
                _ => dense.mlp_output(device, input, &mut output)?,
            }
            let lacking = device.difference(reference, &output)?;
            Ok(device.cross_add(sum, &lacking, input)?)
        })
    }

    fn kept(&mut self, all: &Calibrator<'_>) -> &mut Stash {
        let chunks = self.states.seq_lens.len();
        let park = all.parking.inputs;
        self.kept.get_or_insert_with(|| Stash::new(all.device, chunks, park))
    }

    /// Adds down's products: the block's outputs.
    fn output(&mut self, all: &Calibrator<'_>, block: &Block) -> Result<()> {
        for chunk in 0..self.states.seq_lens.len() {
            let activation = self.kept(all).take(chunk)?;
            let mut hidden = self.states.hidden.take(chunk)?;
            block.mlp_output(all.device, &activation, &mut hidden)?;
            self.states.hidden.put(chunk, hidden)?;
        }
        Ok(())
    }
}

impl States {
    /// One chunk of the unquantised model at a stage: the inputs of q, k, v or of gate, up; or the
    /// states with the products of o or down added, for the caller to put back. Nothing here waits
    /// for a solve, so nothing is kept.
    fn reference(
        &mut self,
        all: &Calibrator<'_>,
        dense: &Block,
        stage: Stage,
        chunk: usize,
    ) -> Result<Tensor> {
        let device = all.device;
        match stage {
            Stage::Qkv => self.hidden.read(chunk, |h| Ok(dense.attention_input(device, h)?)),
            Stage::GateUp => self.hidden.read(chunk, |h| Ok(dense.mlp_input(device, h)?)),
            Stage::Output => {
                let mut hidden = self.hidden.take(chunk)?;
                let input = dense.attention_input(device, &hidden)?;
                let seq_len = self.seq_lens[chunk];
                let context = dense.attention_context(device, &input, all.rope, seq_len)?;
                dense.attention_output(device, &context, &mut hidden)?;
                Ok(hidden)
            }
            Stage::Down => {
                let mut hidden = self.hidden.take(chunk)?;
                let activation =
                    dense.mlp_activation(device, &dense.mlp_input(device, &hidden)?)?;
                dense.mlp_output(device, &activation, &mut hidden)?;
                Ok(hidden)
            }
        }
    }
}

/// What a stage's linears are solved for.
enum Target {
    /// Their weights.
    Weights,
    /// W + share · W · map `[in, in]`.
    Map(Tensor, f32),
    /// W + share · shift `[out, in]`.
    Shift(Tensor, f32),
}

impl Target {
    fn of(&self, device: &Device, weight: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Weights => weight.clone(),
            Self::Map(map, share) => device.shifted_by(weight, map, *share)?,
            Self::Shift(shift, share) => device.shifted(weight, shift, *share)?,
        })
    }
}

/// One block on its way.
struct BlockRun<'r, 's, 'a> {
    all: &'r Calibrator<'a>,
    laps: Laps,
    linears: Vec<LinearReport>,
    sink: &'r mut Sink<'s>,
    stream: Stream<'r>,
    /// The unquantised block and its states.
    reference: Option<(&'r Block, &'r mut States)>,
}

impl BlockRun<'_, '_, '_> {
    /// One stage: every chunk's inputs into the statistics, then its linears solved.
    fn stage(&mut self, block: &mut Block, stage: Stage) -> Result<()> {
        let device = self.all.device;
        let mut gram = device.gram(block.linear(stage.linears()[0]).cols())?;
        for chunk in 0..self.stream.states.seq_lens.len() {
            let input = self.stream.input(self.all, block, stage, chunk)?;
            self.laps.lap("forward")?;
            device.gram_add(&mut gram, &input)?;
            self.laps.lap("gram")?;
            // The products of o and down are added one stage later, with the quantised weights.
            if matches!(stage, Stage::Output | Stage::Down) {
                self.stream.kept(self.all).put(chunk, input)?;
            }
        }
        if stage == Stage::GateUp {
            // All of o's inputs are used up; give their memory back before down's are made.
            self.stream.kept = None;
        }
        let scale = 2.0 / self.all.windows as f32;
        let first = (self.all.name)(block, stage.linears()[0]);
        let factored = factor(&gram, scale, self.all.spec).map_err(|source| match source {
            gptq_quant::Error::NotFinite { .. } => Error::Activations { linear: first.clone() },
            source => Error::Solve { linear: first.clone(), source },
        })?;
        let energies = self.energies(block, stage, &gram, scale)?;
        // The shift needs the room.
        drop(gram);
        self.laps.lap("factor")?;
        let target = self.target(block, stage, &factored, scale)?;
        if let Target::Map(shift, _) | Target::Shift(shift, _) = &target
            && !device.all_finite(shift)?
        {
            return Err(Error::Activations { linear: first });
        }
        self.solve(block, stage, &factored, &target, &energies)
    }

    /// What the linears of a stage should be solved for; moves the unquantised model's states past
    /// the stage.
    fn target(
        &mut self,
        block: &Block,
        stage: Stage,
        factored: &Factored,
        scale: f32,
    ) -> Result<Target> {
        let all = self.all;
        let (device, choices) = (all.device, &all.spec.choices);
        let writes = matches!(stage, Stage::Output | Stage::Down);
        let share = if writes { choices.residual } else { choices.drift };
        let Some((dense, states)) = &mut self.reference else { return Ok(Target::Weights) };
        if share == 0.0 && !writes {
            return Ok(Target::Weights);
        }
        let shape = block.linear(stage.linears()[0]).shape();
        let rows = if writes { shape.0 } else { shape.1 };
        let mut lacking = device.zeros(rows, shape.1)?;
        for chunk in 0..states.seq_lens.len() {
            let reference = states.reference(all, dense, stage, chunk)?;
            self.laps.lap("reference")?;
            if share > 0.0 {
                self.stream.lacking(all, dense, stage, chunk, &reference, &mut lacking)?;
            }
            if writes {
                states.hidden.put(chunk, reference)?;
            }
            self.laps.lap("target")?;
        }
        if share == 0.0 {
            return Ok(Target::Weights);
        }
        let shift = device.over_hessian(&lacking, &factored.upper, &factored.order)?;
        self.laps.lap("target")?;
        let share = share * scale;
        Ok(if writes { Target::Shift(shift, share) } else { Target::Map(shift, share) })
    }

    /// One solve for each linear of a stage.
    fn solve(
        &mut self,
        block: &mut Block,
        stage: Stage,
        factored: &Factored,
        target: &Target,
        energies: &[f64],
    ) -> Result<()> {
        for (&id, &energy) in stage.linears().iter().zip(energies) {
            let name = (self.all.name)(block, id);
            let weight = target.of(self.all.device, block.linear(id))?;
            self.laps.lap("target")?;
            let solved = solve(&weight, factored, self.all.spec)
                .map_err(|source| Error::Solve { linear: name.clone(), source })?;
            self.laps.lap("solve")?;
            self.linears.push(report(name.clone(), &solved, energy, factored));
            (self.sink)(&name, solved.stored)?;
            block.set_linear(id, solved.weight);
            self.laps.lap("pack")?;
        }
        Ok(())
    }

    /// `scale` · tr(W G Wᵀ) of a stage's linears.
    fn energies(&self, block: &Block, stage: Stage, gram: &Gram, scale: f32) -> Result<Vec<f64>> {
        let energy = |&id| Ok(self.energy(block, id, gram)? * f64::from(scale));
        stage.linears().iter().map(energy).collect()
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
