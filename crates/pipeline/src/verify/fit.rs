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
use rayon::prelude::*;

use super::base_weight::BaseWeight;
use super::columns::{Column, Columns};
use super::gains::{Limits, Sums};
use super::grid::Grid;
use super::odd_words::Word;
use super::rows::{Output, outputs};
use super::swapped::swapped;
use crate::error::Result;

/// Mean squared deviation in steps of the nearest column. Rounding leaves 1/12, AutoGPTQ's scales of
/// rows without a negative weight 0.155; codes that are off by one leave 0.8 to 1.1, and more than 0.5
/// at 2 bits, where half of them stay at the end of the grid.
const MAX_NEAREST: f64 = 0.32;

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

/// Energy of the difference of `linear` from the base's weights, and of those.
pub(super) fn energies(linear: &GptqLinear, base: &BaseWeight<'_>) -> Result<(f64, f64)> {
    let columns = Columns::of(&Grid::new(linear, base))?;
    Ok((columns.error, columns.energy))
}

impl Fit {
    /// Of `linear`, with zeros in v1 form, to the base's weights.
    pub(super) fn new(linear: &GptqLinear, base: &BaseWeight<'_>) -> Result<Self> {
        let grid = Grid::new(linear, base);
        let Columns { list: columns, error, energy } = Columns::of(&grid)?;
        let (outputs, odd) = outputs(&grid, &columns)?;
        let of_group = |group: usize| outputs.iter().map(move |output| &output.groups[group]);
        let groups = (0..linear.groups).into_par_iter().map(|g| Sums::of(of_group(g))).collect();
        let judged = columns.iter().filter(|column| column.used && column.count > 0.0);
        Ok(Self {
            error,
            energy,
            nearest: judged.min_by(|a, b| a.mean_square().total_cmp(&b.mean_square())).copied(),
            whole: Sums::of(outputs.iter().flat_map(|output| &output.groups)),
            groups,
            swapped: swapped(&outputs, linear),
            outputs,
            bits: linear.bits,
            odd,
        })
    }

    /// What is wrong, each with its place; `moved` marks a linear whose weights were not meant to be
    /// the base's.
    pub(super) fn faults(&self, name: &str, moved: bool) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        self.look(name, moved, |place, what| faults.push((place, what)));
        faults
    }

    fn look(&self, name: &str, moved: bool, mut add: impl FnMut(String, String)) {
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

impl Column {
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
