//! A group's scale chosen by solving the group with each candidate.
//!
//! The error that a scale leaves weight by weight is not what the solve leaves: within a group each
//! column's error is passed on to those after it. Here every candidate is taken through the group's
//! columns, and the one with the least Σ err² is kept: exactly what the group adds to
//! tr((W − Ŵ) H (W − Ŵ)ᵀ). A group of more than [`BLOCK`] columns is tried in blocks of so many, each
//! as if the errors of the others did not reach it.

use ndarray::{ArrayView2, s};

use crate::choices::Signs;
use crate::grid::{CLIP_STEPS, ROUND, clip_base, file_scale, signed_ratios};
use crate::host::BLOCK;

/// Candidates side by side.
type Lanes = [f32; CLIP_STEPS];

/// Memory of the trials of one thread.
pub(crate) struct Trial {
    /// Candidates of one sign at a time.
    ratios: Vec<Lanes>,
    /// The group's weights under each candidate, corrected as the trial proceeds.
    current: Vec<Lanes>,
}

impl Trial {
    pub(crate) fn new(signs: Signs) -> Self {
        Self { ratios: signed_ratios(signs).as_chunks().0.to_vec(), current: Vec::new() }
    }

    /// The scale among [`signed_ratios`] · 2 · absmax / max_code under which solving `row` along U's
    /// block `upper` `[len, len]` leaves the least Σ err², the first of equals; `half` rounds each
    /// candidate to fp16 first.
    pub(crate) fn scale(
        &mut self,
        row: &[f32],
        upper: ArrayView2<'_, f32>,
        (zero, max_code): (f32, f32),
        half: bool,
    ) -> f32 {
        let base = clip_base(row, max_code);
        let (mut best, mut least) = (0.0, f32::INFINITY);
        for lanes in 0..self.ratios.len() {
            let scales = self.ratios[lanes].map(|ratio| file_scale(ratio * base, max_code, half));
            let losses = self.losses(row, upper, &scales, (zero, max_code));
            if lanes == 0 {
                best = scales[0];
            }
            for (&scale, &loss) in scales.iter().zip(&losses) {
                if loss < least {
                    (best, least) = (scale, loss);
                }
            }
        }
        best
    }

    /// Σ err² of the group under each scale.
    fn losses(
        &mut self,
        row: &[f32],
        upper: ArrayView2<'_, f32>,
        scales: &Lanes,
        (zero, max_code): (f32, f32),
    ) -> Lanes {
        let mut losses = [0.0; CLIP_STEPS];
        for start in (0..row.len()).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(row.len());
            let upper = upper.slice(s![block.clone(), block.clone()]);
            let left = self.block_losses(&row[block], upper, scales, (zero, max_code));
            losses.iter_mut().zip(left).for_each(|(sum, loss)| *sum += loss);
        }
        losses
    }

    /// Σ err² of a block of columns under each scale.
    fn block_losses(
        &mut self,
        row: &[f32],
        upper: ArrayView2<'_, f32>,
        scales: &Lanes,
        (zero, max_code): (f32, f32),
    ) -> Lanes {
        self.current.clear();
        self.current.extend(row.iter().map(|&w| [w; CLIP_STEPS]));
        let mut losses = [0.0; CLIP_STEPS];
        for (i, u) in upper.outer_iter().enumerate() {
            let (done, rest) = self.current.split_at_mut(i + 1);
            let mut errors = [0.0; CLIP_STEPS];
            for k in 0..CLIP_STEPS {
                let (w, scale) = (done[i][k], scales[k]);
                let steps = (w / scale).clamp(-zero, max_code - zero);
                errors[k] = (w - ((steps + ROUND) - ROUND) * scale) / u[i];
                losses[k] += errors[k] * errors[k];
            }
            for (w, &u) in rest.iter_mut().zip(u.iter().skip(i + 1)) {
                for k in 0..CLIP_STEPS {
                    w[k] -= errors[k] * u;
                }
            }
        }
        losses
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    /// Σ err² by the solve's definition, in f64.
    fn loss(row: &[f32], upper: &Array2<f32>, scale: f32, (zero, max_code): (f64, f64)) -> f64 {
        let scale = f64::from(scale);
        let mut now: Vec<f64> = row.iter().map(|&w| f64::from(w)).collect();
        let mut sum = 0.0;
        for i in 0..now.len() {
            let steps = (now[i] / scale).round_ties_even().clamp(-zero, max_code - zero);
            let error = (now[i] - steps * scale) / f64::from(upper[[i, i]]);
            sum += error * error;
            let end = (i / BLOCK + 1) * BLOCK;
            for (j, now) in now.iter_mut().enumerate().take(end).skip(i + 1) {
                *now -= error * f64::from(upper[[i, j]]);
            }
        }
        sum
    }

    #[test]
    fn the_trial_finds_what_the_solve_leaves_least_of() {
        let shapes = [(37, 3), (128, 4), (1, 2), (32, 8), (300, 3)];
        let mut negative = 0;
        for (signs, (len, bits)) in
            [Signs::Positive, Signs::Both].into_iter().flat_map(|s| shapes.map(|shape| (s, shape)))
        {
            let mut trial = Trial::new(signs);
            let noise = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0;
            let row: Vec<f32> = (0..len).map(|i| noise(i + 7).powi(3)).collect();
            let upper = Array2::from_shape_fn((len, len), |(i, j)| match i.cmp(&j) {
                std::cmp::Ordering::Less => 0.3 * noise(i * len + j),
                std::cmp::Ordering::Equal => 0.7 + 0.2 * noise(i),
                std::cmp::Ordering::Greater => 0.0,
            });
            let (zero, max_code) = ((1 << (bits - 1)) as f32, ((1 << bits) - 1) as f32);
            let grid = (f64::from(zero), f64::from(max_code));
            for half in [false, true] {
                for side in [1.0, -1.0] {
                    let row: Vec<f32> = row.iter().map(|w| w * side).collect();
                    let found = trial.scale(&row, upper.view(), (zero, max_code), half);
                    let absmax = row.iter().fold(0.0_f32, |a, &v| a.max(v.abs()));
                    let base = 2.0 * absmax / max_code;
                    let candidates: Vec<f32> = signed_ratios(signs)
                        .iter()
                        .map(|r| file_scale(r * base, max_code, half))
                        .collect();
                    let least = candidates.iter().map(|&s| loss(&row, &upper, s, grid));
                    let least = least.fold(f64::INFINITY, f64::min);
                    assert!(candidates.contains(&found));
                    // A tie may round the other way in f64 and change all that follows.
                    assert!(loss(&row, &upper, found, grid) <= least * 1.02, "{len} {bits} {half}");
                    negative += usize::from(found < 0.0);
                }
            }
        }
        assert!(negative > 0, "a row or its mirror image gains by a negative scale");
        let mut trial = Trial::new(Signs::Both);
        // Zeros and what cannot be solved have a scale all the same.
        let one = Array2::eye(3);
        assert!(trial.scale(&[0.0; 3], one.view(), (8.0, 15.0), true) > 0.0);
        assert!(trial.scale(&[f32::NAN; 3], one.view(), (8.0, 15.0), true) > 0.0);
    }
}
