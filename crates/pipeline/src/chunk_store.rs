//! Tensors of all chunks, on the device or offloaded in host memory beside it.
//!
//! A card that cannot hold every window's states keeps them in pinned host memory; a chunk is
//! fetched while the one before it is computed, and what has changed is offloaded again behind the
//! next one's work.

use gptq_compute::{Device, OffloadedTensor, PrefetchedTensor, Tensor};

use crate::error::Result;

/// One tensor a chunk, used in order.
#[derive(Debug)]
pub(crate) struct ChunkStore {
    device: Device,
    /// Share of the chunks that wait in host memory.
    offloaded: f64,
    slots: Vec<Slot>,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Here(Tensor),
    Offloaded(OffloadedTensor),
    /// On its way, and in host memory still.
    Prefetched(PrefetchedTensor, OffloadedTensor),
}

impl ChunkStore {
    /// Room for `chunks` tensors, of which the share `offloaded` is moved out of device memory while it
    /// waits: evenly spread ones, so that each crosses the bus behind the work on others.
    pub(crate) fn new(device: &Device, chunks: usize, offloaded: f64) -> Self {
        let slots = (0..chunks).map(|_| Slot::Empty).collect();
        Self { device: device.clone(), offloaded, slots }
    }

    fn offloads(&self, chunk: usize) -> bool {
        let before = |chunks: usize| (chunks as f64 * self.offloaded).ceil();
        before(chunk + 1) > before(chunk)
    }

    /// Stores the tensor of a chunk.
    pub(crate) fn put(&mut self, chunk: usize, tensor: Tensor) -> Result<()> {
        self.slots[chunk] = if self.offloads(chunk) {
            Slot::Offloaded(self.device.offload(tensor)?)
        } else {
            Slot::Here(tensor)
        };
        Ok(())
    }

    /// Takes a chunk's tensor, and has the next chunk's on its way.
    ///
    /// # Panics
    /// When nothing was put there: chunks are always put before they are taken.
    pub(crate) fn take(&mut self, chunk: usize) -> Result<Tensor> {
        Ok(self.wait(chunk)?.0)
    }

    /// What `with` makes of a chunk's tensor, which stays; the next chunk's is sent for.
    ///
    /// # Panics
    /// As [`Self::take`].
    pub(crate) fn read<R>(
        &mut self,
        chunk: usize,
        with: impl FnOnce(&Tensor) -> Result<R>,
    ) -> Result<R> {
        let (tensor, offloaded) = self.wait(chunk)?;
        let result = with(&tensor)?;
        self.slots[chunk] = match offloaded {
            Some(offloaded) => Slot::Offloaded(offloaded),
            None => Slot::Here(tensor),
        };
        Ok(result)
    }

    /// A chunk's tensor on the device, with its copy in host memory where there is one.
    fn wait(&mut self, chunk: usize) -> Result<(Tensor, Option<OffloadedTensor>)> {
        self.send_for(chunk)?;
        let slot = std::mem::replace(&mut self.slots[chunk], Slot::Empty);
        self.send_for(chunk + 1)?;
        match slot {
            Slot::Here(tensor) => Ok((tensor, None)),
            Slot::Prefetched(prefetched, offloaded) => Ok((prefetched.wait()?, Some(offloaded))),
            Slot::Empty | Slot::Offloaded(_) => panic!("chunk {chunk} was taken twice"),
        }
    }

    /// Starts a offloaded chunk's way to the device.
    fn send_for(&mut self, chunk: usize) -> Result<()> {
        let Some(slot) = self.slots.get_mut(chunk) else { return Ok(()) };
        *slot = match std::mem::replace(slot, Slot::Empty) {
            Slot::Offloaded(mut offloaded) => {
                Slot::Prefetched(self.device.prefetch(&mut offloaded)?, offloaded)
            }
            other => other,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offloaded_share_is_spread_and_never_less_than_asked() {
        for share in [0.0, 0.1, 0.34, 0.5, 0.99, 1.0] {
            let store = ChunkStore::new(&Device::Cpu, 32, share);
            let offloaded: Vec<usize> = (0..32).filter(|&c| store.offloads(c)).collect();
            assert!(
                offloaded.len() as f64 >= 32.0 * share
                    && offloaded.len() as f64 <= 32.0 * share + 1.0
            );
            let gaps = offloaded.windows(2).map(|w| w[1] - w[0]);
            assert!(share == 0.0 || gaps.max().unwrap_or(0) as f64 <= (1.0 / share).ceil());
        }
    }
}
