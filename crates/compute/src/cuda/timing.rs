//! Marks in the queue of a card, whose times are known when the work before them is done.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

use super::context::Cuda;
use super::error::StageContext;
use crate::error::Result;

const STAGE: &str = "timing";

/// A point in a card's queue of work.
#[derive(Debug)]
pub(crate) struct Mark(CudaEvent);

impl Mark {
    /// Marks the end of what is queued now; does not wait.
    pub(crate) fn now(cuda: &Cuda) -> Result<Self> {
        let event = cuda.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        Ok(Self(event.stage(STAGE)?))
    }

    /// Device time from this mark to a later one; waits until that is reached.
    pub(crate) fn until(&self, later: &Self) -> Result<Duration> {
        later.0.synchronize().stage(STAGE)?;
        let milliseconds = self.0.elapsed_ms(&later.0).stage(STAGE)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

/// Measures the device time of what is queued between [`Timer::start`] and [`Timer::stop`].
#[derive(Debug)]
pub struct Timer {
    cuda: Arc<Cuda>,
    start: Mark,
}

impl Timer {
    /// Marks the start in the queue.
    pub fn start(cuda: &Arc<Cuda>) -> Result<Self> {
        Ok(Self { cuda: Arc::clone(cuda), start: Mark::now(cuda)? })
    }

    /// Waits until what was queued since the start is done, and returns its device time.
    pub fn stop(self) -> Result<Duration> {
        self.start.until(&Mark::now(&self.cuda)?)
    }
}
