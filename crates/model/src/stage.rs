//! The stages in which a block is computed and calibrated.

use gptq_checkpoint::{Expert, LinearId};

/// Linears that read the same inputs; the order in which a block is calibrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// q, k and v read the normed hidden states.
    Qkv,
    /// o reads the heads' contexts.
    Output,
    /// gate and up read the normed hidden states after attention; those of experts read the rows of the tokens
    /// that go through them.
    GateUp,
    /// down reads activation(gate) · up; those of experts read what theirs give.
    Down,
}

impl Stage {
    /// The stages in forward order.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];

    /// The stage whose outputs this one's inputs are made of.
    pub(crate) fn before(self) -> Self {
        match self {
            Self::Qkv | Self::Output => Self::Qkv,
            Self::GateUp | Self::Down => Self::GateUp,
        }
    }

    /// The stage of a linear.
    #[must_use]
    pub fn of(linear: LinearId) -> Self {
        match linear {
            LinearId::Q | LinearId::K | LinearId::V | LinearId::Qkv => Self::Qkv,
            LinearId::O => Self::Output,
            LinearId::Gate | LinearId::Up | LinearId::GateUp => Self::GateUp,
            LinearId::ExpertGate(_) | LinearId::ExpertUp(_) => Self::GateUp,
            LinearId::SharedGate | LinearId::SharedUp => Self::GateUp,
            LinearId::Down | LinearId::ExpertDown(_) | LinearId::SharedDown => Self::Down,
        }
    }
}

/// Linears that read the very same rows: those of a stage, or an expert's part of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reading {
    /// The stage.
    pub stage: Stage,
    /// The expert, where the linears are of one.
    pub expert: Option<Expert>,
}

impl Reading {
    /// What a linear reads.
    #[must_use]
    pub fn of(linear: LinearId) -> Self {
        Self { stage: Stage::of(linear), expert: linear.expert() }
    }
}

impl From<Stage> for Reading {
    /// That of a stage's linears that are of no expert.
    fn from(stage: Stage) -> Self {
        Self { stage, expert: None }
    }
}
