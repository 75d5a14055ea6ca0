//! How a quantized linear sits on the weights that it should stand for, without calibration data.
//!
//! What makes this hard is that a sound file may be far from its base. GPTQ solves the columns one
//! after another and makes the later ones pay for the rounding of the earlier ones, at the rate at
//! which their inputs stand for each other: the deviation of row r is d = e·U, with e the rounding
//! errors and U the factor of H⁻¹. Where a few inputs dominate the Hessian (an outlier channel, a
//! constant one), their columns are exact and all others may be off by many steps, up to the ends of
//! the grid. An input that no token used has a column of zeros. One enormous weight makes its whole
//! row pay. So the size of the error says nothing, and no limit here is on it. What a sound file does
//! have, whatever its Hessian:
//!
//! - *a near column*. The first column that was solved paid for nothing: its codes are the nearest
//!   ones. Codes or zeros that are off by a step, words with changed low bits and scales of the wrong
//!   size leave no column near.
//! - *gains of 1*. Rounding errors do not point along the weights, so the codes that a group has,
//!   projected on the nearest ones, come out as 1 times them, within what the scatter over the rows
//!   allows. Codes that belong to other weights come out as 0. Where noise has driven the codes to the
//!   ends of the grid they also come out low, but then they are much larger than the weights ask for,
//!   and nothing can be told; wrong codes are about as large as right ones. The less noise there is, the
//!   less a gain may differ from 1 ([`gains`](super::gains)). An output by itself, and one group of it,
//!   are judged alike.
//! - *scales of its own*. The gains of the rows say what scales would fit; those of another group do
//!   when rows of scales were swapped.
//! - *no odd word*. The deviations under each 32-bit word, in steps, over what is usual in their
//!   columns and their row. A word that was changed stands out among the others of its linear; one
//!   whose new codes are close to the old does not, and takes a recorded sum to be found.
//!
//! o and down of a recipe that shifts its targets were not meant to be the base's, so no column of them
//! has to be near, and their gains have more room.
//!
//! Limits were set on the files that every recipe makes at 2, 3, 4 and 8 bits of 24 small random models
//! and 9 variants of the embedded one (outlier, constant and dead channels, linears of zeros, heavy,
//! sparse, ternary and one-signed weights, weights at either end of fp16), and on faults planted in
//! some of them; beside each limit stands what was seen on both of its sides.

use gptq_checkpoint::{Bits, GptqLinear};
use ndarray::Array2;
use rayon::prelude::*;

use super::findings::{Check, Findings};
use super::gains::{Gain, Limits, Sums};
use super::odd_words::{Word, odd_words};

/// Rows that a task sums: a fixed number, so that sums do not depend on the number of threads.
const BAND: usize = 64;
/// Mean squared deviation in steps of the nearest column. Rounding leaves 1/12, AutoGPTQ's scales of
/// rows without a negative weight 0.155; codes that are off by one leave 0.8 to 1.1, and more than 0.5
/// at 2 bits, where half of them stay at the end of the grid.
const MAX_NEAREST: f64 = 0.32;
/// Columns whose mean squared deviation is below this are near.
const NEAR: f64 = 0.3;
/// Another group's scales fit a group this much better when they are its own.
const MIN_SWAP: f64 = 2.0;
/// Scatter of a group's gains below which its scales are right.
const MAX_SCATTER: f64 = 0.05;

/// How a quantized linear sits on its weights.
pub(super) struct Fit {
    /// Energy of the difference, and of the weights.
    pub(super) error: f64,
    pub(super) energy: f64,
    /// The nearest column; `None` where no column can be judged.
    nearest: Option<Column>,
    /// Over all its groups and rows.
    whole: Sums,
    /// Of every group, over the rows.
    groups: Vec<Sums>,
    outputs: Vec<Output>,
    /// A group and the one whose scales fit it better than its own.
    swapped: Option<(usize, usize)>,
    bits: Bits,
    odd: Vec<Word>,
}

/// Deviations of a column over the rows, in steps.
#[derive(Clone, Copy, Debug, Default)]
struct Column {
    sum: f64,
    squares: f64,
    /// Rows that were summed.
    count: f64,
    /// Rows whose code is not the zero.
    used: u32,
}

/// What is known of an output's gains.
struct Output {
    groups: Vec<Gain>,
    /// Over all columns.
    all: Sums,
    /// Over the columns that are near in the other outputs.
    near: Sums,
    /// The groups whose scale is that of larger or smaller weights, with their gains.
    other_scales: Vec<(usize, f64)>,
}

/// One weight on its grid, in steps from the zero.
struct Place {
    /// The weight.
    unbounded: f32,
    /// The weight; one beyond the grid is as near as it can be with the last code.
    steps: f32,
    /// The nearest code.
    nearest: f32,
    /// The code in the file.
    code: f32,
    scale: f32,
    /// The scale has digits enough to tell one code from the next.
    exact: bool,
}

/// A linear's codes with their grid.
pub(super) struct Grid<'a> {
    linear: &'a GptqLinear,
    weight: &'a Array2<f32>,
    codes: Vec<u8>,
    zeros: Vec<u8>,
}

/// Energy of the difference of `linear` from `weight`, and of the weights.
pub(super) fn energies(linear: &GptqLinear, weight: &Array2<f32>) -> (f64, f64) {
    let (_, error, energy) = Grid::new(linear, weight).columns();
    (error, energy)
}

impl Fit {
    /// Of `linear`, with zeros in v1 form, to `weight` `[out, in]`.
    pub(super) fn new(linear: &GptqLinear, weight: &Array2<f32>) -> Self {
        let grid = Grid::new(linear, weight);
        let (columns, error, energy) = grid.columns();
        let outputs = grid.rows(|row| grid.output(row, &columns));
        let of_group = |group: usize| outputs.iter().map(move |output| &output.groups[group]);
        let groups = (0..linear.groups).into_par_iter().map(|g| Sums::of(of_group(g))).collect();
        let judged = columns.iter().filter(|column| column.used > 0 && column.count > 0.0);
        let usual: Vec<f64> = columns.iter().map(Column::mean_square).collect();
        let deviations = grid.rows(|row| {
            let deviation = |column| grid.at(row, column).deviation();
            (0..linear.in_features).map(deviation).collect()
        });
        Self {
            error,
            energy,
            nearest: judged.min_by(|a, b| a.mean_square().total_cmp(&b.mean_square())).copied(),
            whole: Sums::of(outputs.iter().flat_map(|output| &output.groups)),
            groups,
            swapped: swapped(&outputs, linear),
            outputs,
            bits: linear.bits,
            odd: odd_words(linear.bits, &deviations, &usual),
        }
    }

    /// Adds what is wrong; `moved` marks a linear whose weights were not meant to be the base's.
    pub(super) fn report(&self, name: &str, moved: bool, findings: &mut Findings) {
        let mut add = |place: String, what: String| findings.add(Check::Weights, place, what);
        let far = self.nearest.filter(|column| !moved && column.mean_square() > MAX_NEAREST);
        if let Some(column) = far {
            add(name.to_owned(), column.describe());
            // The other measures would say the same again, and less clearly.
            return;
        }
        let limits = Limits { bits: self.bits, moved };
        let foreign = |(group, sums): (usize, &Sums)| Some((group, limits.of_group(sums)?));
        if let Some((group, gain)) = self.groups.iter().enumerate().find_map(foreign) {
            add(
                name.to_owned(),
                format!(
                    "gives group {group} other weights: its codes are {gain:.2} times the base's"
                ),
            );
            return;
        }
        if let Some(gain) = limits.of_whole(&self.whole) {
            add(
                format!("{name}.scales"),
                format!("are not the weights': the codes are {gain:.2} times what they ask for"),
            );
            return;
        }
        let mut other_scales = Vec::new();
        for (row, output) in self.outputs.iter().enumerate() {
            if limits.is_other_output(&output.all, &output.near) {
                add(name.to_owned(), format!("gives output {row} other weights than the base's"));
            } else {
                other_scales.extend(output.other_scales.iter().map(|&(g, gain)| (row, g, gain)));
            }
        }
        if let Some((row, group, gain)) = other_scales.first() {
            add(
                format!("{name}.scales"),
                format!(
                    "hold at group {group}, output {row} what is not its weights': the codes there are \
                     {gain:.2} times what they ask for ({} such)",
                    other_scales.len()
                ),
            );
        }
        if let Some((group, other)) = self.swapped {
            add(
                format!("{name}.scales"),
                format!("gives group {group} scales that are those of group {other}"),
            );
        }
        for word in &self.odd {
            add(
                format!("{name}.qweight"),
                format!(
                    "holds a word at row {}, output {} whose error is {:.0} times what is usual there",
                    word.row,
                    word.output,
                    word.times(self.bits)
                ),
            );
        }
    }
}

impl<'a> Grid<'a> {
    fn new(linear: &'a GptqLinear, weight: &'a Array2<f32>) -> Self {
        Self { linear, weight, codes: linear.unpack_codes(), zeros: linear.unpack_zeros() }
    }

    fn at(&self, row: usize, column: usize) -> Place {
        let linear = self.linear;
        let at = linear.g_idx[column] as usize * linear.out_features + row;
        let (scale, zero) = (linear.scales[at].to_f32(), f32::from(self.zeros[at]));
        let max = f32::from(linear.bits.max_code());
        let steps = self.weight[[row, column]] / scale + zero;
        // What rounding of a scale near fp16's end makes of the last code, in steps.
        let slack = max * f32::max(SMALLEST_HALF / scale, 1.0 / 1024.0) / 2.0;
        Place {
            unbounded: steps - zero,
            steps: steps.clamp(-0.5, max + 0.5) - zero,
            nearest: steps.round_ties_even().clamp(0.0, max) - zero,
            code: f32::from(self.codes[row * linear.in_features + column]) - zero,
            scale,
            exact: slack < 0.2,
        }
    }

    /// One value for each row, in order; rows are visited in parallel.
    fn rows<T: Send>(&self, of: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        (0..self.linear.out_features).into_par_iter().map(of).collect()
    }

    /// Deviations of every column, and the energies of the difference and of the weights.
    fn columns(&self) -> (Vec<Column>, f64, f64) {
        let (outputs, columns) = (self.linear.out_features, self.linear.in_features);
        let band = |start: usize| {
            let mut sums = vec![Column::default(); columns];
            let (mut error, mut energy) = (0.0, 0.0);
            for row in start..(start + BAND).min(outputs) {
                for (column, sum) in sums.iter_mut().enumerate() {
                    let place = self.at(row, column);
                    let wanted = f64::from(self.weight[[row, column]]);
                    error += (wanted - f64::from(place.scale * place.code)).powi(2);
                    energy += wanted * wanted;
                    sum.used += u32::from(place.code != 0.0);
                    if place.exact {
                        let deviation = f64::from(place.deviation());
                        sum.sum += deviation;
                        sum.squares += deviation * deviation;
                        sum.count += 1.0;
                    }
                }
            }
            (sums, error, energy)
        };
        let starts: Vec<usize> = (0..outputs).step_by(BAND).collect();
        let shards: Vec<_> = starts.into_par_iter().map(band).collect();
        let mut all = (vec![Column::default(); columns], 0.0, 0.0);
        // In order, so that sums do not depend on the number of threads.
        for (sums, error, energy) in shards {
            for (sum, part) in all.0.iter_mut().zip(sums) {
                sum.sum += part.sum;
                sum.squares += part.squares;
                sum.count += part.count;
                sum.used += part.used;
            }
            all.1 += error;
            all.2 += energy;
        }
        all
    }

    /// Gains of a row's groups, of all of it, and of its near columns alone.
    fn output(&self, row: usize, columns: &[Column]) -> Output {
        let mut groups = vec![Sums::default(); self.linear.groups];
        let (mut all, mut near) = (Sums::default(), Sums::default());
        for (column, known) in columns.iter().enumerate() {
            let place = self.at(row, column);
            // A column of zeros is what no token used.
            if known.used == 0 || !place.exact {
                continue;
            }
            let gain = place.gain();
            groups[self.linear.g_idx[column] as usize].add(&gain);
            all.add(&gain);
            if known.mean_square() < NEAR {
                near.add(&gain);
            }
        }
        let limits = Limits { bits: self.linear.bits, moved: false };
        let cells = groups.iter().enumerate();
        let other_scales = cells.filter_map(|(g, sums)| Some((g, limits.of_cell(sums)?))).collect();
        Output { groups: groups.iter().map(Sums::gain).collect(), all, near, other_scales }
    }
}

/// The smallest number of fp16.
const SMALLEST_HALF: f32 = 5.960_464_5e-8;

impl Place {
    /// How far the code is off, in steps; nothing where the scale is too coarse.
    fn deviation(&self) -> f32 {
        if self.exact { self.steps - self.code } else { 0.0 }
    }

    fn gain(&self) -> Gain {
        let (x, y) = (f64::from(self.nearest), f64::from(self.code));
        let unbounded = f64::from(self.unbounded) * y;
        Gain { wanted: x * x, given: y * y, product: x * y, unbounded }
    }
}

impl Column {
    fn mean_square(&self) -> f64 {
        self.squares / self.count
    }

    /// What is wrong where this is the nearest column.
    fn describe(&self) -> String {
        let mean = self.sum / self.count;
        let about_mean = self.mean_square() - mean * mean;
        if about_mean < MAX_NEAREST && mean.abs() > 0.5 {
            let way = if mean < 0.0 { "above" } else { "below" };
            return format!("has every code {:.1} steps {way} the base's weights", mean.abs());
        }
        format!(
            "has no column near the base's: the nearest is {:.1} steps off",
            self.mean_square().sqrt()
        )
    }
}

/// A group whose weights ask for the scales that another group has, and that group.
fn swapped(of: &[Output], linear: &GptqLinear) -> Option<(usize, usize)> {
    let (groups, outputs) = (linear.groups, linear.out_features);
    let scale = |group: usize, row: usize| f64::from(linear.scales[group * outputs + row].to_f32());
    let usable = |&(row, group): &(usize, usize)| {
        let gain = of[row].groups[group];
        gain.unbounded > 0.0 && gain.given > 0.0
    };
    // Scatter over the rows of the logarithm of the scale that would fit `group` over that of `other`.
    let scatter = |group: usize, other: usize| {
        let ratios: Vec<f64> = (0..outputs)
            .map(|row| (row, group))
            .filter(usable)
            .map(|(row, _)| {
                let gain = of[row].groups[group];
                (scale(group, row) * gain.unbounded / gain.given / scale(other, row)).ln()
            })
            .collect();
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        let squares: f64 = ratios.iter().map(|r| (r - mean).powi(2)).sum();
        (squares / ratios.len() as f64).sqrt()
    };
    (0..groups).into_par_iter().find_map_first(|group| {
        let own = scatter(group, group);
        if own < MAX_SCATTER {
            return None;
        }
        let others = (0..groups).filter(|&other| other != group);
        let fits = others.map(|other| (other, scatter(group, other)));
        let (other, best) = fits.min_by(|a, b| a.1.total_cmp(&b.1))?;
        (best * MIN_SWAP < own).then_some((group, other))
    })
}
