//! Device memory with a type and a length.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, result};

use super::context::Cuda;
use super::error::Stage;
use super::memory::Memory;
use crate::error::Result;

/// Shared device memory that is copied before it is written when it has other owners.
///
/// Cloning is free. Whichever stream the memory was allocated and filled on, its last use is queued
/// on the stream of all work, so it is freed there, in order after that use.
#[derive(Clone, Debug)]
pub(crate) struct Buffer<T> {
    shared: Arc<Allocation<T>>,
}

/// The memory, freed on `user` and given back to the count.
#[derive(Debug)]
struct Allocation<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    user: Arc<CudaStream>,
    memory: Arc<Memory>,
}

impl<T> Drop for Allocation<T> {
    fn drop(&mut self) {
        self.memory.give(self.slice.num_bytes());
        let context = Arc::clone(self.user.context());
        context.record_err(context.bind_to_thread());
        // SAFETY: drop runs once, and nothing uses the slice after this.
        let pointer = unsafe { ManuallyDrop::take(&mut self.slice) }.leak();
        // SAFETY: the pointer came from `cuMemAllocAsync` and its last use is queued on `user`.
        context.record_err(unsafe { result::free_async(pointer, self.user.cu_stream()) });
    }
}

impl<T: DeviceRepr> Buffer<T> {
    /// Takes over `slice`, to be freed on `user`.
    pub(super) fn new(slice: CudaSlice<T>, user: &Arc<CudaStream>, memory: &Arc<Memory>) -> Self {
        let (user, memory) = (Arc::clone(user), Arc::clone(memory));
        Self { shared: Arc::new(Allocation { slice: ManuallyDrop::new(slice), user, memory }) }
    }

    /// The memory, for reading.
    pub(crate) fn slice(&self) -> &CudaSlice<T> {
        &self.shared.slice
    }

    /// The memory, for writing; copied first when another owner could see the writes.
    pub(crate) fn make_mut(&mut self, cuda: &Cuda) -> Result<&mut CudaSlice<T>> {
        if Arc::get_mut(&mut self.shared).is_none() {
            let mut copy = cuda.uninit::<T>("copying a shared buffer", self.slice().len())?;
            let target = copy.unshared()?;
            cuda.stream().memcpy_dtod(self.slice(), target).stage("copying a shared buffer")?;
            *self = copy;
        }
        self.unshared()
    }

    /// The memory of a buffer that has one owner.
    fn unshared(&mut self) -> Result<&mut CudaSlice<T>> {
        // Only `make_mut` calls this, after it has made sure of a single owner.
        Arc::get_mut(&mut self.shared)
            .map(|allocation| &mut *allocation.slice)
            .ok_or(crate::error::Error::DeviceMismatch { op: "writing a shared buffer" })
    }
}
