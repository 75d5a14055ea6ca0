//! What the driver has of one card: its context, the streams on which work is queued, and the count
//! of the memory that was asked of it.
//!
//! Buffers know this much of a card and no more, so that libraries, kernels and pools of pinned
//! memory can stand on buffers.

use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUmemPool_attribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::error::StageContext;
use super::memory::{Memory, MemoryInfo};
use crate::error::{Error, Result};

/// The stage named in errors until the card is ready.
pub(super) const OPENING: &str = "opening the device";

/// An open card, without what computes on it.
#[derive(Debug)]
pub(crate) struct Driver {
    name: String,
    arch: String,
    multiprocessors: usize,
    memory: Memory,
    copies: Arc<CudaStream>,
    leaving: Arc<CudaStream>,
    arriving: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl Driver {
    /// Opens card `ordinal`; the driver's library is there.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let count = CudaContext::device_count().stage(OPENING)?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(Error::NoSuchDevice { ordinal, count: count.max(0) as usize });
        }
        let context = CudaContext::new(ordinal).stage(OPENING)?;
        // SAFETY: all work of this device is queued on `stream`; the streams of copies are ordered
        // against it by the events of the `transfer` and `offload` modules. No buffer exists yet.
        unsafe { context.disable_event_tracking() };
        let name = context.name().stage(OPENING)?;
        let arch = architecture(&name, context.compute_capability().stage(OPENING)?)?;
        keep_freed_memory(&context)?;
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(Self {
            name,
            arch,
            multiprocessors: context.attribute(processors).stage(OPENING)? as usize,
            memory: Memory::default(),
            copies: context.new_stream().stage(OPENING)?,
            leaving: context.new_stream().stage(OPENING)?,
            arriving: context.new_stream().stage(OPENING)?,
            stream: context.new_stream().stage(OPENING)?,
            context,
        })
    }

    /// Name of the card.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// NVRTC's name of its architecture.
    pub(super) fn arch(&self) -> &str {
        &self.arch
    }

    /// Multiprocessors of the card.
    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The stream on which all work is queued.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream of uploads; see the `transfer` module for how it is ordered against the stream of
    /// all work.
    pub(super) fn copies(&self) -> &Arc<CudaStream> {
        &self.copies
    }

    /// The stream of tensors that are offloaded; see the `offload` module.
    pub(super) fn leaving(&self) -> &Arc<CudaStream> {
        &self.leaving
    }

    /// The stream of offloaded tensors that are fetched.
    pub(super) fn arriving(&self) -> &Arc<CudaStream> {
        &self.arriving
    }

    /// The count of the memory held.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Waits for all queued work. A fault of an earlier kernel surfaces here, so `stage` should
    /// name what was queued since the last wait.
    pub(super) fn synchronize(&self, stage: &'static str) -> Result<()> {
        self.stream.synchronize().stage(stage)?;
        for stream in [&self.copies, &self.leaving, &self.arriving] {
            stream.synchronize().stage(stage)?;
        }
        self.context.check_err().stage(stage)
    }

    /// Memory of the card and of this device.
    pub(super) fn memory_info(&self) -> Result<MemoryInfo> {
        let (free, total) = self.context.mem_get_info().stage("reading memory")?;
        let kept = self.kept_by_pool().stage("reading memory")?;
        Ok(MemoryInfo {
            free: free + kept,
            total,
            held: self.memory.held(),
            peak: self.memory.peak(),
            budget: self.memory.budget(),
        })
    }

    /// The error of `wanted` bytes that are not to be had.
    pub(super) fn out_of_memory(&self, stage: &'static str, wanted: usize) -> Error {
        let budget = self.memory.budget();
        let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
        Error::OutOfMemory {
            stage,
            wanted,
            held: self.memory.held(),
            free: free.min(budget.saturating_sub(self.memory.held())),
        }
    }

    /// Bytes that were freed, but that the driver's pool keeps for the next tensors.
    fn kept_by_pool(&self) -> std::result::Result<usize, DriverError> {
        let attributes = [
            CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
            CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
        ];
        // SAFETY: the pool is the device's own, and both attributes are 64-bit integers.
        let [reserved, used] = unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
            let mut values = [0_u64; 2];
            for (attribute, value) in attributes.into_iter().zip(&mut values) {
                let value: *mut u64 = value;
                result::mem_pool::get_attribute(pool, attribute, value.cast())?;
            }
            values
        };
        Ok(reserved.saturating_sub(used) as usize)
    }

    /// Gives the memory that the driver's pool keeps back to the card.
    pub(super) fn release_freed_memory(&self) -> std::result::Result<(), DriverError> {
        self.stream.synchronize()?;
        // SAFETY: the pool is the device's own, and the device is open.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
            result::mem_pool::trim_to(pool, 0)
        }
    }
}

/// NVRTC's name of the architecture, with the features of this very generation from Hopper on.
fn architecture(name: &str, (major, minor): (i32, i32)) -> Result<String> {
    if major < 8 {
        let found = format!("{major}.{minor}");
        return Err(Error::UnsupportedDevice { name: name.to_owned(), found });
    }
    Ok(architecture_of((major, minor)))
}

/// The same of any card, supported or not.
pub(super) fn architecture_of((major, minor): (i32, i32)) -> String {
    let suffix = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{suffix}")
}

/// A card for reports, and what results on it may depend on.
pub(super) fn kind_of(name: &str, architecture: &str) -> String {
    format!("cuda ({name}, {architecture})")
}

/// Keeps freed memory in the driver's pool: by default each synchronization gives it back.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<()> {
    if !context.has_async_alloc() {
        let reason = "its driver has no memory pools".to_owned();
        return Err(Error::Unsupported { op: OPENING, reason });
    }
    let mut threshold = u64::MAX;
    // SAFETY: the pool is the device's own, and the attribute takes a 64-bit integer.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).stage(OPENING)?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).stage(OPENING)
    }
}
