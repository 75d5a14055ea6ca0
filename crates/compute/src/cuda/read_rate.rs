//! How fast a card reads its memory: the yardstick of products that read every weight once.

use std::sync::Arc;

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::context::Cuda;
use super::error::StageContext;
use super::timing::Timer;
use crate::error::Result;

/// Bytes a second of adding up a buffer of so many bytes, far more than caches hold; the best of some
/// runs.
///
/// # Errors
/// Memory that is not to be had, and those of the launch.
pub fn read_rate(cuda: &Arc<Cuda>, bytes: usize) -> Result<f64> {
    const STAGE: &str = "measuring memory";
    const RUNS: usize = 5;
    let words = bytes / 16;
    let buffer = cuda.zeros::<u32>(STAGE, words * 4)?;
    let function = cuda.kernel("read_memory.cu", "read_memory")?;
    let blocks = cuda.driver().multiprocessors() * 8;
    let mut sums = cuda.zeros::<u32>(STAGE, blocks)?;
    let config = LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    };
    let count = words as i64;
    let mut least = f64::INFINITY;
    for _ in 0..=RUNS {
        let timer = Timer::start(cuda)?;
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(buffer.slice()).arg(sums.make_mut()?).arg(&count);
        // SAFETY: the arguments are the kernel's: `count` words of 16 bytes, and a sum of every block.
        unsafe { launch.launch(config) }.stage(STAGE)?;
        least = least.min(timer.stop()?.as_secs_f64());
    }
    Ok((words * 16) as f64 / least)
}
