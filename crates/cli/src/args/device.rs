//! `--device` and `--gpu-memory`: where a command computes.

use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use gptq_compute::Device;

use super::values::parse_bytes;
use crate::printer::Printer;

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Where to compute: cpu or cuda:N [default: the first GPU, or the CPU without one]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceName>,
    /// Use at most this much GPU memory, such as 24GiB; the rest waits in host memory
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) gpu_memory: Option<u64>,
}

/// `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceName {
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        ordinal.map(Self::Cuda).ok_or_else(|| "use cpu, cuda or cuda:N".to_owned())
    }
}

impl DeviceArgs {
    /// Opens the device, says which it is, and gives it its budget.
    pub(crate) fn open(&self, printer: &Printer) -> Result<Device> {
        let device = match self.device {
            Some(DeviceName::Cpu) => Device::Cpu,
            Some(DeviceName::Cuda(ordinal)) => Device::cuda(ordinal)?,
            None => Device::best()?,
        };
        match (&device, self.gpu_memory) {
            (Device::Cuda(cuda), Some(bytes)) => {
                cuda.set_memory_budget(usize::try_from(bytes).unwrap_or(usize::MAX));
            }
            (Device::Cpu, Some(_)) => {
                anyhow::bail!(
                    "--gpu-memory was given, but the device is the CPU; leave it out, or use --device cuda"
                )
            }
            _ => {}
        }
        printer.note(&format!("device: {}", device.name()));
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_typed() {
        assert_eq!("cpu".parse(), Ok(DeviceName::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceName::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda:x", "CPU"] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
        }
    }
}
