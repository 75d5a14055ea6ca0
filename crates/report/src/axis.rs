//! Axes of the page's charts: where a value lies, and which values get a tick.
//!
//! Values come from files, so an axis is made for any: what lies beyond [`LARGEST`] is drawn there,
//! what is smaller than [`SMALLEST`] as 0. Every end, place and number of ticks is then finite.

use serde::Serialize;

/// Ratio of largest to smallest value above which an axis is logarithmic.
const LOG_FROM: f64 = 3.0;

/// The largest value that an axis reaches, of either sign; no measure of a model comes near.
const LARGEST: f64 = 1e30;
/// The smallest that differs from 0.
const SMALLEST: f64 = 1e-30;

/// A value axis, drawn from pixel `start` to pixel `end` (which may be the smaller).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    log: bool,
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

/// A labeled place on an axis.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Tick {
    /// Pixels.
    pub(crate) at: f64,
    /// The value as text.
    pub(crate) label: String,
}

impl Axis {
    /// An axis for `values`, logarithmic where they span more than a factor of three. `None`
    /// without a finite value.
    pub(crate) fn around(
        values: impl IntoIterator<Item = f64>,
        start: f64,
        end: f64,
    ) -> Option<Self> {
        let mut low = f64::INFINITY;
        let mut high = f64::NEG_INFINITY;
        for value in values.into_iter().filter(|v| v.is_finite()).map(bounded) {
            low = low.min(value);
            high = high.max(value);
        }
        (low <= high).then(|| {
            let log = low > 0.0 && high > LOG_FROM * low;
            Self { log, low, high, start, end }.padded()
        })
    }

    /// Room at both ends, so that no mark touches the frame; more where all values are one.
    fn padded(mut self) -> Self {
        let (low, high) = (self.position(self.low), self.position(self.high));
        let span = high - low;
        let pad = match (span > 0.0, low == 0.0) {
            (true, _) => 0.08 * span,
            (false, false) => 0.05 * low.abs(),
            (false, true) => 1.0,
        };
        (self.low, self.high) = (self.value(low - pad), self.value(high + pad));
        self
    }

    /// The value on the scale that is drawn evenly.
    fn position(&self, value: f64) -> f64 {
        if self.log { value.ln() } else { value }
    }

    fn value(&self, position: f64) -> f64 {
        if self.log { position.exp() } else { position }
    }

    /// Pixel of a value; one outside the axis lies at its end.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let (low, high) = (self.position(self.low), self.position(self.high));
        // In this order a value that is no number lies at the low end.
        let value = value.max(self.low).min(self.high);
        pixel(self.start + (self.position(value) - low) / (high - low) * (self.end - self.start))
    }

    /// True when the axis reaches the value.
    pub(crate) fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// The value above the axis that stretches it to `factor` of its length.
    pub(crate) fn reach(&self, factor: f64) -> f64 {
        let (low, high) = (self.position(self.low), self.position(self.high));
        self.value(low + factor * (high - low))
    }

    /// True for a logarithmic axis.
    pub(crate) fn is_log(&self) -> bool {
        self.log
    }

    /// About `wanted` round values and their text.
    pub(crate) fn ticks(&self, wanted: usize) -> Vec<Tick> {
        let powers = if self.log { self.log_values() } else { Vec::new() };
        // A logarithmic axis of less than a decade may hold too few of 1, 2, 5.
        let mut values = if powers.len() < 3 { self.even_values(wanted) } else { powers };
        let most = 2 * wanted.max(1);
        if values.len() > most {
            values.retain(|v| (v.log10() - v.log10().round()).abs() < 1e-9);
        }
        // Of many decades those whose exponent is a multiple of two, three … have a tick.
        let step = values.len().div_ceil(most.max(12)).max(1);
        if step > 1 {
            values.retain(|v| v.log10().round() as i64 % step as i64 == 0);
        }
        let places = values.iter().map(|&v| decimals(v)).max().unwrap_or(0);
        let text = |v: f64| if self.log { plain(v, decimals(v)) } else { plain(v, places) };
        values.iter().map(|&v| Tick { at: self.at(v), label: text(v) }).collect()
    }

    /// 1, 2 and 5 times powers of ten.
    fn log_values(&self) -> Vec<f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        decades
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)))
            .filter(|&v| self.holds(v))
            .collect()
    }

    /// Multiples of 1, 2, 2.5 or 5 times a power of ten.
    fn even_values(&self, wanted: usize) -> Vec<f64> {
        let rough = (self.high - self.low) / wanted.max(1) as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .map(|digit| digit * power)
            .into_iter()
            .find(|&step| step >= rough)
            .unwrap_or(10.0 * power);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

fn plain(value: f64, places: usize) -> String {
    let short = value == 0.0 || (1e-6 - 1e-12..1e7).contains(&value.abs());
    if short { format!("{value:.places$}") } else { format!("{value:.1e}").replacen(".0e", "e", 1) }
}

fn bounded(value: f64) -> f64 {
    if value.abs() < SMALLEST { 0.0 } else { value.clamp(-LARGEST, LARGEST) }
}

/// The fewest decimals that print a round value as it is.
fn decimals(value: f64) -> usize {
    (0..9)
        .find(|&n| {
            let scaled = value * 10f64.powi(n);
            (scaled - scaled.round()).abs() < 1e-6 * scaled.abs().max(1e-3)
        })
        .unwrap_or(9) as usize
}

/// Rounds to a tenth of a pixel: more would only lengthen the page.
pub(crate) fn pixel(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis, wanted: usize) -> Vec<String> {
        axis.ticks(wanted).into_iter().map(|t| t.label).collect()
    }

    #[test]
    fn close_values_get_an_even_axis() {
        let axis = Axis::around([18.9, 20.1], 100.0, 0.0).unwrap();
        assert!(!axis.is_log());
        assert_eq!(labels(&axis, 4), ["19.0", "19.5", "20.0"]);
        assert!(axis.at(18.9) < 100.0 && axis.at(20.1) > 0.0);
        assert_eq!(axis.at(19.5), 50.0);
    }

    #[test]
    fn values_far_apart_get_a_logarithmic_one() {
        let axis = Axis::around([0.01, 0.1], 0.0, 100.0).unwrap();
        assert!(axis.is_log());
        assert_eq!(labels(&axis, 4), ["0.01", "0.02", "0.05", "0.1"]);
        // Equal factors are equal steps.
        let (one, two, four) = (axis.at(0.02), axis.at(0.04), axis.at(0.08));
        assert!((two - one - (four - two)).abs() < 0.11, "{one} {two} {four}");
        let wide = Axis::around([1e-6, 1e3], 0.0, 100.0).unwrap();
        assert_eq!(labels(&wide, 4)[..3], ["0.000001", "0.00001", "0.0001"]);
    }

    #[test]
    fn one_value_or_none_or_nonsense_is_no_panic() {
        assert!(Axis::around([], 0.0, 1.0).is_none());
        assert!(Axis::around([f64::NAN, f64::INFINITY], 0.0, 1.0).is_none());
        for value in [0.0, 5.0, -5.0, 1e-300] {
            let axis = Axis::around([value], 0.0, 100.0).unwrap();
            assert_eq!(axis.at(value), 50.0, "{value}");
            assert!(axis.ticks(4).len() < 12, "{value}");
        }
    }

    #[test]
    fn any_values_get_a_finite_axis() {
        let extremes = [
            0.0,
            -0.0,
            1.0,
            1.0 + f64::EPSILON,
            1e16,
            1e16 + 2.0,
            5e-324,
            1e-310,
            1e-300,
            1e-31,
            1e30,
            1e300,
            f64::MAX,
            f64::INFINITY,
            f64::NAN,
        ];
        let signed = extremes.into_iter().chain(extremes.map(|v| -v));
        for one in signed.clone() {
            for other in signed.clone() {
                let Some(axis) = Axis::around([one, other], 300.0, 0.0) else {
                    assert!(!one.is_finite() && !other.is_finite());
                    continue;
                };
                assert!(axis.low.is_finite() && axis.high.is_finite() && axis.low < axis.high);
                for value in signed.clone() {
                    assert!((0.0..=300.0).contains(&axis.at(value)), "{value} of {one}, {other}");
                }
                let ticks = axis.ticks(5);
                assert!(ticks.len() <= 12, "{one}, {other}: {ticks:?}");
                assert!(ticks.iter().all(|t| t.at.is_finite() && t.label.len() <= 18), "{ticks:?}");
            }
        }
        let wide = Axis::around([1e-25, 1e25], 0.0, 100.0).unwrap();
        assert!(labels(&wide, 4).contains(&"1e-20".to_owned()), "{:?}", labels(&wide, 4));
    }
}
