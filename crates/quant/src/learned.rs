//! A rotation learned from the weights that it turns.
//!
//! Steps of a grid follow from a group's largest weights, so that of all distributions of a given energy
//! the flatter ones lose less. OptRot (Gadhikar, Grazzi, Hensman, arXiv 2512.24124) minimizes Σ (W R)⁴
//! over the rotations R that can be folded; neither texts nor the quantizer are asked. It begins at a
//! [`Rotation`] of n log n operations, under which weights look like normal ones, and is a rotation of blocks
//! of its features after that: one block where there are at most 1024 features, smaller ones of more, so
//! that what learning and folding take a weight has a bound. All weights have to be learned from: what a
//! sample of them gains, the others do not (tests/bench/2026-11-29-forward-only.md).
//!
//! A step is R ← R exp(−t A), A the gradient's skew part YᵀY³ − (Y³)ᵀY with Y = W R over some of the rows, in
//! the mean with those of earlier steps. Rows have one norm each, as their scales follow them.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, s};
use rayon::prelude::*;

use crate::rotation::Rotation;

/// Features of a block, times the features of all.
const BLOCK_FEATURES: usize = 1 << 20;
/// Share of a step's direction that is the last one's.
const MOMENTUM: f32 = 0.5;
/// Length of the first step.
const RATE: f32 = 0.4;
/// What it is multiplied by after each: a longer way at once leads beyond all that is flat, where weights are
/// spikier than normal ones and no gradient leads back.
const SHORTER: f32 = 0.93;
/// Parts that rows are worked on in, side by side: sums do not depend on how many processors there are.
const TASKS: usize = 32;

/// A rotation that is being learned.
#[derive(Debug)]
pub struct Learner {
    rotation: Rotation,
    blocks: Vec<Block>,
    rate: f32,
    /// Rows since the last step, and Σ Y⁴ / n of them.
    rows: usize,
    fourth: f64,
    /// The least mean of a row's.
    least: f64,
}

/// What is known of a block of features.
#[derive(Debug)]
struct Block {
    /// Σ YᵀY³ of the rows since the last step.
    gradient: Array2<f32>,
    /// The direction of the last step.
    direction: Array2<f32>,
    /// Where the least was found, and the gradient's skew part there.
    best: (Array2<f32>, Array2<f32>),
}

impl Learner {
    /// Begins at `rotation`.
    #[must_use]
    pub fn new(rotation: Rotation) -> Self {
        let order = rotation.order();
        let fits = |side: &usize| order.is_multiple_of(*side) && side * order <= BLOCK_FEATURES;
        let side = (1..=order).rev().find(fits).unwrap_or(1);
        let zeros = || Array2::zeros((side, side));
        let block = |_| Block { gradient: zeros(), direction: zeros(), best: (zeros(), zeros()) };
        let blocks = (0..order / side).map(block).collect();
        let rotation = rotation.then(vec![Array2::eye(side); order / side]);
        Self { rotation, blocks, rate: RATE, rows: 0, fourth: 0.0, least: f64::INFINITY }
    }

    /// Looks at row vectors of weights, `[rows, n]`, for the next step.
    pub fn look(&mut self, weights: ArrayView2<'_, f32>) {
        let (rows, order) = weights.dim();
        let task = rows.div_ceil(TASKS).max(1);
        let parts: Vec<ArrayView2<'_, f32>> = weights.axis_chunks_iter(Axis(0), task).collect();
        let side = order / self.blocks.len();
        let made: Vec<(f64, Vec<Array2<f32>>)> = parts
            .into_par_iter()
            .map(|part| {
                let mut turned = part.as_standard_layout().into_owned();
                turned.outer_iter_mut().for_each(|mut row| {
                    let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                    let scale = (order as f32).sqrt() / norm;
                    // A row of zeros has no say.
                    row.mapv_inplace(|v| if norm > 0.0 { v * scale } else { 0.0 });
                });
                self.rotation.apply_all(turned.as_slice_mut().unwrap_or_default());
                let cubes = turned.mapv(|v| v * v * v);
                let fourth = turned.iter().zip(&cubes).map(|(v, cube)| f64::from(v * cube)).sum();
                let gradient = |block: usize| {
                    let features = s![.., block * side..(block + 1) * side];
                    turned.slice(features).t().dot(&cubes.slice(features))
                };
                (fourth, (0..self.blocks.len()).map(gradient).collect())
            })
            .collect();
        for (fourth, gradients) in made {
            self.fourth += fourth / order as f64;
            for (block, gradient) in self.blocks.iter_mut().zip(gradients) {
                block.gradient += &gradient;
            }
        }
        self.rows += rows;
    }

    /// A step along what was looked at since the last one, which has to be the same every time: after one that
    /// led upward another half as long, from where it began. The mean of y⁴ before the step: 3 of normal
    /// values, less of flatter ones.
    pub fn step(&mut self) -> f64 {
        let (rows, mean) = (self.rows.max(1), self.fourth / self.rows.max(1) as f64);
        (self.rows, self.fourth) = (0, 0.0);
        let better = mean < self.least;
        if better {
            self.least = mean;
            self.rate *= SHORTER;
        } else {
            self.rate /= 2.0;
        }
        let (rate, scale) = (self.rate, 4.0 / rows as f32);
        let factors = self.rotation.blocks_mut().par_iter_mut();
        factors.zip(&mut self.blocks).for_each(|(factor, block)| {
            let skew = (&block.gradient - &block.gradient.t()) * scale;
            block.gradient.fill(0.0);
            if better {
                block.best = (factor.clone(), skew);
            } else {
                block.direction.fill(0.0);
            }
            let (from, skew) = &block.best;
            block.direction = &block.direction * MOMENTUM + skew * (1.0 - MOMENTUM);
            *factor = from.dot(&exponential(&(&block.direction * -rate)));
            orthogonalize(factor);
        });
        mean
    }

    /// The best rotation that was looked at, the first one if none was better.
    #[must_use]
    pub fn finish(self) -> Rotation {
        let best = self.blocks.into_iter().map(|block| block.best.0).collect();
        self.rotation.then(best)
    }
}

/// exp(K) of a skew matrix, which is orthogonal: of K / 2^s by its series, then squared s times, and what
/// roundings and the rest of the series leave to be orthogonal taken off by X ← (3 X − X XᵀX) / 2.
fn exponential(skew: &Array2<f32>) -> Array2<f32> {
    /// Sums of columns below which the series ends after its fourth power, 3·10⁻⁴ off at most.
    const SMALL: f32 = 0.5;
    let sum = |column: ArrayView1<'_, f32>| column.iter().map(|v| v.abs()).sum::<f32>();
    let norm = skew.columns().into_iter().map(sum).fold(0.0, f32::max);
    let squarings = (norm / SMALL).log2().ceil().clamp(0.0, 24.0) as i32;
    let small = skew * 0.5_f32.powi(squarings);
    let identity = || Array2::<f32>::eye(skew.nrows());
    // 1 + K (1 + K/2 (1 + K/3 (1 + K/4))).
    let series = [4.0, 3.0, 2.0, 1.0_f32].into_iter();
    let mut turned = series.fold(identity(), |inner, by| identity() + small.dot(&inner) / by);
    for _ in 0..squarings {
        turned = turned.dot(&turned);
        orthogonalize(&mut turned);
    }
    orthogonalize(&mut turned);
    turned
}

/// The nearest orthogonal matrix of one that is nearly so.
fn orthogonalize(matrix: &mut Array2<f32>) {
    let square = matrix.t().dot(matrix);
    let before = matrix.clone();
    general_mat_mul(-0.5, &before, &square, 1.5, matrix);
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn weights_become_flatter_and_the_matrix_stays_orthogonal() {
        for order in [24, 12] {
            let weights = hidden(order, 400);
            let mut learner = Learner::new(Rotation::new(order, 1));
            let means: Vec<f64> = (0..60)
                .map(|_| {
                    learner.look(weights.view());
                    learner.step()
                })
                .collect();
            let least = means.iter().copied().fold(f64::INFINITY, f64::min);
            assert!(means[0] > 2.3 && least < 0.8 * means[0], "{order}: {means:?}");
            let rotation = learner.finish();
            let mut turned = weights.clone();
            rotation.apply_rows(turned.as_slice_mut().unwrap());
            let mean = turned.mapv(|v| f64::from(v).powi(4)).mean().unwrap();
            assert!((mean - least).abs() < 1e-4 * least, "{order}: {mean} {least}");
            let mut r = Array2::<f32>::eye(order);
            rotation.apply_rows(r.as_slice_mut().unwrap());
            let off = r.t().dot(&r) - Array2::<f32>::eye(order);
            assert!(off.iter().all(|v| v.abs() < 1e-5), "{order}: {off}");
        }
    }

    /// Σ Y⁴ of slightly turned weights, in f64 and by its definition.
    #[test]
    fn a_step_goes_down_the_gradient() {
        let weights = hidden(6, 50);
        let mut learner = Learner::new(Rotation::new(6, 1));
        learner.look(weights.view());
        let skew = &learner.blocks[0].gradient - &learner.blocks[0].gradient.t();
        let r = {
            let mut r = Array2::<f32>::eye(6);
            learner.rotation.apply_rows(r.as_slice_mut().unwrap());
            r.mapv(f64::from)
        };
        let wide = weights.mapv(f64::from);
        for (i, j) in [(0, 1), (2, 5), (4, 3)] {
            let fourth = |angle: f64| {
                let mut turn = Array2::<f64>::eye(6);
                (turn[[i, i]], turn[[j, j]]) = (angle.cos(), angle.cos());
                (turn[[i, j]], turn[[j, i]]) = (angle.sin(), -angle.sin());
                wide.dot(&r).dot(&turn).mapv(|v| v.powi(4)).sum()
            };
            let slope = (fourth(1e-4) - fourth(-1e-4)) / 2e-4;
            let want = 4.0 * f64::from(skew[[i, j]]);
            assert!((slope - want).abs() < 1e-3 * slope.abs().max(1.0), "{slope} {want}");
        }
    }

    #[test]
    fn blocks_are_as_large_as_the_bound_allows() {
        for (order, side) in
            [(576, 576), (1024, 1024), (2048, 512), (8192, 128), (5120, 160), (2047, 89)]
        {
            let learner = Learner::new(Rotation::new(order, 1));
            assert_eq!(learner.blocks[0].gradient.nrows(), side, "{order}");
        }
    }
}
