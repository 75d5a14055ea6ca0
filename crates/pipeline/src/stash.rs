//! Tensors of all chunks, on the device or parked in host memory beside it.
//!
//! A card that cannot hold every window's states keeps them in pinned host memory; a chunk is
//! fetched while the one before it is computed, and parked again behind the next one's work.

use gptq_compute::{Device, ParkedTensor, Tensor};

use crate::error::Result;

/// One tensor a chunk, taken and put back in order.
#[derive(Debug)]
pub(crate) struct Stash {
    device: Device,
    park: bool,
    slots: Vec<Slot>,
}

#[derive(Debug)]
enum Slot {
    Empty,
    Here(Tensor),
    Parked(ParkedTensor),
}

impl Stash {
    /// Room for `chunks` tensors; `park` moves them out of device memory while they wait.
    pub(crate) fn new(device: &Device, chunks: usize, park: bool) -> Self {
        let slots = (0..chunks).map(|_| Slot::Empty).collect();
        Self { device: device.clone(), park, slots }
    }

    /// Stores the tensor of a chunk.
    pub(crate) fn put(&mut self, chunk: usize, tensor: Tensor) -> Result<()> {
        self.slots[chunk] =
            if self.park { Slot::Parked(self.device.park(tensor)?) } else { Slot::Here(tensor) };
        Ok(())
    }

    /// Takes a chunk's tensor, and has the next chunk's on its way.
    ///
    /// # Panics
    /// When nothing was put there: chunks are always put before they are taken.
    pub(crate) fn take(&mut self, chunk: usize) -> Result<Tensor> {
        let tensor = self.fetch(chunk)?;
        if self.park && chunk + 1 < self.slots.len() {
            let next = self.fetch(chunk + 1)?;
            self.slots[chunk + 1] = Slot::Here(next);
        }
        Ok(tensor)
    }

    fn fetch(&mut self, chunk: usize) -> Result<Tensor> {
        match std::mem::replace(&mut self.slots[chunk], Slot::Empty) {
            Slot::Here(tensor) => Ok(tensor),
            Slot::Parked(parked) => Ok(self.device.fetch(parked)?),
            Slot::Empty => panic!("chunk {chunk} was taken twice"),
        }
    }
}
