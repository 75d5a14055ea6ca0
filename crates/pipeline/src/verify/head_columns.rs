//! How much of each of the base's columns is left in a fitted head.
//!
//! A head that was made by one matrix more has rows that one matrix makes, so columns that were negated, or are
//! zeros, do not show by rows. In the coordinates of a rotated residual stream all columns are alike, and what
//! fitting leaves of one is about what it leaves of all.

use half::f16;
use rayon::prelude::*;

/// Gains of a column over the whole head's. Sound ones of random models of 57 configurations at 2 and 3 bits
/// have 0.6 to 1.3, of SmolLM2 at 3 bits 0.8 to 1.2; a negated one has -1, one of zeros 0.
const COLUMN_GAINS: std::ops::Range<f64> = 0.25..2.0;
/// Rows that a task sums: a fixed number, so that sums do not depend on the number of threads.
const BAND: usize = 4096;

/// What is left of every column of `base` in `found`, both `[rows, width]`: products over energies, each row
/// by its own energy, so that no enormous one decides. Zeros of the base's have no gain: NaN.
pub(super) fn gains(found: &[f32], base: &[f16], width: usize) -> Vec<f64> {
    let bands = found.par_chunks(BAND * width).zip(base.par_chunks(BAND * width));
    let bands: Vec<Sums> = bands.map(|(found, base)| Sums::of(found, base, width)).collect();
    let mut all = Sums::new(width);
    for band in bands {
        let add = |all: &mut Vec<f64>, band: Vec<f64>| {
            all.iter_mut().zip(band).for_each(|(all, band)| *all += band);
        };
        add(&mut all.products, band.products);
        add(&mut all.energies, band.energies);
    }
    all.products.iter().zip(&all.energies).map(|(product, energy)| product / energy).collect()
}

/// A column that is no more like the base's than another, in a head that has `gain` of all, and how many such
/// there are.
pub(super) fn odd(gains: &[f64], gain: f64) -> Option<(usize, usize)> {
    let other = |of: &f64| of.is_finite() && !COLUMN_GAINS.contains(&(of / gain));
    Some((gains.iter().position(other)?, gains.iter().filter(|of| other(of)).count()))
}

/// Sums over rows, a column each.
struct Sums {
    products: Vec<f64>,
    energies: Vec<f64>,
}

impl Sums {
    fn new(width: usize) -> Self {
        Self { products: vec![0.0; width], energies: vec![0.0; width] }
    }

    fn of(found: &[f32], base: &[f16], width: usize) -> Self {
        let mut sums = Self::new(width);
        for (found, base) in found.chunks(width).zip(base.chunks(width)) {
            let energy: f64 = base.iter().map(|value| f64::from(value.to_f32()).powi(2)).sum();
            if energy == 0.0 {
                continue;
            }
            for (column, (found, base)) in found.iter().zip(base).enumerate() {
                let (found, base) = (f64::from(*found), f64::from(base.to_f32()));
                sums.products[column] += found * base / energy;
                sums.energies[column] += base * base / energy;
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_have_gains_of_their_own() {
        let base: Vec<f16> = [[1.0, 2.0, 0.0], [-100.0, 50.0, 0.0], [0.0; 3]]
            .as_flattened()
            .iter()
            .map(|&value: &f32| f16::from_f32(value))
            .collect();
        let mut found: Vec<f32> = base.iter().map(|value| 0.5 * value.to_f32()).collect();
        let whole = gains(&found, &base, 3);
        assert!((whole[0] - 0.5).abs() < 1e-12 && (whole[1] - 0.5).abs() < 1e-12);
        assert!(whole[2].is_nan());
        assert_eq!(odd(&whole, 0.5), None);
        // Negated in the large row alone, which counts no more than the small one.
        found[3] = 50.0;
        let negated = gains(&found, &base, 3);
        assert!((negated[0] - (0.1 - 0.4) / (0.2 + 0.8)).abs() < 1e-12, "{negated:?}");
        assert_eq!(odd(&negated, 0.5), Some((0, 1)));
    }
}
