//! What the CUDA libraries report.

use cudarc::{cublas, cusolver, driver, nvrtc};

/// A status other than success from a CUDA library.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The driver: allocation, copy, launch, or a kernel that faulted earlier.
    #[error("the driver reports {0:?}")]
    Driver(#[from] driver::DriverError),
    /// The matrix product library.
    #[error("cuBLAS reports {0:?}")]
    Cublas(#[from] cublas::result::CublasError),
    /// The factorization library.
    #[error("cuSOLVER reports {0:?}")]
    Cusolver(#[from] cusolver::result::CusolverError),
    /// The kernel compiler.
    #[error("NVRTC reports {0:?}")]
    Nvrtc(#[from] nvrtc::result::NvrtcError),
    /// The library that joins cards.
    #[error("NCCL reports {0}")]
    Nccl(String),
}
