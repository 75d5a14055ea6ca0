//! Finding the CUDA libraries, without which calling them would be a panic in cudarc.
//!
//! A library is opened under the name of CUDA 13 from the first of [`library_places`] that has it,
//! and stays open, so that cudarc's later open by bare name finds it: the loader compares the names
//! under which loaded libraries know themselves. Where cudarc gets another one nevertheless, which
//! a `libnvrtc.so` of another CUDA in the loader's paths can do, none is used: its structures are
//! not those that this program was built for.

use std::ffi::c_void;
use std::path::Path;
use std::sync::OnceLock;

use cudarc::{cublas, cublaslt, cusolver, driver, nvrtc};

use libloading::Library as Opened;

use super::library_places::{LibraryPlace, places};
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

    /// What to do when the library cannot be used.
    pub fn hint(self) -> &'static str {
        if matches!(self.search(), Search::Shadowed) {
            return "its name without a version belongs to another CUDA in the loader's path: take \
                    that out of LD_LIBRARY_PATH, or put a folder before it in which that name is a \
                    link to this file";
        }
        match self {
            Self::Driver => "install the NVIDIA driver",
            Self::Nccl => {
                "install NCCL, with pip: nvidia-nccl-cu13, or name its folder in GPTQ_CUDA_LIB; \
                 one GPU runs without it"
            }
            _ => {
                "install the CUDA 13 libraries, with pip: nvidia-cuda-nvrtc, nvidia-cublas and \
                 nvidia-cusolver, or name their folder in GPTQ_CUDA_LIB"
            }
        }
    }

    /// True when the library can be used; it is looked for once.
    pub fn is_present(self) -> bool {
        self.place().is_some()
    }

    /// Where the library was found.
    pub fn place(self) -> Option<&'static LibraryPlace> {
        match self.search() {
            Search::Found(place) => Some(place),
            Search::Missing | Search::Shadowed => None,
        }
    }

    /// An error that names the library when it cannot be used.
    pub(crate) fn require(self) -> Result<()> {
        if self.is_present() {
            Ok(())
        } else {
            Err(Error::MissingLibrary { library: self.file(), advice: self.hint() })
        }
    }

    /// What one search of the process came to.
    fn search(self) -> &'static Search {
        static SEARCHES: [OnceLock<Search>; 6] = [const { OnceLock::new() }; 6];
        SEARCHES[self as usize].get_or_init(|| {
            if self == Self::Driver {
                // SAFETY: opening a library runs its initializers; NVIDIA's have no preconditions.
                let present = unsafe { driver::sys::is_culib_present() };
                return if present { Search::Found(LibraryPlace::Loader) } else { Search::Missing };
            }
            for place in places() {
                let Some(library) = self.open(&place) else { continue };
                if self != Self::Nccl {
                    let same = self.is_what_cudarc_opens(library);
                    return if same { Search::Found(place) } else { Search::Shadowed };
                }
                if nccl_api::adopt(library) {
                    return Search::Found(place);
                }
            }
            Search::Missing
        })
    }

    /// Opens the library at a place, and before it what it stands on there.
    fn open(self, place: &LibraryPlace) -> Option<Opened> {
        let LibraryPlace::Folder(folder) = place else {
            // SAFETY: as in `search`.
            return unsafe { Opened::new(self.file()) }.ok();
        };
        let file = folder.join(self.file());
        if !file.is_file() {
            return None;
        }
        if self == Self::Nvrtc {
            open_nvrtc_builtins(folder);
        }
        let dependencies: &[&str] = match self {
            Self::Cublas => &["libcublasLt.so.13"],
            Self::Cusolver => {
                &["libnvJitLink.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcusparse.so.12"]
            }
            _ => &[],
        };
        for dependency in dependencies {
            keep_open(&folder.join(dependency));
        }
        // SAFETY: as in `search`; the path is a toolkit's or one that the user named.
        unsafe { Opened::new(file) }.ok()
    }

    /// Keeps the library open; true when cudarc's open by bare name comes to the same one.
    fn is_what_cudarc_opens(self, library: Opened) -> bool {
        let address = |library: &Opened, symbol: &str| {
            // SAFETY: the symbol's address is only compared.
            unsafe { library.get::<*const c_void>(symbol).ok()?.try_as_raw_ptr() }
        };
        let same = self.opened_by_cudarc().is_some_and(|(cudarcs, symbol)| {
            let own = address(&library, symbol);
            own.is_some() && own == address(cudarcs, symbol)
        });
        std::mem::forget(library);
        same
    }

    /// The library that cudarc calls, and a function of it.
    fn opened_by_cudarc(self) -> Option<(&'static Opened, &'static str)> {
        macro_rules! opened {
            ($module:ident, $symbol:literal) => {
                // SAFETY: as in `search`; `culib` is asked only where there is one.
                unsafe {
                    $module::sys::is_culib_present().then(|| ($module::sys::culib(), $symbol))
                }
            };
        }
        match self {
            Self::Driver => opened!(driver, "cuDriverGetVersion"),
            Self::Nvrtc => opened!(nvrtc, "nvrtcVersion"),
            Self::CublasLt => opened!(cublaslt, "cublasLtGetVersion"),
            Self::Cublas => opened!(cublas, "cublasCreate_v2"),
            Self::Cusolver => opened!(cusolver, "cusolverGetVersion"),
            // Opened and called by this crate.
            Self::Nccl => None,
        }
    }
}

/// What looking for a library came to.
enum Search {
    Found(LibraryPlace),
    Missing,
    /// It is there, but calls would go to another version.
    Shadowed,
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

/// Opens a library for the rest of the process, where there is one.
fn keep_open(path: &Path) {
    // SAFETY: as in `Library::search`; the path is a toolkit's or one that the user named.
    if let Some(Ok(library)) = path.is_file().then(|| unsafe { Opened::new(path) }) {
        std::mem::forget(library);
    }
}
