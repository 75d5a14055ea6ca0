//! Tensors of all chunks, on the device or parked in host memory beside it.
//!
//! A card that cannot hold every window's states keeps them in pinned host memory; a chunk is
//! fetched while the one before it is computed, and what has changed is parked again behind the
//! next one's work.

use gptq_compute::{ComingTensor, Device, ParkedTensor, Tensor};

use crate::error::Result;

/// One tensor a chunk, used in order.
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
    /// On its way, and in host memory still.
    Coming(ComingTensor, ParkedTensor),
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
        Ok(self.land(chunk)?.0)
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
        let (tensor, parked) = self.land(chunk)?;
        let result = with(&tensor)?;
        self.slots[chunk] = match parked {
            Some(parked) => Slot::Parked(parked),
            None => Slot::Here(tensor),
        };
        Ok(result)
    }

    /// A chunk's tensor on the device, with its copy in host memory where there is one.
    fn land(&mut self, chunk: usize) -> Result<(Tensor, Option<ParkedTensor>)> {
        self.send_for(chunk)?;
        let slot = std::mem::replace(&mut self.slots[chunk], Slot::Empty);
        self.send_for(chunk + 1)?;
        match slot {
            Slot::Here(tensor) => Ok((tensor, None)),
            Slot::Coming(coming, parked) => Ok((coming.land()?, Some(parked))),
            Slot::Empty | Slot::Parked(_) => panic!("chunk {chunk} was taken twice"),
        }
    }

    /// Starts a parked chunk's way to the device.
    fn send_for(&mut self, chunk: usize) -> Result<()> {
        let Some(slot) = self.slots.get_mut(chunk) else { return Ok(()) };
        *slot = match std::mem::replace(slot, Slot::Empty) {
            Slot::Parked(mut parked) => Slot::Coming(self.device.fetch(&mut parked)?, parked),
            other => other,
        };
        Ok(())
    }
}
