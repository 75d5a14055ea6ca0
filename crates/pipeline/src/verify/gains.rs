//! Gains: what the codes of some weights are times the nearest ones, and how far from 1 that may be.
//!
//! Limits were set on what every recipe, AutoGPTQ 0.7.1 and GPTQModel make of the embedded model and
//! 13 variants of it: 1.5 million scales, 0.9 million outputs and 10,000 groups. Beside each limit
//! stands what was seen on both of its sides. A gain's noise is the energy of what it leaves of the
//! codes, over that of the nearest ones. A scale or an output that is off by a tenth is not found:
//! sound ones of 4 bits have gains from 0.81 on.

use gptq_checkpoint::Bits;

/// By how many standard errors a gain must differ from 1.
const SURE: f64 = 6.0;
/// Rows, or columns of one output, that a gain must rest on.
const ENOUGH: f64 = 12.0;
/// The same of one group of an output, of which the smallest has 32 columns.
const ENOUGH_OF_CELL: f64 = 8.0;
/// Noise that may hide any gain. Other weights leave 1.0 to 1.3, random codes 1.9; noise that brings a
/// sound gain below the limit leaves 4 and more.
const NOISE: f64 = 2.2;
/// Noise above which one group of an output is not judged, nor the upper end of what was moved.
const LITTLE_NOISE: f64 = 0.4;
/// Gains outside of this are of other weights, whatever the noise: theirs are within 0.1 of 0, those
/// under doubled scales 1.7 to 1.9.
const GAINS: std::ops::Range<f64> = 0.35..1.4;
/// The smallest that is other weights' where a recipe moved them and nothing shows it better: of a
/// group of 2 bits (sound ones have 0.27) and of an output.
const SMALLEST_MOVED: f64 = 0.18;

/// Sums over some weights, in steps: of x², y² and x·y, with x the nearest codes and y the codes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gain {
    pub(super) wanted: f64,
    pub(super) given: f64,
    pub(super) product: f64,
    /// And of w·y, with w the weights however far beyond the grid.
    pub(super) unbounded: f64,
}

/// The sum of gains, and what shows how they scatter about it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    all: Gain,
    /// Of wanted², wanted · product and product².
    wanted: f64,
    mixed: f64,
    product: f64,
}

/// A gain that surely is not 1.
struct Other {
    gain: f64,
    noise: f64,
    /// Less what weights beyond the grid explain: their codes, all at its end, are what the columns
    /// after them pay with (AutoGPTQ's scales of rows without a negative weight, half of what they
    /// need).
    excess: f64,
}

impl Gain {
    fn add(&mut self, other: &Self) {
        self.wanted += other.wanted;
        self.given += other.given;
        self.product += other.product;
        self.unbounded += other.unbounded;
    }
}

impl Sums {
    pub(super) fn of<'a>(parts: impl Iterator<Item = &'a Gain>) -> Self {
        let mut sums = Self::default();
        parts.for_each(|part| sums.add(part));
        sums
    }

    pub(super) fn add(&mut self, part: &Gain) {
        self.all.add(part);
        self.wanted += part.wanted * part.wanted;
        self.mixed += part.wanted * part.product;
        self.product += part.product * part.product;
    }

    pub(super) fn gain(&self) -> Gain {
        self.all
    }

    /// Over weights, given by their nearest codes, their codes and themselves, all in steps.
    ///
    /// Codes are small integers, so but for `unbounded` every sum is exact in whatever order.
    pub(super) fn over(nearest: &[f32], code: &[f32], unbounded: &[f32]) -> Self {
        const LANES: usize = 4;
        let (x, x_rest) = nearest.as_chunks::<LANES>();
        let (y, y_rest) = code.as_chunks::<LANES>();
        let (u, u_rest) = unbounded.as_chunks::<LANES>();
        let mut lanes = [[0.0; LANES]; 7];
        for ((x, y), u) in x.iter().zip(y).zip(u) {
            for lane in 0..LANES {
                let (x, y, u) = (f64::from(x[lane]), f64::from(y[lane]), f64::from(u[lane]));
                let (wanted, product) = (x * x, x * y);
                lanes[0][lane] += wanted;
                lanes[1][lane] += y * y;
                lanes[2][lane] += product;
                lanes[3][lane] += u * y;
                lanes[4][lane] += wanted * wanted;
                lanes[5][lane] += wanted * product;
                lanes[6][lane] += product * product;
            }
        }
        let [wanted, given, product, unbounded, squares, mixed, products] =
            lanes.map(|lanes| lanes.iter().sum());
        let all = Gain { wanted, given, product, unbounded };
        let mut sums = Self { all, wanted: squares, mixed, product: products };
        for ((x, y), u) in x_rest.iter().zip(y_rest).zip(u_rest) {
            let [x, y, u] = [x, y, u].map(|&of| f64::from(of));
            sums.add(&Gain { wanted: x * x, given: y * y, product: x * y, unbounded: u * y });
        }
        sums
    }

    /// Adds the sums over other weights.
    pub(super) fn merge(&mut self, other: &Self) {
        self.all.add(&other.all);
        self.wanted += other.wanted;
        self.mixed += other.mixed;
        self.product += other.product;
    }

    /// The gain, where it rests on `enough` parts, surely is not 1, and noise does not hide it.
    fn other(&self, enough: f64) -> Option<Other> {
        let Gain { wanted, given, product, unbounded } = self.all;
        let gain = product / wanted;
        let noise = given / wanted - gain * gain;
        // Sums of nothing are no numbers.
        let judged = wanted * wanted > enough * self.wanted && noise <= NOISE;
        // The parts scatter about the gain; their sum is as sure as that allows.
        let scatter = self.product - 2.0 * gain * self.mixed + gain * gain * self.wanted;
        let error = scatter.max(0.0).sqrt() / wanted;
        let beyond = if product > 0.0 { (unbounded / product - 1.0).max(0.0) } else { 0.0 };
        let sure = judged && (gain - 1.0).abs() > SURE * error;
        sure.then_some(Other { gain, noise, excess: gain - beyond })
    }
}

/// What gains of a linear may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) bits: Bits,
    /// A recipe moved the weights, which are not meant to be the base's.
    pub(super) moved: bool,
}

impl Limits {
    /// The gain of a group over the rows, where it is that of other weights.
    ///
    /// Without much noise sound groups of 3 bits or more have 0.977 to 1.00, with 0.1 of it 0.96 to
    /// 1.04, with 0.4 0.91 to 1.08; of moved linears 0.86 with 0.2 and 0.76 with 0.4. Three steps do
    /// not tell scales from each other: groups of 2 bits have 0.58 or more. Scales of 0.85 of their
    /// size leave 0.85.
    pub(super) fn of_group(&self, sums: &Sums) -> Option<f64> {
        let Other { gain, noise, excess } = sums.other(ENOUGH)?;
        let (smallest, largest) = match (self.bits, self.moved) {
            (Bits::Two, false) => (GAINS.start, GAINS.end),
            (Bits::Two, true) => (SMALLEST_MOVED, GAINS.end),
            (_, false) => (0.92 - 0.4 * noise, 1.08 + 0.3 * noise),
            (_, true) => (0.86 - 0.5 * noise, 1.08 + 0.3 * noise),
        };
        let least = smallest.max(if self.moved { SMALLEST_MOVED } else { GAINS.start });
        (gain < least || excess > largest.min(GAINS.end)).then_some(gain)
    }

    /// The same over all groups: so much rests on it that a factor common to all scales is seen.
    ///
    /// Sound ones of 3 bits or more have 0.95 to 1.02, and where noise drives codes to the ends of
    /// the grid less: 0.91 where it is 0.24 of the weights, 0.89 at 0.37. Those of ternary weights at
    /// 2 bits have 0.81, and an outlier channel after 16 tokens leaves 0.45.
    pub(super) fn of_whole(&self, sums: &Sums) -> Option<f64> {
        let Other { gain, noise, excess } = sums.other(ENOUGH)?;
        let smallest = match (self.bits, self.moved) {
            (Bits::Two, _) => 0.0,
            (_, false) => 0.92 - 0.4 * noise,
            (_, true) => 0.88 - 0.4 * noise,
        };
        (gain < smallest || excess > 1.05 + 0.3 * noise).then_some(gain)
    }

    /// Whether an output has other weights, by all its columns or by those that are `near`.
    ///
    /// Sound ones of 3 bits or more have 0.82 to 1.06 with noise up to 0.2, 0.75 to 1.16 with 0.4 and
    /// up to 1.41 with 1.5; of moved linears 0.71 with 0.4. At 2 bits 0.41 or more, and what one column
    /// passes on to a moved one may move the whole row by a step.
    pub(super) fn is_other_output(&self, all: &Sums, near: &Sums) -> bool {
        if self.bits == Bits::Two && self.moved {
            return false;
        }
        let is_other = |Other { gain, noise, excess }: Other| match (self.bits, self.moved) {
            (Bits::Two, _) => gain < 0.3,
            (_, false) => gain < (0.7 - 0.3 * noise).max(GAINS.start) || excess > 1.3 + 0.5 * noise,
            (_, true) => {
                let large = noise < LITTLE_NOISE && excess > 1.3 + 0.5 * noise;
                gain < (0.7 - 0.5 * noise).max(SMALLEST_MOVED) || large
            }
        };
        let judged = !self.moved && self.bits != Bits::Two;
        let near = near.other(ENOUGH).filter(|_| judged);
        near.is_some_and(|other| !GAINS.contains(&other.gain))
            || all.other(ENOUGH).is_some_and(is_other)
    }

    /// The gain of one group of one output, where its scale is that of other weights.
    ///
    /// Sound ones have 0.66 to 1.37 with noise up to 0.2, 0.63 to 1.51 with 0.4; a scale of half its
    /// size leaves 0.5 to 0.58, a doubled one 1.7 to 1.9, but less where a search for scales of 3
    /// bits has cut the largest weights off. Three steps do not show it.
    pub(super) fn of_cell(&self, sums: &Sums) -> Option<f64> {
        let Other { gain, noise, excess } = sums.other(ENOUGH_OF_CELL)?;
        let other = gain < 0.62 - 0.15 * noise || excess > 1.55 + 0.5 * noise;
        (other && noise < LITTLE_NOISE && self.bits != Bits::Two).then_some(gain)
    }
}
