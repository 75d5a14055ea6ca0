//! The choice of the next token from a model's logits.
//!
//! What is kept and with which probability is as in transformers, whose processors do the same in
//! f32; `tests/sampling.rs` holds this to them. The order: repetition penalty, temperature, top-k,
//! top-p, min-p.

use std::cmp::Ordering;

use crate::error::{Error, Result};
use crate::exp::exp;
use crate::sampling::Sampling;

/// Candidates that top-p sorts at first. The few that it keeps are among them nearly always, and a
/// vocabulary takes milliseconds to sort.
const SORTED_AT_FIRST: usize = 512;

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// The natural logarithm of the probability that the model itself gives it: of the raw logits,
    /// before any setting changes them, in f64.
    pub logprob: f64,
}

/// Chooses tokens by settings and a seed.
///
/// Draws come from SplitMix64 that begins with the seed: the nth draw takes the upper 53 bits of the
/// nth number as u in [0, 1), and the token is the first in the order of ids at which the
/// probabilities of those kept, added up, exceed u. Greedy choices take no number. With the same
/// logits, the same seed gives the same tokens on every machine.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    state: u64,
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    /// The logit after penalty and temperature, less the highest of them: at most 0.
    score: f64,
    /// Its exponential, once it is needed.
    weight: f64,
}

impl Sampler {
    /// A sampler; the seed is of no consequence where the settings are greedy.
    #[must_use]
    pub fn new(sampling: Sampling, seed: u64) -> Self {
        Self { sampling, state: seed, candidates: Vec::new() }
    }

    /// Chooses a token.
    ///
    /// `logits` is the model's row for the next position, one for each token of the vocabulary, raw;
    /// negative infinity is a token that cannot be. `history` is what stands before it, prompt and
    /// answer, in any order and with repetitions; the penalty reads it and ignores tokens beyond the
    /// row.
    ///
    /// Greedy is the highest logit after the penalty, of equal ones that of the lowest id.
    ///
    /// # Errors
    /// [`Error::Logits`] where one is NaN or infinite, or none is possible: then the model or its
    /// computation is broken, and any token would hide it.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<Choice> {
        let log_sum = self.keep(logits, history)?;
        let id = match self.candidates.as_slice() {
            [only] => only.id,
            _ => self.draw(),
        };
        Ok(Choice { id, logprob: f64::from(logits[id as usize]) - log_sum })
    }

    /// The tokens that [`sample`](Self::sample) would draw from, in the order of ids, with their
    /// probabilities, which add up to 1. Takes no draw.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Result<Vec<(u32, f64)>> {
        self.keep(logits, history)?;
        let sum = total(&self.candidates);
        Ok(self.candidates.iter().map(|kept| (kept.id, kept.weight / sum)).collect())
    }

    /// Makes the candidates those that may be drawn, in the order of ids; gives the logarithm of the
    /// sum of the raw logits' exponentials.
    fn keep(&mut self, logits: &[f32], history: &[u32]) -> Result<f64> {
        let log_sum = log_sum_exp(logits)?;
        let mut scores = logits.to_vec();
        // In f32, as transformers; from the raw logit, so that a repeated token is penalized once.
        let penalty = self.sampling.repetition_penalty.value as f32;
        let penalty = penalty.clamp(f32::MIN_POSITIVE, f32::MAX);
        if penalty != 1.0 {
            for &id in history {
                if let Some(&logit) = logits.get(id as usize)
                    && logit.is_finite()
                {
                    let score = if logit < 0.0 { logit * penalty } else { logit / penalty };
                    scores[id as usize] = score.clamp(f32::MIN, f32::MAX);
                }
            }
        }
        let highest = highest(&scores);
        self.candidates.clear();
        let temperature = self.sampling.temperature.value;
        if temperature == 0.0 {
            let id = scores.iter().position(|&score| score == highest).unwrap_or_default() as u32;
            self.candidates.push(Candidate { id, score: 0.0, weight: 1.0 });
            return Ok(log_sum);
        }
        // The highest first becomes 0, so that no temperature makes an infinity of it.
        self.candidates.extend(scores.iter().zip(0..).map(|(&score, id)| {
            let score = (f64::from(score) - f64::from(highest)) / temperature;
            Candidate { id, score, weight: 0.0 }
        }));
        self.candidates.retain(|candidate| candidate.score > f64::NEG_INFINITY);
        self.keep_top_k();
        for candidate in &mut self.candidates {
            candidate.weight = exp(candidate.score);
        }
        self.keep_top_p();
        let least = self.sampling.min_p.value;
        // The highest weight is 1.
        self.candidates.retain(|candidate| candidate.weight >= least);
        if !self.candidates.is_sorted_by_key(|candidate| candidate.id) {
            self.candidates.sort_unstable_by_key(|candidate| candidate.id);
        }
        Ok(log_sum)
    }

    /// Drops what is below the kth highest; those equal to it stay, however many.
    fn keep_top_k(&mut self) {
        let k = self.sampling.top_k.value;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        let (_, kth, _) = self.candidates.select_nth_unstable_by(k - 1, descending);
        let least = kth.score;
        self.candidates.retain(|candidate| candidate.score >= least);
    }

    /// Drops the least likely as long as they have at most 1 - `top_p` together, and never the last.
    /// Of equal ones, those with lower ids go first: transformers sorts in ascending order, and what
    /// its sort leaves open is here as a stable one has it.
    fn keep_top_p(&mut self) {
        let p = self.sampling.top_p.value;
        if p >= 1.0 {
            return;
        }
        let dropped = (1.0 - p) * total(&self.candidates);
        let mut most = SORTED_AT_FIRST;
        while most < self.candidates.len() {
            let (_, _, tail) = self.candidates.select_nth_unstable_by(most - 1, descending);
            if total(tail) <= dropped {
                break;
            }
            most *= 8;
        }
        let most = most.min(self.candidates.len());
        let mut sum = total(&self.candidates[most..]);
        self.candidates.truncate(most);
        self.candidates.sort_unstable_by(descending);
        while let [_, .., last] = self.candidates.as_slice() {
            sum += last.weight;
            if sum > dropped {
                break;
            }
            self.candidates.pop();
        }
    }

    fn draw(&mut self) -> u32 {
        let unit = (split_mix(&mut self.state) >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total(&self.candidates);
        for candidate in &self.candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding may leave a crumb at the end.
        self.candidates.last().map_or(0, |candidate| candidate.id)
    }
}

/// The highest score first, of equal ones the highest id.
fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(b.id.cmp(&a.id))
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

fn highest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The logarithm of the sum of a row's exponentials, where the row is sound.
pub(crate) fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let broken = |reason: String| Err(Error::Logits { reason });
    if let Some(id) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return broken(format!("that of token {id} is {}", logits[id]));
    }
    let highest = f64::from(highest(logits));
    if highest == f64::NEG_INFINITY {
        return broken(format!("no token of {} is possible", logits.len()));
    }
    let sum: f64 = logits.iter().map(|&logit| exp(f64::from(logit) - highest)).sum();
    Ok(highest + sum.ln())
}

/// The next number of SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
