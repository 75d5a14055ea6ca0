//! The quantized model as it is tuned.

use gptq_checkpoint::CheckpointWriter;
use gptq_compute::{Adam, Device, Tensor};
use gptq_model::{BlockParts, Model};
use half::f16;

use super::block::TunedBlock;
use super::teacher::{Chunk, Teacher};
use crate::chunk_store::ChunkStore;
use crate::error::{Error, Result};

/// What the loss is multiplied by at first, so that fp16 holds its gradients: summed over a chunk's tokens
/// they are 1e-4 to 1e-2 where states are, and fp16 is exact to 2⁻²⁴.
const LOSS_SCALE: f32 = 1024.0;
/// The least; gradients that are still infinite are no matter of scale.
const LEAST_LOSS_SCALE: f32 = 1.0 / 1024.0;

/// The quantized model.
pub(super) struct Student {
    blocks: Vec<TunedBlock>,
    /// Share of the states between blocks that waits in host memory.
    offloaded: f64,
    loss_scale: f32,
}

impl Student {
    /// The model that `writer` has written.
    pub(super) fn new(
        model: &Model<'_>,
        frames: Vec<BlockParts<()>>,
        writer: &CheckpointWriter,
        offloaded: f64,
    ) -> Result<Self> {
        let block =
            |frame| TunedBlock::new(model.device(), frame, |name| Ok(writer.read_linear(name)?));
        let blocks = frames.into_iter().map(block).collect::<Result<_>>()?;
        Ok(Self { blocks, offloaded, loss_scale: LOSS_SCALE })
    }

    /// Names of all linears, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.blocks.iter().flat_map(TunedBlock::names)
    }

    /// Scales of all linears, in order, as a file holds them.
    pub(super) fn scales(&self, device: &Device) -> Result<Vec<Vec<f16>>> {
        self.blocks.iter().flat_map(|block| block.scales(device)).collect()
    }

    /// Mean KL in nats a token on what is held out.
    ///
    /// # Errors
    /// [`Error::Activations`] where it is not finite.
    pub(super) fn judge(&self, model: &Model<'_>, teacher: &mut Teacher) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0);
        for place in 0..teacher.held_out() {
            let hidden = self.forward(model, teacher.held_out_chunk(place), None)?;
            let normed = teacher.norm.apply(model.device(), &hidden)?;
            let divergences = teacher.judge(model.device(), place, &normed)?;
            tokens += divergences.len();
            sum += divergences.into_iter().map(f64::from).sum::<f64>();
        }
        let mean = sum / tokens as f64;
        if mean.is_finite() { Ok(mean) } else { Err(not_finite()) }
    }

    /// One step on a batch.
    pub(super) fn train(
        &mut self,
        model: &Model<'_>,
        teacher: &mut Teacher,
        batch: usize,
        step: Adam,
    ) -> Result<()> {
        while !self.gradients(model, teacher, batch)? {
            self.loss_scale /= 2.0;
            if self.loss_scale < LEAST_LOSS_SCALE {
                return Err(not_finite());
            }
        }
        let step = Adam { gradient_factor: 1.0 / self.loss_scale, ..step };
        self.blocks.iter_mut().try_for_each(|block| block.step(model.device(), &step))
    }

    /// Sums the gradients of a batch; `false` where they are not finite.
    fn gradients(
        &mut self,
        model: &Model<'_>,
        teacher: &mut Teacher,
        batch: usize,
    ) -> Result<bool> {
        self.blocks.iter_mut().try_for_each(|block| block.clear(model.device()))?;
        for place in teacher.batch(batch) {
            let gradient = self.backward(model, teacher, place)?;
            // What is infinite on the way makes all before it so.
            if !model.device().all_finite(&gradient)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Adds the gradients of one chunk to those of the scales; gives that of the embedded tokens.
    fn backward(
        &mut self,
        model: &Model<'_>,
        teacher: &mut Teacher,
        place: usize,
    ) -> Result<Tensor> {
        let device = model.device();
        let chunk = teacher.train_chunk(place).clone();
        let mut between = ChunkStore::new(device, self.blocks.len(), self.offloaded);
        let hidden = self.forward(model, &chunk, Some(&mut between))?;
        let normed = teacher.norm.apply(device, &hidden)?;
        let of_normed = teacher.gradient(device, place, &normed, self.loss_scale)?;
        drop(normed);
        let mut gradient = teacher.norm.backward(device, &hidden, &of_normed)?;
        drop((hidden, of_normed));
        let ropes = model.ropes(chunk.seq_len);
        for (behind, block) in self.blocks.iter_mut().rev().enumerate() {
            let hidden = between.take(behind)?;
            block.backward(device, &hidden, &mut gradient, ropes, chunk.seq_len)?;
        }
        Ok(gradient)
    }

    /// The states `[tokens, hidden]` behind the last block; `between` keeps those before every block, the last
    /// one's first, in the order in which the way back takes them.
    fn forward(
        &self,
        model: &Model<'_>,
        chunk: &Chunk,
        mut between: Option<&mut ChunkStore>,
    ) -> Result<Tensor> {
        let device = model.device();
        let count = self.blocks.len();
        let ropes = model.ropes(chunk.seq_len);
        let mut hidden = model.embed(&chunk.ids)?;
        for (index, block) in self.blocks.iter().enumerate() {
            if let Some(between) = &mut between {
                between.put(count - 1 - index, hidden.clone())?;
            }
            block.block(device)?.forward(device, &mut hidden, ropes, chunk.seq_len)?;
        }
        Ok(hidden)
    }
}

fn not_finite() -> Error {
    Error::Activations { linear: "lm_head".to_owned() }
}
