//! Scales of one group that are another's.

use gptq_checkpoint::GptqLinear;
use rayon::prelude::*;

use super::rows::Output;

/// Another group's scales fit a group this much better when they are its own.
const MIN_SWAP: f64 = 2.0;
/// Scatter of a group's gains below which its scales are right.
const MAX_SCATTER: f64 = 0.05;

/// A group whose weights ask for the scales that another group has, and that group.
pub(super) fn swapped(of: &[Output], linear: &GptqLinear) -> Option<(usize, usize)> {
    let (groups, outputs) = (linear.groups, linear.out_features);
    let scale = |group: usize, row: usize| f64::from(linear.scales[group * outputs + row].to_f32());
    // The rows of a group that show a scale, each with the logarithm of the scale that would fit.
    let wanted = |group: usize| -> (Vec<u32>, Vec<f64>) {
        let fitting = |row: usize| {
            let gain = of[row].groups[group];
            let usable = gain.unbounded > 0.0 && gain.given > 0.0;
            let fits = scale(group, row) * gain.unbounded / gain.given;
            usable.then(|| (row as u32, fits.ln()))
        };
        (0..outputs).filter_map(fitting).unzip()
    };
    let logarithms = |group: usize| (0..outputs).map(|row| scale(group, row).ln()).collect();
    let own = |group: usize| {
        let (rows, wanted) = wanted(group);
        let has = |&row: &u32| scale(group, row as usize).ln();
        scatter(wanted.iter().zip(&rows).map(|(wanted, row)| wanted - has(row)))
    };
    // Most linears have none that is off, and need no logarithms of all scales.
    let right = |&group: &usize| own(group) < MAX_SCATTER;
    let suspects = (0..groups).into_par_iter().filter(|group| !right(group));
    let suspects: Vec<usize> = suspects.collect();
    if suspects.is_empty() {
        return None;
    }
    let known: Vec<Vec<f64>> = (0..groups).into_par_iter().map(logarithms).collect();
    suspects.into_par_iter().find_map_first(|group| {
        let (rows, wanted) = wanted(group);
        let under = |other: usize| {
            let known = &known[other];
            scatter(wanted.iter().zip(&rows).map(|(wanted, &row)| wanted - known[row as usize]))
        };
        let others = (0..groups).filter(|&other| other != group);
        let fits = others.map(|other| (other, under(other)));
        let (other, best) = fits.min_by(|a, b| a.1.total_cmp(&b.1))?;
        (best * MIN_SWAP < under(group)).then_some((group, other))
    })
}

/// Scatter of some numbers about their mean. They come in lanes, which are summed at a time; small
/// beside 1 / ε, they can be summed in one pass.
fn scatter(numbers: impl Iterator<Item = f64>) -> f64 {
    const LANES: usize = 8;
    let (mut sums, mut squares, mut count) = ([0.0; LANES], [0.0; LANES], 0_usize);
    for number in numbers {
        sums[count % LANES] += number;
        squares[count % LANES] += number * number;
        count += 1;
    }
    let count = count as f64;
    let mean = sums.iter().sum::<f64>() / count;
    let square = squares.iter().sum::<f64>() / count - mean * mean;
    // Rounding may leave a little less than nothing. Of no numbers this is none, which `max` would
    // hide.
    if square < 0.0 { 0.0 } else { square.sqrt() }
}
