//! A head beside the one that it was made of, row by row: the sums that fitting records and verifying makes
//! again.

use gptq_records::branch_report::HeadFit;
use half::f16;

/// Sums over a row of a head, or several.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowSums {
    /// Of the squared differences.
    pub(crate) change: f64,
    /// Of the original's squares.
    pub(crate) energy: f64,
    /// Of the squares that were found.
    pub(crate) given: f64,
    /// Of the products of both.
    pub(crate) product: f64,
}

impl RowSums {
    /// Of a row, `found`, whose original is `base`.
    pub(crate) fn new(found: impl Iterator<Item = f32>, base: &[f16]) -> Self {
        let mut row = Self::default();
        for (found, base) in found.zip(base) {
            let (found, base) = (f64::from(found), f64::from(base.to_f32()));
            row.change += (found - base).powi(2);
            row.energy += base * base;
            row.given += found * found;
            row.product += found * base;
        }
        row
    }

    /// Of all rows.
    pub(crate) fn sum(rows: &[Self]) -> Self {
        let mut all = Self::default();
        for row in rows {
            all.change += row.change;
            all.energy += row.energy;
            all.given += row.given;
            all.product += row.product;
        }
        all
    }

    /// What is left of the original's values, over them; `None` where those are zeros.
    pub(crate) fn gain(&self) -> Option<f64> {
        (self.energy > 0.0).then(|| self.product / self.energy)
    }
}

/// What a report says of a fit; `None` where the original is all zeros, which fitting leaves as it is.
pub(crate) fn head_fit(rows: &[RowSums]) -> Option<HeadFit> {
    let all = RowSums::sum(rows);
    let gains = || rows.iter().filter_map(RowSums::gain);
    Some(HeadFit {
        change: all.change / all.energy,
        gain: all.gain()?,
        least_gain: gains().fold(f64::INFINITY, f64::min),
        most_gain: gains().fold(f64::NEG_INFINITY, f64::max),
    })
}
