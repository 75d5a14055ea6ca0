//! One card: its context, streams, library handles, kernels and memory.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cublas::CudaBlas;
use cudarc::cublas::sys::{cublasMath_t, cublasSetMathMode};
use cudarc::cusolver::DnHandle;
use cudarc::driver::sys::{CUdevice_attribute, CUmemPool_attribute, CUresult};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, ValidAsZeroBits,
    result,
};

use super::buffer::Buffer;
use super::error::Stage;
use super::kernels::Kernels;
use super::libraries::Library;
use super::memory::{Memory, MemoryInfo};
use super::park::Parking;
use super::transfer::Staging;
use crate::error::{Error, Result};

const STAGE: &str = "opening the device";

/// An NVIDIA card, ready for work.
pub struct Cuda {
    name: String,
    arch: String,
    multiprocessors: usize,
    kernels: Kernels,
    blas: Mutex<CudaBlas>,
    solver: Mutex<DnHandle>,
    memory: Arc<Memory>,
    staging: Staging,
    parking: Parking,
    copies: Arc<CudaStream>,
    leaving: Arc<CudaStream>,
    arriving: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name).field("arch", &self.arch).finish()
    }
}

impl Cuda {
    /// Opens card `ordinal` (as `CUDA_VISIBLE_DEVICES` numbers them) and loads all kernels.
    pub fn new(ordinal: usize) -> Result<Arc<Self>> {
        for library in Library::REQUIRED {
            library.require()?;
        }
        let count = CudaContext::device_count().stage(STAGE)?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(Error::NoSuchDevice { ordinal, count: count.max(0) as usize });
        }
        let context = CudaContext::new(ordinal).stage(STAGE)?;
        // SAFETY: all work of this device is queued on `stream`; the streams of copies are ordered
        // against it by the events of the `transfer` and `park` modules. No buffer exists yet.
        unsafe { context.disable_event_tracking() };
        let name = context.name().stage(STAGE)?;
        let arch = architecture(&name, context.compute_capability().stage(STAGE)?)?;
        keep_freed_memory(&context)?;
        let stream = context.new_stream().stage(STAGE)?;
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        Ok(Arc::new(Self {
            name,
            multiprocessors: context.attribute(processors).stage(STAGE)? as usize,
            kernels: Kernels::load(&context, &arch)?,
            arch,
            blas: Mutex::new(open_blas(&stream)?),
            solver: Mutex::new(DnHandle::new(Arc::clone(&stream)).stage(STAGE)?),
            memory: Arc::default(),
            staging: Staging::default(),
            parking: Parking::default(),
            copies: context.new_stream().stage(STAGE)?,
            leaving: context.new_stream().stage(STAGE)?,
            arriving: context.new_stream().stage(STAGE)?,
            stream,
            context,
        }))
    }

    /// Name of the card.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Architecture that the kernels were compiled for, such as `sm_90a`.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The stream on which all work is queued.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Pinned memory through which host values travel.
    pub(super) fn staging(&self) -> &Staging {
        &self.staging
    }

    /// Pinned memory of parked tensors.
    pub(super) fn parking(&self) -> &Parking {
        &self.parking
    }

    /// The stream of uploads; see the `transfer` module for how it is ordered against the stream of
    /// all work.
    pub(super) fn copies(&self) -> &Arc<CudaStream> {
        &self.copies
    }

    /// The stream of tensors that are parked; see the `park` module.
    pub(super) fn leaving(&self) -> &Arc<CudaStream> {
        &self.leaving
    }

    /// The stream of parked tensors that are fetched.
    pub(super) fn arriving(&self) -> &Arc<CudaStream> {
        &self.arriving
    }

    /// Kernel `name` of `file`.
    pub(crate) fn kernel(&self, file: &'static str, name: &'static str) -> Result<CudaFunction> {
        self.kernels.function(file, name, 0)
    }

    /// Kernel `name` of `file`, whose launches ask for up to `shared` bytes of dynamic shared
    /// memory; needed above 48 KiB.
    pub(crate) fn kernel_with_shared(
        &self,
        file: &'static str,
        name: &'static str,
        shared: usize,
    ) -> Result<CudaFunction> {
        self.kernels.function(file, name, shared)
    }

    /// The cuBLAS handle; one caller at a time.
    pub(crate) fn blas(&self) -> MutexGuard<'_, CudaBlas> {
        self.blas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cuSOLVER handle; one caller at a time.
    pub(crate) fn solver(&self) -> MutexGuard<'_, DnHandle> {
        self.solver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory for `len` values whose contents are arbitrary: the caller queues work that writes all
    /// of them before any work that reads them. Running out names `stage`.
    pub(crate) fn uninit<T: DeviceRepr>(
        &self,
        stage: &'static str,
        len: usize,
    ) -> Result<Buffer<T>> {
        self.uninit_on(&self.stream, stage, len)
    }

    /// As [`Self::uninit`], usable at once on `stream`; the stream of all work must wait for it.
    pub(super) fn uninit_on<T: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        stage: &'static str,
        len: usize,
    ) -> Result<Buffer<T>> {
        // The driver refuses empty allocations.
        let len = len.max(1);
        let bytes = len * size_of::<T>();
        if !self.memory.take(bytes) {
            return Err(self.out_of_memory(stage, bytes));
        }
        // SAFETY: device memory may hold any bits for every `DeviceRepr` type, and by this
        // function's contract nothing reads it before it is written.
        let slice = unsafe { stream.alloc::<T>(len) }.or_else(|error| {
            if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(error);
            }
            // The pool may hold freed memory in pieces that are too small.
            self.release_freed_memory()?;
            // SAFETY: as above.
            unsafe { stream.alloc::<T>(len) }
        });
        match slice {
            Ok(slice) => Ok(Buffer::new(slice, &self.stream, &self.memory)),
            Err(error) => {
                self.memory.give(bytes);
                if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    return Err(self.out_of_memory(stage, bytes));
                }
                Err(error).stage(stage)
            }
        }
    }

    /// Memory for `len` zeros.
    pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        stage: &'static str,
        len: usize,
    ) -> Result<Buffer<T>> {
        let mut buffer = self.uninit(stage, len)?;
        self.stream.memset_zeros(buffer.make_mut(self)?).stage(stage)?;
        Ok(buffer)
    }

    /// Waits for all queued work. A fault of an earlier kernel surfaces here, so `stage` should
    /// name what was queued since the last wait.
    pub fn synchronize(&self, stage: &'static str) -> Result<()> {
        self.stream.synchronize().stage(stage)?;
        for stream in [&self.copies, &self.leaving, &self.arriving] {
            stream.synchronize().stage(stage)?;
        }
        self.context.check_err().stage(stage)
    }

    /// Memory of the card and of this device.
    pub fn memory(&self) -> Result<MemoryInfo> {
        let (free, total) = self.context.mem_get_info().stage("reading memory")?;
        Ok(MemoryInfo {
            free,
            total,
            held: self.memory.held(),
            peak: self.memory.peak(),
            budget: self.memory.budget(),
        })
    }

    /// Starts a new peak from what is held now.
    pub fn reset_peak(&self) {
        self.memory.reset_peak();
    }

    /// How to launch `items` grid-stride items: blocks of 256 threads, enough to fill the card.
    pub(crate) fn spread(&self, items: usize) -> LaunchConfig {
        let blocks = items.div_ceil(256).clamp(1, self.multiprocessors * 8);
        LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    /// Refuses allocations that would make this device hold more than `bytes`.
    pub fn set_memory_budget(&self, bytes: usize) {
        self.memory.set_budget(bytes);
    }

    fn out_of_memory(&self, stage: &'static str, wanted: usize) -> Error {
        let budget = self.memory.budget();
        let free = self.context.mem_get_info().map_or(0, |(free, _)| free);
        Error::OutOfMemory {
            stage,
            wanted,
            held: self.memory.held(),
            free: free.min(budget.saturating_sub(self.memory.held())),
        }
    }

    fn release_freed_memory(&self) -> std::result::Result<(), DriverError> {
        self.stream.synchronize()?;
        // SAFETY: the pool is the device's own, and the device is open.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
            result::mem_pool::trim_to(pool, 0)
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Pinned memory must not be freed under a copy. A fault has been or will be reported.
        let _ = self.synchronize("closing the device");
    }
}

/// NVRTC's name of the architecture, with the features of this very generation from Hopper on.
fn architecture(name: &str, (major, minor): (i32, i32)) -> Result<String> {
    if major < 8 {
        let found = format!("{major}.{minor}");
        return Err(Error::UnsupportedDevice { name: name.to_owned(), found });
    }
    let suffix = if major >= 9 { "a" } else { "" };
    Ok(format!("sm_{major}{minor}{suffix}"))
}

/// cuBLAS on `stream`, with sums in f32 alone: by default it may cut k and add the parts in the type
/// of the result, which is fp16 for activations.
fn open_blas(stream: &Arc<CudaStream>) -> Result<CudaBlas> {
    let blas = CudaBlas::new(Arc::clone(stream)).stage(STAGE)?;
    // The default mode is 0, so this flag alone is the default and the flag.
    let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is open, and nobody else has it yet.
    unsafe { cublasSetMathMode(*blas.handle(), mode) }.result().stage(STAGE)?;
    Ok(blas)
}

/// Keeps freed memory in the driver's pool: by default each synchronisation gives it back.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<()> {
    if !context.has_async_alloc() {
        let reason = "its driver has no memory pools".to_owned();
        return Err(Error::Unsupported { op: STAGE, reason });
    }
    let mut threshold = u64::MAX;
    // SAFETY: the pool is the device's own, and the attribute takes a 64-bit integer.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).stage(STAGE)?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).stage(STAGE)
    }
}
