//! The pinned buffers that values go through on their way to a card and back: see `transfer`.

use std::sync::Mutex;

use cudarc::driver::{CudaEvent, PinnedHostSlice};

use super::driver::Driver;
use super::error::StageContext;
use crate::error::Result;
use crate::lock::lock;

/// Bytes of one half: copies of this size run at full speed, and two take no room worth naming.
pub(super) const HALF: usize = 16 << 20;
/// Bytes that one task copies, and the most that is a small upload.
pub(super) const PIECE: usize = 1 << 20;

/// The pinned buffers, each allocated at its first use. The two directions are apart so that an
/// upload does not wait for a read, which itself waits for queued work.
#[derive(Default)]
pub(super) struct Staging {
    pub(super) inward: Mutex<Option<Halves>>,
    /// For uploads of at most [`PIECE`] bytes.
    pub(super) small: Mutex<Option<Halves>>,
    pub(super) outward: Mutex<Option<Halves>>,
}

pub(super) struct Halves {
    pub(super) memory: [PinnedHostSlice<u8>; 2],
    /// The half that the next piece of an upload takes: small uploads, of one piece each, take turns.
    pub(super) next: usize,
    /// Recorded after the last copy from or to a half.
    pub(super) used: [CudaEvent; 2],
}

impl Halves {
    fn new(driver: &Driver, bytes: usize) -> Result<Self> {
        const STAGE: &str = "allocating pinned host memory";
        // SAFETY: every byte is written before it is read, by the host or by a copy.
        let half =
            || unsafe { driver.context().alloc_pinned_with_flags::<u8>(bytes, 0) }.stage(STAGE);
        let event = || driver.context().new_event(None).stage(STAGE);
        Ok(Self { memory: [half()?, half()?], next: 0, used: [event()?, event()?] })
    }
}

/// Runs `work` with one of the staging buffers, whose halves are of `bytes`.
pub(super) fn with<R>(
    (staging, bytes): (&Mutex<Option<Halves>>, usize),
    driver: &Driver,
    work: impl FnOnce(&mut Halves) -> Result<R>,
) -> Result<R> {
    let mut staging = lock(staging);
    let mut halves = match staging.take() {
        Some(halves) => halves,
        None => Halves::new(driver, bytes)?,
    };
    let outcome = work(&mut halves);
    *staging = Some(halves);
    outcome
}
