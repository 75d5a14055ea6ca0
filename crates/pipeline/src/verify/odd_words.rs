//! Words of qweight that stand out among the others of their linear.
//!
//! Limits were set on the embedded model and on SmolLM2, where sound linears stay below half of them
//! or so, however short the calibration.

use gptq_checkpoint::Bits;
use rayon::prelude::*;

/// Deviations under a word, over what is usual, below which no word is odd.
const MIN_ODD: f64 = 80.0;
/// And over those of the oddest but a few of the same linear. Without act-order, AutoGPTQ's numerics
/// leave words 4.4 times as odd in sound files (SmolLM2).
const ODD_FACTOR: f64 = 6.0;
/// Words that may be odd in a sound linear: one in so many.
const ODD_RANK: usize = 10_000;

/// A word of qweight, with the sum of its codes' squared deviations over the usual ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Word {
    score: f64,
    /// Row of qweight.
    pub(super) row: usize,
    /// Column of qweight: the output.
    pub(super) output: usize,
}

impl Word {
    /// Its deviations over the usual ones, a code in the mean.
    pub(super) fn times(&self, bits: Bits) -> f64 {
        self.score / codes_of_word(bits, self.row).len() as f64
    }
}

/// Words of qweight whose deviations stand out from those of the linear's other words.
pub(super) fn odd_words(bits: Bits, deviations: &[Vec<f32>], usual: &[f64]) -> Vec<Word> {
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
