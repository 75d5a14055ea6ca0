//! Facts about the CUDA installation, for `doctor` and bug reports; nothing here fails.

use std::path::PathBuf;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, result};
use cudarc::{cublaslt, cusolver, driver};

use super::driver::{architecture_of, kind_of};
use super::libraries::Library;
use super::library_places::LibraryPlace;
use super::{cache, nccl, nvrtc};

/// What was found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Each library this program can use.
    pub libraries: Vec<LibraryFacts>,
    /// The cards, in the driver's order.
    pub cards: Vec<Card>,
    /// Pairs of cards that cannot reach each other's memory: they exchange through the host's.
    pub apart: Vec<(usize, usize)>,
    /// Folder of compiled kernels.
    pub cache: Option<PathBuf>,
}

/// One library.
#[derive(Clone, Debug)]
pub struct LibraryFacts {
    /// The library.
    pub library: Library,
    /// Where it was found; none when it cannot be used.
    pub place: Option<&'static LibraryPlace>,
    /// Its version, where it has one to ask for.
    pub version: Option<String>,
}

/// One card.
#[derive(Clone, Debug)]
pub struct Card {
    /// Number for `Device::cuda`.
    pub ordinal: usize,
    /// The vendor's name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
    /// True when the kernels of this program can run on it.
    pub supported: bool,
}

impl Card {
    /// What [`Device::kind`](crate::Device::kind) says of it once it is opened.
    pub fn kind(&self) -> String {
        kind_of(&self.name, &architecture_of(self.capability))
    }
}

/// Looks for the driver, the libraries and the cards.
pub fn probe() -> Probe {
    let libraries = Library::ALL
        .into_iter()
        .map(|library| {
            let place = library.place();
            LibraryFacts { library, place, version: version(library) }
        })
        .collect();
    let cards = cards();
    let apart = apart(&cards);
    Probe { libraries, cards, apart, cache: cache::folder() }
}

fn driver_version() -> Option<(i32, i32)> {
    let mut version = 0;
    if !Library::Driver.is_present() {
        return None;
    }
    // SAFETY: the library is present and the pointer is valid for a write.
    unsafe { driver::sys::cuDriverGetVersion(&raw mut version) }.result().ok()?;
    Some((version / 1000, version % 1000 / 10))
}

fn version(library: Library) -> Option<String> {
    if !library.is_present() {
        return None;
    }
    let dotted = |v: usize, major: usize, minor: usize| {
        format!("{}.{}.{}", v / major, v % major / minor, v % minor)
    };
    let mut number = 0;
    match library {
        Library::Driver => driver_version().map(|(major, minor)| format!("CUDA {major}.{minor}")),
        Library::Nvrtc => nvrtc::version().ok().map(|(major, minor)| format!("{major}.{minor}")),
        // SAFETY: the library is present; the call takes nothing.
        Library::CublasLt => {
            Some(dotted(unsafe { cublaslt::sys::cublasLtGetVersion() }, 10_000, 100))
        }
        // Its own version call needs a handle, hence a card; it ships with cuBLASLt.
        Library::Cublas => None,
        Library::Cusolver => {
            // SAFETY: the library is present and the pointer is valid for a write.
            let status = unsafe { cusolver::sys::cusolverGetVersion(&raw mut number) };
            status.result().ok().map(|()| dotted(number as usize, 1000, 100))
        }
        Library::Nccl => nccl::version(),
    }
}

fn cards() -> Vec<Card> {
    if !Library::Driver.is_present() {
        return Vec::new();
    }
    let count = CudaContext::device_count().unwrap_or(0);
    (0..count.max(0) as usize).filter_map(card).collect()
}

/// Pairs without access to each other's memory.
fn apart(cards: &[Card]) -> Vec<(usize, usize)> {
    let reach = |from: usize, to: usize| {
        let device = |ordinal| result::device::get(i32::try_from(ordinal).ok()?).ok();
        let (from, to) = (device(from)?, device(to)?);
        let mut can = 0;
        // SAFETY: both devices came from the driver, and the pointer is valid for a write.
        unsafe { driver::sys::cuDeviceCanAccessPeer(&raw mut can, from, to) }.result().ok()?;
        Some(can != 0)
    };
    let pairs = cards
        .iter()
        .enumerate()
        .flat_map(|(i, a)| cards[i + 1..].iter().map(move |b| (a.ordinal, b.ordinal)));
    pairs
        .filter(|&(a, b)| !matches!((reach(a, b), reach(b, a)), (Some(true), Some(true))))
        .collect()
}

/// Reads a card without opening a context on it.
fn card(ordinal: usize) -> Option<Card> {
    let device = result::device::get(i32::try_from(ordinal).ok()?).ok()?;
    let attribute = |which| {
        // SAFETY: `device` came from the driver just above.
        unsafe { result::device::get_attribute(device, which) }.ok()
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Some(Card {
        ordinal,
        name: result::device::get_name(device).ok()?,
        capability: (major, minor),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.ok()?,
        supported: major >= 8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By it a card's benchmarks are found again without opening the card.
    #[test]
    fn a_card_has_one_name_opened_or_not() {
        let kind = |name: &str, capability| {
            let name = name.to_owned();
            Card { ordinal: 0, name, capability, memory: 0, supported: true }.kind()
        };
        assert_eq!(kind("NVIDIA H200", (9, 0)), "cuda (NVIDIA H200, sm_90a)");
        assert_eq!(kind("NVIDIA A100-PCIE-40GB", (8, 0)), "cuda (NVIDIA A100-PCIE-40GB, sm_80)");
    }
}
