//! Copies between host and device: uploads do not wait for queued work, nor small ones for large
//! ones.
//!
//! Host values go through two halves of a pinned buffer: while one half is being copied by the
//! card, the next piece is being written to the other by all cores. Uploads run on the copy stream
//! and the stream of all work waits for their end on the device, so the weights of the next block
//! arrive while the current one computes. The uploader of a tensor holds its buffer until the last
//! piece was read, page faults of a mapped file included; norm gains, biases and orders, which the
//! computing thread needs meanwhile, have a buffer of their own, and wait at most for the halves that
//! are on their way to the card.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, result};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::context::Cuda;
use super::error::StageContext;
use super::staging::{self, HALF, Halves, PIECE};
use crate::error::Result;

impl Cuda {
    /// Queues the copy of `bytes` to `to`, on the copy stream; returns when `bytes` are read.
    pub(super) fn stage_in(&self, stage: &'static str, bytes: &[u8], to: u64) -> Result<()> {
        let staging = self.staging();
        let (halves, size) = match bytes.len() <= PIECE {
            true => (&staging.small, PIECE),
            false => (&staging.inward, HALF),
        };
        staging::with((halves, size), self.driver(), |halves| {
            for (i, chunk) in bytes.chunks(size).enumerate() {
                let at_hand = halves.next;
                halves.next = 1 - at_hand;
                halves.used[at_hand].synchronize().stage(stage)?;
                let half = halves.memory[at_hand].as_mut_slice().stage(stage)?;
                let half = &mut half[..chunk.len()];
                if chunk.len() <= PIECE {
                    // One piece: a thread of the pool would have to be free first.
                    half.copy_from_slice(chunk);
                } else {
                    let pieces = half.par_chunks_mut(PIECE).zip(chunk.par_chunks(PIECE));
                    pieces.for_each(|(to, from)| to.copy_from_slice(from));
                }
                let at = to + (i * size) as u64;
                // SAFETY: the target holds `bytes.len()` bytes and was allocated on this stream;
                // the half is not touched again before its event is done.
                unsafe { result::memcpy_htod_async(at, half, self.copies().cu_stream()) }
                    .stage(stage)?;
                halves.used[at_hand].record(self.copies()).stage(stage)?;
            }
            Ok(())
        })
    }

    /// A copy of `values` on the device, which work queued from now on may use.
    pub(crate) fn copied<T: DeviceRepr + Pod>(
        &self,
        stage: &'static str,
        values: &[T],
    ) -> Result<Buffer<T>> {
        let buffer = Buffer::<T>::uninit_on(self.driver(), self.copies(), stage, values.len())?;
        self.stage_in(stage, bytemuck::cast_slice(values), address(buffer.slice(), self.copies()))?;
        self.stream().join(self.copies()).stage(stage)?;
        Ok(buffer)
    }

    /// The first `len` values of `slice` in host memory; waits for all queued work.
    pub(crate) fn read<T: DeviceRepr + Pod>(
        &self,
        stage: &'static str,
        slice: &CudaSlice<T>,
        len: usize,
    ) -> Result<Vec<T>> {
        assert!(len <= slice.len(), "{len} values of {}", slice.len());
        let mut values = vec![T::zeroed(); len];
        self.stage_out(
            stage,
            address(slice, self.stream()),
            bytemuck::cast_slice_mut(&mut values),
        )?;
        self.context().check_err().stage(stage)?;
        Ok(values)
    }

    /// Copies from `from` on the device into `bytes`, after all queued work.
    fn stage_out(&self, stage: &'static str, from: u64, bytes: &mut [u8]) -> Result<()> {
        staging::with((&self.staging().outward, HALF), self.driver(), |halves| {
            let mut waiting: Option<(usize, &mut [u8])> = None;
            let drain = |halves: &mut Halves, entry: Option<(usize, &mut [u8])>| {
                let Some((half, chunk)) = entry else { return Ok(()) };
                halves.used[half].synchronize().stage(stage)?;
                let memory = halves.memory[half].as_slice().stage(stage)?;
                let pieces = chunk.par_chunks_mut(PIECE).zip(memory.par_chunks(PIECE));
                pieces.for_each(|(to, from)| to.copy_from_slice(&from[..to.len()]));
                Ok(())
            };
            for (i, chunk) in bytes.chunks_mut(HALF).enumerate() {
                let half = halves.memory[i % 2].as_mut_slice().stage(stage)?;
                let (half, at) = (&mut half[..chunk.len()], from + (i * HALF) as u64);
                // SAFETY: the source holds as many bytes as the caller's slice, and the half is
                // not touched before its event is done.
                unsafe { result::memcpy_dtoh_async(half, at, self.stream().cu_stream()) }
                    .stage(stage)?;
                halves.used[i % 2].record(self.stream()).stage(stage)?;
                drain(halves, waiting.replace((i % 2, chunk)))?;
            }
            drain(halves, waiting)
        })
    }
}

/// Device address of a slice; its uses are ordered by the caller.
pub(super) fn address<T>(slice: &CudaSlice<T>, stream: &Arc<CudaStream>) -> u64 {
    slice.device_ptr(stream).0
}
