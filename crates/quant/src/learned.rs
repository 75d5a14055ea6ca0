//! A rotation learned from the weights that it turns.
//!
//! Steps of a grid follow from a group's largest weights, so that of all distributions of a given energy
//! the flatter ones lose less. OptRot (Gadhikar, Grazzi, Hensman, arXiv 2512.24124) minimizes Σ (W R)⁴
//! over the rotations R that can be folded; neither texts nor the quantizer are asked. It begins at a
//! [`Rotation`] of n log n operations, under which weights look like normal ones. All weights have to be
//! looked at for every step: what a sample of them gains, the others do not
//! (tests/bench/2026-11-29-forward-only.md).
//!
//! A step goes along the gradient's skew part A = 4 (YᵀY³ − (Y³)ᵀY), Y = W R, in the mean with those of earlier
//! steps. What bounds its length is the plane that it turns most, while most of what there is to gain lies in
//! the many that it turns little; so the singular values of the direction are flattened first, as Muon's are
//! (Jordan et al. 2024, by Newton–Schulz iterations): as much is gained in half the looks. R stays orthogonal to the last
//! digits of f64.

use gptq_compute::Device;
use ndarray::Array2;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::rotation::Rotation;

/// Share of a step's direction that is the last one's.
const MOMENTUM: f64 = 0.3;
/// The tangent of the largest angle of the first step. A longer way at once leads beyond all that is flat, where
/// weights are spikier than normal ones and no gradient leads back.
const TANGENT: f64 = 0.45;
/// What it is multiplied by after each.
const SHORTER: f64 = 0.9;

/// A rotation that is being learned.
#[derive(Debug)]
pub struct Learner {
    device: Device,
    /// Where the next look is.
    here: Array2<f64>,
    /// The direction of the last step.
    direction: Array2<f64>,
    /// Where the least mean was found, and the gradient's skew part there.
    best: Option<Best>,
    /// The tangent of the next step's largest angle.
    tangent: f64,
}

#[derive(Debug)]
struct Best {
    mean: f64,
    rotation: Array2<f64>,
    skew: Array2<f64>,
}

impl Learner {
    /// Begins at `rotation`; steps are computed on `device`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn new(rotation: &Rotation, device: Device) -> Result<Self> {
        let order = rotation.order();
        let zeros = Array2::zeros((order, order));
        // Values in f32 are orthogonal to 10⁻⁷ alone.
        let here = device.nearest_orthogonal(&rotation.matrix().mapv(f64::from))?;
        Ok(Self { device, here, direction: zeros, best: None, tangent: TANGENT / SHORTER })
    }

    /// The rotation to look at all weights under, `[n, n]`.
    #[must_use]
    pub fn rotation(&self) -> Array2<f32> {
        self.here.mapv(|value| value as f32)
    }

    /// Goes on from what was seen of all weights under [`Self::rotation`]: the mean fourth power and its
    /// gradient ([`gptq_compute::FourthPowers`]). After a step that led upward another goes half as far, from
    /// where it began.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for weights that are none at the first look, and those of the device.
    pub fn step(&mut self, mean: f64, gradient: &Array2<f64>) -> Result<()> {
        // A mean that is no number is not less than another.
        if self.best.as_ref().is_none_or(|best| mean < best.mean) {
            if !mean.is_finite() {
                return Err(Error::NotFinite { what: "The mean fourth power of the weights" });
            }
            let skew = (gradient - &gradient.t()) * 4.0;
            let rotation = self.here.clone();
            self.best = Some(Best { mean, rotation, skew });
            self.tangent *= SHORTER;
        } else {
            self.direction.fill(0.0);
            self.tangent /= 2.0;
        }
        let Some(best) = &self.best else { return Ok(()) };
        self.direction.zip_mut_with(&best.skew, |direction, skew| {
            *direction = MOMENTUM * *direction + (1.0 - MOMENTUM) * skew;
        });
        let norm = largest_singular_value(&self.direction);
        self.here =
            self.device.orthogonal_step(&best.rotation, &self.direction, norm, self.tangent)?;
        Ok(())
    }

    /// The rotation with the least mean fourth power of those that were looked at; `mean` is the last one's, from
    /// which no step goes on.
    #[must_use]
    pub fn finish(self, mean: f64) -> Array2<f32> {
        match &self.best {
            // A mean that is no number is less than none.
            Some(best) if mean >= best.mean || mean.is_nan() => best.rotation.mapv(|v| v as f32),
            _ => self.rotation(),
        }
    }
}

/// Of a skew matrix, by power iteration: a little less than it is.
fn largest_singular_value(skew: &Array2<f64>) -> f64 {
    const ITERATIONS: usize = 24;
    let order = skew.nrows();
    let mut state = 1;
    let mut vector: Vec<f64> =
        (0..order).map(|_| crate::split_mix(&mut state) as f64 / u64::MAX as f64 - 0.5).collect();
    let mut norm = 0.0;
    for _ in 0..ITERATIONS {
        let length = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
        if length == 0.0 {
            return 0.0;
        }
        vector.iter_mut().for_each(|v| *v /= length);
        let row = |i: usize| skew.row(i).iter().zip(&vector).map(|(a, v)| a * v).sum::<f64>();
        vector = (0..order).into_par_iter().map(row).collect();
        norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    }
    norm
}

#[cfg(test)]
mod tests {
    use gptq_compute::{Tensor, Turned};

    use super::*;

    /// Weights that some rotation makes as flat as can be: all of one size.
    fn hidden(order: usize, rows: usize) -> Array2<f32> {
        let mut state = 5;
        let mut flat = Array2::from_shape_fn((rows, order), |_| {
            if crate::split_mix(&mut state) >> 63 == 0 { 1.0_f32 } else { -1.0 }
        });
        Rotation::new(order, 9).apply_rows(flat.as_slice_mut().unwrap());
        flat
    }

    fn look(weights: &Array2<f32>, rotation: &Array2<f32>) -> (f64, Array2<f64>) {
        let mut sums = Device::Cpu.fourth_powers(rotation).unwrap();
        sums.add(&Tensor::from_host(weights.clone()), Turned::Rows(None)).unwrap();
        (sums.mean(), sums.gradient().unwrap())
    }

    #[test]
    fn weights_become_flatter_and_the_matrix_stays_orthogonal() {
        for order in [24, 12] {
            let weights = hidden(order, 400);
            let mut learner = Learner::new(&Rotation::new(order, 1), Device::Cpu).unwrap();
            let mut means = Vec::new();
            for _ in 0..20 {
                let (mean, gradient) = look(&weights, &learner.rotation());
                means.push(mean);
                learner.step(mean, &gradient).unwrap();
            }
            let best = learner.best.as_ref().unwrap();
            let off = best.rotation.t().dot(&best.rotation) - Array2::<f64>::eye(order);
            assert!(off.iter().all(|v| v.abs() < 1e-13), "{order}: {off}");
            let least = best.mean;
            assert!(means[0] > 2.3 && least < 0.8 * means[0], "{order}: {means:?}");
            // What is worse than the best is not kept, what is better is.
            let here = learner.rotation();
            let (last, _) = look(&weights, &here);
            let rotation = learner.finish(last);
            assert_eq!(look(&weights, &rotation).0, least.min(last));
        }
    }

    /// Σ Y⁴ of slightly turned weights, in f64 and by its definition.
    #[test]
    fn the_gradient_is_the_slope_of_the_mean() {
        let weights = hidden(6, 50);
        let mut learner = Learner::new(&Rotation::new(6, 1), Device::Cpu).unwrap();
        let (mean, gradient) = look(&weights, &learner.rotation());
        learner.step(mean, &gradient).unwrap();
        let best = learner.best.unwrap();
        let wide = weights.mapv(f64::from);
        for (i, j) in [(0, 1), (2, 5), (4, 3)] {
            let fourth = |angle: f64| {
                let mut turn = Array2::<f64>::eye(6);
                (turn[[i, i]], turn[[j, j]]) = (angle.cos(), angle.cos());
                (turn[[i, j]], turn[[j, i]]) = (angle.sin(), -angle.sin());
                let turned = wide.dot(&best.rotation).dot(&turn);
                let of_row = |row: ndarray::ArrayView1<'_, f64>| {
                    row.mapv(|v| v.powi(4)).sum() / row.dot(&row).powi(2) * 36.0
                };
                turned.outer_iter().map(of_row).sum::<f64>() / 50.0
            };
            let slope = (fourth(1e-4) - fourth(-1e-4)) / 2e-4;
            let want = best.skew[[i, j]];
            assert!((slope - want).abs() < 1e-3 * slope.abs().max(1.0), "{slope} {want}");
        }
    }

    #[test]
    fn what_is_no_number_is_refused_at_once_and_gone_back_from_later() {
        let order = 8;
        let new = || Learner::new(&Rotation::new(order, 1), Device::Cpu).unwrap();
        let zeros = Array2::zeros((order, order));
        assert!(matches!(new().step(f64::NAN, &zeros), Err(Error::NotFinite { .. })));
        let mut learner = new();
        learner.step(3.0, &zeros).unwrap();
        let first = learner.rotation();
        learner.step(f64::NAN, &zeros).unwrap();
        assert_eq!(learner.finish(f64::NAN), first);
    }

    #[test]
    fn the_largest_singular_value_is_found() {
        let skew = ndarray::array![[0.0, 3.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]];
        assert!((largest_singular_value(&skew) - 3.0).abs() < 1e-12);
        assert_eq!(largest_singular_value(&Array2::zeros((4, 4))), 0.0);
    }
}
