//! Device memory with a type and a length.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits, result};
use half::f16;

use super::driver::Driver;
use super::error::StageContext;
use crate::error::Result;

/// Shared device memory that is copied before it is written when it has other owners.
///
/// Cloning is free. Whichever stream the memory was allocated and filled on, its last use is queued
/// on the stream of all work, so it is freed there, in order after that use.
#[derive(Clone, Debug)]
pub(crate) struct Buffer<T> {
    shared: Arc<Allocation<T>>,
}

/// The memory, freed on the stream of all work and given back to the count.
#[derive(Debug)]
struct Allocation<T> {
    slice: ManuallyDrop<CudaSlice<T>>,
    driver: Arc<Driver>,
}

impl<T> Drop for Allocation<T> {
    fn drop(&mut self) {
        self.driver.memory().give(self.slice.num_bytes());
        let (context, user) = (self.driver.context(), self.driver.stream());
        context.record_err(context.bind_to_thread());
        // SAFETY: drop runs once, and nothing uses the slice after this.
        let pointer = unsafe { ManuallyDrop::take(&mut self.slice) }.leak();
        // SAFETY: the pointer came from `cuMemAllocAsync` and its last use is queued on `user`.
        context.record_err(unsafe { result::free_async(pointer, user.cu_stream()) });
    }
}

/// Values of a matrix: fp16 for weights and activations, f32 for hidden states and solver matrices.
#[derive(Clone, Debug)]
pub(crate) enum Values {
    F16(Buffer<f16>),
    F32(Buffer<f32>),
}

impl<T: DeviceRepr> Buffer<T> {
    /// Memory for `len` values whose contents are arbitrary: the caller queues work that writes all
    /// of them before any work that reads them. Running out names `stage`.
    pub(super) fn uninit(driver: &Arc<Driver>, stage: &'static str, len: usize) -> Result<Self> {
        Self::uninit_on(driver, driver.stream(), stage, len)
    }

    /// As [`Self::uninit`], usable at once on `stream`; the stream of all work must wait for it.
    pub(super) fn uninit_on(
        driver: &Arc<Driver>,
        stream: &Arc<CudaStream>,
        stage: &'static str,
        len: usize,
    ) -> Result<Self> {
        // The driver refuses empty allocations.
        let len = len.max(1);
        let bytes = len * size_of::<T>();
        if !driver.memory().take(bytes) {
            return Err(driver.out_of_memory(stage, bytes));
        }
        // SAFETY: device memory may hold any bits for every `DeviceRepr` type, and by this
        // function's contract nothing reads it before it is written.
        let slice = unsafe { stream.alloc::<T>(len) }.or_else(|error| {
            if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(error);
            }
            // The pool may hold freed memory in pieces that are too small.
            driver.release_freed_memory()?;
            // SAFETY: as above.
            unsafe { stream.alloc::<T>(len) }
        });
        match slice {
            Ok(slice) => {
                let (slice, driver) = (ManuallyDrop::new(slice), Arc::clone(driver));
                Ok(Self { shared: Arc::new(Allocation { slice, driver }) })
            }
            Err(error) => {
                driver.memory().give(bytes);
                if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    return Err(driver.out_of_memory(stage, bytes));
                }
                Err(error).stage(stage)
            }
        }
    }

    /// Memory for `len` zeros.
    pub(super) fn zeros(driver: &Arc<Driver>, stage: &'static str, len: usize) -> Result<Self>
    where
        T: ValidAsZeroBits,
    {
        let mut buffer = Self::uninit(driver, stage, len)?;
        driver.stream().memset_zeros(buffer.make_mut()?).stage(stage)?;
        Ok(buffer)
    }

    /// The memory, for reading.
    pub(crate) fn slice(&self) -> &CudaSlice<T> {
        &self.shared.slice
    }

    /// The memory, for writing; copied first when another owner could see the writes.
    pub(crate) fn make_mut(&mut self) -> Result<&mut CudaSlice<T>> {
        if Arc::get_mut(&mut self.shared).is_none() {
            const STAGE: &str = "copying a shared buffer";
            let driver = Arc::clone(&self.shared.driver);
            let mut copy = Self::uninit(&driver, STAGE, self.slice().len())?;
            let target = copy.unshared()?;
            driver.stream().memcpy_dtod(self.slice(), target).stage(STAGE)?;
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
