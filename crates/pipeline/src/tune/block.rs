//! A quantized block as it is tuned: codes on the device, a log factor a scale, and how they are moved.

use gptq_checkpoint::GptqLinear;
use gptq_compute::{Adam, Device, PackedCodes, ScaledCodes, Tensor};
use gptq_model::{Block, BlockParts, Ropes};
use half::f16;

use crate::error::{Error, Result};

/// A linear whose scales are tuned.
struct TunedLinear {
    codes: ScaledCodes,
    /// `[out, groups]` in f32, as the next ones.
    log_factors: Tensor,
    moments: [Tensor; 2],
    gradient: Tensor,
}

/// A block whose scales are tuned.
pub(super) struct TunedBlock {
    /// The block but for its weights.
    frame: BlockParts<()>,
    /// In the frame's order.
    linears: Vec<TunedLinear>,
}

impl TunedBlock {
    /// A block of these linears, in the frame's order, with the scales that they have.
    pub(super) fn new(
        device: &Device,
        frame: BlockParts<()>,
        linears: impl IntoIterator<Item = Result<GptqLinear>>,
    ) -> Result<Self> {
        let linears = linears.into_iter().map(|linear| TunedLinear::new(device, &linear?));
        let linears: Vec<TunedLinear> = linears.collect::<Result<_>>()?;
        if linears.len() == frame.linears.len() {
            Ok(Self { frame, linears })
        } else {
            Err(Error::Thread("tuning"))
        }
    }

    /// Names of the linears.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.frame.linears.iter().map(|linear| linear.name.as_str())
    }

    /// Scales of the linears, `[groups, out]` each, as a file holds them.
    pub(super) fn scales(&self, device: &Device) -> impl Iterator<Item = Result<Vec<f16>>> {
        let scales = |linear: &TunedLinear| device.file_scales(&linear.codes, &linear.log_factors);
        self.linears.iter().map(move |linear| Ok(scales(linear)?))
    }

    /// The block with the weights that its scales now give.
    pub(super) fn block(&self, device: &Device) -> Result<Block> {
        let mut linears = self.linears.iter();
        let parts = self.frame.clone().with_weights(|_| match linears.next() {
            Some(linear) => Ok(device.rescaled(&linear.codes, &linear.log_factors)?),
            None => Err(Error::Thread("tuning")),
        })?;
        Ok(Block::new(parts))
    }

    /// Sets the gradients of the scales to zeros.
    pub(super) fn clear(&mut self, device: &Device) -> Result<()> {
        for linear in &mut self.linears {
            let (rows, groups) = linear.gradient.shape();
            linear.gradient = device.zeros(rows, groups)?;
        }
        Ok(())
    }

    /// Takes the gradient of the states behind the block to that of `hidden`, those before it, and adds to
    /// those of the scales.
    pub(super) fn backward(
        &mut self,
        device: &Device,
        hidden: &Tensor,
        gradient: &mut Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<()> {
        let block = self.block(device)?;
        let linears = &mut self.linears;
        block.backward(device, hidden, gradient, ropes, seq_len, &mut |id, x, dy| {
            let place = block.place_of(id);
            let TunedLinear { codes, gradient, .. } = &mut linears[place];
            let weight = &block.linears()[place].weight;
            Ok(device.scale_gradient(dy, x, codes, weight, gradient)?)
        })?;
        Ok(())
    }

    /// A step along the gradients.
    pub(super) fn step(&mut self, device: &Device, step: &Adam) -> Result<()> {
        for linear in &mut self.linears {
            let TunedLinear { gradient, moments: [mean, square], log_factors, .. } = linear;
            device.adam_step(gradient, [mean, square], log_factors, step)?;
        }
        Ok(())
    }
}

impl TunedLinear {
    fn new(device: &Device, written: &GptqLinear) -> Result<Self> {
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
        Ok(Self { codes, log_factors, moments, gradient })
    }
}
