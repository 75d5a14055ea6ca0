//! The head against the base's, in the same coordinates: the one dense tensor that a recipe may change.

use gptq_checkpoint::{Checkpoint, HEAD, Head};
use half::f16;
use rayon::prelude::*;

use super::base::relative;
use super::findings::{Check, Findings};
use super::one_map::{LEFT_OVER, left_over};
use crate::error::Result;
use crate::rotate::{FusedRotations, dense_head};

/// Energy of the difference over the base's up to which a head that was not fitted is the base's:
/// rounding of turned values to fp16, which another processor may round the other way.
const ROUNDING: f64 = 1e-5;
/// Gains that a row of a fitted head may have: what is left of the base's row in it, over that row.
/// Fitting multiplies all rows by one matrix near 1: sound rows have 0.82 to 1.10 (both at 2 bits), a
/// row of zeros or of another token 0 ± 0.4, a doubled one 1.6 or more.
const ROW_GAINS: std::ops::Range<f64> = 0.5..1.45;
/// Energy over the base's of what a gain leaves of a row, above which it is noise that may hide any
/// gain: sound rows of the embedded model have up to 0.15, and where one enormous weight makes a row
/// of states as large as all others, 1.8, or with 16 tokens of calibration a gain of -0.1. Zeros and
/// factors leave nothing, other tokens about 1.
const NOISE: f64 = 0.5;
/// Share of the rows that may be such. Of that model 5 of 64 are; of a head with other tokens' rows
/// all.
const NOISY_ROWS: f64 = 0.25;
/// Gains of the whole head, which rests on all rows: sound ones have 0.83 to 1.012, a factor of 1.3
/// leaves 1.17 or more, of 0.6 at most 0.6.
const GAINS: std::ops::Range<f64> = 0.7..1.08;

/// How the head differs from the base's.
pub(super) struct HeadChange {
    rows: Vec<Row>,
    all: Row,
    /// What one matrix leaves over of every row; `None` where nothing was changed, nothing would show
    /// it, or nobody has fitted it.
    left_over: Option<Vec<f64>>,
    /// It has the base's shape.
    whole: bool,
    /// It is the embedding, but the base's is another.
    lost: bool,
}

impl HeadChange {
    /// `may_be_fitted` unless it is known that nobody has fitted it: only then is one matrix looked
    /// for, which takes tens of passes over the head.
    pub(super) fn new(
        checkpoint: &Checkpoint,
        base: &Checkpoint,
        rotations: Option<&FusedRotations>,
        may_be_fitted: bool,
    ) -> Result<Self> {
        let expected = dense_head(base, rotations)?;
        let found = checkpoint.tensor(HEAD)?;
        let width = base.config().hidden_size;
        let of_row = |given: &mut Vec<f32>, (row, expected): (usize, &[f16])| {
            given.resize(width.min(found.len() - row * width), 0.0);
            found.read_f32(row * width, given);
            Row::new(given, expected)
        };
        let count = found.len().div_ceil(width);
        let expected_rows = expected.par_chunks(width).take(count).enumerate();
        let rows: Vec<Row> = expected_rows.map_init(Vec::new, of_row).collect();
        let mut all = Row::default();
        rows.iter().for_each(|row| all.add(row));
        let own = matches!(base.head()?, Head::Own | Head::Untied);
        Ok(Self {
            rows,
            left_over: (may_be_fitted && all.change > 0.0)
                .then(|| left_over(&found.to_f32(), &expected, width))
                .flatten(),
            all,
            whole: found.len() == expected.len(),
            lost: checkpoint.head()? == Head::Tied && own,
        })
    }

    /// Its energy over that of the base's head; `None` where that is all zeros.
    pub(super) fn relative(&self) -> Option<f64> {
        relative(self.all.change, self.all.energy)
    }

    /// Whether it was fitted by all that it shows: every row is changed by the same matrix, which is
    /// not just a factor. Of what fitting changes, a tenth or less lies along the base's values.
    pub(super) fn shows_fitting(&self) -> bool {
        let along = self.all.gain().map(|gain| (gain - 1.0).powi(2) * self.all.energy);
        self.left_over.is_some()
            && self.fault_of_fitted().is_none()
            && along.is_some_and(|along| along < self.all.change / 2.0)
    }

    /// One that was not fitted is the base's, and so is a head of zeros, which fitting leaves as it
    /// is. Fitting makes up for what the blocks have lost, so what it changes has no size of its own;
    /// but it changes every row by the same matrix, and keeps it on its way.
    pub(super) fn report(&self, fitted: bool, findings: &mut Findings) {
        findings.examine(Check::DenseWeights, 1);
        let relative = self.relative();
        let other = match (fitted, relative) {
            (_, None) => self.all.change > 0.0,
            (false, Some(change)) => change > ROUNDING,
            (true, Some(_)) => false,
        };
        let fault = if !self.whole || other {
            Some(match relative {
                Some(by) => format!("differs from the base's by {by:.2e} of its energy"),
                None => "differs from the base's, which is all zeros".to_owned(),
            })
        } else if fitted && relative.is_some() {
            self.fault_of_fitted()
        } else {
            None
        };
        if let Some(fault) = fault {
            let missing =
                "is missing: config.json ties it to the embedding, but the base's is another";
            let message = if self.lost { missing.to_owned() } else { fault };
            findings.add(Check::DenseWeights, HEAD, message);
        }
    }

    /// What no fitting leaves.
    fn fault_of_fitted(&self) -> Option<String> {
        let rows = &self.rows;
        let other = |row: &Row| match row.gain() {
            Some(gain) => !ROW_GAINS.contains(&gain),
            None => row.change > 0.0,
        };
        let others = rows.iter().filter(|row| other(row)).count();
        let many = others as f64 > NOISY_ROWS * rows.len() as f64;
        let gone = |row: &Row| other(row) && (many || row.noise().is_none_or(|n| n < NOISE));
        let wrong = rows.iter().filter(|row| gone(row)).count();
        if let Some(token) = rows.iter().position(gone) {
            return Some(match rows[token].gain() {
                Some(gain) => format!(
                    "differs from the base's, of whose row of token {token} it has {gain:.2}, which no \
                     fitting leaves ({wrong} such)"
                ),
                None => format!(
                    "differs from the base's, whose row of token {token} is zeros ({wrong} such)"
                ),
            });
        }
        let left_over = self.left_over.as_deref().unwrap_or_default();
        let other = |&left: &f64| left > LEFT_OVER;
        if let Some(token) = left_over.iter().position(other) {
            let wrong = left_over.iter().filter(|left| other(left)).count();
            return Some(format!(
                "differs from the base's: fitting changes all rows by one matrix, but that of token \
                 {token} is off by {:.2} of it ({wrong} such)",
                left_over[token]
            ));
        }
        let gain = self.all.gain().filter(|gain| !GAINS.contains(gain))?;
        Some(format!(
            "differs from the base's: it is {gain:.2} times that, which no fitting leaves"
        ))
    }
}

/// Sums over a row of a head, or several.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// Of the squared differences.
    change: f64,
    /// Of the base's squares.
    energy: f64,
    /// Of the squares that were found.
    given: f64,
    /// Of the products of both.
    product: f64,
}

impl Row {
    fn new(found: &[f32], expected: &[f16]) -> Self {
        let mut row = Self::default();
        for (found, expected) in found.iter().zip(expected) {
            let (found, expected) = (f64::from(*found), f64::from(expected.to_f32()));
            row.change += (found - expected).powi(2);
            row.energy += expected * expected;
            row.given += found * found;
            row.product += found * expected;
        }
        row
    }

    fn add(&mut self, other: &Self) {
        self.change += other.change;
        self.energy += other.energy;
        self.given += other.given;
        self.product += other.product;
    }

    /// What is left of the base's values, over them; `None` where those are zeros.
    fn gain(&self) -> Option<f64> {
        relative(self.product, self.energy)
    }

    /// Energy of what the gain leaves, over the base's.
    fn noise(&self) -> Option<f64> {
        let gain = self.gain()?;
        relative(self.given, self.energy).map(|given| given - gain * gain)
    }
}
