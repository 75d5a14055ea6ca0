//! What the time of a calibrated block goes to.

use std::collections::BTreeMap;

/// What a block's time goes to, in the order of the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// Between ranks.
    Exchange,
    /// Hessians and their factors.
    Factor,
    /// Inputs of linears.
    Forward,
    /// XᵀX of these.
    Gram,
    /// Codes on their way to the file.
    Pack,
    /// The unquantized model's states.
    Reference,
    /// Moving the weights of o and down.
    Shift,
    /// Choosing codes.
    Solve,
    /// Training the scales of the whole model, after its blocks.
    Tune,
}

impl Work {
    /// All of them.
    pub(crate) const ALL: [Self; 9] = [
        Self::Exchange,
        Self::Factor,
        Self::Forward,
        Self::Gram,
        Self::Pack,
        Self::Reference,
        Self::Shift,
        Self::Solve,
        Self::Tune,
    ];

    /// The name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::Factor => "factor",
            Self::Forward => "forward",
            Self::Gram => "gram",
            Self::Pack => "pack",
            Self::Reference => "reference",
            Self::Shift => "shift",
            Self::Solve => "solve",
            Self::Tune => "tune",
        }
    }
}

/// Seconds by what they went to.
pub(crate) type StageSeconds = BTreeMap<Work, f64>;
