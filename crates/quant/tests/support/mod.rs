//! What tests of solvers share: inputs, and a replay in f64 along the codes that a solver chose.

use std::ops::Range;

use gptq_compute::cuda::SolveOptions;
use gptq_compute::{HessianPrep, Precision, Tensor};
use gptq_quant::{Factored, Signs};
use half::f16;
use ndarray::Array2;

/// The order, dead columns and damped diagonal of a Gram.
pub(crate) struct Plan {
    pub(crate) order: Vec<u32>,
    pub(crate) dead: Vec<bool>,
    pub(crate) damp: f32,
    /// diag(H) in solve order, undamped.
    pub(crate) importance: Vec<f32>,
}

pub(crate) const SCALE: f32 = 0.25;

impl Plan {
    pub(crate) fn new(gram: &Array2<f32>, act_order: bool) -> Self {
        let dead: Vec<bool> = gram.diag().iter().map(|&d| d == 0.0).collect();
        let diagonal: Vec<f32> =
            gram.diag().iter().map(|&d| if d == 0.0 { 1.0 } else { d * SCALE }).collect();
        let mut order: Vec<u32> = (0..dead.len() as u32).collect();
        if act_order {
            order.sort_by(|&a, &b| diagonal[b as usize].total_cmp(&diagonal[a as usize]));
        }
        let damp = 0.01 * diagonal.iter().sum::<f32>() / diagonal.len() as f32;
        let importance = order.iter().map(|&c| diagonal[c as usize]).collect();
        Self { order, dead, damp, importance }
    }

    pub(crate) fn prep(&self) -> HessianPrep<'_> {
        HessianPrep { scale: SCALE, order: &self.order, dead: &self.dead, damp: self.damp }
    }

    /// As a solve takes it, with the factor of [`Self::hessian`]'s inverse.
    pub(crate) fn factored(&self, upper: &Array2<f32>, precision: Precision) -> Factored {
        Factored {
            order: self.order.clone(),
            dead: self.dead.clone(),
            upper: Tensor::from_host(upper.clone()),
            importance: self.importance.clone(),
            damp: 0.01,
            added: self.damp,
            damp_retries: 0,
            precision,
        }
    }

    /// The damped Hessian in solve order.
    pub(crate) fn hessian(&self, gram: &Array2<f32>) -> Array2<f32> {
        Array2::from_shape_fn(gram.dim(), |(i, j)| {
            let (a, b) = (self.order[i] as usize, self.order[j] as usize);
            let value = gram[[a.min(b), a.max(b)]] * SCALE;
            match (i == j, self.dead[a]) {
                (true, true) => 1.0 + self.damp,
                (true, false) => value + self.damp,
                (false, _) => value,
            }
        })
    }
}

/// What a replay of a solver's codes in f64 finds.
#[derive(Default)]
pub(crate) struct Replay {
    /// How far beyond half a step a weight lay from its code's value, in steps.
    pub(crate) code: f64,
    /// Relative error of a scale, or of the loss that a searched scale is left with.
    pub(crate) scale: f64,
    pub(crate) loss: f64,
}

/// The candidates of a search for scales, of either sign: multiples of the absmax scale.
pub(crate) fn ratios(signs: Signs) -> Vec<f32> {
    let ratios = (0..48).map(|i| 0.35 + 0.7 * i as f32 / 47.0);
    match signs {
        Signs::Positive => ratios.collect(),
        Signs::Both => ratios.clone().chain(ratios.map(|ratio| -ratio)).collect(),
    }
}

/// The inputs of a solve, on the host.
pub(crate) struct Case<'a> {
    pub(crate) w: &'a Array2<f32>,
    pub(crate) upper: &'a Array2<f32>,
    pub(crate) plan: &'a Plan,
    pub(crate) options: SolveOptions<'a>,
    /// A code's value is rounded to fp16 before its error is computed, as a card does where scales
    /// are fp16.
    pub(crate) half_values: bool,
}

impl Case<'_> {
    fn n(&self) -> usize {
        self.w.ncols()
    }

    pub(crate) fn group(&self) -> usize {
        self.options.group_size.unwrap_or(self.n())
    }

    /// `code(j)` and `scale(g)` are the solver's for solve column j and group g of this row.
    pub(crate) fn replay(&self, row: usize, code: &[u8], scale: &[f32], out: &mut Replay) {
        let n = self.n();
        let source = |c: u32, zeroed: bool| {
            if zeroed && self.plan.dead[c as usize] {
                0.0
            } else {
                f64::from(self.w[[row, c as usize]])
            }
        };
        let original: Vec<f64> = self.plan.order.iter().map(|&c| source(c, false)).collect();
        let mut now: Vec<f64> = self.plan.order.iter().map(|&c| source(c, true)).collect();
        let stale = !self.options.fresh;
        let mut outer = now.clone();
        let zero = f64::from(1_u32 << (self.options.bits - 1));
        for j in 0..n {
            if j.is_multiple_of(128) {
                outer.clone_from(&now);
            }
            if j.is_multiple_of(self.group()) {
                let seen = match (stale, self.options.group_size) {
                    (true, None) => &original,
                    (true, Some(_)) => &outer,
                    (false, _) => &now,
                };
                let columns = j..(j + self.group()).min(n);
                let error =
                    self.scale_error(&seen[columns.clone()], columns, scale[j / self.group()]);
                out.scale = larger(out.scale, error);
            }
            let step = f64::from(scale[j / self.group()]);
            let chosen = f64::from(code[j]);
            let steps = now[j] / step + zero - chosen;
            let clipped =
                (chosen == 0.0 && steps < 0.0) || (chosen == 2.0 * zero - 1.0 && steps > 0.0);
            if !clipped {
                out.code = larger(out.code, steps.abs() - 0.5);
            }
            let mut value = step * (chosen - zero);
            if self.half_values {
                value = f64::from(f16::from_f64(value).to_f32());
            }
            let error = (now[j] - value) / f64::from(self.upper[[j, j]]);
            out.loss += error * error;
            for (now, u) in now.iter_mut().zip(self.upper.row(j)).skip(j + 1) {
                *now -= error * f64::from(*u);
            }
        }
    }

    /// How wrong a scale is for the weights it was computed from.
    fn scale_error(&self, w: &[f64], columns: Range<usize>, found: f32) -> f64 {
        let max_code = f64::from((1_u32 << self.options.bits) - 1);
        let low = w.iter().fold(0.0_f64, |a, &v| a.min(v));
        let high = w.iter().fold(0.0_f64, |a, &v| a.max(v));
        let absmax = high.max(-low);
        let half = |s: f64| {
            if self.options.half_scales { f64::from(f16::from_f64(s).to_f32()) } else { s }
        };
        let slack = if self.options.half_scales { 1e-3 } else { 0.0 };
        let Some(search) = self.options.search else {
            let range = if low < 0.0 { 2.0 * absmax } else { high };
            let range = if absmax == 0.0 { 2.0 } else { range };
            let off = (f64::from(found) - half(range / max_code)).abs() / f64::from(found);
            return larger(off - slack, 0.0);
        };
        let zero = (max_code + 1.0) / 2.0;
        let tried = search.by_solving && self.options.fresh;
        let loss = |s: f64| -> f64 {
            let value = |v: f64| s * (v / s).round_ties_even().clamp(-zero, max_code - zero);
            if tried {
                return self.trial(w, columns.start, value);
            }
            let terms = w.iter().zip(&search.importance[columns.clone()]);
            terms.map(|(&v, &h)| f64::from(h) * (value(v) - v).powi(2)).sum()
        };
        let base = 2.0 * if absmax == 0.0 { 1.0 } else { absmax } / max_code;
        let best =
            search.ratios.iter().map(|&r| loss(half(f64::from(r) * base))).fold(f64::MAX, f64::min);
        let left = loss(f64::from(found));
        if best == 0.0 { left } else { larger(left / best - 1.0, 0.0) }
    }
}

impl Case<'_> {
    /// Σ err² of solving the group whose weights are `w` with a grid that gives `value`, in blocks of
    /// 128 columns that do not know of each other.
    fn trial(&self, w: &[f64], start: usize, value: impl Fn(f64) -> f64) -> f64 {
        let mut now = w.to_vec();
        let mut sum = 0.0;
        for i in 0..now.len() {
            let upper = |j: usize| f64::from(self.upper[[start + i, start + j]]);
            let mut given = value(now[i]);
            if self.half_values {
                given = f64::from(f16::from_f64(given).to_f32());
            }
            let error = (now[i] - given) / upper(i);
            sum += error * error;
            let end = (i / 128 + 1) * 128;
            for (j, now) in now.iter_mut().enumerate().take(end).skip(i + 1) {
                *now -= error * upper(j);
            }
        }
        sum
    }
}

/// The larger of two errors, or NaN where one is, which `max` would drop.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Prints `error` as a fraction of `tolerance`, and fails beyond it (or on NaN).
pub(crate) fn within(what: &str, error: f64, tolerance: f64) {
    println!(
        "{what}: error {error:.2e} = {:.4} of the tolerance {tolerance:.0e}",
        error / tolerance
    );
    assert!(error <= tolerance, "{what}: {error:e} exceeds {tolerance:e}");
}

/// Values in −1..1 from a hash of the index.
pub(crate) fn noise(seed: usize, i: usize) -> f32 {
    let mut x = (i as u64).wrapping_add((seed as u64) << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x >> 40) as f32) / (1_u32 << 23) as f32 - 1.0
}

pub(crate) fn weights(rows: usize, n: usize) -> Array2<f32> {
    let heavy = |v: f32| v * v * v + 0.1 * v;
    let mut w = Array2::from_shape_fn((rows, n), |(r, j)| heavy(noise(1, r * n + j)));
    w.mapv_inplace(|v| f16::from_f32(v).to_f32());
    // Rows that take the scale's odd branches: no negative value, nothing but zeros.
    w.row_mut(1).mapv_inplace(f32::abs);
    w.row_mut(2).fill(0.0);
    w
}

/// Rows at the ends of fp16 that have each broken a scale: tiny weights beside zeros, all tiny, the
/// largest of either sign beside ordinary ones, and zeros.
#[allow(dead_code, reason = "each test binary uses a part of it")]
pub(crate) fn weights_at_the_ends_of_fp16(n: usize) -> Array2<f32> {
    let tiny = 2.0_f32.powi(-24);
    Array2::from_shape_fn((6, n), |(row, j)| match (row, j % 16) {
        (0, _) => tiny * (j % 2) as f32,
        (1, _) => {
            if j % 3 == 0 {
                -tiny
            } else {
                tiny
            }
        }
        (2, 5) => 65504.0,
        (3, 5) => -65504.0,
        (4, 5) => -65000.0,
        (5, _) => 0.0,
        _ => f16::from_f32(0.1 * noise(7, row * n + j)).to_f32(),
    })
}

/// A Gram of correlated inputs of different sizes; column 3 is dead.
pub(crate) fn gram(n: usize) -> Array2<f32> {
    let tokens = 2 * n + 8;
    let size = |j: usize| 0.2 + 2.0 * noise(5, j).abs();
    let mut x = Array2::from_shape_fn((tokens, n), |(t, j)| {
        (noise(2, t * n + j) + 0.5 * noise(3, t * 8 + j % 8)) * size(j)
    });
    if n > 3 {
        x.column_mut(3).fill(0.0);
    }
    x.t().dot(&x)
}
