//! `--device` and `--gpu-memory`: where a command computes.

use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use gptq_compute::cuda::{Library, probe};
use gptq_compute::{Device, RankHandle};
use gptq_pipeline::progress::Progress;

use super::values::parse_bytes;
use crate::hint::advised;
use crate::launch::{Launched, launched};
use crate::local_ranks::LocalRanks;
use crate::printer::Printer;

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Where to compute: cpu, cuda:N, or several GPUs as cuda:0,1 or cuda:all [default: the first
    /// GPU, or the CPU without one]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<DeviceName>,
    /// Use at most this much memory of a GPU, such as 24GiB; the rest waits in host memory
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) gpu_memory: Option<u64>,
}

/// `cpu`, `cuda`, `cuda:N`, `cuda:N,M,…` or `cuda:all`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceName {
    Cpu,
    /// The first card, or that of the local rank.
    Cuda,
    Cards(Vec<usize>),
    All,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda),
            "cuda:all" => return Ok(Self::All),
            _ => {}
        }
        let wrong = || "use cpu, cuda, cuda:N, cuda:N,M,… or cuda:all".to_owned();
        let list = text.strip_prefix("cuda:").ok_or_else(wrong)?;
        let cards: Vec<usize> =
            list.split(',').map(|n| n.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?;
        match cards.iter().enumerate().find(|(i, card)| cards[..*i].contains(card)) {
            Some((_, card)) => Err(format!("GPU {card} is named twice")),
            None => Ok(Self::Cards(cards)),
        }
    }
}

impl DeviceArgs {
    /// Whether any of them was given.
    pub(crate) fn is_given(&self) -> bool {
        self.device.is_some() || self.gpu_memory.is_some()
    }

    /// Opens the devices, says which they are, and gives each its budget. Where a launcher has
    /// started several processes, waits for the others.
    pub(crate) fn open(&self, printer: &Printer) -> Result<LocalRanks> {
        let launched = launched()?;
        let handles = match &launched {
            Some(Launched { launch, .. }) => {
                printer.note(&format!(
                    "rank {} of {}, meeting the others at {}",
                    launch.rank,
                    launch.size,
                    launch.meeting_place()
                ));
                let handle = RankHandle::join_announcing(launch, &|warning| printer.warn(warning))?;
                if let Some(strangers) = handle.strangers() {
                    printer.warn(strangers);
                }
                Some(vec![handle])
            }
            None => None,
        };
        let devices = match &launched {
            Some(launched) => vec![self.local(launched)?],
            None => self.all()?,
        };
        let many = devices.len() > 1 || launched.is_some();
        for device in &devices {
            self.limit(device)?;
            if many && matches!(device, Device::Cuda(_)) && !Library::Nccl.is_present() {
                let file = Library::Nccl.file();
                let message = format!("several GPUs talk through NCCL, but `{file}` was not found");
                return Err(advised(message, Library::Nccl.hint()));
            }
        }
        let handles = handles.unwrap_or_else(|| match devices.len() {
            1 => vec![RankHandle::alone()],
            count => RankHandle::threads(count),
        });
        let local_ranks = LocalRanks::new(devices, handles);
        printer.note(&format!("device: {}", local_ranks.name()));
        local_ranks.note_unequal_memory(printer)?;
        Ok(local_ranks)
    }

    /// Opens every device of a command that gives each work of its own; `advice` says what to do
    /// instead where a launcher has started several processes.
    pub(crate) fn open_each(&self, printer: &Printer, advice: &str) -> Result<Vec<Device>> {
        if launched()?.is_some_and(|launched| launched.launch.size > 1) {
            let message = "this command is one process, also for several devices";
            return Err(advised(message, advice));
        }
        let devices = self.all()?;
        devices.iter().try_for_each(|device| self.limit(device))?;
        let many = if devices.len() > 1 { "s" } else { "" };
        printer.note(&format!("device{many}: {}", names(&devices)));
        Ok(devices)
    }

    /// Opens the device of a command that uses one; `advice` says what to do instead.
    pub(crate) fn open_one(&self, printer: &Printer, advice: &str) -> Result<Device> {
        self.check_one(advice)?;
        Ok(self.open(printer)?.device().clone())
    }

    /// Refuses several devices, before any is opened; `advice` says what to do instead, or why.
    pub(crate) fn check_one(&self, advice: &str) -> Result<()> {
        let several = match (launched()?, &self.device) {
            (Some(launched), _) => launched.launch.size > 1,
            (None, Some(DeviceName::Cards(cards))) => cards.len() > 1,
            (None, Some(DeviceName::All)) => every_card()?.len() > 1,
            (None, Some(DeviceName::Cpu | DeviceName::Cuda) | None) => false,
        };
        if several {
            return Err(advised("this command uses one device", advice));
        }
        Ok(())
    }

    /// What a process of this program is to be told so that it uses the devices that this one would, and
    /// the type of the numbers there; nothing is opened.
    pub(crate) fn for_child(&self) -> Result<(Vec<String>, &'static str)> {
        let cards: Vec<_> = self.cards()?.iter().map(usize::to_string).collect();
        let (name, dtype) = match cards.is_empty() {
            true => ("cpu".to_owned(), Device::CPU_DTYPE),
            false => (format!("cuda:{}", cards.join(",")), Device::GPU_DTYPE),
        };
        let mut options = vec![format!("--device={name}")];
        options.extend(self.gpu_memory.map(|bytes| format!("--gpu-memory={bytes}")));
        Ok((options, dtype))
    }

    /// The devices of a process that is alone.
    fn all(&self) -> Result<Vec<Device>> {
        match self.cards()? {
            cards if cards.is_empty() => Ok(vec![Device::Cpu]),
            cards => cards.into_iter().map(|card| Ok(Device::cuda(card)?)).collect(),
        }
    }

    /// The cards of a process that is alone; none for the CPU.
    fn cards(&self) -> Result<Vec<usize>> {
        Ok(match &self.device {
            None => every_card().into_iter().flatten().take(1).collect(),
            Some(DeviceName::Cpu) => Vec::new(),
            Some(DeviceName::Cuda) => vec![0],
            Some(DeviceName::Cards(cards)) => cards.clone(),
            Some(DeviceName::All) => every_card()?,
        })
    }

    /// The device of a process among others.
    fn local(&self, launched: &Launched) -> Result<Device> {
        let local = launched.local_rank;
        let cards = match &self.device {
            Some(DeviceName::Cpu) => return Ok(Device::Cpu),
            Some(DeviceName::Cards(cards)) => cards.clone(),
            Some(DeviceName::Cuda | DeviceName::All) => every_card()?,
            None => match every_card() {
                Ok(cards) => cards,
                Err(_) => return Ok(Device::Cpu),
            },
        };
        // A launcher may show each process its own card alone.
        match if cards.len() == 1 { cards.first() } else { cards.get(local) } {
            Some(&card) => Ok(Device::cuda(card)?),
            None => {
                let message = format!(
                    "this host has {} GPUs for the ranks, and this is its rank {local} (from 0)",
                    cards.len()
                );
                Err(advised(message, "start fewer processes on it"))
            }
        }
    }

    /// Gives a device its budget.
    fn limit(&self, device: &Device) -> Result<()> {
        match (device, self.gpu_memory) {
            (Device::Cuda(cuda), Some(bytes)) => {
                cuda.set_memory_budget(usize::try_from(bytes).unwrap_or(usize::MAX));
            }
            (Device::Cpu, Some(_)) => {
                return Err(advised(
                    "--gpu-memory was given, but the device is the CPU",
                    "leave it out, or use --device cuda",
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

/// What some devices are called together.
pub(crate) fn names(devices: &[Device]) -> String {
    let names: Vec<String> = devices.iter().map(Device::name).collect();
    match names.as_slice() {
        [first, others @ ..] if !others.is_empty() && others.iter().all(|other| other == first) => {
            format!("{} × {first}", names.len())
        }
        names => names.join(", "),
    }
}

/// Every card that the kernels support.
fn every_card() -> Result<Vec<usize>> {
    let cards: Vec<usize> =
        probe().cards.iter().filter(|card| card.supported).map(|card| card.ordinal).collect();
    if cards.is_empty() {
        let message = "no GPU of compute capability 8.0 or newer was found";
        return Err(advised(message, "see gptq doctor"));
    }
    Ok(cards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_told_what_was_typed() {
        let told = |device: &str, gpu_memory| {
            let device = Some(device.parse().unwrap());
            DeviceArgs { device, gpu_memory }.for_child()
        };
        assert_eq!(told("cpu", None).unwrap(), (vec!["--device=cpu".to_owned()], "f32"));
        let (options, dtype) = told("cuda:3", Some(5)).unwrap();
        assert_eq!(
            (options.join(" "), dtype),
            ("--device=cuda:3 --gpu-memory=5".to_owned(), "fp16")
        );
        assert_eq!(told("cuda:1,0", None).unwrap(), (vec!["--device=cuda:1,0".to_owned()], "fp16"));
    }

    #[test]
    fn devices_are_read_as_typed() {
        assert_eq!("cpu".parse(), Ok(DeviceName::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda));
        assert_eq!("cuda:3".parse(), Ok(DeviceName::Cards(vec![3])));
        assert_eq!("cuda:1,0".parse(), Ok(DeviceName::Cards(vec![1, 0])));
        assert_eq!("cuda:all".parse(), Ok(DeviceName::All));
        for wrong in ["gpu", "cuda:", "cuda:x", "CPU", "cuda:0,", "cuda:1,1", "cuda:0-1"] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong}");
        }
    }
}
