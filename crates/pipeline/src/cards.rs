//! Cards whose rates are known without a benchmark on this machine: measured by this project, or
//! estimated from those by what data sheets promise.

use crate::bench::Width;
use crate::operations::{Extras, Operations};
use crate::stage_rates::{Entry, Source, Stage};

/// A kind of card.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    /// The name on the command line.
    pub name: &'static str,
    /// Bytes of memory; the least of those sold.
    pub memory: u64,
    /// The driver's names of it, to the letter: an `RTX 3090 Ti` or a MIG slice is another card.
    devices: &'static [&'static str],
    /// Dense fp16 products that its data sheet promises, with fp32 accumulation, in TFLOP/s.
    promised: f64,
    /// Seconds of [`MEASURED_WITH`]'s block under `autogptq`.
    measured: Option<f64>,
}

/// The cards of the table; the first is the one that others are scaled by.
pub const CARDS: [Card; 6] = [
    Card {
        name: "H100",
        memory: 80_000_000_000,
        devices: &["NVIDIA H100 80GB HBM3"],
        promised: 989.0,
        // 3.385 and 3.351 s (tests/bench/2026-11-23-h100.md and 2026-11-24-h100.md).
        measured: Some(3.37),
    },
    Card {
        name: "H200",
        memory: 141_000_000_000,
        devices: &["NVIDIA H200"],
        promised: 989.0,
        // A block of 4 bits, 128g, act-order (tests/bench/2026-11-28-h200.md).
        measured: Some(3.41),
    },
    Card {
        name: "A100",
        memory: 40_000_000_000,
        devices: &[
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA A100 80GB PCIe",
        ],
        promised: 312.0,
        measured: None,
    },
    Card {
        name: "L40S",
        memory: 48_000_000_000,
        devices: &["NVIDIA L40S"],
        promised: 181.0,
        measured: None,
    },
    Card {
        name: "RTX4090",
        memory: 24_000_000_000,
        devices: &["NVIDIA GeForce RTX 4090"],
        promised: 165.0,
        measured: None,
    },
    Card {
        name: "RTX3090",
        memory: 24_000_000_000,
        devices: &["NVIDIA GeForce RTX 3090"],
        promised: 71.0,
        measured: None,
    },
];

/// What the table's cards were measured with: windows, and tokens of each.
pub(crate) const MEASURED_WITH: (usize, usize) = (128, 4096);

/// Seconds of a 70B block by stage on one H100 (tests/bench/2026-11-24-h100.md, its second session):
/// how a block's time is shared out.
const STAGE_SECONDS: [(Stage, f64); 7] = [
    (Stage::Forward, 1.5300),
    (Stage::Gram, 0.8814),
    (Stage::Factor, 0.5465),
    (Stage::Solve, 0.3703),
    (Stage::SolveTrial, 0.8197),
    (Stage::Reference, 1.5349),
    (Stage::Shift, 0.8529),
];

/// What blocks with experts were measured with.
const EXPERTS_MEASURED_WITH: (usize, usize) = (128, 2048);

/// Seconds of blocks with experts by stage on one H200 (tests/bench/2026-11-29-tuned-scales.md), whose products
/// are smaller the more experts there are: the stages of `autogptq`, then what `best` has of its own. To the
/// shift falls all that no other stage of `best` counts.
const EXPERTS_SECONDS: [(&str, [(Stage, f64); 7]); 2] = [
    (
        "mixtral-8x7b",
        [
            (Stage::Forward, 0.411),
            (Stage::Gram, 0.237),
            (Stage::Factor, 0.795),
            (Stage::Solve, 0.557),
            (Stage::SolveTrial, 2.725),
            (Stage::Reference, 0.376),
            (Stage::Shift, 0.021),
        ],
    ),
    (
        "qwen3-30b-a3b",
        [
            (Stage::Forward, 0.665),
            (Stage::Gram, 0.081),
            (Stage::Factor, 0.570),
            (Stage::Solve, 0.341),
            (Stage::SolveTrial, 1.425),
            (Stage::Reference, 0.766),
            (Stage::Shift, 0.083),
        ],
    ),
];

/// The card that [`EXPERTS_SECONDS`] are of.
const EXPERTS_CARD: &str = "H200";

impl std::str::FromStr for Card {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = CARDS.into_iter().find(|card| card.name.eq_ignore_ascii_case(text));
        found.ok_or_else(|| {
            let names: Vec<&str> = CARDS.iter().map(|card| card.name).collect();
            format!("use one of {}", names.join(", "))
        })
    }
}

impl Card {
    pub(crate) fn of_device(name: &str) -> Option<&'static Self> {
        CARDS.iter().find(|card| card.devices.contains(&name))
    }

    /// Rates of all kinds of blocks that are known.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let experts = EXPERTS_SECONDS.iter().filter(|_| self.name == EXPERTS_CARD);
        let experts = experts.filter_map(|(width, seconds)| {
            let width: Width = width.parse().ok()?;
            let operations =
                Operations::of_block(&width.kind(), EXPERTS_MEASURED_WITH, Extras::REFERENCE);
            let rate =
                |&(stage, seconds): &(Stage, f64)| (stage, operations.of(stage.work()) / seconds);
            Some(Entry {
                hidden: width.hidden(),
                experts: true,
                ranks: 1,
                rates: seconds.iter().map(rate).collect(),
                from: Source::Table,
            })
        });
        std::iter::once(self.entry()).chain(experts).collect()
    }

    fn entry(&self) -> Entry {
        let [reference, ..] = CARDS;
        let scaled = |of: &Self| of.measured.map(|seconds| seconds * of.promised / self.promised);
        let seconds = self.measured.or(scaled(&reference)).unwrap_or(f64::INFINITY);
        let operations =
            Operations::of_block(&Width::LARGEST.kind(), MEASURED_WITH, Extras::REFERENCE);
        // The four stages of `autogptq`, which the block's seconds are of; what no stage counts is
        // spread over them.
        let of_block: f64 = STAGE_SECONDS[..4].iter().map(|(_, seconds)| seconds).sum();
        let rate = |&(stage, share): &(Stage, f64)| {
            (stage, operations.of(stage.work()) / (share / of_block * seconds))
        };
        Entry {
            hidden: Width::LARGEST.hidden(),
            experts: false,
            ranks: 1,
            rates: STAGE_SECONDS.iter().map(rate).collect(),
            from: if self.measured.is_some() { Source::Table } else { Source::DataSheet },
        }
    }
}
