//! The choices a recipe is made of; each can be set alone.

use std::fmt::{self, Display};

pub use gptq_compute::cuda::GroupWeights;

/// Precision of a scale while codes are chosen for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScalePrecision {
    /// f32, rounded to fp16 only in the file: loaders compute with another scale than the solver.
    F32,
    /// Rounded to fp16 first, so that the solver compensates what loaders will compute.
    Half,
}

/// How a group's scale follows from its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clip {
    /// The largest weight fits: AutoGPTQ's absmax.
    None,
    /// The scale, among fractions of the absmax one, that minimises Σ diag(H) (w − ŵ)².
    Search,
}

/// Orthogonal matrices folded into the weights before they are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    /// None.
    None,
    /// One in every attention head, between v and o.
    Heads,
    /// That, and one over the residual stream: norm gains are folded too, and a tied head becomes a
    /// tensor of its own.
    Full,
}

/// What the solver does where GPTQ leaves a choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choices {
    /// Weights that a group's scale is computed from.
    pub group_weights: GroupWeights,
    /// Precision of scales while solving.
    pub scales: ScalePrecision,
    /// Search for scales.
    pub clip: Clip,
    /// Strength of GPTAQ's asymmetric term (Li et al., arXiv 2504.02692); 0 leaves it out, and with
    /// it the walk of the unquantised model.
    pub asymmetric: f32,
    /// Rotations folded into the weights.
    pub rotate: Rotate,
}

impl Choices {
    /// AutoGPTQ's.
    pub const AUTOGPTQ: Self = Self {
        group_weights: GroupWeights::Stale,
        scales: ScalePrecision::F32,
        clip: Clip::None,
        asymmetric: 0.0,
        rotate: Rotate::None,
    };
    /// The lowest loss in the same file.
    pub const BEST: Self = Self {
        group_weights: GroupWeights::Fresh,
        scales: ScalePrecision::Half,
        clip: Clip::Search,
        asymmetric: 0.25,
        rotate: Rotate::Full,
    };

    /// Sets one choice from `KEY=VALUE`, in the form that [`Choices`] prints.
    ///
    /// # Errors
    /// A sentence that says what is possible.
    pub fn set(&mut self, setting: &str) -> std::result::Result<(), String> {
        let unknown = |values: &str| format!("`{setting}` is no choice; use {values}");
        let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
        match (key, value) {
            ("group-weights", "stale") => self.group_weights = GroupWeights::Stale,
            ("group-weights", "fresh") => self.group_weights = GroupWeights::Fresh,
            ("group-weights", _) => return Err(unknown("group-weights=stale or =fresh")),
            ("scales", "f32") => self.scales = ScalePrecision::F32,
            ("scales", "fp16") => self.scales = ScalePrecision::Half,
            ("scales", _) => return Err(unknown("scales=f32 or =fp16")),
            ("clip", "none") => self.clip = Clip::None,
            ("clip", "search") => self.clip = Clip::Search,
            ("clip", _) => return Err(unknown("clip=none or =search")),
            ("rotate", "none") => self.rotate = Rotate::None,
            ("rotate", "heads") => self.rotate = Rotate::Heads,
            ("rotate", "full") => self.rotate = Rotate::Full,
            ("rotate", _) => return Err(unknown("rotate=none, =heads or =full")),
            ("asymmetric", _) => match value.parse() {
                Ok(strength) if (0.0..=1.0).contains(&strength) => self.asymmetric = strength,
                _ => return Err(unknown("asymmetric=0 to =1")),
            },
            _ => return Err(unknown("group-weights, scales, clip, asymmetric or rotate")),
        }
        Ok(())
    }
}

impl Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group_weights = match self.group_weights {
            GroupWeights::Stale => "stale",
            GroupWeights::Fresh => "fresh",
        };
        let scales = match self.scales {
            ScalePrecision::F32 => "f32",
            ScalePrecision::Half => "fp16",
        };
        let clip = match self.clip {
            Clip::None => "none",
            Clip::Search => "search",
        };
        let rotate = match self.rotate {
            Rotate::None => "none",
            Rotate::Heads => "heads",
            Rotate::Full => "full",
        };
        write!(
            f,
            "group-weights={group_weights} scales={scales} clip={clip} asymmetric={} rotate={rotate}",
            self.asymmetric
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_set() {
        for choices in [Choices::AUTOGPTQ, Choices::BEST] {
            let other = if choices == Choices::BEST { Choices::AUTOGPTQ } else { Choices::BEST };
            let mut set = other;
            for setting in choices.to_string().split(' ') {
                set.set(setting).unwrap();
            }
            assert_eq!(set, choices);
        }
        let mut heads = Choices::BEST;
        heads.set("rotate=heads").unwrap();
        assert_eq!(heads.rotate, Rotate::Heads);
    }

    #[test]
    fn mistakes_say_what_is_possible() {
        for (setting, hint) in [
            ("clip", "clip=none or =search"),
            ("clip=maybe", "clip=none or =search"),
            ("asymmetric=2", "asymmetric=0 to =1"),
            ("asymmetric=NaN", "asymmetric=0 to =1"),
            ("speed=fast", "group-weights, scales"),
        ] {
            let message = Choices::BEST.clone().set(setting).unwrap_err();
            assert!(message.contains(hint) && message.contains(setting), "{message}");
        }
    }
}
