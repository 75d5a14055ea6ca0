//! The quantized model as it is tuned: codes on the device, a log factor a scale, and how they are moved.

use gptq_checkpoint::{CheckpointWriter, GptqLinear};
use gptq_compute::{Adam, Device, PackedCodes, ScaledCodes, Tensor};
use gptq_model::{Block, BlockParts, Model};
use half::f16;

use super::teacher::{Chunk, Teacher};
use crate::chunk_store::ChunkStore;
use crate::error::{Error, Result};

/// What the loss is multiplied by at first, so that fp16 holds its gradients: summed over a chunk's tokens
/// they are 1e-4 to 1e-2 where states are, and fp16 is exact to 2⁻²⁴.
const LOSS_SCALE: f32 = 1024.0;
/// The least; gradients that are still infinite are no matter of scale.
const LEAST_LOSS_SCALE: f32 = 1.0 / 1024.0;

/// A linear whose scales are tuned.
struct TunedLinear {
    name: String,
    codes: ScaledCodes,
    /// `[out, groups]` in f32, as the next ones.
    log_factors: Tensor,
    moments: [Tensor; 2],
    gradient: Tensor,
}

/// The quantized model.
pub(super) struct Student {
    frames: Vec<BlockParts<()>>,
    /// Linears of every block, in the frames' order.
    blocks: Vec<Vec<TunedLinear>>,
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
        let mut blocks = Vec::with_capacity(frames.len());
        for frame in &frames {
            let linears = frame.linears.iter().map(|linear| {
                let written = writer.read_linear(&linear.name)?;
                TunedLinear::new(model.device(), linear.name.clone(), &written)
            });
            blocks.push(linears.collect::<Result<_>>()?);
        }
        Ok(Self { frames, blocks, offloaded, loss_scale: LOSS_SCALE })
    }

    /// Names of all linears, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.blocks.iter().flatten().map(|linear| linear.name.as_str())
    }

    /// Scales of all linears, in order, as a file holds them.
    pub(super) fn scales(&self, device: &Device) -> Result<Vec<Vec<f16>>> {
        let scales =
            |linear: &TunedLinear| Ok(device.file_scales(&linear.codes, &linear.log_factors)?);
        self.blocks.iter().flatten().map(scales).collect()
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
        for linear in self.blocks.iter_mut().flatten() {
            let TunedLinear { gradient, moments: [first, second], log_factors, .. } = linear;
            model.device().adam_step(gradient, [first, second], log_factors, &step)?;
        }
        Ok(())
    }

    /// Sums the gradients of a batch; `false` where they are not finite.
    fn gradients(
        &mut self,
        model: &Model<'_>,
        teacher: &mut Teacher,
        batch: usize,
    ) -> Result<bool> {
        for linear in self.blocks.iter_mut().flatten() {
            let (rows, groups) = linear.gradient.shape();
            linear.gradient = model.device().zeros(rows, groups)?;
        }
        for place in teacher.batch(batch) {
            let gradient = self.backward(model, teacher, place)?;
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
        let count = self.frames.len();
        let chunk = teacher.train_chunk(place).clone();
        let mut between = ChunkStore::new(device, count, self.offloaded);
        let hidden = self.forward(model, &chunk, Some(&mut between))?;
        let normed = teacher.norm.apply(device, &hidden)?;
        let of_normed = teacher.gradient(device, place, &normed, self.loss_scale)?;
        drop(normed);
        let mut gradient = teacher.norm.backward(device, &hidden, &of_normed)?;
        drop((hidden, of_normed));
        let ropes = model.ropes(chunk.seq_len);
        for index in (0..count).rev() {
            let block = self.block(device, index)?;
            let hidden = between.take(count - 1 - index)?;
            let linears = &mut self.blocks[index];
            block.backward(
                device,
                &hidden,
                &mut gradient,
                ropes,
                chunk.seq_len,
                &mut |id, x, dy| {
                    let place = block.place_of(id);
                    let TunedLinear { codes, gradient, .. } = &mut linears[place];
                    let weight = &block.linears()[place].weight;
                    Ok(device.scale_gradient(dy, x, codes, weight, gradient)?)
                },
            )?;
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
        let count = self.frames.len();
        let mut hidden = model.embed(&chunk.ids)?;
        for index in 0..count {
            if let Some(between) = &mut between {
                between.put(count - 1 - index, hidden.clone())?;
            }
            let block = self.block(device, index)?;
            block.forward(device, &mut hidden, model.ropes(chunk.seq_len), chunk.seq_len)?;
        }
        Ok(hidden)
    }

    /// A block with the weights that its scales now give.
    fn block(&self, device: &Device, index: usize) -> Result<Block> {
        let mut linears = self.blocks[index].iter();
        let parts = self.frames[index].clone().with_weights(|_| match linears.next() {
            Some(linear) => Ok(device.rescaled(&linear.codes, &linear.log_factors)?),
            None => Err(Error::Thread("tuning")),
        })?;
        Ok(Block::new(parts))
    }
}

impl TunedLinear {
    fn new(device: &Device, name: String, written: &GptqLinear) -> Result<Self> {
        let codes = device.scaled_codes(PackedCodes {
            bits: written.bits.get(),
            rows: written.out_features,
            cols: written.in_features,
            words: &written.qweight,
            zero: written.bits.symmetric_zero(),
            scales: &written.scales,
            g_idx: &written.g_idx,
        })?;
        let zeros = || device.zeros(written.out_features, written.groups);
        let (log_factors, moments, gradient) = (zeros()?, [zeros()?, zeros()?], zeros()?);
        Ok(Self { name, codes, log_factors, moments, gradient })
    }
}

fn not_finite() -> Error {
    Error::Activations { linear: "lm_head".to_owned() }
}
