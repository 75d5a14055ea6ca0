//! The part of a decoder that one device holds: blocks that follow one another, with their keys and values.
//!
//! A model that is too large for one card is cut between blocks, one part a card. Hidden states go from one
//! to the next through host memory: of a step they are some kilobytes a token.

use std::ops::Range;

use gptq_checkpoint::{Checkpoint, HEAD, LinearShape, ModelConfig};
use gptq_compute::{
    CacheShape, CodedMatrix, Device, KvCache, Resident, RopeTable, Span, StepModel, Steps, Tensor,
};

use crate::block::{Block, Linear};
use crate::block_rule::Ropes;
use crate::error::{Error, Result};
use crate::model::{Head, Model};
use crate::values::{SourcePrecision, Values};

/// Blocks on a device.
#[derive(Debug)]
pub(crate) struct Part {
    device: Device,
    pub(crate) blocks: Vec<Block<Resident>>,
}

/// Keys and values of a part's blocks, for some sequences at a time.
#[derive(Debug)]
pub(crate) struct PartCache {
    blocks: Vec<KvCache>,
    /// A GPU's program for steps of these sequences.
    pub(crate) steps: Option<Steps>,
}

impl Part {
    /// Loads blocks; `progress` hears of each.
    pub(crate) fn load(
        model: &Model<'_>,
        device: &Device,
        indices: Range<usize>,
        progress: &mut impl FnMut(usize),
    ) -> Result<Self> {
        let block = |index| {
            let frame = model.load_frame_on(device, index)?;
            let keep = |linear: &Linear<LinearShape>| {
                keep_linear(model, device, &linear.name, &linear.weight)
            };
            let block = Block::new(frame.with_weights(keep)?);
            progress(index);
            Ok(block)
        };
        Ok(Self { device: device.clone(), blocks: indices.map(block).collect::<Result<_>>()? })
    }

    /// An empty cache, with a program for steps where `rope` is given and the device has one for these blocks:
    /// hidden states of `width` values, norms with `eps`, the last norm's gain `norm` if this is the last part.
    pub(crate) fn cache(
        &self,
        shape: CacheShape,
        rope: Option<&RopeTable>,
        (width, eps): (usize, f32),
        norm: Option<&[f32]>,
    ) -> Result<PartCache> {
        let blocks = self.blocks.iter().map(|_| Ok(self.device.kv_cache(shape)?));
        let blocks: Vec<KvCache> = blocks.collect::<Result<_>>()?;
        let steps = self.blocks.iter().zip(&blocks).map(|(block, kept)| block.step(kept));
        let steps = match (steps.collect::<Option<Vec<_>>>(), rope) {
            (Some(blocks), Some(rope)) => {
                self.device.steps(&StepModel { blocks, width, norm, eps, rope }, shape)?
            }
            _ => None,
        };
        Ok(PartCache { blocks, steps })
    }

    /// All blocks over hidden states, the rows of `spans`.
    pub(crate) fn pass(
        &self,
        cache: &mut PartCache,
        hidden: &mut Tensor,
        ropes: &Ropes,
        spans: &[Span],
    ) -> Result<()> {
        for (block, kept) in self.blocks.iter().zip(&mut cache.blocks) {
            block.forward_spans(&self.device, hidden, ropes, spans, kept)?;
        }
        Ok(())
    }

    /// Hidden states of another part, brought here.
    pub(crate) fn bring(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.device.upload_f32(hidden.to_host()?)?)
    }
}

/// Loads the final norm and the head, as it is stored.
pub(crate) fn keep_head(model: &Model<'_>, device: &Device) -> Result<Head<Resident>> {
    let config = model.config();
    Ok(Head {
        norm: model.final_norm()?,
        weight: keep(model, device, HEAD, config.vocab_size, config.hidden_size)?,
    })
}

/// Keeps a linear, dense or quantized, as it is stored.
fn keep_linear(
    model: &Model<'_>,
    device: &Device,
    name: &str,
    shape: &LinearShape,
) -> Result<Resident> {
    let (rows, cols) = (shape.out_features, shape.in_features);
    let Some(linear) = model.gptq_linear(name, shape)? else {
        return keep(model, device, &format!("{name}.weight"), rows, cols);
    };
    Ok(device.keep_coded(CodedMatrix {
        bits: linear.bits.get(),
        rows,
        cols,
        codes: &linear.unpack_codes(),
        zeros: &linear.unpack_zeros(),
        scales: &linear.scales,
        group_of: &linear.g_idx,
    })?)
}

/// Keeps a dense weight as it is stored.
fn keep(
    model: &Model<'_>,
    device: &Device,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Resident> {
    let tensor = model.checkpoint().tensor_shaped(name, &[rows, cols])?;
    tensor.check_finite()?;
    let values = Values::read(tensor, SourcePrecision::Stored)?;
    let kept = device.keep(values.matrix(rows, cols))?;
    model.checkpoint().release(name);
    Ok(kept)
}

/// Which blocks each device gets, so that all are filled alike.
///
/// # Errors
/// [`Error::TooManyDevices`].
pub(crate) fn shares(checkpoint: &Checkpoint, devices: &[Device]) -> Result<Vec<Range<usize>>> {
    let config = checkpoint.config();
    if devices.len() > config.num_hidden_layers {
        let (devices, blocks) = (devices.len(), config.num_hidden_layers);
        return Err(Error::TooManyDevices { devices, blocks });
    }
    let rooms = devices.iter().map(room).collect::<Result<Vec<_>>>()?;
    let blocks: Vec<u64> =
        (0..config.num_hidden_layers).map(|block| block_bytes(checkpoint, block)).collect();
    let head = Resident::bytes_on_gpu(16, (config.vocab_size, config.hidden_size), None) as u64;
    Ok(cut(&blocks, head, &rooms))
}

/// Bytes that a device can still hold; of the CPU, whose memory all share, one.
fn room(device: &Device) -> Result<u64> {
    let Device::Cuda(cuda) = device else { return Ok(1) };
    let memory = cuda.memory()?;
    Ok(memory.free.min(memory.budget.saturating_sub(memory.held)) as u64)
}

/// Bytes of a block's linears on a GPU.
fn block_bytes(checkpoint: &Checkpoint, block: usize) -> u64 {
    let prefix = ModelConfig::block_prefix(block);
    let quantized = checkpoint.quantize_config();
    let bytes = |linear: LinearShape| {
        let coded = quantized
            .filter(|_| checkpoint.has_gptq_linear(&format!("{prefix}.{}", linear.name)))
            .map_or((16, None), |config| (config.bits.get(), config.group_size));
        Resident::bytes_on_gpu(coded.0, (linear.out_features, linear.in_features), coded.1) as u64
    };
    checkpoint.config().block_linears(block).into_iter().map(bytes).sum()
}

/// Cuts blocks of so many bytes, behind the last of which the head comes, in proportion to the rooms; each
/// gets one block at least, of which there are as many.
fn cut(blocks: &[u64], head: u64, rooms: &[u64]) -> Vec<Range<usize>> {
    let total = (blocks.iter().sum::<u64>() + head) as f64;
    let all_rooms = rooms.iter().sum::<u64>().max(1) as f64;
    let (mut first, mut before, mut filled) = (0, 0.0, 0.0);
    let mut parts = Vec::with_capacity(rooms.len());
    for (i, &room) in rooms.iter().enumerate() {
        let after = rooms.len() - i - 1;
        filled += room as f64;
        let wanted = total * filled / all_rooms;
        let most = blocks.len() - after;
        let mut end = first + 1;
        before += blocks[first] as f64;
        // A block goes where the larger part of it belongs; the rest are the last one's.
        while end < most && (after == 0 || before + blocks[end] as f64 / 2.0 <= wanted) {
            before += blocks[end] as f64;
            end += 1;
        }
        parts.push(first..end);
        first = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_filled_alike() {
        let ends = |blocks: &[u64], head, rooms: &[u64]| -> Vec<usize> {
            let parts = cut(blocks, head, rooms);
            assert_eq!(parts[0].start, 0);
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(parts.iter().all(|part| !part.is_empty()));
            parts.iter().map(|part| part.end).collect()
        };
        assert_eq!(ends(&[10; 8], 0, &[100, 100]), [4, 8]);
        // The head weighs as much as two blocks.
        assert_eq!(ends(&[10; 8], 20, &[100, 100]), [5, 8]);
        assert_eq!(ends(&[10; 8], 0, &[300, 100]), [6, 8]);
        assert_eq!(ends(&[10; 8], 0, &[100, 100, 100]), [3, 5, 8]);
        assert_eq!(ends(&[10; 3], 500, &[1, 1, 1]), [1, 2, 3]);
        assert_eq!(ends(&[10; 3], 0, &[1, 1000, 1]), [1, 2, 3]);
        assert_eq!(ends(&[50, 10, 10, 10, 10, 10], 0, &[1, 1]), [1, 6]);
        assert_eq!(ends(&[10; 5], 0, &[1]), [5]);
        // No room is known: the first of them are filled as little as can be.
        assert_eq!(ends(&[10; 4], 0, &[0, 0]), [1, 4]);
    }
}
