//! Tensors parked in pinned host memory, for hidden states that do not fit on the card.
//!
//! Both directions run on the copy stream, beside the computation. A parked tensor's device memory
//! is freed when its copy is done; until then it is kept in a short queue, whose oldest entry is
//! waited for when the queue is full, so that parking can never run ahead of the bus. Pinned memory
//! is slow to allocate and is kept for the next tensor of the same size.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaEvent, DevicePtr, DeviceRepr, PinnedHostSlice, result};
use half::f16;

use super::buffer::Buffer;
use super::context::Cuda;
use super::error::Stage;
use super::matrix::{Matrix, Values};
use crate::error::Result;

const STAGE: &str = "parking a tensor";
/// Copies under way before the oldest is waited for.
const IN_FLIGHT: usize = 2;

/// Pinned memory that is free, and tensors on their way out.
#[derive(Default)]
pub(super) struct Parking {
    free: Mutex<Vec<PinnedHostSlice<u8>>>,
    leaving: Mutex<VecDeque<(CudaEvent, Values)>>,
}

/// A tensor in pinned host memory.
#[derive(Debug)]
pub struct Parked {
    cuda: Arc<Cuda>,
    shape: (usize, usize),
    is_f16: bool,
    host: Option<PinnedHostSlice<u8>>,
}

impl Parked {
    /// Bytes of host memory.
    pub fn bytes(&self) -> usize {
        self.host.as_ref().map_or(0, PinnedHostSlice::num_bytes)
    }

    /// Rows and columns of the tensor.
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn give_back(&mut self) {
        if let Some(host) = self.host.take() {
            lock(&self.cuda.parking().free).push(host);
        }
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        // The next user writes it on the copy stream, in order after the copy that filled it.
        self.give_back();
    }
}

/// Queues the copy of `matrix` to the host; its device memory is freed when that is done.
pub(crate) fn park(matrix: Matrix) -> Result<Parked> {
    let cuda = Arc::clone(matrix.cuda());
    let mut host = pinned(&cuda, matrix.bytes())?;
    cuda.copies().join(cuda.stream()).stage(STAGE)?;
    let from = match matrix.values() {
        Values::F16(buffer) => buffer.slice().device_ptr(cuda.copies()).0,
        Values::F32(buffer) => buffer.slice().device_ptr(cuda.copies()).0,
    };
    let target = host.as_mut_slice().stage(STAGE)?;
    // SAFETY: both hold `matrix.bytes()` bytes; the device memory lives in `leaving` until the copy
    // is done, and the host memory is touched on the copy stream alone.
    unsafe { result::memcpy_dtoh_async(target, from, cuda.copies().cu_stream()) }.stage(STAGE)?;
    let done = cuda.copies().record_event(None).stage(STAGE)?;
    let parked = Parked {
        cuda: Arc::clone(&cuda),
        shape: matrix.shape(),
        is_f16: matches!(matrix.values(), Values::F16(_)),
        host: Some(host),
    };
    let mut leaving = lock(&cuda.parking().leaving);
    leaving.push_back((done, matrix.into_values()));
    while let Some((done, _)) = leaving.front() {
        if leaving.len() > IN_FLIGHT {
            done.synchronize().stage(STAGE)?;
        } else if !done.is_complete() {
            break;
        }
        leaving.pop_front();
    }
    Ok(parked)
}

/// Queues the copy back; work queued from now on may use the tensor.
pub(crate) fn fetch(mut parked: Parked) -> Result<Matrix> {
    let (cuda, shape) = (Arc::clone(&parked.cuda), parked.shape);
    let count = shape.0 * shape.1;
    let matrix = if parked.is_f16 {
        Matrix::from_f16(&cuda, shape, copied_back::<f16>(&cuda, &parked, count)?)
    } else {
        Matrix::from_f32(&cuda, shape, copied_back::<f32>(&cuda, &parked, count)?)
    };
    parked.give_back();
    cuda.stream().join(cuda.copies()).stage(STAGE)?;
    Ok(matrix)
}

fn copied_back<T: DeviceRepr>(cuda: &Cuda, parked: &Parked, count: usize) -> Result<Buffer<T>> {
    let buffer = cuda.uninit_on::<T>(cuda.copies(), STAGE, count)?;
    let to = buffer.slice().device_ptr(cuda.copies()).0;
    if let Some(host) = &parked.host {
        let from = host.as_slice().stage(STAGE)?;
        // SAFETY: the buffer holds as many bytes as were parked; the copies of one stream run in
        // order, so the host memory is filled before this copy and reused after it.
        unsafe { result::memcpy_htod_async(to, from, cuda.copies().cu_stream()) }.stage(STAGE)?;
    }
    Ok(buffer)
}

/// Pinned memory of exactly `bytes`, from the free list where there is some.
fn pinned(cuda: &Cuda, bytes: usize) -> Result<PinnedHostSlice<u8>> {
    let mut free = lock(&cuda.parking().free);
    if let Some(at) = free.iter().position(|host| host.num_bytes() == bytes.max(1)) {
        return Ok(free.swap_remove(at));
    }
    // SAFETY: the memory is read only after a copy from the device has filled it.
    unsafe { cuda.context().alloc_pinned_with_flags(bytes.max(1), 0) }.stage(STAGE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
