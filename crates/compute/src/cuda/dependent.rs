//! Launches of kernels that may be put on the card before the one ahead of them is done.
//!
//! What a kernel of `kernels/` that includes `dependent.cuh` does before its wait (its launch, the first
//! weights on their way) then costs no time of its own. Cards before Hopper run one after the other.

use std::ffi::c_void;

use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    cuLaunchKernelEx,
};
use cudarc::driver::{CudaFunction, CudaStream, LaunchConfig};

use super::context::Cuda;
use super::error::StageContext;
use crate::error::Result;

/// Pointers to the arguments of a launch.
pub(super) struct Arguments(Vec<*mut c_void>);

impl Arguments {
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(16))
    }

    /// Adds an argument, which has to stay where it is until the launch.
    pub(super) fn push<T: Copy>(&mut self, value: &T) {
        self.0.push(std::ptr::from_ref(value).cast_mut().cast());
    }
}

/// Queues a kernel that waits for the one ahead by itself.
///
/// # Safety
/// The arguments are those of the kernel and alive; the kernel calls `wait_for_last` before it touches
/// anything that is written, or writes anything that is read, since the last copy or ordinary launch on this
/// stream; so do the kernels ahead that were queued this way.
pub(super) unsafe fn launch(
    (cuda, stream): (&Cuda, &CudaStream),
    stage: &'static str,
    function: &CudaFunction,
    config: LaunchConfig,
    arguments: &mut Arguments,
) -> Result<()> {
    cuda.context().bind_to_thread().stage(stage)?;
    let mut attribute = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let hopper = cuda.arch().starts_with("sm_9") || cuda.arch().starts_with("sm_1");
    let config = CUlaunchConfig {
        gridDimX: config.grid_dim.0,
        gridDimY: config.grid_dim.1,
        gridDimZ: config.grid_dim.2,
        blockDimX: config.block_dim.0,
        blockDimY: config.block_dim.1,
        blockDimZ: config.block_dim.2,
        sharedMemBytes: config.shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(hopper),
    };
    // SAFETY: the configuration and its attribute outlive the call, which copies them and what the
    // arguments point to; the caller vouches for the kernel's side.
    unsafe {
        cuLaunchKernelEx(
            &raw const config,
            function.cu_function(),
            arguments.0.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    }
    .result()
    .stage(stage)
}
