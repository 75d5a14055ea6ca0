//! The head against the base's, in the same coordinates: the one dense tensor that a recipe may change.

use gptq_checkpoint::{Checkpoint, HEAD, Head, REPORT_FILE};
use gptq_records::branch_report::HeadFit;
use half::f16;
use rayon::prelude::*;

use super::base::relative;
use super::findings::{Check, Findings};
use super::head_columns;
use super::one_map::{LEFT_OVER, left_over};
use crate::error::Result;
use crate::head_rows::{RowSums, head_fit};
use crate::rotate::{FusedRotations, dense_head};

/// Energy of the difference over the base's up to which a head that was not fitted is the base's:
/// rounding of turned values to fp16, which another processor may round the other way.
const ROUNDING: f64 = 1e-5;
/// Root mean square of a row of the base's that fitting may make zeros of: fp16 knows no less than 6e-8.
const FAINT: f64 = 1e-6;
/// How far the sums over a fitted head may be from those that its report records. They are over the file's
/// values and the turned base's, which another processor may round the other way in one of some hundred
/// places: that moves the gain of a head of half a million values by 1e-7, and its change by less; a row of
/// few or faint values by more.
const RECORDED_GAIN: f64 = 5e-5;
const RECORDED_ROW_GAIN: f64 = 0.02;
const RECORDED_CHANGE: f64 = 1e-3;
/// The same where next to nothing was changed.
const RECORDED_LEAST: f64 = 1e-6;
/// Gains of a whole fitted head that nothing is recorded of. The map is a ridge regression of the unquantized
/// model's states on the quantized model's, so its gain is the share of these that still says something of
/// those: 0.52 to 1.02 in random models of 48 configurations at 2 bits, and towards 0 in one that is lost; above 1
/// only by chance. Other rows, other columns and another model's head have 0 ± 0.1, a negated one less.
const GAINS: std::ops::Range<f64> = 0.2..1.08;
/// Gains of a row over the whole head's, where the rows are too few to tell whether one matrix made them all:
/// what is left of the base's row in it. Sound rows of these models have 0.62 to 1.33, a row of zeros or of
/// another token 0 ± 0.4, a doubled one 1.6 or more.
const ROW_GAINS: std::ops::Range<f64> = 0.5..1.45;
/// Energy over the base's of what a gain leaves of such a row, above which it is noise that may hide any
/// gain: sound rows of the embedded model have up to 0.15, and where one enormous weight makes a row
/// of states as large as all others, 1.8, or with 16 tokens of calibration a gain of -0.1. Zeros and
/// factors leave nothing, other tokens about 1.
const NOISE: f64 = 0.5;
/// Share of the rows that may be such. Of that model 5 of 64 are; of a head with other tokens' rows
/// all.
const NOISY_ROWS: f64 = 0.25;

/// How the head differs from the base's.
pub(super) struct HeadChange {
    rows: Vec<RowSums>,
    all: RowSums,
    /// What one matrix leaves over of every row; `None` where nothing was changed, nothing would show
    /// it, or nobody has fitted it.
    left_over: Option<Vec<f64>>,
    /// What its report says that fitting made of it.
    recorded: Option<HeadFit>,
    /// What is left of each column, of a fitted head in rotated coordinates of which nothing is recorded;
    /// `None` of others, and of few rows.
    columns: Option<Vec<f64>>,
    /// Columns.
    width: usize,
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
        recorded: Option<HeadFit>,
    ) -> Result<Self> {
        let expected = dense_head(base, rotations)?;
        let found = checkpoint.tensor(HEAD)?;
        let width = base.config().hidden_size;
        let of_row = |given: &mut Vec<f32>, (row, expected): (usize, &[f16])| {
            given.resize(width.min(found.len() - row * width), 0.0);
            found.read_f32(row * width, given);
            RowSums::new(given.iter().copied(), expected)
        };
        let count = found.len().div_ceil(width);
        let expected_rows = expected.par_chunks(width).take(count).enumerate();
        let rows: Vec<RowSums> = expected_rows.map_init(Vec::new, of_row).collect();
        let all = RowSums::sum(&rows);
        let own = matches!(base.head()?, Head::Own | Head::Untied);
        let values = (may_be_fitted && all.change > 0.0).then(|| found.to_f32());
        let left_over = values.as_ref().and_then(|values| left_over(values, &expected, width));
        let turned = recorded.is_none() && rotations.is_some_and(FusedRotations::turns_stream);
        let columns = values.filter(|_| turned && left_over.is_some());
        Ok(Self {
            rows,
            left_over,
            columns: columns.map(|values| head_columns::gains(&values, &expected, width)),
            all,
            recorded,
            width,
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
    /// is. Fitting makes up for what the blocks have lost, so what it changes has no size of its own; but
    /// it changes every row by the same matrix, and its report says how much is left.
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

    /// What no fitting leaves, or not the one that is recorded.
    fn fault_of_fitted(&self) -> Option<String> {
        let faint = FAINT * FAINT * self.width as f64;
        let gone = |row: &RowSums| row.given == 0.0 && row.energy > faint;
        if let Some(token) = self.rows.iter().position(gone) {
            let wrong = self.rows.iter().filter(|row| gone(row)).count();
            return Some(format!(
                "differs from the base's, of whose row of token {token} nothing is left ({wrong} such)"
            ));
        }
        if let Some(fault) = self.left_over.as_deref().and_then(of_several_maps) {
            return Some(fault);
        }
        if let Some(recorded) = self.recorded {
            return self.unlike(&recorded);
        }
        let gain = self.all.gain()?;
        if !GAINS.contains(&gain) {
            return Some(format!(
                "differs from the base's: it is {gain:.2} times that, which no fitting leaves"
            ));
        }
        if self.left_over.is_none() { self.odd_row(gain) } else { self.odd_column(gain) }
    }

    /// That a fit left other sums than these.
    fn unlike(&self, recorded: &HeadFit) -> Option<String> {
        let found = head_fit(&self.rows)?;
        let change = RECORDED_LEAST + RECORDED_CHANGE * recorded.change;
        let pairs = [
            ("a gain", found.gain, recorded.gain, RECORDED_GAIN),
            ("a change", found.change, recorded.change, change),
            ("a least gain of a row", found.least_gain, recorded.least_gain, RECORDED_ROW_GAIN),
            ("a largest gain of a row", found.most_gain, recorded.most_gain, RECORDED_ROW_GAIN),
        ];
        let (what, found, recorded, _) = pairs
            .into_iter()
            .find(|(_, found, recorded, most)| (found - recorded).abs() > *most)?;
        Some(format!(
            "differs from the base's otherwise than {REPORT_FILE} says of its fit: {what} of {found:.6} in \
             place of {recorded:.6}"
        ))
    }

    /// A column that is no more like the base's than another, in a head of this gain.
    fn odd_column(&self, gain: f64) -> Option<String> {
        let columns = self.columns.as_ref()?;
        let (column, wrong) = head_columns::odd(columns, gain)?;
        Some(format!(
            "differs from the base's, of whose column {column} it has {:.2}, and {gain:.2} of all, which no \
             fitting leaves ({wrong} such)",
            columns[column]
        ))
    }

    /// A row that is no more like the base's than another token's, in a head of this gain.
    fn odd_row(&self, gain: f64) -> Option<String> {
        let other = |row: &RowSums| match row.gain() {
            Some(of_row) => !ROW_GAINS.contains(&(of_row / gain)),
            None => row.change > 0.0,
        };
        let rows = &self.rows;
        let others = rows.iter().filter(|row| other(row)).count();
        let many = others as f64 > NOISY_ROWS * rows.len() as f64;
        let gone = |row: &RowSums| other(row) && (many || noise(row).is_none_or(|n| n < NOISE));
        let wrong = rows.iter().filter(|row| gone(row)).count();
        let token = rows.iter().position(gone)?;
        Some(match rows[token].gain() {
            Some(of_row) => format!(
                "differs from the base's, of whose row of token {token} it has {of_row:.2}, and {gain:.2} of \
                 all, which no fitting leaves ({wrong} such)"
            ),
            None => format!(
                "differs from the base's, whose row of token {token} is zeros ({wrong} such)"
            ),
        })
    }
}

/// That one matrix did not make all rows, of which it leaves so much over.
fn of_several_maps(left_over: &[f64]) -> Option<String> {
    let other = |&left: &f64| left > LEFT_OVER;
    let token = left_over.iter().position(other)?;
    let wrong = left_over.iter().filter(|left| other(left)).count();
    Some(format!(
        "differs from the base's: fitting changes all rows by one matrix, but that of token {token} is off by \
         {:.2} of it ({wrong} such)",
        left_over[token]
    ))
}

/// Energy of what the gain of a row leaves, over the base's.
fn noise(row: &RowSums) -> Option<f64> {
    let gain = row.gain()?;
    relative(row.given, row.energy).map(|given| given - gain * gain)
}
