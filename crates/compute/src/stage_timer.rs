//! How long the stages of a computation take on a device, without waiting between them.

use std::time::{Duration, Instant};

use crate::Device;
use crate::cuda::Mark;
use crate::error::Result;

/// Times of consecutive stages. On a GPU only the queue is marked, so the host runs on; the times
/// are the device's own.
#[derive(Debug)]
pub struct StageTimer<S> {
    device: Device,
    start: Point,
    stages: Vec<(S, Point)>,
}

#[derive(Debug)]
enum Point {
    Host(Instant),
    Cuda(Mark),
}

impl Point {
    fn now(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Host(Instant::now())),
            Device::Cuda(cuda) => Ok(Self::Cuda(Mark::now(cuda)?)),
        }
    }

    fn until(&self, later: &Self) -> Result<Duration> {
        match (self, later) {
            (Self::Host(a), Self::Host(b)) => Ok(b.saturating_duration_since(*a)),
            (Self::Cuda(a), Self::Cuda(b)) => a.until(b),
            // All points of a value are of its device.
            _ => Ok(Duration::ZERO),
        }
    }
}

impl<S> StageTimer<S> {
    /// Starts the first stage.
    pub fn start(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), start: Point::now(device)?, stages: Vec::new() })
    }

    /// Ends the current stage, which is `stage`, and starts the next.
    pub fn mark(&mut self, stage: S) -> Result<()> {
        self.stages.push((stage, Point::now(&self.device)?));
        Ok(())
    }

    /// The stages and their times, in order; waits for the last.
    pub fn finish(self) -> Result<Vec<(S, Duration)>> {
        let mut from = self.start;
        let mut times = Vec::with_capacity(self.stages.len());
        for (stage, to) in self.stages {
            times.push((stage, from.until(&to)?));
            from = to;
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_timed_in_order() {
        let mut timer = StageTimer::start(&Device::Cpu).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        timer.mark("slow").unwrap();
        timer.mark("fast").unwrap();
        let times = timer.finish().unwrap();
        assert_eq!([times[0].0, times[1].0], ["slow", "fast"]);
        assert!(times[0].1 >= Duration::from_millis(5) && times[1].1 < times[0].1);
    }
}
