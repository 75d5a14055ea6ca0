//! Row-wise and element-wise operations of a decoder block.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::rows::{into_matrix, slice, slice_mut};
use super::simd;
use crate::activation::Activation;
use crate::rope::{RopeLayout, RopeTable};

/// Rows handed to one task: enough work to pay for scheduling, small enough to balance.
pub(super) const ROWS_PER_TASK: usize = 64;

/// x / sqrt(mean(x²) + eps) · gain over every run of gain.len() values of a row. The mean is a sum in
/// f64 rounded once to f32, the type in which loaders add eps and take the root.
pub(crate) fn rms_norm(x: &Array2<f32>, gain: &[f32], eps: f32) -> Array2<f32> {
    let (rows, cols) = x.dim();
    let mut out = vec![0.0_f32; rows * cols];
    out.par_chunks_mut(cols * ROWS_PER_TASK).enumerate().for_each(|(task, band)| {
        for (i, out) in band.chunks_mut(cols).enumerate() {
            let row = slice(x.row(task * ROWS_PER_TASK + i));
            for (out, run) in out.chunks_mut(gain.len()).zip(row.chunks(gain.len())) {
                let square = run.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
                let mean = square / gain.len() as f64;
                let inverse = 1.0 / (mean as f32 + eps).sqrt();
                for ((o, &v), g) in out.iter_mut().zip(run).zip(gain) {
                    *o = v * inverse * g;
                }
            }
        }
    });
    into_matrix(out, rows, cols)
}

/// (x − mean) / sqrt(variance + eps) · gain over every run of `features` values of a row, whose gains are all
/// the same or one after the other. Sums are f64, as in [`rms_norm`].
pub(crate) fn layer_norm(x: &Array2<f32>, gain: &[f32], features: usize, eps: f32) -> Array2<f32> {
    let (rows, cols) = x.dim();
    let mut out = vec![0.0_f32; rows * cols];
    out.par_chunks_mut(cols * ROWS_PER_TASK).enumerate().for_each(|(task, band)| {
        for (i, out) in band.chunks_mut(cols).enumerate() {
            let row = slice(x.row(task * ROWS_PER_TASK + i));
            let gains = gain.chunks(features).cycle();
            for ((out, run), gain) in out.chunks_mut(features).zip(row.chunks(features)).zip(gains)
            {
                let mean = run.iter().map(|&v| f64::from(v)).sum::<f64>() / features as f64;
                let square = run.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
                let inverse = 1.0 / ((square / features as f64) as f32 + eps).sqrt();
                for ((o, &v), g) in out.iter_mut().zip(run).zip(gain) {
                    *o = (v - mean as f32) * inverse * g;
                }
            }
        }
    });
    into_matrix(out, rows, cols)
}

/// Adds a bias to every row.
pub(crate) fn add_bias(x: &mut Array2<f32>, bias: &[f32]) {
    let mut rows: Vec<_> = x.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).for_each(|row| {
        row.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
    });
}

/// Rotates every head by the angles of the row's position in its window.
pub(crate) fn rope(x: &mut Array2<f32>, table: &RopeTable, seq_len: usize) {
    rotate(x, table, |row| row % seq_len);
}

/// As [`rope`], with the position of every row.
pub(crate) fn rope_at(x: &mut Array2<f32>, table: &RopeTable, positions: &[usize]) {
    rotate(x, table, |row| positions[row]);
}

fn rotate(x: &mut Array2<f32>, table: &RopeTable, position: impl Fn(usize) -> usize + Sync) {
    let half = table.half;
    let mut rows: Vec<_> = x.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, row)| {
        let at = position(i) * half;
        let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
        for head in slice_mut(row).chunks_exact_mut(table.head_dim) {
            let angles = cos.iter().zip(sin);
            match table.layout {
                RopeLayout::Half => {
                    let (low, high) = head[..2 * half].split_at_mut(half);
                    for ((l, h), (c, s)) in low.iter_mut().zip(high).zip(angles) {
                        (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
                    }
                }
                RopeLayout::Interleaved => {
                    for (pair, (c, s)) in head.chunks_exact_mut(2).zip(angles) {
                        let (even, odd) = (pair[0], pair[1]);
                        (pair[0], pair[1]) = (even * c - odd * s, odd * c + even * s);
                    }
                }
            }
        }
    });
}

/// activation(gate) · up, in place of `gate`.
pub(crate) fn gated(
    mut gate: Array2<f32>,
    up: &Array2<f32>,
    activation: Activation,
) -> Array2<f32> {
    let multiply = match activation {
        Activation::Silu => simd::silu_mul,
        Activation::GeluTanh => simd::gelu_mul,
    };
    let mut rows: Vec<_> = gate.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, gate)| {
        multiply(slice_mut(gate), slice(up.row(i)));
    });
    gate
}

/// True when no value is NaN or infinite.
pub(crate) fn all_finite(x: &Array2<f32>) -> bool {
    let rows: Vec<_> = x.axis_iter(Axis(0)).collect();
    rows.par_iter().with_min_len(ROWS_PER_TASK).all(|row| row.iter().all(|v| v.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::largest;

    fn noise(rows: usize, cols: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            ((i * 7919 + j * 104_729) % 2003) as f32 / 400.0 - 2.5
        })
    }

    #[test]
    fn layer_norms_match_f64() {
        let (x, features, eps) = (noise(70, 24) + 3.0, 8, 1e-5);
        for gains in [1, 3] {
            let gain: Vec<f32> = noise(1, gains * features).into_iter().collect();
            let want = Array2::from_shape_fn(x.dim(), |(i, j)| {
                let run = x.row(i).mapv(f64::from);
                let run = run.as_slice().unwrap().chunks(features).nth(j / features).unwrap();
                let mean = run.iter().sum::<f64>() / features as f64;
                let variance =
                    run.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / features as f64;
                let gain = f64::from(gain[j % gain.len()]);
                (run[j % features] - mean) / (variance + f64::from(eps)).sqrt() * gain
            });
            let got = layer_norm(&x, &gain, features, eps).mapv(f64::from);
            assert!(largest(&(got - want)) < 2e-6, "{gains} gains");
        }
    }

    /// A pair of features is a complex number that is multiplied by factor · e^(i·angle); what is not rotated
    /// stays.
    #[test]
    fn rotations_match_the_definition_in_every_layout() {
        let frequencies = [1.0_f32, 0.31, 0.07];
        for (layout, head_dim, factor) in [
            (RopeLayout::Half, 6, 1.0),
            (RopeLayout::Half, 10, 1.25),
            (RopeLayout::Interleaved, 6, 1.0),
            (RopeLayout::Interleaved, 11, 0.75),
        ] {
            let table = RopeTable::with(&frequencies, 9, head_dim, layout, factor);
            let x = noise(7, 2 * head_dim);
            let place = |i: usize, second: bool| match (layout, second) {
                (RopeLayout::Half, _) => i + 3 * usize::from(second),
                (RopeLayout::Interleaved, _) => 2 * i + usize::from(second),
            };
            let mut want = x.mapv(f64::from);
            for ((row, head), i) in
                (0..7).flat_map(|r| [(r, 0), (r, 1)]).flat_map(|at| (0..3).map(move |i| (at, i)))
            {
                let [a, b] = [false, true].map(|second| head * head_dim + place(i, second));
                let (re, im) = (f64::from(x[[row, a]]), f64::from(x[[row, b]]));
                let angle = (2 + row) as f64 * f64::from(frequencies[i]);
                let (sin, cos) = angle.sin_cos();
                want[[row, a]] = f64::from(factor) * (re * cos - im * sin);
                want[[row, b]] = f64::from(factor) * (im * cos + re * sin);
            }
            let mut got = x;
            let positions: Vec<_> = (2..9).collect();
            rope_at(&mut got, &table, &positions);
            let worst = largest(&(got.mapv(f64::from) - want));
            assert!(worst < 3e-6, "{layout:?} of {head_dim}: {worst:e}");
        }
    }
}
