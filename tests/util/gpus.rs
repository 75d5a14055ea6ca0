//! The GPUs of this machine, for tests that need one or several.

use std::sync::OnceLock;

use gptq_compute::Device;
use gptq_compute::cuda::{Library, probe};

use super::needs::Need;

/// Ordinals of the GPUs that can be used, or what was found instead.
fn supported() -> Result<Vec<usize>, String> {
    let found = probe();
    let usable: Vec<usize> =
        found.cards.iter().filter(|card| card.supported).map(|card| card.ordinal).collect();
    if usable.is_empty() {
        return Err("no GPU of compute capability 8.0 or newer was found".to_owned());
    }
    Ok(usable)
}

/// The first GPU; without one the test says so and should return. A GPU that does not open fails.
#[allow(dead_code, reason = "each test binary uses a part of it")]
#[expect(clippy::unwrap_used, reason = "a helper of tests")]
#[track_caller]
pub(crate) fn gpu() -> Option<Device> {
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    match DEVICE.get_or_init(|| supported().map(|all| Device::cuda(all[0]).unwrap())) {
        Ok(device) => Some(device.clone()),
        Err(reason) => {
            Need::Gpu.is_missing(reason);
            None
        }
    }
}

/// All GPUs, where there are two or more and NCCL.
#[allow(dead_code, reason = "each test binary uses a part of it")]
#[expect(clippy::unwrap_used, reason = "a helper of tests")]
#[track_caller]
pub(crate) fn gpus() -> Option<Vec<Device>> {
    let usable = match supported() {
        Ok(usable) if usable.len() < 2 => Err("only one GPU was found".to_owned()),
        Ok(_) if !Library::Nccl.is_present() => {
            Err(format!("{} is not present", Library::Nccl.file()))
        }
        found => found,
    };
    match usable {
        Ok(usable) => Some(usable.into_iter().map(|card| Device::cuda(card).unwrap()).collect()),
        Err(reason) => {
            Need::Gpus.is_missing(reason);
            None
        }
    }
}
