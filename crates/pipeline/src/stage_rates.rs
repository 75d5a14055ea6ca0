//! Rates of a device by stage, and where they come from: what tables and files of rates hold.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::work::Work;

/// What is counted, and has a rate of its own. The solver's operations are counted alike whatever it
/// tries for a group's scales, which takes it longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    Forward,
    Gram,
    Factor,
    /// With `clip=none`.
    Solve,
    /// With `clip=search`.
    SolveSearch,
    /// With `clip=solve`.
    SolveTrial,
    Reference,
    Shift,
    Tune,
}

impl Stage {
    /// What is counted and timed under this.
    pub(crate) fn work(self) -> Work {
        match self {
            Self::Forward => Work::Forward,
            Self::Gram => Work::Gram,
            Self::Factor => Work::Factor,
            Self::Solve | Self::SolveSearch | Self::SolveTrial => Work::Solve,
            Self::Reference => Work::Reference,
            Self::Shift => Work::Shift,
            Self::Tune => Work::Tune,
        }
    }
}

/// Operations a second by stage.
pub(crate) type Rates = BTreeMap<Stage, f64>;

/// Where rates come from, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// `gptq bench` on this device.
    Bench,
    /// This project's measurements of such a card.
    Table,
    /// Those of a block of quite another width, or of one without experts for one that has them.
    OtherWidth,
    /// Those of one device, for several.
    OneDevice,
    /// Those of a forward, for passes back.
    ForwardRate,
    /// Those of a run that holds all on the device, for one that does not.
    Offloaded,
    /// Those of the table's first card, by what data sheets promise of both.
    DataSheet,
}

impl Source {
    /// Whether nothing quite alike was measured.
    #[must_use]
    pub fn is_estimate(self) -> bool {
        self > Self::Table
    }

    /// In words, after a time.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bench => "by what gptq bench measured on it",
            Self::Table => "as such cards were measured",
            Self::OtherWidth => "estimated from a block of another shape",
            Self::OneDevice => "estimated from one device's rates",
            Self::ForwardRate => "estimated from the rate of a forward",
            Self::Offloaded => "estimated from a run whose activations stay on the device",
            Self::DataSheet => "estimated from an H100's by data sheets",
        }
    }
}

/// Rates of a device, as measured on one width.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Width of the residual stream.
    pub(crate) hidden: usize,
    /// Whether its MLP was a mixture of experts, whose products are many and small.
    pub(crate) experts: bool,
    /// Devices that worked together.
    pub(crate) ranks: usize,
    pub(crate) rates: Rates,
    pub(crate) from: Source,
}
