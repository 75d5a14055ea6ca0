//! The pool of pinned host memory that offloaded tensors lie in.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, PinnedHostSlice};

use super::buffer::Values;
use super::driver::Driver;
use super::error::StageContext;
use crate::error::Result;
use crate::lock::lock;

/// Pinned memory that is free, and tensors on their way out.
#[derive(Default)]
pub(super) struct PinnedPool {
    pub(super) free: Mutex<Vec<Pinned>>,
    pub(super) leaving: Mutex<VecDeque<(Arc<CudaEvent>, Values)>>,
}

/// Pinned memory, and the last copy that was queued for it.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) memory: PinnedHostSlice<u8>,
    pub(super) last: Option<Arc<CudaEvent>>,
}

impl PinnedPool {
    /// Pinned memory of exactly `bytes`, from the free list where there is some: the one that has
    /// been free for longest, whose last copy is most likely done.
    pub(super) fn take(&self, driver: &Driver, bytes: usize) -> Result<Pinned> {
        let mut free = lock(&self.free);
        if let Some(at) = free.iter().position(|host| host.memory.num_bytes() == bytes.max(1)) {
            return Ok(free.remove(at));
        }
        // SAFETY: the memory is read only after a copy from the device has filled it.
        let memory = unsafe { driver.context().alloc_pinned_with_flags(bytes.max(1), 0) }
            .stage("offloading a tensor")?;
        Ok(Pinned { memory, last: None })
    }
}
