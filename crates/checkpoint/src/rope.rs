//! Rotary position embeddings: the frequencies that a model's settings mean.
//!
//! The rules are those of transformers (`modeling_rope_utils.py`).

use std::f32::consts::TAU;

/// Rotary position embeddings of a model, or of some of its blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Features of a head that are rotated, the first of it; an even number.
    pub dims: usize,
    /// How they are stretched to contexts longer than the model was first trained on.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
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
    /// The same with a ramp over the pairs of features, and larger cosines and sines (Peng et al.,
    /// arXiv 2309.00071).
    Yarn(Yarn),
    /// Every frequency divided by a factor of its own, by one of two sets (Ding et al.,
    /// arXiv 2402.13753).
    LongRope(LongRope),
}

/// Settings of YaRN.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// The divisor of low frequencies.
    pub factor: f64,
    /// Turns within the original context from which a frequency is kept.
    pub beta_fast: f64,
    /// Turns within the original context up to which a frequency is divided.
    pub beta_slow: f64,
    /// Context of the first training, in tokens.
    pub original_context: usize,
    /// The ramp begins and ends at whole pairs.
    pub truncate: bool,
    /// What cosines and sines are multiplied by.
    pub attention_factor: f64,
}

/// Settings of LongRoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Divisors for windows within the original context, one a frequency.
    pub short_factor: Vec<f64>,
    /// Divisors for longer windows.
    pub long_factor: Vec<f64>,
    /// Context of the first training, in tokens.
    pub original_context: usize,
    /// What cosines and sines are multiplied by.
    pub attention_factor: f64,
}

impl Rope {
    /// Angle of one position in radians for each of the `dims / 2` pairs of a head's features, in
    /// windows of `seq_len` tokens: `theta^(-2i/dims)`, stretched.
    #[must_use]
    pub fn frequencies(&self, seq_len: usize) -> Vec<f32> {
        let plain = || plain_frequencies(self.theta, self.dims);
        match &self.scaling {
            RopeScaling::None => plain(),
            &RopeScaling::Linear { factor } => divided(plain(), factor as f32),
            &RopeScaling::Dynamic { factor, context } => {
                let stretch = seq_len.max(context) as f64 / context as f64;
                let dim = self.dims as f64;
                let grown = (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                plain_frequencies(self.theta * grown, self.dims)
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
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
            RopeScaling::Yarn(yarn) => yarn.stretched(plain(), self.theta),
            RopeScaling::LongRope(long) => {
                let beyond = seq_len > long.original_context;
                let factors = if beyond { &long.long_factor } else { &long.short_factor };
                plain().into_iter().zip(factors).map(|(f, by)| f / *by as f32).collect()
            }
        }
    }

    /// What cosines and sines are multiplied by.
    #[must_use]
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor as f32,
            RopeScaling::LongRope(long) => long.attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Windows of fewer tokens than this have the same frequencies whatever the model was prepared for;
    /// `None` where all have. Of `dynamic` scaling that is what transformers does once it has seen a
    /// longer one.
    #[must_use]
    pub fn changes_from(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::Dynamic { context, .. } => Some(*context),
            RopeScaling::LongRope(long) => Some(long.original_context + 1),
            _ => None,
        }
    }
}

impl Yarn {
    /// Frequencies divided where they are low, by a ramp over the pairs.
    fn stretched(&self, plain: Vec<f32>, theta: f64) -> Vec<f32> {
        let pairs = plain.len();
        let dims = 2.0 * pairs as f64;
        // The pair that turns so often within the original context.
        let pair = |turns: f64| {
            let wavelength = self.original_context as f64 / (turns * std::f64::consts::TAU);
            dims * wavelength.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, span, factor) = (low as f32, (high - low) as f32, self.factor as f32);
        let stretched = |(pair, frequency): (usize, f32)| {
            let ramp = ((pair as f32 - low) / span).clamp(0.0, 1.0);
            frequency / factor * ramp + frequency * (1.0 - ramp)
        };
        plain.into_iter().enumerate().map(stretched).collect()
    }
}

/// `theta^(-2i/dims)`, rounded to f32 once.
fn plain_frequencies(theta: f64, dims: usize) -> Vec<f32> {
    (0..dims / 2).map(|i| theta.powf(-2.0 * i as f64 / dims as f64) as f32).collect()
}

fn divided(mut frequencies: Vec<f32>, factor: f32) -> Vec<f32> {
    frequencies.iter_mut().for_each(|f| *f /= factor);
    frequencies
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(scaling: RopeScaling, seq_len: usize, expected: [f32; 8]) {
        let made =
            Rope { theta: 10_000.0, dims: 16, scaling: scaling.clone() }.frequencies(seq_len);
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
        close(dynamic.clone(), 32, plain);
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
