//! Rotary settings of config.json, in all their forms, and the frequencies that they mean.
//!
//! The rules are those of transformers (`modeling_rope_utils.py`).

use std::f32::consts::TAU;

use serde_json::{Map, Value};

use crate::Result;
use crate::fields::Fields;

/// Rotary position embeddings of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are stretched to contexts longer than the model was first trained on.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// They are not.
    None,
    /// All divided by a factor: position interpolation (Chen et al., arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A larger base for windows beyond the context, the larger the longer they are (NTK-aware).
    Dynamic {
        /// By how much windows may exceed the context.
        factor: f64,
        /// Windows up to this many tokens are left alone.
        context: usize,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Turns within the original context up to which a frequency is low.
        low_freq_factor: f64,
        /// Turns within the original context from which a frequency is high.
        high_freq_factor: f64,
        /// Context of the first training, in tokens.
        original_context: usize,
    },
}

const TYPES: &str = "one of the types `default`, `linear`, `dynamic` and `llama3`";
const MAX_CONTEXT: u64 = 1 << 40;

impl Rope {
    /// Reads the older form (`rope_theta`, `rope_scaling`) and that of transformers 5
    /// (`rope_parameters`); `context` is `max_position_embeddings`.
    pub(crate) fn read(fields: &Fields<'_>, context: usize) -> Result<Self> {
        let older = fields.positive("rope_theta")?.unwrap_or(10_000.0);
        // transformers takes the older key where a file has both.
        for (key, within) in
            [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
        {
            let Some(value) = fields.get(key) else { continue };
            let Value::Object(map) = value else {
                return Err(fields.invalid(key, format!("is `{value}`, expected an object")));
            };
            if map.is_empty() {
                continue;
            }
            let nested = Fields { raw: map, within, ..*fields };
            // Scaling without a type is an error in transformers; parameters without one are plain.
            if key == "rope_scaling" && kind(map).is_none() {
                return Err(fields.unsupported(key, value, TYPES));
            }
            let theta = nested.positive("rope_theta")?.unwrap_or(older);
            return Ok(Self { theta, scaling: RopeScaling::read(fields, &nested, context)? });
        }
        Ok(Self { theta: older, scaling: RopeScaling::None })
    }

    /// Angle of one position in radians for each of the `head_dim / 2` pairs of a head's features,
    /// in windows of `seq_len` tokens: `theta^(-2i/head_dim)`, stretched.
    #[must_use]
    pub fn frequencies(&self, head_dim: usize, seq_len: usize) -> Vec<f32> {
        let plain = || plain_frequencies(self.theta, head_dim);
        match self.scaling {
            RopeScaling::None => plain(),
            RopeScaling::Linear { factor } => divided(plain(), factor as f32),
            RopeScaling::Dynamic { factor, context } => {
                let stretch = seq_len.max(context) as f64 / context as f64;
                let dim = head_dim as f64;
                let grown = (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain_frequencies(self.theta * grown, head_dim)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let [factor, low, high] =
                    [factor, low_freq_factor, high_freq_factor].map(|v| v as f32);
                let context = original_context as f32;
                let stretched = |frequency: f32| {
                    let wavelength = TAU / frequency;
                    if wavelength > context / low {
                        return frequency / factor;
                    }
                    if wavelength < context / high {
                        return frequency;
                    }
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                };
                plain().into_iter().map(stretched).collect()
            }
        }
    }
}

impl RopeScaling {
    /// Reads the settings `nested` in `fields`.
    fn read(fields: &Fields<'_>, nested: &Fields<'_>, context: usize) -> Result<Self> {
        let Some(value) = kind(nested.raw) else {
            // One object of settings for each kind of layer would also come here.
            return match nested.raw.values().find(|v| v.is_object()) {
                Some(inner) => Err(fields.unsupported("rope_parameters", inner, TYPES)),
                None => Ok(Self::None),
            };
        };
        let factor = || match nested.required("factor")? {
            factor if factor >= 1.0 => Ok(factor),
            factor => Err(nested.invalid("factor", format!("is `{factor}`, expected 1 or more"))),
        };
        match value.as_str() {
            Some("default") => Ok(Self::None),
            Some("linear") => Ok(Self::Linear { factor: factor()? }),
            Some("dynamic") => Ok(Self::Dynamic { factor: factor()?, context }),
            Some("llama3") => {
                let key = "original_max_position_embeddings";
                // A key beside the settings wins in transformers.
                let outer = fields.get(key).map(|_| fields.size(key, None, MAX_CONTEXT));
                let original = match outer {
                    Some(outer) => outer?,
                    None => nested.size(key, Some(context), MAX_CONTEXT)?,
                };
                let low_freq_factor = nested.required("low_freq_factor")?;
                let high_freq_factor = nested.required("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    let reason =
                        format!("is `{high_freq_factor}`, expected more than low_freq_factor");
                    return Err(nested.invalid("high_freq_factor", reason));
                }
                let (factor, original_context) = (factor()?, original);
                Ok(Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
            }
            _ => Err(nested.unsupported("rope_type", value, TYPES)),
        }
    }
}

/// `rope_type`, or `type` as it was called first.
fn kind(map: &Map<String, Value>) -> Option<&Value> {
    ["rope_type", "type"].iter().find_map(|key| map.get(*key)).filter(|kind| !kind.is_null())
}

/// `theta^(-2i/head_dim)`, rounded to f32 once.
fn plain_frequencies(theta: f64, head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect()
}

fn divided(mut frequencies: Vec<f32>, factor: f32) -> Vec<f32> {
    frequencies.iter_mut().for_each(|f| *f /= factor);
    frequencies
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(scaling: RopeScaling, seq_len: usize, expected: [f32; 8]) {
        let made = Rope { theta: 10_000.0, scaling }.frequencies(16, seq_len);
        for (made, expected) in made.iter().zip(expected) {
            let error = (made / expected - 1.0).abs();
            assert!(error < 3e-7, "{scaling:?}: {made}, expected {expected}");
        }
        assert_eq!(made.len(), 8);
    }

    /// Against the buffers of transformers 5.24 (torch 2.15) for heads of 16.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let linear = RopeScaling::Linear { factor: 4.0 };
        let quartered = [
            0.25,
            0.079_056_94,
            0.025,
            0.007_905_695,
            0.0025,
            7.905_694_7e-4,
            2.5e-4,
            7.905_695e-5,
        ];
        close(linear, 48, quartered);
        let dynamic = RopeScaling::Dynamic { factor: 2.0, context: 32 };
        let plain =
            [1.0, 0.316_227_76, 0.1, 0.031_622_78, 0.01, 0.003_162_277_9, 0.001, 3.162_277_6e-4];
        close(dynamic, 32, plain);
        close(RopeScaling::None, 48, plain);
        let grown = [
            1.0,
            0.286_414_95,
            0.082_033_54,
            0.023_495_633,
            0.006_729_501_3,
            0.001_927_429_8,
            5.520_448e-4,
            1.581_139e-4,
        ];
        close(dynamic, 48, grown);
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64,
        };
        let blended = [
            1.0,
            0.244_384_59,
            0.013_042_256,
            0.003_952_847_3,
            0.00125,
            3.952_847_3e-4,
            1.25e-4,
            3.952_847_3e-5,
        ];
        close(llama3, 48, blended);
    }
}
