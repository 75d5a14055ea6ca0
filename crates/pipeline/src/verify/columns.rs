//! The first look at a linear: deviations of every column, and energies.

use super::grid::{Cells, Grid, Row};
use crate::error::Result;

/// Deviations of a column over the rows, in steps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Column {
    pub(super) sum: f64,
    pub(super) squares: f64,
    /// Rows that were summed.
    pub(super) count: f64,
    /// Some row's code is not the zero.
    pub(super) used: bool,
}

/// All columns of a linear.
#[derive(Default)]
pub(super) struct Columns {
    pub(super) list: Vec<Column>,
    /// Energy of the difference, and of the weights.
    pub(super) error: f64,
    pub(super) energy: f64,
}

/// The same of a band, each field by itself so that several columns are summed at a time.
struct Band {
    sum: Vec<f64>,
    squares: Vec<f64>,
    used: Vec<u32>,
    /// Rows that count in all columns, and of others the columns that they count in.
    whole: f64,
    partial: Vec<f64>,
    error: f64,
    energy: f64,
}

impl Column {
    pub(super) fn mean_square(&self) -> f64 {
        self.squares / self.count
    }
}

impl Columns {
    pub(super) fn of(grid: &Grid<'_>) -> Result<Self> {
        let columns = grid.linear.in_features;
        let bands = grid.bands(
            || Band::new(columns),
            |band, _, row, cells| band.add(row, cells, &grid.linear.g_idx),
        )?;
        let mut all = Self { list: vec![Column::default(); columns], ..Self::default() };
        // In order, so that sums do not depend on the number of threads.
        bands.into_iter().for_each(|band| all.add(&band));
        Ok(all)
    }

    fn add(&mut self, band: &Band) {
        for (index, column) in self.list.iter_mut().enumerate() {
            column.sum += band.sum[index];
            column.squares += band.squares[index];
            column.count += band.whole + band.partial.get(index).unwrap_or(&0.0);
            column.used |= band.used[index] != 0;
        }
        self.error += band.error;
        self.energy += band.energy;
    }
}

impl Band {
    fn new(columns: usize) -> Self {
        Self {
            sum: vec![0.0; columns],
            squares: vec![0.0; columns],
            used: vec![0; columns],
            whole: 0.0,
            partial: Vec::new(),
            error: 0.0,
            energy: 0.0,
        }
    }

    fn add(&mut self, row: &Row, cells: Cells<'_>, group_of: &[u32]) {
        let count = self.sum.len();
        for (used, code) in self.used.iter_mut().zip(&row.code) {
            *used |= u32::from(*code != 0.0);
        }
        let (weight, scale) = (&row.weight[..count], &row.scale[..count]);
        let (code, deviation) = (&row.code[..count], &row.deviation[..count]);
        let (sum, squares) = (&mut self.sum[..count], &mut self.squares[..count]);
        let (mut error, mut energy) = (self.error, self.energy);
        for i in 0..count {
            let wanted = f64::from(weight[i]);
            error += (wanted - f64::from(scale[i] * code[i])).powi(2);
            energy += wanted * wanted;
        }
        (self.error, self.energy) = (error, energy);
        for i in 0..count {
            let deviation = f64::from(deviation[i]);
            sum[i] += deviation;
            squares[i] += deviation * deviation;
        }
        if cells.all_exact() {
            self.whole += 1.0;
            return;
        }
        self.partial.resize(count, 0.0);
        for (partial, &group) in self.partial.iter_mut().zip(group_of) {
            *partial += f64::from(u8::from(cells.of(group).exact));
        }
    }
}
