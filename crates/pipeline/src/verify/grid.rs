//! A linear's codes and the base's weights on one grid, band by band.
//!
//! A band is a few rows that one task looks at: its codes are unpacked and its scales widened together,
//! and its rows are then placed on the grid one by one, in buffers that a task keeps. So a linear takes
//! no memory but its packed form, however large it is. Loops over a row have no branches and no calls,
//! so that they are done several values at a time.

use std::ops::Range;

use gptq_checkpoint::GptqLinear;
use half::f16;
use rayon::prelude::*;

use super::base_weight::BaseWeight;
use crate::error::Result;

/// Rows that a task sums: a fixed number, so that sums do not depend on the number of threads.
const BAND: usize = 64;
/// The smallest number of fp16.
const SMALLEST_HALF: f32 = 5.960_464_5e-8;
/// What has a spacing of 1 above it: adding it rounds to the nearest integer, ties to even. The
/// instruction that does so is not in every x86-64, and without it is a call for every weight.
const ROUNDS: f32 = 12_582_912.0;

/// A linear's codes with their grid.
pub(super) struct Grid<'a> {
    pub(super) linear: &'a GptqLinear,
    base: &'a BaseWeight<'a>,
    zeros: Vec<u8>,
    max: f32,
    /// Groups and how many columns of each follow one another; empty where they do not lie together,
    /// as after act-order.
    runs: Vec<(u32, usize)>,
}

/// Scale and zero of one group of one row.
#[derive(Clone, Copy, Default)]
pub(super) struct Cell {
    pub(super) scale: f32,
    zero: f32,
    /// The scale has digits enough to tell one code from the next.
    pub(super) exact: bool,
}

/// A row on its grid, every field but `weight` in steps from the zero.
#[derive(Default)]
pub(super) struct Row {
    pub(super) weight: Vec<f32>,
    /// The code in the file.
    pub(super) code: Vec<f32>,
    /// The weight.
    pub(super) unbounded: Vec<f32>,
    /// The nearest code.
    pub(super) nearest: Vec<f32>,
    /// How far the code is off the weight; one beyond the grid is as near as it can be with the last
    /// code. Nothing where the scale is too coarse.
    pub(super) deviation: Vec<f32>,
    pub(super) scale: Vec<f32>,
    zero: Vec<f32>,
    halves: Vec<f16>,
}

/// A task's buffers.
#[derive(Default)]
pub(super) struct Desk {
    pub(super) row: Row,
    codes: Vec<u8>,
    /// `[rows, groups]`.
    cells: Vec<Cell>,
}

/// The cells of a row.
#[derive(Clone, Copy)]
pub(super) struct Cells<'a>(&'a [Cell]);

impl Cells<'_> {
    pub(super) fn of(&self, group: u32) -> Cell {
        self.0[group as usize]
    }

    pub(super) fn all_exact(&self) -> bool {
        self.0.iter().all(|cell| cell.exact)
    }
}

impl<'a> Grid<'a> {
    /// Of `linear`, with zeros in v1 form, and the weights it stands for.
    pub(super) fn new(linear: &'a GptqLinear, base: &'a BaseWeight<'a>) -> Self {
        let max = f32::from(linear.bits.max_code());
        let runs = linear.g_idx.chunk_by(|a, b| a == b).map(|run| (run[0], run.len()));
        let mut runs: Vec<_> = runs.collect();
        if runs.len() * LANES > linear.in_features {
            runs.clear();
        }
        Self { linear, base, zeros: linear.unpack_zeros(), max, runs }
    }

    /// What `of` makes of every band of rows, in order; it gets each row in turn, between `begin` and
    /// the end of the band.
    ///
    /// # Errors
    /// As [`BaseWeight::row`], of the first row that has one.
    pub(super) fn bands<T: Send>(
        &self,
        begin: impl Fn() -> T + Sync + Send,
        of: impl Fn(&mut T, usize, &Row, Cells<'_>) + Sync + Send,
    ) -> Result<Vec<T>> {
        let rows = self.linear.out_features;
        let band = |desk: &mut Desk, start: usize| {
            let band = start..(start + BAND).min(rows);
            self.spread(desk, band.clone());
            let mut made = begin();
            for row in band {
                let Desk { row: places, codes, cells } = desk;
                let at = row - start;
                let (columns, groups) = (self.linear.in_features, self.linear.groups);
                let codes = &codes[at * columns..][..columns];
                let cells = &cells[at * groups..][..groups];
                self.place(row, codes, cells, places)?;
                of(&mut made, row, places, Cells(cells));
            }
            Ok(made)
        };
        let starts: Vec<usize> = (0..rows).step_by(BAND).collect();
        let made: Vec<Result<T>> = starts.into_par_iter().map_init(Desk::default, band).collect();
        made.into_iter().collect()
    }

    /// Unpacks the codes of a band and widens its scales.
    fn spread(&self, desk: &mut Desk, band: Range<usize>) {
        let GptqLinear { in_features, out_features, groups, .. } = *self.linear;
        desk.codes.resize(band.len() * in_features, 0);
        self.linear.unpack_codes_of(band.clone(), &mut desk.codes);
        desk.cells.resize(band.len() * groups, Cell::default());
        for group in 0..groups {
            let at = group * out_features;
            let scales = &self.linear.scales[at..][band.clone()];
            let zeros = &self.zeros[at..][band.clone()];
            for (row, (scale, &zero)) in scales.iter().zip(zeros).enumerate() {
                let scale = scale.to_f32();
                // What rounding of a scale near fp16's end makes of the last code, in steps.
                let slack = self.max * f32::max(SMALLEST_HALF / scale.abs(), 1.0 / 1024.0) / 2.0;
                let cell = Cell { scale, zero: f32::from(zero), exact: slack < 0.2 };
                desk.cells[row * groups + group] = cell;
            }
        }
    }

    /// Places a row on its grid.
    fn place(&self, row: usize, codes: &[u8], cells: &[Cell], to: &mut Row) -> Result<()> {
        let count = codes.len();
        to.resize(count);
        self.base.row(row, &mut to.halves, &mut to.weight)?;
        self.widen(cells, to);
        let weights = to.weight.as_chunks().0.iter().zip(to.scale.as_chunks().0);
        let weights = weights.zip(to.zero.as_chunks().0).zip(codes.as_chunks().0);
        let places = to.code.as_chunks_mut().0.iter_mut().zip(to.unbounded.as_chunks_mut().0);
        let places = places.zip(to.nearest.as_chunks_mut().0).zip(to.deviation.as_chunks_mut().0);
        // The format's sides are multiples of 32, so no column is left over.
        for ((((weight, scale), zero), codes), (((code, unbounded), nearest), deviation)) in
            weights.zip(places)
        {
            let placed = Placed::new(weight, scale, zero, codes, self.max);
            (*code, *unbounded) = (placed.code, placed.unbounded);
            (*nearest, *deviation) = (placed.nearest, placed.deviation);
        }
        if !Cells(cells).all_exact() {
            for (deviation, &group) in to.deviation.iter_mut().zip(&self.linear.g_idx) {
                *deviation = if cells[group as usize].exact { *deviation } else { 0.0 };
            }
        }
        Ok(())
    }
}

impl Grid<'_> {
    /// Gives every column of a row the scale and the zero of its group.
    fn widen(&self, cells: &[Cell], to: &mut Row) {
        if self.runs.is_empty() {
            let columns = to.scale.iter_mut().zip(&mut to.zero);
            for ((scale, zero), &group) in columns.zip(&self.linear.g_idx) {
                let cell = &cells[group as usize];
                (*scale, *zero) = (cell.scale, cell.zero);
            }
            return;
        }
        let mut at = 0;
        for &(group, columns) in &self.runs {
            let cell = &cells[group as usize];
            to.scale[at..at + columns].fill(cell.scale);
            to.zero[at..at + columns].fill(cell.zero);
            at += columns;
        }
    }
}

/// Columns that are placed at a time, in registers.
const LANES: usize = 8;

/// Some columns of [`Row`].
struct Placed {
    code: [f32; LANES],
    unbounded: [f32; LANES],
    nearest: [f32; LANES],
    deviation: [f32; LANES],
}

impl Placed {
    #[inline(always)]
    fn new(
        weight: &[f32; LANES],
        scale: &[f32; LANES],
        zero: &[f32; LANES],
        codes: &[u8; LANES],
        max: f32,
    ) -> Self {
        let none = [0.0; LANES];
        let mut to = Self { code: none, unbounded: none, nearest: none, deviation: none };
        for i in 0..LANES {
            let steps = weight[i] / scale[i] + zero[i];
            to.code[i] = f32::from(codes[i]) - zero[i];
            to.unbounded[i] = steps - zero[i];
            // What is no number stays none, and is of a scale that is not exact.
            to.nearest[i] = (within(steps, 0.0, max) + ROUNDS) - ROUNDS - zero[i];
            to.deviation[i] = within(steps, -0.5, max + 0.5) - zero[i] - to.code[i];
        }
        to
    }
}

/// As [`f32::clamp`], which first looks at its limits, for every value anew.
#[inline(always)]
fn within(value: f32, least: f32, most: f32) -> f32 {
    let value = if value < least { least } else { value };
    if value > most { most } else { value }
}

impl Row {
    fn resize(&mut self, count: usize) {
        let Self { weight, code, unbounded, nearest, deviation, scale, zero, halves: _ } = self;
        for buffer in [weight, code, unbounded, nearest, deviation, scale, zero] {
            buffer.resize(count, 0.0);
        }
    }
}
