//! One card with all that computes on it: library handles, kernels, and pools of pinned memory.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::cublas::CudaBlas;
use cudarc::cublas::sys::{cublasMath_t, cublasSetMathMode};
use cudarc::cusolver::DnHandle;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DeviceRepr, LaunchConfig, ValidAsZeroBits,
};

use super::buffer::Buffer;
use super::driver::{Driver, OPENING, kind_of};
use super::error::StageContext;
use super::kernels::Kernels;
use super::libraries::Library;
use super::memory::MemoryInfo;
use super::pinned::PinnedPool;
use super::staging::Staging;
use crate::error::Result;
use crate::lock::lock;

/// An NVIDIA card, ready for work.
pub struct Cuda {
    kernels: Kernels,
    blas: Mutex<CudaBlas>,
    solver: Mutex<DnHandle>,
    staging: Staging,
    pinned: PinnedPool,
    driver: Arc<Driver>,
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, arch) = (self.name(), self.arch());
        f.debug_struct("Cuda").field("name", &name).field("arch", &arch).finish()
    }
}

impl Cuda {
    /// Opens card `ordinal` (as `CUDA_VISIBLE_DEVICES` numbers them) and loads all kernels.
    pub fn new(ordinal: usize) -> Result<Arc<Self>> {
        for library in Library::REQUIRED {
            library.require()?;
        }
        let driver = Driver::open(ordinal)?;
        let stream = driver.stream();
        Ok(Arc::new(Self {
            kernels: Kernels::load(driver.context(), driver.arch())?,
            blas: Mutex::new(open_blas(stream)?),
            solver: Mutex::new(DnHandle::new(Arc::clone(stream)).stage(OPENING)?),
            staging: Staging::default(),
            pinned: PinnedPool::default(),
            driver: Arc::new(driver),
        }))
    }

    /// Name of the card.
    pub fn name(&self) -> &str {
        self.driver.name()
    }

    /// What it is called in reports, and what results on it may depend on.
    pub(crate) fn kind(&self) -> String {
        kind_of(self.name(), self.arch())
    }

    /// Architecture that the kernels were compiled for, such as `sm_90a`.
    pub fn arch(&self) -> &str {
        self.driver.arch()
    }

    /// The card without what computes on it.
    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        self.driver.context()
    }

    /// The stream on which all work is queued.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        self.driver.stream()
    }

    /// Pinned memory through which host values travel.
    pub(super) fn staging(&self) -> &Staging {
        &self.staging
    }

    /// The pinned memory of offloaded tensors.
    pub(super) fn pinned(&self) -> &PinnedPool {
        &self.pinned
    }

    /// The stream of uploads; see the `transfer` module for how it is ordered against the stream of
    /// all work.
    pub(super) fn copies(&self) -> &Arc<CudaStream> {
        self.driver.copies()
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
        lock(&self.blas)
    }

    /// The cuSOLVER handle; one caller at a time.
    pub(crate) fn solver(&self) -> MutexGuard<'_, DnHandle> {
        lock(&self.solver)
    }

    /// [`Buffer::uninit`] on this card.
    pub(crate) fn uninit<T: DeviceRepr>(
        &self,
        stage: &'static str,
        len: usize,
    ) -> Result<Buffer<T>> {
        Buffer::uninit(&self.driver, stage, len)
    }

    /// [`Buffer::zeros`] on this card.
    pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        stage: &'static str,
        len: usize,
    ) -> Result<Buffer<T>> {
        Buffer::zeros(&self.driver, stage, len)
    }

    /// Waits for all queued work. A fault of an earlier kernel surfaces here, so `stage` should
    /// name what was queued since the last wait.
    pub fn synchronize(&self, stage: &'static str) -> Result<()> {
        self.driver.synchronize(stage)
    }

    /// Memory of the card and of this device.
    pub fn memory(&self) -> Result<MemoryInfo> {
        self.driver.memory_info()
    }

    /// Starts a new peak from what is held now.
    pub fn reset_peak(&self) {
        self.driver.memory().reset_peak();
    }

    /// How to launch `items` grid-stride items: blocks of 256 threads, enough to fill the card.
    pub(crate) fn spread(&self, items: usize) -> LaunchConfig {
        let blocks = items.div_ceil(256).clamp(1, self.driver.multiprocessors() * 8);
        LaunchConfig {
            grid_dim: (blocks as u32, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        }
    }

    /// Refuses allocations that would make this device hold more than `bytes`.
    pub fn set_memory_budget(&self, bytes: usize) {
        self.driver.memory().set_budget(bytes);
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Pinned memory must not be freed under a copy. A fault has been or will be reported.
        let _ = self.synchronize("closing the device");
    }
}

/// cuBLAS on `stream`, with sums in f32 alone: by default it may cut k and add the parts in the type
/// of the result, which is fp16 for activations.
fn open_blas(stream: &Arc<CudaStream>) -> Result<CudaBlas> {
    let blas = CudaBlas::new(Arc::clone(stream)).stage(OPENING)?;
    // The default mode is 0, so this flag alone is the default and the flag.
    let mode = cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is open, and nobody else has it yet.
    unsafe { cublasSetMathMode(*blas.handle(), mode) }.result().stage(OPENING)?;
    Ok(blas)
}
