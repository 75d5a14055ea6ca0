//! Every linear of a checkpoint beside the base's, brought one after the other and looked at side by
//! side.
//!
//! While linears are looked at, the next one is read, and what the next block needs is announced to
//! the system. So many linears are in host memory at once, and no more: [`ABREAST`] and the one that
//! is read. Of one whose base is not turned that is its packed form and, while they are looked at, the
//! mapped pages of the base's; of one that is turned also its weights in f32.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use gptq_checkpoint::{Checkpoint, GptqLinear, LEAVES, LinearShape, ModelConfig};
use gptq_model::{Gains, Linear, LinearId, Model};

use super::base_weight::BaseWeight;
use crate::error::Result;
use crate::lock::lock;
use crate::progress::Progress;
use crate::rotate::FusedRotations;

/// Linears that are looked at side by side: what of one is not parallel does not hold up all cores.
const ABREAST: usize = 2;

/// A linear of the checkpoint and the base's.
pub(super) struct Pair<'a> {
    pub(super) id: LinearId,
    /// Prefix in the checkpoint.
    pub(super) name: String,
    /// `None` where the checkpoint has it dense.
    pub(super) packed: Option<GptqLinear>,
    pub(super) base: BaseWeight<'a>,
}

/// Where pairs come from.
#[derive(Clone, Copy)]
pub(super) struct Pairs<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    /// The base.
    pub(super) model: &'a Model<'a>,
    /// What brings it into the checkpoint's coordinates.
    pub(super) rotations: Option<&'a FusedRotations>,
}

impl<'a> Pairs<'a> {
    /// What `of` makes of every pair, in order. Of several faults the first one is reported.
    pub(super) fn each<T: Send>(
        self,
        of: impl Fn(&Pair<'_>) -> Result<T> + Sync,
        progress: &dyn Progress,
    ) -> Result<Vec<T>> {
        let failed = AtomicBool::new(false);
        let ends: Vec<usize> = block_starts(self.model.config()).skip(1).collect();
        let mut made: Vec<Option<Result<T>>> = Vec::new();
        std::thread::scope(|scope| {
            // A rendezvous: nothing waits but the pair that was read last.
            let (sender, receiver) = sync_channel(0);
            scope.spawn(|| self.read_all(sender, &failed));
            // Gone with the last of its owners, so that the reader does not wait for ever.
            let receiver = Arc::new(Mutex::new(receiver));
            let (tell, told) = channel();
            for _ in 0..ABREAST {
                let (receiver, tell, of, failed) = (receiver.clone(), tell.clone(), &of, &failed);
                scope.spawn(move || {
                    loop {
                        let next = lock(&receiver).recv();
                        let Ok((at, pair)) = next else { return };
                        let result = pair.and_then(|pair: Pair<'_>| {
                            let result = of(&pair);
                            self.model.checkpoint().release(&format!("{}.weight", pair.name));
                            result
                        });
                        failed.fetch_or(result.is_err(), Ordering::Relaxed);
                        if tell.send((at, result)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop((receiver, tell));
            for (count, (at, result)) in told.into_iter().enumerate() {
                made.resize_with(made.len().max(at + 1), || None);
                made[at] = Some(result);
                if ends.contains(&(count + 1)) {
                    progress.step();
                }
            }
        });
        // All that were read before a faulty one were looked at.
        made.into_iter().flatten().collect()
    }

    /// Reads all pairs until one is faulty.
    fn read_all(self, sender: SyncSender<(usize, Result<Pair<'a>>)>, failed: &AtomicBool) {
        let blocks = self.model.config().num_hidden_layers;
        self.announce(0);
        for (index, first) in (0..blocks).zip(block_starts(self.model.config())) {
            if index + 1 < blocks {
                self.announce(index + 1);
            }
            let frame = match self.model.load_frame(index) {
                Ok(frame) => frame,
                Err(error) => {
                    // Nobody who takes it means that the walk has failed elsewhere.
                    drop(sender.send((first, Err(error.into()))));
                    return;
                }
            };
            for (place, linear) in frame.linears.iter().enumerate() {
                let pair = self.read(linear, &frame.gains);
                let stop = pair.is_err() || failed.load(Ordering::Relaxed);
                let sent = sender.send((first + place, pair));
                if stop || sent.is_err() {
                    return;
                }
            }
        }
    }

    /// Has the system read what a block needs.
    fn announce(self, index: usize) {
        let prefix = ModelConfig::block_prefix(index);
        for shape in self.model.config().block_linears(index) {
            let name = format!("{prefix}.{}", shape.name);
            LEAVES.iter().for_each(|leaf| self.checkpoint.announce(&format!("{name}.{leaf}")));
            self.model.checkpoint().announce(&format!("{name}.weight"));
        }
    }

    /// A linear of both; `gains` are those of the base's norms in its block.
    pub(super) fn read(self, linear: &Linear<LinearShape>, gains: &Gains) -> Result<Pair<'a>> {
        let (id, name, shape) = (linear.id, linear.name.clone(), &linear.weight);
        let packed = match self.checkpoint.has_gptq_linear(&name) {
            true => Some(self.checkpoint.gptq_linear(&name, shape)?),
            false => None,
        };
        LEAVES.iter().for_each(|leaf| self.checkpoint.release(&format!("{name}.{leaf}")));
        let base = BaseWeight::read(self.model, self.rotations, linear, gains)?;
        Ok(Pair { id, name, packed, base })
    }
}

/// Where the linears of each block begin among those of the whole model, and where the last one's end.
pub(super) fn block_starts(config: &ModelConfig) -> impl Iterator<Item = usize> {
    let counts = (0..config.num_hidden_layers).map(|block| config.block_linears(block).len());
    std::iter::once(0).chain(counts).scan(0, |sum, count| {
        *sum += count;
        Some(*sum)
    })
}
