//! How many tokens an evaluation may hold at once.
//!
//! A walk without calibration holds a block, the one read ahead, and every token's hidden states;
//! what is left of these in the end are the normed states of the scored positions, which wait for
//! the head, beside another model's where two are compared.

use std::collections::BTreeMap;

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use gptq_model::Reading;

use crate::error::{Error, Result};
use crate::host_memory::available;
use crate::memory::{Along, BlockSizes, STAGING, USABLE, device_budget};

/// What an evaluation holds beside the states of the model that it walks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beside {
    /// Another model's final states and head, to compare with.
    pub base: bool,
    /// Grams of the inputs of a block's linears.
    pub grams: bool,
}

/// Rows of logits that the CPU holds at a time.
const LOGITS: usize = 512;
/// Bytes of logits that a GPU holds at a time.
const DEVICE_LOGITS: usize = 256 << 20;

/// What the memory of an evaluation depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EvaluationSizes {
    block: BlockSizes,
    vocab: usize,
    /// Tokens of the longest window.
    longest: usize,
    /// Models whose final states are held.
    models: usize,
    /// Bytes of Grams.
    grams: usize,
}

/// Room for the states of an evaluation, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// On the device; all there is on the CPU.
    here: usize,
    /// In host memory beside a GPU; `None` where there is no GPU.
    host: Option<usize>,
    /// Final states of a token, which are never offloaded.
    scored: usize,
    /// Hidden states of a token, which may be.
    hidden: usize,
}

/// Bytes of the Grams of what a block's linears read, of the block that has most.
fn grams_of(model: &ModelConfig) -> usize {
    let of_block = |block| {
        let linears = model.block_linears(block).into_iter();
        let orders: BTreeMap<Reading, usize> =
            linears.map(|l| (Reading::of(l.id), l.in_features)).collect();
        orders.into_values().map(|order| 4 * order * order).sum::<usize>()
    };
    (0..model.num_hidden_layers).map(of_block).max().unwrap_or(0)
}

impl EvaluationSizes {
    pub(crate) fn of(model: &ModelConfig, longest: usize, beside: Beside) -> Self {
        let block = BlockSizes::of(model);
        let grams = if beside.grams { grams_of(model) } else { 0 };
        let models = 1 + usize::from(beside.base);
        Self { block, vocab: model.vocab_size, longest, models, grams }
    }

    /// What two walks hold, of the dense model and of so many grids of its weights: beside a GPU all of
    /// their states wait in host memory. With `exact`, weights are rounded from wider ones.
    pub(crate) fn along(self, device: &Device, tokens: usize, grids: usize, exact: bool) -> Along {
        let Self { block, longest, .. } = self;
        let states = tokens.saturating_mul(4 * block.hidden * (1 + grids));
        // The block in use and the one read ahead, of each walk, and one that is rounded.
        let blocks = 5 * block.weights;
        match device {
            Device::Cpu => Along { device: 0, host: states.saturating_add(4 * blocks) },
            Device::Cuda(_) => {
                let chunk = Device::GPU_CHUNK_TOKENS.max(longest);
                let flight = chunk * (3 * 2 * block.intermediate + 3 * 4 * block.hidden);
                let rounding = 12 * block.largest + 4 * 1024 * block.rows;
                let moving = 3 * chunk * 4 * block.hidden;
                let staging = 4 * block.weights * if exact { 4 } else { 2 };
                Along {
                    device: 2 * blocks + flight + rounding + moving,
                    host: states.saturating_add(staging),
                }
            }
        }
    }

    /// Bytes on the CPU that do not depend on how many windows there are.
    fn cpu_fixed(self) -> usize {
        let Self { block, vocab, longest, models, grams } = self;
        // Queries, keys, values and contexts of a chunk, or its gate and up.
        let flight = Device::CPU_CHUNK_TOKENS.max(longest)
            * (4 * block.hidden).max(2 * block.intermediate + block.hidden);
        // In f32: two blocks and a linear on its way to one; then heads and logits.
        let walking = 4 * (2 * block.weights + block.largest + flight) + grams;
        let scoring = 4 * models * vocab * (block.hidden + LOGITS);
        let waiting = 4 * (models - 1) * vocab * block.hidden;
        (walking + waiting).max(scoring)
    }

    /// The same on a GPU, with the columns of a linear that is rounded on the way.
    fn gpu_fixed(self) -> usize {
        let Self { block, vocab, longest, models, grams } = self;
        let flight = Device::GPU_CHUNK_TOKENS.max(longest)
            * (3 * 2 * block.intermediate + 3 * 4 * block.hidden);
        let rounding = 12 * block.largest + 4 * 1024 * block.rows;
        let heads = models * (2 * vocab * block.hidden + DEVICE_LOGITS);
        2 * 2 * block.weights + flight + rounding + heads + grams
    }
}

impl Room {
    /// What is free now; ranks share a host.
    ///
    /// # Errors
    /// [`Error::HostMemory`] where one window does not fit.
    pub(crate) fn find(device: &Device, ranks: usize, sizes: EvaluationSizes) -> Result<Self> {
        let host = available().map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX) / ranks);
        let room = match device_budget(device)? {
            None => Self::on_cpu(sizes, host),
            Some(budget) => Self::on_gpu(sizes, budget as usize, host),
        };
        let needed = room.least_host(sizes);
        match host {
            Some(free) if needed > free => Err(Error::HostMemory {
                what: format!("A window of {} tokens", sizes.longest),
                needed: needed as u64,
                available: free as u64,
                advice: "use shorter windows (--seq-len)",
            }),
            _ => Ok(room),
        }
    }

    fn on_cpu(sizes: EvaluationSizes, free: Option<usize>) -> Self {
        // Others take memory, too, while this runs.
        let usable = free.map_or(usize::MAX, |free| free - free / 8);
        let hidden = 4 * sizes.block.hidden;
        Self {
            here: usable.saturating_sub(sizes.cpu_fixed()),
            host: None,
            // Final states take the room of the hidden ones that they are made of.
            scored: (sizes.models - 1) * hidden,
            hidden,
        }
    }

    fn on_gpu(sizes: EvaluationSizes, budget: usize, free: Option<usize>) -> Self {
        let hidden = 4 * sizes.block.hidden;
        let moving = 3 * Device::GPU_CHUNK_TOKENS.max(sizes.longest) * hidden;
        // Uploads go through pinned buffers, and a block waits to be uploaded.
        let staging = 4 * sizes.block.weights + STAGING;
        let usable = free.map_or(usize::MAX, |free| free - free / 8);
        Self {
            here: ((budget as f64 * USABLE) as usize).saturating_sub(sizes.gpu_fixed() + moving),
            host: Some(usable.saturating_sub(staging)),
            scored: sizes.models * hidden / 2,
            hidden,
        }
    }

    /// Tokens that may be held at once.
    pub(crate) fn tokens(self) -> usize {
        let final_states = self.here.checked_div(self.scored).unwrap_or(usize::MAX);
        let all = self.here.saturating_add(self.host.unwrap_or(0)) / (self.scored + self.hidden);
        all.min(final_states)
    }

    /// Share of the hidden states of so many tokens that must wait in host memory.
    pub(crate) fn offloaded(self, tokens: usize) -> f64 {
        let hidden = tokens.saturating_mul(self.hidden);
        let over = tokens.saturating_mul(self.scored).saturating_add(hidden);
        let over = over.saturating_sub(self.here);
        if self.host.is_none() || hidden == 0 {
            0.0
        } else {
            (over as f64 / hidden as f64).min(1.0)
        }
    }

    /// Bytes of host memory that a single window takes.
    fn least_host(self, sizes: EvaluationSizes) -> usize {
        let states = sizes.longest.saturating_mul(self.scored + self.hidden);
        match self.host {
            None => sizes.cpu_fixed().saturating_add(states),
            // A card that lacks the room says so itself, and what to lower.
            Some(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The toy of width 256 whose windows are its whole context.
    fn sizes(longest: usize, beside: Beside) -> EvaluationSizes {
        let text = r#"{"model_type":"llama","hidden_size":256,"intermediate_size":768,
            "num_hidden_layers":2,"num_attention_heads":4,"vocab_size":2000,
            "max_position_embeddings":32768}"#;
        let model = ModelConfig::parse(text, std::path::Path::new("config.json")).unwrap();
        EvaluationSizes::of(&model, longest, beside)
    }

    #[test]
    fn the_room_is_what_the_rest_leaves() {
        let alone = sizes(2048, Beside::default());
        let room = Room::on_cpu(alone, Some(8 << 30));
        assert_eq!(room.tokens(), ((7 << 30) - alone.cpu_fixed()) / (4 * 256));
        // Beside another model's final states half as many fit, and its head takes some too.
        let both = Room::on_cpu(sizes(2048, Beside { base: true, grams: false }), Some(8 << 30));
        assert!(both.tokens() < room.tokens() / 2 && both.tokens() > room.tokens() * 2 / 5);
        assert_eq!(Room::on_cpu(alone, Some(1 << 20)).tokens(), 0);
        assert!(Room::on_cpu(alone, None).tokens() > 1 << 40);
        assert_eq!(room.offloaded(usize::MAX), 0.0);
    }

    #[test]
    fn a_gpu_offloads_what_it_cannot_hold() {
        let alone = sizes(2048, Beside::default());
        let room = Room::on_gpu(alone, 4 << 30, Some(64 << 30));
        assert_eq!(room.offloaded(1000), 0.0);
        let (half, all) = (room.offloaded(3_000_000), room.offloaded(room.tokens()));
        assert!(half > 0.0 && half < all && all <= 1.0, "{half} {all}");
        // What is on the card and beside it is no more than there is.
        let bytes = |tokens: usize| {
            let offloaded = (room.offloaded(tokens) * (tokens * room.hidden) as f64) as usize;
            (tokens * (room.scored + room.hidden) - offloaded, offloaded)
        };
        let (here, host) = bytes(room.tokens());
        assert!(
            here <= room.here + room.hidden && host <= room.host.unwrap() + room.hidden,
            "{here} {host}"
        );
    }
}
