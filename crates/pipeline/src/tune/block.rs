//! A quantized block as it is tuned: codes on the device, a log factor a scale, and how they are moved.

use gptq_checkpoint::GptqLinear;
use gptq_compute::{Adam, Device, PackedCodes, ScaledCodes, Tensor};
use gptq_model::{Block, BlockParts, Linear, Ropes};
use half::f16;

use crate::error::Result;

/// A linear whose scales are tuned.
struct TunedLinear {
    codes: ScaledCodes,
    /// `[out, groups]` in f32, as the next ones.
    log_factors: Tensor,
    moments: [Tensor; 2],
    gradient: Tensor,
}

/// A block whose scales are tuned.
pub(super) struct TunedBlock(BlockParts<TunedLinear>);

impl TunedBlock {
    /// A block of the linears that `written` gives by their names, with the scales that they have.
    pub(super) fn new(
        device: &Device,
        frame: BlockParts<()>,
        mut written: impl FnMut(&str) -> Result<GptqLinear>,
    ) -> Result<Self> {
        let parts =
            frame.with_weights(|linear| TunedLinear::new(device, &written(&linear.name)?))?;
        Ok(Self(parts))
    }

    /// Names of the linears.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.linears.iter().map(|linear| linear.name.as_str())
    }

    /// Scales of the linears, `[groups, out]` each, as a file holds them.
    pub(super) fn scales(&self, device: &Device) -> impl Iterator<Item = Result<Vec<f16>>> {
        let scales = |linear: &TunedLinear| device.file_scales(&linear.codes, &linear.log_factors);
        self.0.linears.iter().map(move |linear| Ok(scales(&linear.weight)?))
    }

    /// The block with the weights that its scales now give.
    pub(super) fn block(&self, device: &Device) -> Result<Block> {
        let BlockParts { index, linears, gains, rule, mixture } = &self.0;
        let linears = linears.iter().map(|Linear { id, name, weight, bias }| {
            let weight = device.rescaled(&weight.codes, &weight.log_factors)?;
            Ok(Linear { id: *id, name: name.clone(), weight, bias: bias.clone() })
        });
        let linears = linears.collect::<Result<_>>()?;
        Ok(Block::new(BlockParts {
            index: *index,
            linears,
            gains: gains.clone(),
            rule: *rule,
            mixture: mixture.clone(),
        }))
    }

    /// Sets the gradients of the scales to zeros.
    pub(super) fn clear(&mut self, device: &Device) -> Result<()> {
        for Linear { weight: linear, .. } in &mut self.0.linears {
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
        let linears = &mut self.0.linears;
        block.backward(device, hidden, gradient, ropes, seq_len, &mut |id, x, dy| {
            let place = block.place_of(id);
            let TunedLinear { codes, gradient, .. } = &mut linears[place].weight;
            let weight = &block.linears()[place].weight;
            Ok(device.scale_gradient(dy, x, codes, weight, gradient)?)
        })?;
        Ok(())
    }

    /// A step along the gradients.
    pub(super) fn step(&mut self, device: &Device, step: &Adam) -> Result<()> {
        for Linear { weight: linear, .. } in &mut self.0.linears {
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
