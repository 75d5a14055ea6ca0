//! The exponential function, the same on every machine.
//!
//! The standard library's is that of the system's C library, which differ in the last place; one
//! such place is enough for a draw to fall on another token. Sums and products do not differ.

use std::f64::consts::LOG2_E;

/// ln 2 in two parts, the first with so few digits that its product with an exponent is exact.
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);

/// Terms of the series; after so many, what is left is below half a unit in the last place where
/// |r| ≤ ln 2 / 2.
const TERMS: u32 = 14;

/// eˣ for x ≤ 0, to a few units in the last place; 0 below -708, where the result would lose digits.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -708.0 {
        return 0.0;
    }
    let power = (x * LOG2_E).round();
    let r = (x - power * LN2_HIGH) - power * LN2_LOW;
    let series = (1..=TERMS).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    // The power is between -1022 and 0, so its exponent is that of a normal number.
    series * f64::from_bits(((1023 + power as i64) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn it_is_the_exponential() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(exp(-800.0), 0.0);
        for step in 0..70_000 {
            let x = -f64::from(step) / 100.0;
            let error = (exp(x) / x.exp() - 1.0).abs();
            assert!(error < 1e-15, "{x}: {error:e}");
        }
    }
}
