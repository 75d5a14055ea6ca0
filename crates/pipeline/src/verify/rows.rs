//! The second look at a linear: every output against what is usual in the columns.

use std::ops::Range;

use super::columns::Column;
use super::gains::{Gain, Limits, Sums};
use super::grid::{Cells, Grid, Row};
use super::odd_words::{OddWords, Word};
use crate::error::Result;

/// Columns whose mean squared deviation is below this are near.
const NEAR: f64 = 0.3;

/// What is known of an output's gains.
pub(super) struct Output {
    pub(super) groups: Vec<Gain>,
    /// Over all columns.
    pub(super) all: Sums,
    /// Over the columns that are near in the other outputs.
    pub(super) near: Sums,
    /// The groups whose scale is that of larger or smaller weights, with their gains.
    pub(super) other_scales: Vec<(usize, f64)>,
}

/// Columns in the order of their groups, the near ones of each after the others; those of zeros, which
/// no token used, left out.
struct Order {
    columns: Vec<u32>,
    /// They lie so already.
    as_stored: bool,
    runs: Vec<Run>,
}

/// Columns of one group that are all near or all not, in [`Order`].
struct Run {
    at: Range<usize>,
    group: u32,
    near: bool,
}

/// A band's outputs, and room for a row in [`Order`].
struct Band<'a> {
    outputs: Vec<Output>,
    odd: OddWords<'a>,
    nearest: Vec<f32>,
    code: Vec<f32>,
    unbounded: Vec<f32>,
}

/// Gains of every output, and the words that are odd.
pub(super) fn outputs(grid: &Grid<'_>, columns: &[Column]) -> Result<(Vec<Output>, Vec<Word>)> {
    let linear = grid.linear;
    let order = Order::new(&linear.g_idx, columns);
    let usual: Vec<f64> = columns.iter().map(Column::mean_square).collect();
    let usual = OddWords::reciprocals(&usual);
    let begin = || Band {
        outputs: Vec::new(),
        odd: OddWords::new(linear.bits, &usual, linear.out_features),
        nearest: Vec::new(),
        code: Vec::new(),
        unbounded: Vec::new(),
    };
    let limits = Limits { bits: linear.bits, moved: false };
    let bands = grid.bands(begin, |band, output, row, cells| {
        band.odd.add(output, &row.deviation);
        band.add(row, cells, &order, (linear.groups, limits));
    })?;
    let mut outputs = Vec::with_capacity(linear.out_features);
    let mut odd = OddWords::new(linear.bits, &usual, linear.out_features);
    for band in bands {
        outputs.extend(band.outputs);
        odd.merge(band.odd);
    }
    Ok((outputs, odd.finish()))
}

impl Order {
    fn new(g_idx: &[u32], columns: &[Column]) -> Self {
        let key = |&column: &u32| {
            let known = &columns[column as usize];
            (g_idx[column as usize], known.mean_square() < NEAR)
        };
        let used = |&column: &u32| columns[column as usize].used;
        let mut order: Vec<u32> = (0..columns.len() as u32).filter(used).collect();
        order.sort_by_key(key);
        let mut at = 0;
        let runs = order.chunk_by(|a, b| key(a) == key(b)).map(|run| {
            let (group, near) = key(&run[0]);
            at += run.len();
            Run { at: at - run.len()..at, group, near }
        });
        let runs = runs.collect();
        let in_place = order.iter().enumerate().all(|(at, &column)| at == column as usize);
        Self { as_stored: in_place && order.len() == columns.len(), columns: order, runs }
    }

    fn gather(&self, from: &[f32], to: &mut Vec<f32>) {
        to.clear();
        to.extend(self.columns.iter().map(|&column| from[column as usize]));
    }
}

impl Band<'_> {
    /// Gains of a row's groups, of all of it, and of its near columns alone.
    fn add(
        &mut self,
        row: &Row,
        cells: Cells<'_>,
        order: &Order,
        (groups, limits): (usize, Limits),
    ) {
        let (nearest, code, unbounded) = match order.as_stored {
            true => (&row.nearest, &row.code, &row.unbounded),
            false => {
                order.gather(&row.nearest, &mut self.nearest);
                order.gather(&row.code, &mut self.code);
                order.gather(&row.unbounded, &mut self.unbounded);
                (&self.nearest, &self.code, &self.unbounded)
            }
        };
        let mut of_groups = vec![Sums::default(); groups];
        let (mut all, mut near) = (Sums::default(), Sums::default());
        for run in order.runs.iter().filter(|run| cells.of(run.group).exact) {
            let at = || run.at.clone();
            let sums = Sums::over(&nearest[at()], &code[at()], &unbounded[at()]);
            of_groups[run.group as usize].merge(&sums);
            all.merge(&sums);
            if run.near {
                near.merge(&sums);
            }
        }
        let cells = of_groups.iter().enumerate();
        let other_scales = cells.filter_map(|(g, sums)| Some((g, limits.of_cell(sums)?))).collect();
        let groups = of_groups.iter().map(Sums::gain).collect();
        self.outputs.push(Output { groups, all, near, other_scales });
    }
}
