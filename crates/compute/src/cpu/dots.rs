//! Dot products of a weight's row, as it is stored, with one token: what making text is made of.
//!
//! Bound by memory once rows stay packed, if a code costs an instruction or less: eight values at a time
//! by AVX2's own instructions, for loops like these are not reliably made of them by the compiler. The
//! portable loops beside them do the same operations in the same order, so that processors agree.
//!
//! Values are widened exactly, a row in memory and a row on the way give the same products, and these
//! are summed in 32 lanes that are joined in a fixed order.

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::dots_avx2 as avx2;

/// Values that are multiplied at a time; codes come in as many.
pub(crate) const LANES: usize = 32;

/// One row of codes: bits in order, `bits / 8` bytes a code, and what they mean.
#[derive(Clone, Copy)]
pub(crate) struct CodedRow<'a> {
    pub(crate) codes: &'a [u8],
    /// Of every group.
    pub(crate) scales: &'a [f32],
    /// The code that means 0.0, of every group.
    pub(crate) zeros: &'a [u8],
    /// The group of every [`LANES`] codes.
    pub(crate) group_of: &'a [u32],
}

/// The AVX2 function where the processor has what it needs, or else the portable one.
macro_rules! wide_or {
    ($wide:expr, $portable:expr) => {{
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            // SAFETY: both target features were detected on this processor just above.
            return unsafe { $wide };
        }
        $portable
    }};
}

#[expect(unsafe_code, reason = "calls functions with run-time checked target features")]
impl CodedRow<'_> {
    /// Σ w · x over whole lanes; `bits` is 2, 3, 4 or 8.
    pub(crate) fn dot(self, bits: u8, x: &[f32]) -> f32 {
        match bits {
            2 => wide_or!(avx2::dot_coded::<2>(self, x), dot_coded::<2>(self, x)),
            3 => wide_or!(avx2::dot_coded::<3>(self, x), dot_coded::<3>(self, x)),
            4 => wide_or!(avx2::dot_coded::<4>(self, x), dot_coded::<4>(self, x)),
            _ => wide_or!(avx2::dot_coded::<8>(self, x), dot_coded::<8>(self, x)),
        }
    }

    /// The weights that the row stands for.
    pub(crate) fn widen(self, bits: u8, to: &mut [f32]) {
        match bits {
            2 => wide_or!(avx2::widen_coded::<2>(self, to), widen_coded::<2>(self, to)),
            3 => wide_or!(avx2::widen_coded::<3>(self, to), widen_coded::<3>(self, to)),
            4 => wide_or!(avx2::widen_coded::<4>(self, to), widen_coded::<4>(self, to)),
            _ => wide_or!(avx2::widen_coded::<8>(self, to), widen_coded::<8>(self, to)),
        }
    }
}

/// Σ w · x.
#[expect(unsafe_code, reason = "calls a function with run-time checked target features")]
pub(crate) fn dot_f32(w: &[f32], x: &[f32]) -> f32 {
    wide_or!(avx2::dot_f32(w, x), dot_of(w, x, |w| w))
}

/// Σ w · x of fp16 values.
#[expect(unsafe_code, reason = "calls a function with run-time checked target features")]
pub(crate) fn dot_f16(w: &[f16], x: &[f32]) -> f32 {
    wide_or!(avx2::dot_f16(w, x), dot_of(w, x, f16::to_f32))
}

/// Σ w · x of bfloat16 bits.
#[expect(unsafe_code, reason = "calls a function with run-time checked target features")]
pub(crate) fn dot_bf16(w: &[u16], x: &[f32]) -> f32 {
    wide_or!(avx2::dot_bf16(w, x), dot_of(w, x, |bits| f32::from_bits(u32::from(bits) << 16)))
}

/// Σ w · x, value by value.
fn dot_of<T: Copy>(w: &[T], x: &[f32], widen: impl Fn(T) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    for (w, x) in w.chunks(LANES).zip(x.chunks(LANES)) {
        for ((sum, &w), x) in sums.iter_mut().zip(w).zip(x) {
            *sum += widen(w) * x;
        }
    }
    total(sums)
}

fn dot_coded<const BITS: usize>(row: CodedRow<'_>, x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for (lane, x) in x.chunks_exact(LANES).enumerate() {
        for (i, (sum, x)) in sums.iter_mut().zip(x).enumerate() {
            *sum += weight::<BITS>(row, lane * LANES + i) * x;
        }
    }
    total(sums)
}

fn widen_coded<const BITS: usize>(row: CodedRow<'_>, to: &mut [f32]) {
    for (i, to) in to.iter_mut().enumerate() {
        *to = weight::<BITS>(row, i);
    }
}

/// The weight at a place of a row. Exact: a code is of 8 bits at most, a scale of 11.
fn weight<const BITS: usize>(row: CodedRow<'_>, at: usize) -> f32 {
    let bit = at * BITS;
    let byte = |at: usize| u16::from(row.codes.get(at).copied().unwrap_or(0));
    let code = (byte(bit / 8) | byte(bit / 8 + 1) << 8) >> (bit % 8) & ((1 << BITS) - 1);
    let group = row.group_of[at / LANES] as usize;
    (f32::from(code) - f32::from(row.zeros[group])) * row.scales[group]
}

/// Sum of all lanes, in halves: the upper ones are added to the lower, until one is left.
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn noise(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 700.0 - 1.4).collect()
    }

    fn exact(w: impl Iterator<Item = f64>, x: &[f32]) -> f64 {
        w.zip(x).map(|(w, &x)| w * f64::from(x)).sum()
    }

    #[test]
    fn stored_values_match_f64_at_ragged_lengths() {
        for count in [1, 31, 32, 33, 96, 577] {
            let (w, x) = (noise(count, 1), noise(count, 2));
            let close = |got: f32, exact: f64| {
                assert!((f64::from(got) - exact).abs() < 3e-5, "{count}: {got} {exact}");
            };
            close(dot_f32(&w, &x), exact(w.iter().map(|&v| v.into()), &x));
            let halves: Vec<f16> = w.iter().map(|&v| f16::from_f32(v * 1e-5)).collect();
            let want = exact(halves.iter().map(|&v| v.into()), &x);
            assert!((f64::from(dot_f16(&halves, &x)) - want).abs() < 1e-9, "{count}, subnormal");
            let halves: Vec<f16> = w.iter().map(|&v| f16::from_f32(v)).collect();
            close(dot_f16(&halves, &x), exact(halves.iter().map(|&v| v.into()), &x));
            // Wide and portable loops agree to the bit.
            assert_eq!(dot_f16(&halves, &x), dot_of(&halves, &x, f16::to_f32), "{count}");
            assert_eq!(dot_f32(&w, &x), dot_of(&w, &x, |w| w), "{count}");
            let brains: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            let bits: Vec<u16> = brains.iter().map(|v| v.to_bits()).collect();
            close(dot_bf16(&bits, &x), exact(brains.iter().map(|&v| v.into()), &x));
        }
    }

    /// Against codes that are taken bit by bit.
    #[test]
    fn codes_of_every_width_match_f64() {
        for bits in [2_u8, 3, 4, 8] {
            let lanes = 5;
            let bytes: Vec<u8> =
                (0..lanes * LANES / 8 * usize::from(bits)).map(|i| (i * 89 + 7) as u8).collect();
            let bit = |at: usize| bytes[at / 8] >> (at % 8) & 1;
            let wide = usize::from(bits);
            let code = |at: usize| (0..wide).map(|b| u32::from(bit(at * wide + b)) << b).sum();
            let codes: Vec<u32> = (0..lanes * LANES).map(code).collect();
            let scales = [0.25, 3.5e-3, 7.0].map(|scale| f16::from_f32(scale).to_f32());
            let (zeros, group_of) = ([1, 3, 2], [0, 0, 2, 1, 1]);
            let row =
                CodedRow { codes: &bytes, scales: &scales, zeros: &zeros, group_of: &group_of };
            let weight = |at: usize| {
                let group = group_of[at / LANES] as usize;
                (f64::from(codes[at]) - f64::from(zeros[group])) * f64::from(scales[group])
            };
            let x = noise(codes.len(), 3);
            let mut widened = vec![0.0; codes.len()];
            row.widen(bits, &mut widened);
            for (at, &w) in widened.iter().enumerate() {
                assert_eq!(f64::from(w), weight(at), "{bits} bits, {at}");
            }
            let want = exact((0..codes.len()).map(weight), &x);
            let got = row.dot(bits, &x);
            assert!((f64::from(got) - want).abs() < 1e-5 * want.abs().max(100.0), "{got} {want}");
            assert_eq!(got, dot_f32(&widened, &x), "{bits} bits: in memory and on the way");
            let portable: fn(CodedRow<'_>, &[f32]) -> f32 = match bits {
                2 => dot_coded::<2>,
                3 => dot_coded::<3>,
                4 => dot_coded::<4>,
                _ => dot_coded::<8>,
            };
            assert_eq!(got, portable(row, &x), "{bits} bits: wide and portable");
        }
    }
}
