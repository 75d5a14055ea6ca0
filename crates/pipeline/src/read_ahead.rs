//! Blocks read one ahead of their use, which every walk over a model does.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use gptq_checkpoint::{Checkpoint, ModelConfig};
use gptq_compute::Device;
use gptq_model::{Block, Model};

use crate::error::{Error, Result};
use crate::one_reading::Reader;
use crate::rotate::FusedRotations;

/// Reads blocks one ahead of their use, and folds rotations into them, on a thread of its own.
/// With `exact`, blocks on a GPU keep their weights unrounded as well. With a `reader`, other walks
/// read the model at the same time.
pub(crate) fn read_ahead<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<'env>,
    rotations: Option<&'env FusedRotations>,
    exact: bool,
    reader: Option<&'env Reader<'env>>,
) -> Receiver<Result<Block>> {
    // A rendezvous: the block that waits here is the only one beside the one in use.
    let (sender, receiver) = sync_channel(0);
    scope.spawn(move || {
        for index in 0..model.config().num_hidden_layers {
            let block = load(model, index, rotations, exact, reader);
            let failed = block.is_err();
            // A closed channel means that the walk has failed elsewhere.
            if sender.send(block).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

fn load(
    model: &Model<'_>,
    index: usize,
    rotations: Option<&FusedRotations>,
    exact: bool,
    reader: Option<&Reader<'_>>,
) -> Result<Block> {
    // The host rotates the block while a GPU works on the one before it.
    let on_host = rotations.is_some() || exact;
    let read = || match on_host {
        true => Ok(model.load_block_on(&Device::Cpu, index)?),
        false => Ok(model.load_block(index)?),
    };
    let mut block = match reader {
        Some(reader) => reader.block(index, read, |block| discard(model.checkpoint(), block))?,
        None => {
            let block = read()?;
            discard(model.checkpoint(), index)?;
            block
        }
    };
    if !on_host {
        return Ok(block);
    }
    // The file holds biases and gains in fp16, so calibration walks them as such: biases before they
    // are turned, gains unless they are folded.
    if exact {
        block.round_biases();
    }
    let left = rotations.map(|rotations| rotations.block(&mut block, exact)).transpose()?.flatten();
    if exact {
        block.round_dense();
    }
    let mut block = model.place(block, exact)?;
    if let (Some(rotations), Some(gains)) = (rotations, left) {
        rotations.placed(model.device(), &mut block, &gains)?;
    }
    Ok(block)
}

/// No walk reads a block's linears twice: where shards arrive and go, these may go.
pub(crate) fn discard(source: &Checkpoint, index: usize) -> Result<()> {
    for name in linears(source, index) {
        source.discard(&name)?;
    }
    Ok(())
}

/// Names of the weights of a block's linears.
pub(crate) fn linears(source: &Checkpoint, index: usize) -> impl Iterator<Item = String> {
    let prefix = ModelConfig::block_prefix(index);
    let shapes = source.config().block_linears(index).into_iter();
    shapes.map(move |shape| format!("{prefix}.{}.weight", shape.name))
}

/// The next block, or why it could not be read.
pub(crate) fn next_block(ahead: &Receiver<Result<Block>>) -> Result<Block> {
    ahead.recv().map_err(|_| Error::Thread("reading"))?
}
