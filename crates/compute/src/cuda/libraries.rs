//! Finding the CUDA libraries, without which calling them would be a panic in cudarc.
//!
//! A library is opened by its bare name first (the loader's own paths), and then from the folders
//! of a toolkit. A library opened from a folder stays open, so that a later open by bare name finds
//! it: the loader compares the names under which loaded libraries know themselves.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::{cublas, cublaslt, cusolver, driver, nvrtc};

use libloading::Library as Opened;

use super::nccl_api;
use crate::error::{Error, Result};

/// A shared library of CUDA that this crate calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// libcuda, installed with the driver.
    Driver,
    /// libnvrtc, the kernel compiler.
    Nvrtc,
    /// libcublasLt, under cuBLAS.
    CublasLt,
    /// libcublas, matrix products.
    Cublas,
    /// libcusolver, factorizations.
    Cusolver,
    /// libnccl, several GPUs.
    Nccl,
}

impl Library {
    /// All libraries, dependencies first.
    pub const ALL: [Self; 6] =
        [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Cublas, Self::Cusolver, Self::Nccl];

    /// What every GPU command needs.
    pub(crate) const REQUIRED: [Self; 5] =
        [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Cublas, Self::Cusolver];

    /// The file name under which the library of CUDA 13 knows itself.
    pub fn file(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so.1",
            Self::Nvrtc => "libnvrtc.so.13",
            Self::CublasLt => "libcublasLt.so.13",
            Self::Cublas => "libcublas.so.13",
            Self::Cusolver => "libcusolver.so.12",
            Self::Nccl => "libnccl.so.2",
        }
    }

    /// What to do when the library is missing.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver",
            Self::Nccl => {
                "install NCCL, or name its folder in GPTQ_CUDA_LIB \
                 (with pip: site-packages/nvidia/nccl/lib); one GPU runs without it"
            }
            _ => {
                "install the CUDA 13 libraries, or name their folder in GPTQ_CUDA_LIB \
                 (with pip: site-packages/nvidia/cu13/lib)"
            }
        }
    }

    /// True when the library can be opened; it is looked for once.
    pub fn is_present(self) -> bool {
        static FOUND: [OnceLock<bool>; 6] = [const { OnceLock::new() }; 6];
        *FOUND[self as usize].get_or_init(|| self.opens() || (self.preload() && self.opens()))
    }

    /// An error that names the library when it cannot be opened.
    pub(crate) fn require(self) -> Result<()> {
        if self.is_present() {
            Ok(())
        } else {
            Err(Error::MissingLibrary { library: self.file(), advice: self.hint() })
        }
    }

    fn opens(self) -> bool {
        // SAFETY: opening a library runs its initializers; NVIDIA's have no preconditions.
        unsafe {
            match self {
                Self::Driver => driver::sys::is_culib_present(),
                Self::Nvrtc => nvrtc::sys::is_culib_present(),
                Self::CublasLt => cublaslt::sys::is_culib_present(),
                Self::Cublas => cublas::sys::is_culib_present(),
                Self::Cusolver => cusolver::sys::is_culib_present(),
                Self::Nccl => Opened::new(self.file()).is_ok_and(nccl_api::adopt),
            }
        }
    }

    /// Opens the library from a toolkit folder and keeps it open.
    fn preload(self) -> bool {
        let mut dependencies = match self {
            Self::Cublas => vec!["libcublasLt.so.13"],
            Self::Cusolver => {
                vec![
                    "libnvJitLink.so.13",
                    "libcublasLt.so.13",
                    "libcublas.so.13",
                    "libcusparse.so.12",
                ]
            }
            _ => Vec::new(),
        };
        dependencies.push(self.file());
        let mut folders = folders();
        if self == Self::Nccl {
            // With pip it has a folder of its own, beside the toolkit's.
            let beside = |folder: &PathBuf| folder.join("../../nccl/lib");
            folders.extend(folders.iter().map(beside).collect::<Vec<_>>());
            let open = |folder: &PathBuf| {
                let path = folder.join(self.file());
                // SAFETY: as in `opens`.
                path.is_file() && unsafe { Opened::new(path) }.is_ok_and(nccl_api::adopt)
            };
            return folders.iter().any(open);
        }
        folders.iter().any(|folder| {
            if self == Self::Nvrtc {
                open_nvrtc_builtins(folder);
            }
            dependencies.iter().fold(false, |_, file| keep_open(&folder.join(file)))
        })
    }
}

/// The compiler opens its built-in headers by a name that holds its version, at the first compile.
fn open_nvrtc_builtins(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
            keep_open(&entry.path());
        }
    }
}

/// Opens a library for the rest of the process; false when there is none.
fn keep_open(path: &Path) -> bool {
    // SAFETY: as in `Library::opens`; the path is a toolkit's or one that the user named.
    let library = path.is_file().then(|| unsafe { Opened::new(path) });
    match library {
        Some(Ok(library)) => {
            std::mem::forget(library);
            true
        }
        _ => false,
    }
}

/// Where a toolkit may be, in the order of search.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("GPTQ_CUDA_LIB").map(|v| env::split_paths(&v).collect()).unwrap_or_default();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(env::var_os(variable).map(|home| PathBuf::from(home).join("lib64")));
    }
    folders.push(PathBuf::from("/usr/local/cuda/lib64"));
    folders
}
