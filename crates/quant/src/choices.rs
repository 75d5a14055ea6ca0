//! The choices a recipe is made of; each can be set alone.

use std::fmt::{self, Display};

use crate::{Error, Result};

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
    /// The scale, among fractions of the absmax one, that minimizes Σ diag(H) (w − ŵ)².
    Search,
    /// Among the same, the scale under which solving the group's columns leaves the least error. With
    /// fresh weights; stale ones as [`Clip::Search`]. A group of more than 128 columns is tried in
    /// blocks of 128 that do not know of each other.
    Solve,
}

/// Which signs a group's scale may have. Codes reach one step further below 0 than above it, so a
/// negative scale gives that step to the positive weights; loaders multiply by what the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signs {
    /// Positive, as AutoGPTQ's.
    Positive,
    /// Whichever loses less, among the candidates of [`Clip::Search`] or [`Clip::Solve`]; of 8 bits
    /// positive all the same ([`QuantSpec::signs`](crate::QuantSpec::signs)).
    Both,
}

/// Orthogonal matrices folded into the weights before they are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotate {
    /// None.
    None,
    /// One in every attention head, between v and o.
    Heads,
    /// That, and one over the residual stream: norm gains are folded too, and the head is turned.
    Full,
    /// As full, with the residual stream's learned from the model's weights ([`Learner`](crate::Learner)).
    Learned,
}

/// What the Hessian of v is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueInputs {
    /// Its inputs X, as that of q and k.
    Plain,
    /// What attention makes of them: a head's contexts are A X Wᵀ, A being its weights and W v's rows, so that
    /// an error of W is seen through A X alone. The order of columns stays that of q and k.
    Attended,
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
    /// Signs of the scales that the search tries.
    pub signs: Signs,
    /// Share of what the residual stream lacks that o and down make up for: 0 aims at their weights
    /// as they are. This share and the next need a walk of the unquantized model beside the quantized
    /// one.
    pub residual: f32,
    /// Share of the last states' drift that the head, which stays fp16, makes up for.
    pub head: f32,
    /// Rotations folded into the weights.
    pub rotate: Rotate,
    /// What the Hessian of v is made of.
    pub values: ValueInputs,
    /// Steps of tuning all group scales by the finished model's KL to the unquantized one; 0 for none.
    pub tune: u32,
    /// How far the first of these steps moves the logarithm of a scale, about; later ones move it less.
    pub tune_rate: f32,
}

impl Choices {
    /// AutoGPTQ's.
    pub const AUTOGPTQ: Self = Self {
        group_weights: GroupWeights::Stale,
        scales: ScalePrecision::F32,
        clip: Clip::None,
        signs: Signs::Positive,
        residual: 0.0,
        head: 0.0,
        rotate: Rotate::None,
        values: ValueInputs::Plain,
        tune: 0,
        tune_rate: Self::TUNE_RATE,
    };
    /// The lowest loss in the same file.
    pub const BEST: Self = Self {
        group_weights: GroupWeights::Fresh,
        scales: ScalePrecision::Half,
        clip: Clip::Solve,
        signs: Signs::Both,
        residual: 0.5,
        head: 1.0,
        rotate: Rotate::Learned,
        values: ValueInputs::Plain,
        tune: 0,
        tune_rate: Self::TUNE_RATE,
    };
    /// Those, and tuned scales.
    pub const TUNED: Self = Self { tune: 64, ..Self::BEST };
    /// The rate of tuning where none is asked for.
    pub const TUNE_RATE: f32 = 2e-3;
    /// Steps of tuning that may be asked for.
    pub const MOST_STEPS: u32 = 100_000;
    /// The largest rate: a tenth of a scale a step.
    pub const MOST_RATE: f32 = 0.1;

    /// Name of the choice of the head's share, for messages about it.
    pub const HEAD: &str = "head";
    /// Name of the choice of the residual stream's share, likewise.
    pub const RESIDUAL: &str = "residual";
    /// Name of the choice of v's Hessian, likewise.
    pub const VALUES: &str = "values";
    /// Name of the choice of tuning steps, likewise.
    pub const TUNE: &str = "tune";
    /// Name of the choice of their rate, likewise.
    pub const RATE: &str = "tune-rate";

    /// True when the unquantized model is walked beside the quantized one.
    pub fn needs_reference(&self) -> bool {
        self.residual > 0.0 || self.head > 0.0 || self.tune > 0
    }

    /// Sets one choice from `KEY=VALUE`, in the form that [`Choices`] prints.
    ///
    /// # Errors
    /// [`Error::UnknownChoice`], which says what is possible.
    pub fn set(&mut self, setting: &str) -> Result<()> {
        let unknown =
            |possible: String| Error::UnknownChoice { setting: setting.to_owned(), possible };
        let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
        let Some(choice) = TABLE.iter().find(|choice| choice.key == key) else {
            return Err(unknown(listed(TABLE.iter().map(|choice| choice.key.to_owned()))));
        };
        (choice.set)(self, value).ok_or_else(|| unknown(choice.possible()))
    }

    /// Every choice with its values, as help texts show them.
    pub fn help() -> String {
        let help = |choice: &Choice| match choice.values {
            Values::Names(names) => format!("{}={}", choice.key, names().join("|")),
            Values::Share => format!("{}=0..1", choice.key),
            Values::Steps => format!("{}=STEPS", choice.key),
            Values::Rate => format!("{}=0..{}", choice.key, Choices::MOST_RATE),
        };
        TABLE.iter().map(help).collect::<Vec<_>>().join(", ")
    }
}

impl Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Files of before there was a choice say nothing of it; those that were made so still stay as they are.
        let is_said = |choice: &&Choice| match choice.key {
            Self::TUNE | Self::RATE => self.tune > 0,
            Self::VALUES => self.values != ValueInputs::Plain,
            _ => true,
        };
        let said = TABLE.iter().filter(is_said);
        for (i, choice) in said.enumerate() {
            let space = if i == 0 { "" } else { " " };
            write!(f, "{space}{}={}", choice.key, (choice.value)(self))?;
        }
        Ok(())
    }
}

/// A choice by name: the one place that knows how it is written.
struct Choice {
    key: &'static str,
    values: Values,
    /// Its value as text.
    value: fn(&Choices) -> String,
    /// Takes a value from text, if there is such a one.
    set: fn(&mut Choices, &str) -> Option<()>,
}

/// The values that a choice takes.
#[derive(Clone, Copy)]
enum Values {
    /// One of these names.
    Names(fn() -> Vec<&'static str>),
    /// A share from 0 to 1.
    Share,
    /// A number of steps.
    Steps,
    /// A rate of tuning.
    Rate,
}

/// All choices, in the order in which they are printed.
const TABLE: [Choice; 10] = [
    Choice {
        key: "group-weights",
        values: Values::Names(names::<GroupWeights>),
        value: |choices| choices.group_weights.name().to_owned(),
        set: |choices, text| GroupWeights::named(text).map(|v| choices.group_weights = v),
    },
    Choice {
        key: "scales",
        values: Values::Names(names::<ScalePrecision>),
        value: |choices| choices.scales.name().to_owned(),
        set: |choices, text| ScalePrecision::named(text).map(|v| choices.scales = v),
    },
    Choice {
        key: "clip",
        values: Values::Names(names::<Clip>),
        value: |choices| choices.clip.name().to_owned(),
        set: |choices, text| Clip::named(text).map(|v| choices.clip = v),
    },
    Choice {
        key: "signs",
        values: Values::Names(names::<Signs>),
        value: |choices| choices.signs.name().to_owned(),
        set: |choices, text| Signs::named(text).map(|v| choices.signs = v),
    },
    Choice {
        key: Choices::RESIDUAL,
        values: Values::Share,
        value: |choices| choices.residual.to_string(),
        set: |choices, text| share(text).map(|v| choices.residual = v),
    },
    Choice {
        key: Choices::HEAD,
        values: Values::Share,
        value: |choices| choices.head.to_string(),
        set: |choices, text| share(text).map(|v| choices.head = v),
    },
    Choice {
        key: Rotate::KEY,
        values: Values::Names(names::<Rotate>),
        value: |choices| choices.rotate.name().to_owned(),
        set: |choices, text| Rotate::named(text).map(|v| choices.rotate = v),
    },
    Choice {
        key: Choices::VALUES,
        values: Values::Names(names::<ValueInputs>),
        value: |choices| choices.values.name().to_owned(),
        set: |choices, text| ValueInputs::named(text).map(|v| choices.values = v),
    },
    Choice {
        key: Choices::TUNE,
        values: Values::Steps,
        value: |choices| choices.tune.to_string(),
        set: |choices, text| steps(text).map(|v| choices.tune = v),
    },
    Choice {
        key: Choices::RATE,
        values: Values::Rate,
        value: |choices| choices.tune_rate.to_string(),
        set: |choices, text| rate(text).map(|v| choices.tune_rate = v),
    },
];

impl Choice {
    /// Its settings, for a person: `clip=none, =search or =solve`.
    fn possible(&self) -> String {
        match self.values {
            Values::Names(names) => {
                format!("{}{}", self.key, listed(names().iter().map(|name| format!("={name}"))))
            }
            Values::Share => format!("{}=0 to =1", self.key),
            Values::Steps => format!("{}=0 to ={}", self.key, Choices::MOST_STEPS),
            Values::Rate => format!("{}=0 to ={}, but not 0", self.key, Choices::MOST_RATE),
        }
    }
}

/// A choice between a few values.
trait Named: Copy + 'static {
    const ALL: &'static [Self];

    fn name(self) -> &'static str;

    fn named(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|value| value.name() == text)
    }
}

/// Names of values, each once; the compiler sees to it that none is left out.
macro_rules! named {
    ($type:ident: $($value:ident = $name:literal),+) => {
        impl Named for $type {
            const ALL: &'static [Self] = &[$(Self::$value),+];

            fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name),+
                }
            }
        }
    };
}

named!(GroupWeights: Stale = "stale", Fresh = "fresh");
named!(ScalePrecision: F32 = "f32", Half = "fp16");
named!(Clip: None = "none", Search = "search", Solve = "solve");
named!(Signs: Positive = "positive", Both = "both");
named!(ValueInputs: Plain = "plain", Attended = "attended");
named!(Rotate: None = "none", Heads = "heads", Full = "full", Learned = "learned");

impl Rotate {
    /// Whether the residual stream is turned.
    #[must_use]
    pub fn turns_stream(self) -> bool {
        matches!(self, Self::Full | Self::Learned)
    }

    /// Name of the choice, for messages about it.
    pub const KEY: &str = "rotate";

    /// Its name in settings and reports.
    pub fn name(self) -> &'static str {
        Named::name(self)
    }
}

fn names<T: Named>() -> Vec<&'static str> {
    T::ALL.iter().map(|value| value.name()).collect()
}

/// A share from 0 to 1.
fn share(text: &str) -> Option<f32> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share))
}

/// A number of steps.
fn steps(text: &str) -> Option<u32> {
    text.parse().ok().filter(|steps| *steps <= Choices::MOST_STEPS)
}

/// A rate above 0.
fn rate(text: &str) -> Option<f32> {
    text.parse().ok().filter(|rate| *rate > 0.0 && *rate <= Choices::MOST_RATE)
}

/// `a, b or c`.
fn listed(words: impl Iterator<Item = String>) -> String {
    let words: Vec<String> = words.collect();
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, first)) => format!("{} or {last}", first.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_set() {
        for choices in [Choices::AUTOGPTQ, Choices::BEST, Choices::TUNED] {
            let other =
                if choices == Choices::AUTOGPTQ { Choices::BEST } else { Choices::AUTOGPTQ };
            let mut set = other;
            for setting in choices.to_string().split(' ') {
                set.set(setting).unwrap();
            }
            assert_eq!(set, choices);
        }
        let mut heads = Choices::BEST;
        heads.set("rotate=heads").unwrap();
        assert_eq!(heads.rotate, Rotate::Heads);
        let mut full = Choices::TUNED;
        full.set("rotate=full").unwrap();
        let mut set = Choices::BEST;
        full.to_string().split(' ').for_each(|setting| set.set(setting).unwrap());
        assert_eq!(set, full);
    }

    #[test]
    fn what_is_not_tuned_says_nothing_of_it() {
        assert!(!Choices::BEST.to_string().contains("tune"));
        assert!(Choices::TUNED.to_string().ends_with(" rotate=learned tune=64 tune-rate=0.002"));
    }

    #[test]
    fn a_plain_hessian_of_v_is_not_spoken_of() {
        let mut choices = Choices::BEST;
        assert!(!choices.to_string().contains("values"));
        choices.set("values=attended").unwrap();
        assert!(choices.to_string().ends_with(" rotate=learned values=attended"));
        let mut set = Choices::BEST;
        choices.to_string().split(' ').for_each(|setting| set.set(setting).unwrap());
        assert_eq!(set, choices);
    }

    #[test]
    fn every_choice_is_listed_with_its_values() {
        assert_eq!(
            Choices::help(),
            "group-weights=stale|fresh, scales=f32|fp16, clip=none|search|solve, \
             signs=positive|both, residual=0..1, head=0..1, rotate=none|heads|full|learned, \
             values=plain|attended, tune=STEPS, tune-rate=0..0.1"
        );
    }

    #[test]
    fn mistakes_say_what_is_possible() {
        for (setting, hint) in [
            ("clip", "clip=none, =search or =solve"),
            ("clip=maybe", "clip=none, =search or =solve"),
            ("signs=negative", "signs=positive or =both"),
            ("residual=2", "residual=0 to =1"),
            ("residual=NaN", "residual=0 to =1"),
            ("head=-1", "head=0 to =1"),
            ("tune=-1", "tune=0 to =100000"),
            ("tune=100001", "tune=0 to =100000"),
            ("tune=1.5", "tune=0 to =100000"),
            ("tune-rate=0", "=0 to =0.1, but not 0"),
            ("tune-rate=0.2", "=0 to =0.1, but not 0"),
            ("tune-rate=NaN", "=0 to =0.1, but not 0"),
            (
                "speed=fast",
                "use group-weights, scales, clip, signs, residual, head, rotate, values, tune or tune-rate",
            ),
            ("scales=bf16", "scales=f32 or =fp16"),
        ] {
            let error = Choices::BEST.clone().set(setting).unwrap_err();
            assert!(error.hint().unwrap().contains(hint), "{error}");
            assert!(error.to_string().contains(setting), "{error}");
        }
    }
}
