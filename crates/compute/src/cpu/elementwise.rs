//! Row-wise and element-wise operations of a Llama block.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::rows::{into_matrix, slice, slice_mut};
use super::simd;
use crate::rope::RopeTable;

/// Rows handed to one task: enough work to pay for scheduling, small enough to balance.
const ROWS_PER_TASK: usize = 64;

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

/// Adds a bias to every row.
pub(crate) fn add_bias(x: &mut Array2<f32>, bias: &[f32]) {
    let mut rows: Vec<_> = x.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).for_each(|row| {
        row.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
    });
}

/// Rotates (x_i, x_{i+half}) of every head by the angle of the row's position in its window.
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
        for head in slice_mut(row).chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for ((l, h), (c, s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
                (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
            }
        }
    });
}

/// silu(gate) · up, in place of `gate`.
pub(crate) fn silu_mul(mut gate: Array2<f32>, up: &Array2<f32>) -> Array2<f32> {
    let mut rows: Vec<_> = gate.axis_iter_mut(Axis(0)).collect();
    rows.par_iter_mut().with_min_len(ROWS_PER_TASK).enumerate().for_each(|(i, gate)| {
        simd::silu_mul(slice_mut(gate), slice(up.row(i)));
    });
    gate
}

/// True when no value is NaN or infinite.
pub(crate) fn all_finite(x: &Array2<f32>) -> bool {
    let rows: Vec<_> = x.axis_iter(Axis(0)).collect();
    rows.par_iter().with_min_len(ROWS_PER_TASK).all(|row| row.iter().all(|v| v.is_finite()))
}
