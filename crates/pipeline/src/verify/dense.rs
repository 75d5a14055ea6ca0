//! What is not quantized against the base's, in the same coordinates.

use gptq_checkpoint::{Checkpoint, HEAD, Head, LEAVES, Layout, QuantizeConfig, tensor_specs};
use half::f16;
use ndarray::Array2;

use super::base::relative;
use super::findings::{Check, Findings};
use crate::error::Result;
use crate::rotate::{FusedRotations, dense_head};

/// Embeddings, norms and the architecture's own biases: everything but the head, which a recipe may
/// have fitted.
pub(super) fn check(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    (stored, rotations): (&QuantizeConfig, Option<&FusedRotations>),
    findings: &mut Findings,
) -> Result<()> {
    let specs = tensor_specs(base.config(), stored, Layout::Modern).into_iter();
    let quantized = |name: &str| name.rsplit('.').next().is_some_and(|leaf| LEAVES.contains(&leaf));
    for name in specs.map(|spec| spec.name).filter(|name| !quantized(name) && name != HEAD) {
        findings.examine(Check::DenseWeights, 1);
        let Ok(found) = checkpoint.tensor(&name) else {
            // The checkpoint's own configuration does without it.
            findings.add(Check::DenseWeights, name, "is missing, but the base has it");
            continue;
        };
        let turned = rotations.map(|f| f.tensor(base, &name)).transpose()?.flatten();
        let exact = turned.is_none();
        let expected = match turned {
            Some(values) => values,
            None => base.tensor(&name)?.to_f16()?,
        };
        // Turned values are sums, which another processor may round the other way.
        let near = |found: f32, wanted: f32| {
            (found - wanted).abs() <= if exact { 0.0 } else { wanted.abs() / 256.0 + 1e-3 }
        };
        let found = found.to_f32();
        let pairs = found.iter().zip(&expected);
        let wrong = pairs.filter(|&(&a, b)| !near(a, b.to_f32())).count();
        if wrong > 0 || found.len() != expected.len() {
            let message = format!("has {wrong} values of {} that the base does not", found.len());
            findings.add(Check::DenseWeights, name, message);
        }
    }
    Ok(())
}

/// Energy of the difference over the base's up to which a head that was not fitted is the base's:
/// rounding of turned values to fp16, which another processor may round the other way.
const ROUNDING: f64 = 1e-5;
/// Gains that a row of a fitted head may have: what is left of the base's row in it, over that row.
/// Fitting multiplies all rows by one matrix near 1: sound rows have 0.82 to 1.10 (both at 2 bits), a row
/// of zeros or of another token 0 ± 0.4, a doubled one 1.6 or more.
const ROW_GAINS: std::ops::Range<f64> = 0.5..1.45;
/// Energy over the base's of what a gain leaves of a row, above which it is noise that may hide any
/// gain: sound rows of the embedded model have up to 0.15, and where one enormous weight makes a row
/// of states as large as all others, 1.8, or with 16 tokens of calibration a gain of -0.1. Zeros and
/// factors leave nothing, other tokens about 1.
const NOISE: f64 = 0.5;
/// Share of the rows that may be such. Of that model 5 of 64 are; of a head with other tokens' rows all.
const NOISY_ROWS: f64 = 0.25;
/// Gains of the whole head, which rests on all rows: sound ones have 0.90 to 1.004, a factor of 1.3 leaves
/// 1.17 or more, of 0.6 at most 0.6.
const GAINS: std::ops::Range<f64> = 0.7..1.15;

/// How much the head was changed, as energy over the base's. One that was not fitted is the base's, and
/// so is a head of zeros, which fitting leaves as it is. Fitting makes up for what the blocks have lost,
/// so what it changes has no size of its own; but it keeps every row on its way.
pub(super) fn head_change(
    checkpoint: &Checkpoint,
    base: &Checkpoint,
    (rotations, fitted): (Option<&FusedRotations>, bool),
    findings: &mut Findings,
) -> Result<Option<f64>> {
    findings.examine(Check::DenseWeights, 1);
    let expected = dense_head(base, rotations)?;
    let found = checkpoint.tensor(HEAD)?.to_f32();
    let rows: Vec<Row> = found
        .chunks(base.config().hidden_size)
        .zip(expected.chunks(base.config().hidden_size))
        .map(|(found, expected)| Row::new(found, expected))
        .collect();
    let mut all = Row::default();
    rows.iter().for_each(|row| all.add(row));
    let relative = relative(all.change, all.energy);
    let other = match (fitted, relative) {
        (_, None) => all.change > 0.0,
        (false, Some(change)) => change > ROUNDING,
        (true, Some(_)) => false,
    };
    let lost = checkpoint.head()? == Head::Tied && matches!(base.head()?, Head::Own | Head::Untied);
    let missing = "is missing: config.json ties it to the embedding, but the base's is another";
    if found.len() != expected.len() || other {
        let message = match (lost, relative) {
            (true, _) => missing.to_owned(),
            (false, Some(by)) => format!("differs from the base's by {by:.2e} of its energy"),
            (false, None) => "differs from the base's, which is all zeros".to_owned(),
        };
        findings.add(Check::DenseWeights, HEAD, message);
    } else if fitted && relative.is_some() {
        let other = |row: &Row| match row.gain() {
            Some(gain) => !ROW_GAINS.contains(&gain),
            None => row.change > 0.0,
        };
        let others = rows.iter().filter(|row| other(row)).count();
        let many = others as f64 > NOISY_ROWS * rows.len() as f64;
        let gone = |row: &Row| other(row) && (many || row.noise().is_none_or(|n| n < NOISE));
        let wrong = rows.iter().filter(|row| gone(row)).count();
        let first = rows.iter().position(gone);
        if let Some(token) = first {
            let message = match rows[token].gain() {
                _ if lost => missing.to_owned(),
                Some(gain) => format!(
                    "differs from the base's, of whose row of token {token} it has {gain:.2}, which no \
                     fitting leaves ({wrong} such)"
                ),
                None => format!(
                    "differs from the base's, whose row of token {token} is zeros ({wrong} such)"
                ),
            };
            findings.add(Check::DenseWeights, HEAD, message);
        } else if let Some(gain) = all.gain().filter(|gain| !GAINS.contains(gain)) {
            let message = format!(
                "differs from the base's: it is {gain:.2} times that, which no fitting leaves"
            );
            findings.add(Check::DenseWeights, HEAD, message);
        }
    }
    Ok(relative)
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

/// How far a linear that was left dense is from the base's: energy of the difference, and the base's.
pub(super) fn energies(
    checkpoint: &Checkpoint,
    name: &str,
    base: &Array2<f32>,
) -> Result<(f64, f64)> {
    let found = checkpoint.tensor(&format!("{name}.weight"))?.to_f32();
    let (mut error, mut energy) = (0.0, 0.0);
    for (found, &base) in found.iter().zip(base) {
        error += f64::from(found - base).powi(2);
        energy += f64::from(base).powi(2);
    }
    Ok((error, energy))
}
