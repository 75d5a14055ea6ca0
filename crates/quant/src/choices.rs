//! The choices a recipe is made of; each can be set alone.

use std::fmt::{self, Display};

/// Which weights a group's scale is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupWeights {
    /// Weights corrected up to the last block of 128 columns, as AutoGPTQ does; for one group a row,
    /// the weights before dead columns were zeroed.
    Stale,
    /// Weights corrected for every column before the group, dead columns being zero.
    Fresh,
}

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
    /// Among the same, the scale under which solving the group's columns leaves the least error: for
    /// groups of at most 128 columns with fresh weights, which are solved on their own; others as
    /// [`Clip::Search`].
    Solve,
}

/// Orthogonal matrices folded into the weights before they are quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    /// None.
    None,
    /// One in every attention head, between v and o.
    Heads,
    /// That, and one over the residual stream: norm gains are folded too, and the head is turned.
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
    /// Share of what the residual stream lacks that o and down make up for: 0 aims at their weights
    /// as they are. This share and the next need a walk of the unquantised model beside the quantised
    /// one.
    pub residual: f32,
    /// Share of the last states' drift that the head, which stays fp16, makes up for.
    pub head: f32,
    /// Rotations folded into the weights.
    pub rotate: Rotate,
}

impl Choices {
    /// AutoGPTQ's.
    pub const AUTOGPTQ: Self = Self {
        group_weights: GroupWeights::Stale,
        scales: ScalePrecision::F32,
        clip: Clip::None,
        residual: 0.0,
        head: 0.0,
        rotate: Rotate::None,
    };
    /// The lowest loss in the same file.
    pub const BEST: Self = Self {
        group_weights: GroupWeights::Fresh,
        scales: ScalePrecision::Half,
        clip: Clip::Solve,
        residual: 0.5,
        head: 1.0,
        rotate: Rotate::Full,
    };

    /// True when the unquantised model is walked beside the quantised one.
    pub fn needs_reference(&self) -> bool {
        self.residual > 0.0 || self.head > 0.0
    }

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
            ("clip", "solve") => self.clip = Clip::Solve,
            ("clip", _) => return Err(unknown("clip=none, =search or =solve")),
            ("rotate", "none") => self.rotate = Rotate::None,
            ("rotate", "heads") => self.rotate = Rotate::Heads,
            ("rotate", "full") => self.rotate = Rotate::Full,
            ("rotate", _) => return Err(unknown("rotate=none, =heads or =full")),
            ("residual" | "head", _) => match value.parse() {
                Ok(share) if (0.0..=1.0).contains(&share) => *self.share(key) = share,
                _ => return Err(unknown(&format!("{key}=0 to =1"))),
            },
            _ => {
                let keys = "group-weights, scales, clip, residual, head or rotate";
                return Err(unknown(keys));
            }
        }
        Ok(())
    }

    fn share(&mut self, key: &str) -> &mut f32 {
        match key {
            "residual" => &mut self.residual,
            _ => &mut self.head,
        }
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
            Clip::Solve => "solve",
        };
        let rotate = match self.rotate {
            Rotate::None => "none",
            Rotate::Heads => "heads",
            Rotate::Full => "full",
        };
        write!(
            f,
            "group-weights={group_weights} scales={scales} clip={clip} residual={} head={} \
             rotate={rotate}",
            self.residual, self.head
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
            ("clip", "clip=none, =search or =solve"),
            ("clip=maybe", "clip=none, =search or =solve"),
            ("residual=2", "residual=0 to =1"),
            ("residual=NaN", "residual=0 to =1"),
            ("head=-1", "head=0 to =1"),
            ("speed=fast", "group-weights, scales"),
        ] {
            let message = Choices::BEST.clone().set(setting).unwrap_err();
            assert!(message.contains(hint) && message.contains(setting), "{message}");
        }
    }
}
