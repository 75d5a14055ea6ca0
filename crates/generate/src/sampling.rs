//! The settings that a token is chosen by, and where each of them comes from.

use std::fmt::Display;

use crate::error::{Error, Result};
use crate::generation_config::{
    self as ranges, GENERATION_CONFIG_FILE, GenerationConfig, is_min_p, is_penalty, is_temperature,
    is_top_p,
};

/// Where a setting comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The caller's options.
    Option,
    /// `generation_config.json`.
    File,
    /// Nobody said anything: transformers' value, except that it is greedy without `do_sample`.
    Default,
}

/// What the caller asks for; nothing of it is needed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// What logits are divided by; 0 takes the likeliest token.
    pub temperature: Option<f64>,
    /// How many of the likeliest tokens are drawn from; 0 is all.
    pub top_k: Option<usize>,
    /// The probability that they have together, in (0, 1].
    pub top_p: Option<f64>,
    /// The least probability, as a part of the likeliest token's, in [0, 1].
    pub min_p: Option<f64>,
    /// What the logits of tokens that were there are divided by, or multiplied if negative.
    pub repetition_penalty: Option<f64>,
}

/// A setting's value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

/// How the next token is chosen.
///
/// Whether it is drawn at all is decided by the first of these that applies:
///
/// 1. a temperature among the options: drawn, or the likeliest one (greedy) for 0;
/// 2. another option of drawing (`top_k`, `top_p`, `min_p`): drawn;
/// 3. `do_sample: true` in `generation_config.json`, without a temperature of 0: drawn;
/// 4. otherwise greedy, whatever else the file says, as transformers does.
///
/// Where tokens are drawn, each setting is the option's, else the file's, else transformers' default:
/// temperature 1, `top_k` 50, `top_p` 1, `min_p` 0. The repetition penalty (default 1) acts on greedy
/// choices too, and asks for no drawing.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 is greedy, and then the three after it do nothing.
    pub temperature: Setting<f64>,
    /// How many of the likeliest tokens are drawn from; 0 is all.
    pub top_k: Setting<usize>,
    /// The probability that they have together, in (0, 1]; 1 is all.
    pub top_p: Setting<f64>,
    /// The least probability, as a part of the likeliest token's, in [0, 1]; 0 is all.
    pub min_p: Setting<f64>,
    /// What the logits of tokens that were there are divided by, or multiplied if negative; 1 is
    /// nothing.
    pub repetition_penalty: Setting<f64>,
}

impl Sampling {
    /// The settings of the options over those of the file over the defaults.
    ///
    /// # Errors
    /// [`Error::Setting`] for an option outside its range.
    pub fn resolve(options: &SamplingOptions, file: Option<&GenerationConfig>) -> Result<Self> {
        check("The temperature", options.temperature, is_temperature, ranges::TEMPERATURE)?;
        check("top-p", options.top_p, is_top_p, ranges::TOP_P)?;
        check("min-p", options.min_p, is_min_p, ranges::MIN_P)?;
        let penalty = options.repetition_penalty;
        check("The repetition penalty", penalty, is_penalty, ranges::PENALTY)?;

        let none = GenerationConfig::default();
        let file = file.unwrap_or(&none);
        let asked = options.top_k.is_some() || options.top_p.is_some() || options.min_p.is_some();
        let drawn = asked || file.do_sample == Some(true) && file.temperature != Some(0.0);
        let file_temperature = file.temperature.filter(|&temperature| temperature > 0.0);
        Ok(Self {
            temperature: if drawn || options.temperature.is_some() {
                setting(options.temperature, file_temperature, 1.0)
            } else {
                // That the file says `do_sample: false` is no other thing than its silence.
                let says = file.do_sample.is_some();
                Setting { value: 0.0, origin: if says { Origin::File } else { Origin::Default } }
            },
            top_k: setting(options.top_k, file.top_k, 50),
            top_p: setting(options.top_p, file.top_p, 1.0),
            min_p: setting(options.min_p, file.min_p, 0.0),
            repetition_penalty: setting(penalty, file.repetition_penalty, 1.0),
        })
    }

    /// The likeliest token, always.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: setting(None, None, 0.0),
            top_k: setting(None, None, 50),
            top_p: setting(None, None, 1.0),
            min_p: setting(None, None, 0.0),
            repetition_penalty: setting(None, None, 1.0),
        }
    }

    /// Whether the likeliest token is taken, so that nothing depends on a seed.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature.value == 0.0
    }

    /// What is used and where it comes from, in one line: `greedy (default)`, `temperature 0.7
    /// (option), top-k 50 (default), top-p 0.9 (generation_config.json)`. What has no effect is left
    /// out.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        if self.is_greedy() {
            parts.push(said("greedy", "", self.temperature.origin));
        } else {
            parts.push(said("temperature ", self.temperature.value, self.temperature.origin));
            if self.top_k.value > 0 {
                parts.push(said("top-k ", self.top_k.value, self.top_k.origin));
            }
            if self.top_p.value < 1.0 {
                parts.push(said("top-p ", self.top_p.value, self.top_p.origin));
            }
            if self.min_p.value > 0.0 {
                parts.push(said("min-p ", self.min_p.value, self.min_p.origin));
            }
        }
        let penalty = self.repetition_penalty;
        if penalty.value != 1.0 {
            parts.push(said("repetition penalty ", penalty.value, penalty.origin));
        }
        parts.join(", ")
    }
}

fn setting<T>(option: Option<T>, file: Option<T>, default: T) -> Setting<T> {
    match (option, file) {
        (Some(value), _) => Setting { value, origin: Origin::Option },
        (None, Some(value)) => Setting { value, origin: Origin::File },
        (None, None) => Setting { value: default, origin: Origin::Default },
    }
}

fn check(
    name: &'static str,
    value: Option<f64>,
    holds: fn(f64) -> bool,
    range: &'static str,
) -> Result<()> {
    match value {
        Some(value) if !holds(value) => {
            Err(Error::Setting { name, value: value.to_string(), range })
        }
        _ => Ok(()),
    }
}

fn said(name: &str, value: impl Display, origin: Origin) -> String {
    let origin = match origin {
        Origin::Option => "option",
        Origin::File => GENERATION_CONFIG_FILE,
        Origin::Default => "default",
    };
    format!("{name}{value} ({origin})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(do_sample: Option<bool>) -> GenerationConfig {
        GenerationConfig {
            do_sample,
            temperature: Some(0.6),
            top_p: Some(0.9),
            ..Default::default()
        }
    }

    fn describe(options: &SamplingOptions, file: Option<&GenerationConfig>) -> String {
        Sampling::resolve(options, file).unwrap().describe()
    }

    #[test]
    fn options_come_before_the_file_and_the_file_before_defaults() {
        let none = SamplingOptions::default();
        assert_eq!(describe(&none, None), "greedy (default)");
        assert_eq!(describe(&none, Some(&file(None))), "greedy (default)");
        assert_eq!(describe(&none, Some(&file(Some(false)))), "greedy (generation_config.json)");
        let sampled = "temperature 0.6 (generation_config.json), top-k 50 (default), \
                       top-p 0.9 (generation_config.json)";
        assert_eq!(describe(&none, Some(&file(Some(true)))), sampled);
        let zero = GenerationConfig { temperature: Some(0.0), ..file(Some(true)) };
        assert_eq!(describe(&none, Some(&zero)), "greedy (generation_config.json)");

        let hot = SamplingOptions { temperature: Some(1.5), ..none.clone() };
        assert_eq!(describe(&hot, None), "temperature 1.5 (option), top-k 50 (default)");
        let cold = SamplingOptions { temperature: Some(0.0), top_p: Some(0.5), ..none.clone() };
        assert_eq!(describe(&cold, Some(&file(Some(true)))), "greedy (option)");
        let all = SamplingOptions { top_k: Some(0), ..none.clone() };
        assert_eq!(
            describe(&all, Some(&file(None))),
            "temperature 0.6 (generation_config.json), top-p 0.9 (generation_config.json)"
        );
        assert_eq!(describe(&all, Some(&zero)).split(',').next(), Some("temperature 1 (default)"));
        let penalty = SamplingOptions { repetition_penalty: Some(1.1), ..none };
        assert_eq!(describe(&penalty, None), "greedy (default), repetition penalty 1.1 (option)");
        assert!(Sampling::greedy().is_greedy());
    }

    #[test]
    fn options_outside_their_range_are_refused() {
        let options = |temperature, top_p, min_p, repetition_penalty| SamplingOptions {
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            top_k: None,
        };
        for wrong in [
            options(Some(f64::NAN), None, None, None),
            options(Some(-1.0), None, None, None),
            options(Some(f64::INFINITY), None, None, None),
            options(None, Some(0.0), None, None),
            options(None, Some(1.1), None, None),
            options(None, None, Some(-0.1), None),
            options(None, None, None, Some(0.0)),
        ] {
            let error = Sampling::resolve(&wrong, None).unwrap_err();
            assert!(matches!(error, Error::Setting { .. }), "{error}");
        }
        let error = Sampling::resolve(&options(None, Some(1.5), None, None), None).unwrap_err();
        assert_eq!(error.to_string(), "top-p is 1.5, which is not a number above 0 and at most 1");
    }
}
