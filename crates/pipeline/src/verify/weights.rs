//! Every linear against the base's, in the same coordinates.
//!
//! A recipe may have turned the model ([`crate::fold`]), so the base is turned the same way before
//! weights are compared. Which way is found by trying: a wrong one leaves an error as large as the
//! weights. Three measures then tell damage from quantisation, none of which needs calibration data:
//!
//! - *misfit*: the error of the codes in the file over that of the nearest codes on the file's own
//!   grid. GPTQ spends a small factor on compensating errors; codes that belong to other weights, or
//!   zeros that are off by one, spend a large one.
//! - *gains*: the weights of a group in a row, projected on what the file gives, come out near 1
//!   times it. Where they do not, their ratios say what scales would fit: those of another group
//!   when rows were swapped.
//! - *odd words*: the deviations under each 32-bit word, in grid steps, over what is usual in their
//!   columns and their row. A word that was changed stands out among the others of its linear; one
//!   whose new codes are close to the old does not, and takes a recorded sum to be found.
//!
//! Limits were set on the embedded model and on SmolLM2, where sound linears stay below half of them
//! or so, however short the calibration.

use gptq_checkpoint::{Bits, Checkpoint, GptqLinear, ModelConfig, QuantizeConfig};
use gptq_compute::Device;
use gptq_model::{LinearId, Model, SourcePrecision};
use gptq_quant::{Choices, Recipe, Rotate};
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use super::{Check, Findings, dense};
use crate::error::Result;
use crate::fold::Folding;
use crate::progress::Progress;
use crate::quantise::{linear_name, next_block, read_ahead};

/// Codes of a linear may be this much worse than the nearest ones (energy).
const MAX_MISFIT: f64 = 8.0;
/// What a group gives along the base's weights, over them: farther from 1 it is other weights'. Noise
/// and shifts, however large, do not point along the weights.
const GAINS: std::ops::Range<f64> = 0.55..1.8;
/// Another group's scales fit a group this much better when they are its own.
const MIN_SWAP: f64 = 2.0;
/// Scatter of a group's gains below which its scales are right.
const MAX_SCATTER: f64 = 0.05;
/// Deviations under a word, over what is usual, below which no word is odd.
const MIN_ODD: f64 = 80.0;
/// And over those of the oddest but a few of the same linear. Without act-order, AutoGPTQ's numerics
/// leave words 4.4 times as odd in sound files (SmolLM2).
const ODD_FACTOR: f64 = 6.0;
/// Words that may be odd in a sound linear: one in so many.
const ODD_RANK: usize = 10_000;

/// Comparison with the base.
#[derive(Clone, Debug, Serialize)]
pub struct Weights {
    /// Rotation folded into the checkpoint: `none`, `heads` or `full`.
    pub rotation: &'static str,
    /// Change of the head's values, as energy over the base's.
    pub head_change: f64,
    /// Every linear.
    pub linears: Vec<LinearError>,
    #[serde(skip)]
    rotate: Rotate,
}

/// How far a linear is from the base's.
#[derive(Clone, Debug, Serialize)]
pub struct LinearError {
    /// Prefix in the checkpoint.
    pub name: String,
    /// Energy of the weights' error over the energy of the weights.
    pub weight_error: f64,
    /// Energy of the output error over that of the outputs, on the checkpoint's own activations;
    /// `null` without a text.
    pub output_error: Option<f64>,
}

impl Weights {
    /// The rotations that bring a model of this shape into the checkpoint's coordinates.
    pub(super) fn folding(&self, config: &ModelConfig) -> Option<Folding> {
        Folding::new(config, self.rotate)
    }
}

/// Compares every tensor with the base's.
pub(super) fn compare(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    stored: &QuantizeConfig,
    findings: &mut Findings,
    progress: &dyn Progress,
) -> Result<Weights> {
    super::outputs::check_base(checkpoint, base)?;
    let model = Model::new(base, Device::Cpu, SourcePrecision::Half, 1)?;
    let rotate = rotation(checkpoint, &model)?;
    let recorded = recorded_choices(checkpoint);
    if let Some(choices) = recorded.filter(|choices| choices.rotate != rotate) {
        let message = format!(
            "records rotate={}, but the weights have {}",
            name(choices.rotate),
            name(rotate)
        );
        findings.add(Check::Weights, "metadata", message);
    }
    let folding = Folding::new(base.config(), rotate);
    let mut linears = Vec::new();
    let blocks = base.config().num_hidden_layers;
    progress.begin("compare", blocks);
    std::thread::scope(|scope| {
        let ahead = read_ahead(scope, &model, folding.as_ref(), false);
        for _ in 0..blocks {
            let block = next_block(&ahead)?;
            for (id, shape) in LinearId::ALL.into_iter().zip(base.config().block_linears()) {
                let name = linear_name(&model, &block, id);
                let weight = block.linear(id).to_host()?;
                if !checkpoint.has_gptq_linear(&name) {
                    // That its values are the base's is checked with all else that is dense.
                    let weight_error = dense::linear_error(checkpoint, &name, &weight)?;
                    linears.push(LinearError { name, weight_error, output_error: None });
                    continue;
                }
                let linear = checkpoint.gptq_linear(&name, &shape)?;
                findings.examine(Check::Weights, 1);
                let fit = Fit::new(&linear, &weight);
                let moved = matches!(id, LinearId::O | LinearId::Down)
                    && recorded.is_none_or(|choices| choices.residual > 0.0);
                fit.report(&name, moved, findings);
                let weight_error = fit.error / fit.energy.max(f64::MIN_POSITIVE);
                linears.push(LinearError { name, weight_error, output_error: None });
            }
            progress.step();
        }
        Ok::<_, crate::Error>(())
    })?;
    progress.end();
    dense::check(checkpoint, base, (stored, folding.as_ref()), findings)?;
    let head_change = dense::head_change(checkpoint, base, folding.as_ref(), recorded, findings)?;
    Ok(Weights { rotation: name(rotate), head_change, linears, rotate })
}

fn name(rotate: Rotate) -> &'static str {
    match rotate {
        Rotate::None => "none",
        Rotate::Heads => "heads",
        Rotate::Full => "full",
    }
}

/// Choices that the metadata records, where it does.
fn recorded_choices(checkpoint: &Checkpoint) -> Option<Choices> {
    let metadata = &checkpoint.weight_files().first()?.metadata;
    let recipe: Recipe = metadata.get("recipe")?.parse().ok()?;
    let mut choices = recipe.choices();
    for setting in metadata.get("choices").iter().flat_map(|text| text.split(' ')) {
        // A later version's choices may be unknown here; those that are known still hold.
        let _ = choices.set(setting);
    }
    Some(choices)
}

/// The rotation under which the first block's q and o are nearest to the checkpoint's.
fn rotation(checkpoint: &Checkpoint, model: &Model<'_>) -> Result<Rotate> {
    let mut nearest = (f64::INFINITY, Rotate::None);
    for rotate in [Rotate::None, Rotate::Heads, Rotate::Full] {
        let mut block = model.load_block_on(&Device::Cpu, 0)?;
        if let Some(folding) = Folding::new(model.config(), rotate) {
            folding.block(&mut block)?;
        }
        let mut total = 0.0;
        for id in [LinearId::Q, LinearId::O] {
            let shape = model.config().block_linears()[id as usize];
            let name = linear_name(model, &block, id);
            if !checkpoint.has_gptq_linear(&name) {
                let weight = block.linear(id).to_host()?;
                total += dense::linear_error(checkpoint, &name, &weight)?;
                continue;
            }
            let linear = checkpoint.gptq_linear(&name, &shape)?;
            let fit = Fit::new(&linear, &block.linear(id).to_host()?);
            total += fit.error / fit.energy.max(f64::MIN_POSITIVE);
        }
        if total < nearest.0 {
            nearest = (total, rotate);
        }
    }
    Ok(nearest.1)
}

/// Sums over the columns of a band of rows.
#[derive(Clone, Default)]
struct Sums {
    /// Σ of squared deviations in steps, by column.
    columns: Vec<f64>,
    error: f64,
    nearest: f64,
    energy: f64,
}

impl Sums {
    fn plus(mut self, other: Self) -> Self {
        if self.columns.is_empty() {
            return other;
        }
        self.columns.iter_mut().zip(&other.columns).for_each(|(a, b)| *a += b);
        self.error += other.error;
        self.nearest += other.nearest;
        self.energy += other.energy;
        self
    }
}

/// A word of qweight, with the sum of its codes' squared deviations over the usual ones.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Word {
    score: f64,
    /// Row of qweight.
    row: usize,
    /// Column of qweight: the output.
    output: usize,
}

/// How a quantised linear sits on the weights that it should stand for.
struct Fit {
    error: f64,
    nearest: f64,
    energy: f64,
    /// The group whose mean gain is farthest from 1.
    gain: (usize, f64),
    /// A group and the one whose scales fit it better than its own.
    swapped: Option<(usize, usize)>,
    bits: Bits,
    odd: Vec<Word>,
}

impl Fit {
    /// Of `linear`, with zeros in v1 form, to `weight` `[out, in]`.
    fn new(linear: &GptqLinear, weight: &Array2<f32>) -> Self {
        let grid = Grid::new(linear);
        let rows: Vec<(Vec<f32>, Sums, Vec<Gain>)> =
            (0..linear.out_features).into_par_iter().map(|row| grid.row(row, weight)).collect();
        let mut deviations = Vec::with_capacity(rows.len());
        let mut gains = Vec::with_capacity(rows.len());
        let mut sums = Sums::default();
        // In order, so that sums do not depend on the number of threads.
        for (deviation, of_row, of_groups) in rows {
            sums = sums.plus(of_row);
            deviations.push(deviation);
            gains.push(of_groups);
        }
        let usual: Vec<f64> =
            sums.columns.iter().map(|sum| sum / linear.out_features as f64).collect();
        Self {
            error: sums.error,
            nearest: sums.nearest,
            energy: sums.energy,
            gain: farthest_gain(&gains, linear.groups),
            swapped: swapped(&gains, linear),
            bits: linear.bits,
            odd: odd_words(linear.bits, &deviations, &usual),
        }
    }

    /// Adds what is wrong; `moved` tells of a linear whose weights were not meant to be the base's.
    fn report(&self, name: &str, moved: bool, findings: &mut Findings) {
        let misfit = self.error / self.nearest.max(f64::MIN_POSITIVE);
        let error = self.error / self.energy.max(f64::MIN_POSITIVE);
        if self.energy > 0.0 && !moved && misfit > MAX_MISFIT {
            let message = format!(
                "is {misfit:.0} times as far from the base as the nearest codes are (error {error:.3})"
            );
            findings.add(Check::Weights, name, message);
            // The other measures would say the same again, and less clearly.
            return;
        }
        let (group, gain) = self.gain;
        if self.energy > 0.0 && !GAINS.contains(&gain) {
            let message = format!(
                "gives group {group} other weights: the base's are {gain:.2} times what it gives"
            );
            findings.add(Check::Weights, name, message);
            return;
        }
        if let Some((group, other)) = self.swapped {
            let message = format!("gives group {group} scales that are those of group {other}");
            findings.add(Check::Weights, format!("{name}.scales"), message);
        }
        for word in &self.odd {
            let times = word.score / codes_of_word(self.bits, word.row).len() as f64;
            let message = format!(
                "holds a word at row {}, output {} whose error is {times:.0} times what is usual there",
                word.row, word.output
            );
            findings.add(Check::Weights, format!("{name}.qweight"), message);
        }
    }
}

/// Sums of one group in one row: of w·ŵ, ŵ² and w².
#[derive(Clone, Copy, Default)]
struct Gain {
    product: f64,
    given: f64,
    wanted: f64,
}

/// A linear's codes with their grid.
struct Grid<'a> {
    linear: &'a GptqLinear,
    codes: Vec<u8>,
    zeros: Vec<u8>,
}

impl<'a> Grid<'a> {
    fn new(linear: &'a GptqLinear) -> Self {
        Self { linear, codes: linear.unpack_codes(), zeros: linear.unpack_zeros() }
    }

    /// Deviations of a row in steps, what they add to the columns' sums, and the gains of its groups.
    fn row(&self, row: usize, weight: &Array2<f32>) -> (Vec<f32>, Sums, Vec<Gain>) {
        let Self { linear, codes, zeros } = self;
        let (columns, outputs) = (linear.in_features, linear.out_features);
        let max = f32::from(linear.bits.max_code());
        let mut gains = vec![Gain::default(); linear.groups];
        let mut sums = Sums { columns: vec![0.0; columns], ..Sums::default() };
        let mut deviations = vec![0.0; columns];
        for (column, &w) in weight.row(row).iter().enumerate() {
            let group = linear.g_idx[column] as usize;
            let at = group * outputs + row;
            let (scale, zero) = (linear.scales[at].to_f32(), f32::from(zeros[at]));
            let code = f32::from(codes[row * columns + column]);
            let given = scale * (code - zero);
            let steps = w / scale + zero;
            let nearest = steps.round_ties_even().clamp(0.0, max);
            let error = f64::from(w - given);
            sums.error += error * error;
            sums.nearest += f64::from(w - scale * (nearest - zero)).powi(2);
            sums.energy += f64::from(w) * f64::from(w);
            // A weight beyond the grid is as near as it can be with the last code.
            let deviation = (steps.clamp(-0.5, max + 0.5) - code).clamp(-max, max);
            deviations[column] = deviation;
            sums.columns[column] = f64::from(deviation) * f64::from(deviation);
            let gain = &mut gains[group];
            gain.product += f64::from(w) * f64::from(given);
            gain.given += f64::from(given) * f64::from(given);
            gain.wanted += f64::from(w) * f64::from(w);
        }
        (deviations, sums, gains)
    }
}

/// The group whose gain over all rows is farthest from 1, and that gain.
fn farthest_gain(gains: &[Vec<Gain>], groups: usize) -> (usize, f64) {
    let of = |group: usize| {
        let sum = |part: fn(&Gain) -> f64| gains.iter().map(|row| part(&row[group])).sum::<f64>();
        (group, sum(|g| g.product) / sum(|g| g.wanted))
    };
    let far = |gain: f64| if gain > 0.0 { gain.ln().abs() } else { f64::INFINITY };
    let found = (0..groups).map(of).filter(|(_, gain)| gain.is_finite());
    found.max_by(|a, b| far(a.1).total_cmp(&far(b.1))).unwrap_or((0, 1.0))
}

/// A group whose weights ask for the scales that another group has, and that group.
fn swapped(gains: &[Vec<Gain>], linear: &GptqLinear) -> Option<(usize, usize)> {
    let (groups, outputs) = (linear.groups, linear.out_features);
    let scale = |group: usize, row: usize| f64::from(linear.scales[group * outputs + row].to_f32());
    let usable = |&(row, group): &(usize, usize)| {
        let gain = gains[row][group];
        gain.product > 0.0 && gain.given > 0.0
    };
    // Scatter over the rows of the logarithm of the scale that would fit `group` over that of `other`.
    let scatter = |group: usize, other: usize| {
        let ratios: Vec<f64> = (0..outputs)
            .map(|row| (row, group))
            .filter(usable)
            .map(|(row, _)| {
                let gain = gains[row][group];
                (scale(group, row) * gain.product / gain.given / scale(other, row)).ln()
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

/// Words of qweight whose deviations stand out from those of the linear's other words.
fn odd_words(bits: Bits, deviations: &[Vec<f32>], usual: &[f64]) -> Vec<Word> {
    let rows = bits.words(usual.len());
    let scores = |(output, of_row): (usize, &Vec<f32>)| {
        let square = |column: usize| {
            // No column is expected to be better than rounding makes it: 1/12.
            f64::from(of_row[column]).powi(2) / usual[column].max(1.0 / 12.0)
        };
        let whole: f64 = (0..usual.len()).map(square).sum();
        let score = |row: usize| {
            let codes = codes_of_word(bits, row);
            let others = (usual.len() - codes.len()).max(1);
            let own: f64 = codes.map(square).sum();
            // A row may as a whole be off, as where its weights are small beside its scales.
            own / ((whole - own) / others as f64).max(1.0)
        };
        (0..rows).map(|row| Word { score: score(row), row, output }).collect::<Vec<_>>()
    };
    let mut words: Vec<Word> = deviations.par_iter().enumerate().flat_map_iter(scores).collect();
    let rank = (words.len() / ODD_RANK).max(8).min(words.len().saturating_sub(1));
    if words.is_empty() {
        return words;
    }
    words.select_nth_unstable_by(rank, |a, b| b.score.total_cmp(&a.score));
    let limit = (ODD_FACTOR * words[rank].score).max(MIN_ODD);
    words.truncate(rank);
    words.retain(|word| word.score > limit);
    words.sort_by(|a, b| b.score.total_cmp(&a.score));
    // A code that lies in two words is seen under both: the odder one has the blame.
    let mut odd: Vec<Word> = Vec::with_capacity(words.len());
    for word in words {
        let beside = |of: &Word| of.output == word.output && of.row.abs_diff(word.row) == 1;
        if bits != Bits::Three || !odd.iter().any(beside) {
            odd.push(word);
        }
    }
    odd
}

/// The columns that have bits in a row of qweight.
fn codes_of_word(bits: Bits, row: usize) -> std::ops::Range<usize> {
    let width = usize::from(bits.get());
    32 * row / width..(32 * (row + 1)).div_ceil(width)
}
