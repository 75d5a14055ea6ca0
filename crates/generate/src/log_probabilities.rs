//! What a model says of the next token, as it says it: before any setting changes it.

use crate::error::Result;
use crate::sampler::{Choice, log_sum_exp};

/// The natural logarithms of the probabilities that a row of raw logits stands for.
#[derive(Clone, Copy, Debug)]
pub struct LogProbabilities<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> LogProbabilities<'a> {
    /// Those of a row, which has a logit for each token of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Logits`](crate::Error::Logits), as [`Sampler::sample`](crate::Sampler::sample).
    pub fn new(logits: &'a [f32]) -> Result<Self> {
        Ok(Self { logits, log_sum: log_sum_exp(logits)? })
    }

    /// That of a token, the same to the bit as a [`Choice`] has it; negative infinity beyond the row.
    #[must_use]
    pub fn of(&self, id: u32) -> f64 {
        let logit = self.logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        f64::from(logit) - self.log_sum
    }

    /// So many of the likeliest tokens, the likeliest first and of equal ones the lowest id.
    #[must_use]
    pub fn top(&self, count: usize) -> Vec<Choice> {
        let likelier = |&a: &u32, &b: &u32| {
            self.logits[b as usize].total_cmp(&self.logits[a as usize]).then(a.cmp(&b))
        };
        // A vocabulary is read once: the few that are wanted are kept beside it, in order.
        let mut best: Vec<u32> = Vec::with_capacity(count + 1);
        for id in 0..self.logits.len() as u32 {
            if best.len() == count && best.last().is_none_or(|last| likelier(&id, last).is_gt()) {
                continue;
            }
            let place = best.partition_point(|kept| likelier(kept, &id).is_lt());
            best.insert(place, id);
            best.truncate(count);
        }
        best.into_iter().map(|id| Choice { id, logprob: self.of(id) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Sampler, Sampling};

    #[test]
    fn the_likeliest_come_first_with_what_a_choice_says() {
        let logits = [1.0, 3.0, -2.0, 3.0, f32::NEG_INFINITY, 2.5];
        let row = LogProbabilities::new(&logits).unwrap();
        let ids = |count| row.top(count).iter().map(|choice| choice.id).collect::<Vec<_>>();
        assert!(ids(0).is_empty());
        assert_eq!(ids(1), [1]);
        assert_eq!(ids(3), [1, 3, 5]);
        assert_eq!(ids(9), [1, 3, 5, 0, 2, 4]);
        let chosen = Sampler::new(Sampling::greedy(), 0).sample(&logits, &[]).unwrap();
        assert_eq!(row.top(1), [chosen]);
        let sum: f64 = row.top(6).iter().map(|choice| choice.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        assert_eq!(row.of(6), f64::NEG_INFINITY);
        assert!(LogProbabilities::new(&[f32::NAN]).is_err());
    }
}
