//! The exponential function, the same on every machine.
//!
//! The standard library's is that of the system's C library, which differ in the last place; one
//! such place is enough for a draw to fall on another token. Sums and products do not differ.

use std::f64::consts::LOG2_E;

/// ln 2 in two parts, the first with so few digits that its product with an exponent is exact.
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);

/// 1/n!, up to where what is left of the series is below half a unit in the last place for
/// |r| ≤ ln 2 / 2. Products, since a row of logits has a hundred thousand and a quotient takes long.
const SERIES: [f64; 14] = {
    let mut series = [1.0; 14];
    let mut n = 1;
    while n < series.len() {
        series[n] = series[n - 1] / n as f64;
        n += 1;
    }
    series
};

/// What rounds a number to a whole one when it is added and taken away again.
const WHOLE: f64 = 1.5 * (1u64 << 52) as f64;

/// eˣ for x ≤ 0, to a few units in the last place; 0 below -708, where the result would lose digits.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -708.0 {
        return 0.0;
    }
    let power = (x * LOG2_E + WHOLE) - WHOLE;
    let r = (x - power * LN2_HIGH) - power * LN2_LOW;
    let series = SERIES.iter().rev().fold(0.0, |sum, term| sum * r + term);
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
