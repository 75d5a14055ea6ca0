//! What the CUDA libraries report, and how it becomes an error of this crate.

use cudarc::{cublas, cusolver, driver, nvrtc};

use crate::error::{Error, Result};

/// A status other than success from a CUDA library.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The driver: allocation, copy, launch, or a kernel that faulted earlier.
    #[error("the driver reports {0:?}")]
    Driver(#[from] driver::DriverError),
    /// The matrix product library.
    #[error("cuBLAS reports {0:?}")]
    Cublas(#[from] cublas::result::CublasError),
    /// The factorisation library.
    #[error("cuSOLVER reports {0:?}")]
    Cusolver(#[from] cusolver::result::CusolverError),
    /// The kernel compiler.
    #[error("NVRTC reports {0:?}")]
    Nvrtc(#[from] nvrtc::result::NvrtcError),
    /// The library that joins cards.
    #[error("NCCL reports {0}")]
    Nccl(String),
}

/// Names the stage in which a CUDA call failed.
pub(crate) trait Stage<T> {
    /// Turns a library's status into [`Error::Cuda`] with the name of the stage.
    fn stage(self, stage: &'static str) -> Result<T>;
}

impl<T, F: Into<Fault>> Stage<T> for std::result::Result<T, F> {
    fn stage(self, stage: &'static str) -> Result<T> {
        self.map_err(|fault| Error::Cuda { stage, source: fault.into() })
    }
}
