//! The GPTQ solver on the host: column by column, each error spread over the columns to come.
//!
//! Frantar et al., arXiv 2210.17323, with AutoGPTQ's order of operations where the spec's choices do
//! not say otherwise. Output rows are independent, so a task owns a band of rows from the first
//! column to the last.

use gptq_compute::Tensor;
use half::f16;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::choices::{Choices, Clip, GroupWeights, ScalePrecision, Signs};
use crate::error::Result;
use crate::grid::{absmax_scale, code, file_scale, searched_scale, signed_ratios};
use crate::hessian::Factored;
use crate::solved::{Quantized, Stored, group_index};
use crate::spec::QuantSpec;
use crate::trial::Trial;

/// Columns whose errors are spread one by one; the columns after them get one product per block.
/// AutoGPTQ's value, and part of its numerics: group scales are read from weights updated only at
/// block ends.
pub(crate) const BLOCK: usize = 128;
/// Rows of a task: a fixed size, so that sums do not depend on the number of threads.
const ROWS_PER_TASK: usize = 64;

/// A band of rows while it is solved; everything is in solve order.
struct Band {
    weight: Array2<f32>,
    codes: Array2<u8>,
    /// Dequantized values.
    values: Array2<f32>,
    /// One vector of scales a row.
    scales: Vec<Vec<f32>>,
    loss: f64,
}

/// Quantizes `weight` `[out, in]` in host memory; see [`crate::solve`].
pub(crate) fn solve(weight: &Tensor, factored: &Factored, spec: &QuantSpec) -> Result<Quantized> {
    let w = weight.as_host();
    let (out_features, in_features) = w.dim();
    let starts: Vec<usize> = (0..out_features).step_by(ROWS_PER_TASK).collect();
    let bands: Vec<Band> = starts
        .into_par_iter()
        .map(|start| {
            let end = (start + ROWS_PER_TASK).min(out_features);
            solve_band(w.slice(s![start..end, ..]), factored, spec)
        })
        .collect();

    let group = spec.group_columns(in_features);
    let mut codes = vec![0_u8; out_features * in_features];
    let mut values = vec![0.0_f32; out_features * in_features];
    let band_len = ROWS_PER_TASK * in_features;
    codes.par_chunks_mut(band_len).zip(values.par_chunks_mut(band_len)).zip(&bands).for_each(
        |((codes, values), band)| {
            unpermute(band, &factored.order, &spec.choices, codes, values);
        },
    );
    let scales: Vec<Vec<f32>> = bands.iter().flat_map(|b| b.scales.iter().cloned()).collect();
    let g_idx = group_index(&factored.order, group);
    let stored = Stored::of_rows([out_features, in_features], codes, &scales, &values, g_idx)?;
    let loss = bands.iter().map(|b| b.loss).sum();
    #[expect(clippy::expect_used, reason = "out × in values were allocated above")]
    let values = Array2::from_shape_vec((out_features, in_features), values).expect("out × in");
    Ok(Quantized { stored, weight: Tensor::from_host(values), loss: Some(loss) })
}

/// Puts a band's columns back into the weights' order. Scales that the file holds exactly give the
/// values that it dequantizes to; values of f32 scales are rounded to fp16, the type in which
/// AutoGPTQ keeps the layer while it calibrates the next ones.
fn unpermute(band: &Band, order: &[u32], choices: &Choices, codes: &mut [u8], values: &mut [f32]) {
    let n = order.len();
    let kept = |v: f32| match choices.scales {
        ScalePrecision::Half => v,
        ScalePrecision::F32 => f16::from_f32(v).to_f32(),
    };
    for row in 0..band.codes.nrows() {
        for (j, &column) in order.iter().enumerate() {
            let at = row * n + column as usize;
            codes[at] = band.codes[[row, j]];
            values[at] = kept(band.values[[row, j]]);
        }
    }
}

/// What every row of a linear is solved with.
struct Solver<'a> {
    upper: &'a Array2<f32>,
    importance: &'a [f32],
    choices: Choices,
    signs: Signs,
    ratios: Vec<f32>,
    /// One group a row.
    whole_rows: bool,
    group: usize,
    zero: f32,
    max_code: f32,
}

impl<'a> Solver<'a> {
    fn new(factored: &'a Factored, spec: &QuantSpec, n: usize) -> Self {
        Self {
            upper: factored.upper.as_host(),
            importance: &factored.importance,
            choices: spec.choices,
            signs: spec.signs(),
            ratios: signed_ratios(spec.signs()),
            whole_rows: spec.group_size.is_none(),
            group: spec.group_columns(n),
            zero: f32::from(spec.zero()),
            max_code: spec.max_code(),
        }
    }

    /// Scale of a group whose members start at column `first` of the solve.
    fn scale(&self, members: &[f32], first: usize) -> f32 {
        let half = self.choices.scales == ScalePrecision::Half;
        match self.choices.clip {
            Clip::None => file_scale(absmax_scale(members, self.max_code), self.max_code, half),
            Clip::Search | Clip::Solve => {
                let importance = &self.importance[first..first + members.len()];
                let grid = (self.zero, self.max_code);
                searched_scale(members, importance, &self.ratios, grid, half)
            }
        }
    }

    /// Scale of a group whose members start at column `first` of the solve, by trial where the
    /// weights are all corrected.
    fn chosen(&self, trial: &mut Trial, members: &[f32], first: usize) -> f32 {
        let fresh = self.choices.group_weights == GroupWeights::Fresh;
        if self.choices.clip != Clip::Solve || !fresh {
            return self.scale(members, first);
        }
        let half = self.choices.scales == ScalePrecision::Half;
        let columns = first..first + members.len();
        let upper = self.upper.slice(s![columns.clone(), columns]);
        trial.scale(members, upper, (self.zero, self.max_code), half)
    }

    /// End of the block of columns that begins at `start`. With fresh weights a group that would
    /// cross the end begins a block of its own, because only a block's own columns are corrected
    /// within it.
    fn block_end(&self, start: usize, n: usize) -> usize {
        let end = (start + BLOCK).min(n);
        let last = end / self.group * self.group;
        let crosses = last > start && last < end && (last + self.group).min(n) > end;
        match self.choices.group_weights {
            GroupWeights::Fresh if crosses && !self.whole_rows => last,
            _ => end,
        }
    }
}

/// Solves a band of rows `[rows, in]`.
fn solve_band(w: ArrayView2<'_, f32>, factored: &Factored, spec: &QuantSpec) -> Band {
    let (rows, n) = w.dim();
    let solver = Solver::new(factored, spec, n);
    let mut band = Band {
        weight: Array2::from_shape_fn((rows, n), |(r, j)| {
            let column = factored.order[j] as usize;
            if factored.dead[column] { 0.0 } else { w[[r, column]] }
        }),
        codes: Array2::zeros((rows, n)),
        values: Array2::zeros((rows, n)),
        scales: vec![Vec::with_capacity(n.div_ceil(solver.group)); rows],
        loss: 0.0,
    };
    if solver.whole_rows {
        row_scales(&mut band, w, &solver, factored);
    }
    let mut errors = Array2::<f32>::zeros((rows, BLOCK));
    let mut start = 0;
    while start < n {
        let end = solver.block_end(start, n);
        let mut errors = errors.slice_mut(s![.., ..end - start]);
        solve_block(&mut band, &solver, start..end, &mut errors);
        let (_, mut rest) = band.weight.view_mut().split_at(Axis(1), end);
        general_mat_mul(-1.0, &errors, &solver.upper.slice(s![start..end, end..]), 1.0, &mut rest);
        start = end;
    }
    band
}

/// One scale for each whole row. AutoGPTQ's comes from the weights as they were before dead columns
/// were zeroed.
fn row_scales(band: &mut Band, w: ArrayView2<'_, f32>, solver: &Solver<'_>, factored: &Factored) {
    let stale = solver.choices.group_weights == GroupWeights::Stale;
    let mut trial = Trial::new(solver.signs);
    for (r, scales) in band.scales.iter_mut().enumerate() {
        let row: Vec<f32> = if stale {
            factored.order.iter().map(|&column| w[[r, column as usize]]).collect()
        } else {
            band.weight.row(r).to_vec()
        };
        scales.push(solver.chosen(&mut trial, &row, 0));
    }
}

/// Solves the columns of one block for every row of the band; leaves their scaled errors in
/// `errors` `[rows, columns]` and the band's own weights untouched: stale scales inside the block
/// are read from them.
fn solve_block(
    band: &mut Band,
    solver: &Solver<'_>,
    columns: std::ops::Range<usize>,
    errors: &mut ArrayViewMut2<'_, f32>,
) {
    let n = band.weight.ncols();
    let mut current = vec![0.0_f32; columns.len()];
    let mut trial = Trial::new(solver.signs);
    for (r, mut errors) in errors.axis_iter_mut(Axis(0)).enumerate() {
        let outer = band.weight.row(r);
        let Some(outer) = outer.as_slice() else { return };
        current.copy_from_slice(&outer[columns.clone()]);
        for (i, j) in columns.clone().enumerate() {
            if !solver.whole_rows && j.is_multiple_of(solver.group) {
                let until = (j + solver.group).min(n);
                let fresh = solver.choices.group_weights == GroupWeights::Fresh;
                // A group that begins a block may reach past it: all of it is corrected so far.
                let members = if fresh && until <= columns.end {
                    &current[i..until - columns.start]
                } else {
                    &outer[j..until]
                };
                band.scales[r].push(solver.chosen(&mut trial, members, j));
            }
            let scale = band.scales[r][j / solver.group];
            let w = current[i];
            let q = code(w, scale, solver.zero, solver.max_code);
            let value = scale * (q - solver.zero);
            let row = solver.upper.row(j);
            let Some(row) = row.as_slice() else { return };
            let error = (w - value) / row[j];
            for (c, u) in current[i..].iter_mut().zip(&row[j..columns.end]) {
                *c -= error * u;
            }
            band.codes[[r, j]] = q as u8;
            band.values[[r, j]] = value;
            errors[i] = error;
            band.loss += f64::from(error) * f64::from(error);
        }
    }
}
