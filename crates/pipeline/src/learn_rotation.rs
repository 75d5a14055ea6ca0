//! The rotation of the residual stream that flattens a model's weights most.
//!
//! What the stream's rotation turns are rows of q, k, v, gate and up, with the gain of the norm before them,
//! and columns of o and down. Every step looks at all of them: a rotation learned from some is worth nothing
//! to the others, and steps along some at a time undo each other (tests/bench/2026-11-29-forward-only.md).

use gptq_checkpoint::{Checkpoint, NormId};
use gptq_compute::Device;
use gptq_model::{Block, Model, SourcePrecision, Stage};
use gptq_quant::{Learner, Rotation};
use ndarray::Array2;

use crate::error::Result;
use crate::progress::Progress;

/// Looks at the whole model, the first at what is begun with, each after that at where a step led.
const STEPS: usize = 12;

/// Learns from all weights of `source` that read or write the residual stream; begins at `rotation`.
///
/// # Errors
/// Weights that cannot be read, or are not finite.
pub(crate) fn learned(
    source: &Checkpoint,
    rotation: Rotation,
    progress: &dyn Progress,
) -> Result<Rotation> {
    let model = Model::new(source, Device::Cpu, SourcePrecision::Half, 1)?;
    let blocks = source.config().num_hidden_layers;
    let mut learner = Learner::new(rotation);
    progress.begin_steps("learn the rotation", STEPS);
    for _ in 0..STEPS {
        for index in 0..blocks {
            look(&mut learner, &model.load_block_on(&Device::Cpu, index)?)?;
        }
        learner.step();
        progress.step();
    }
    progress.end();
    Ok(learner.finish())
}

/// Looks at all linears of a block.
fn look(learner: &mut Learner, block: &Block) -> Result<()> {
    for linear in block.linears() {
        let mut weight: Array2<f32> = linear.weight.to_host()?;
        match Stage::of(linear.id) {
            Stage::Qkv => scale(&mut weight, block.gains().get(NormId::BeforeAttention)),
            Stage::GateUp => scale(&mut weight, block.gains().get(NormId::BeforeMlp)),
            Stage::Output | Stage::Down => weight = weight.t().as_standard_layout().into_owned(),
        }
        learner.look(weight.view());
    }
    Ok(())
}

/// W ← W diag(gain).
fn scale(weight: &mut Array2<f32>, gain: Option<&[f32]>) {
    if let Some(gain) = gain {
        weight
            .outer_iter_mut()
            .for_each(|mut row| row.iter_mut().zip(gain).for_each(|(v, g)| *v *= g));
    }
}
