//! Dot products of a weight's row, as it is stored, with one token: what making text is made of.
//!
//! Bound by memory once rows stay packed: a code costs one instruction or less with AVX2. Values are
//! widened exactly, a row in memory and a row on the way give the same products, and these are summed
//! in 32 lanes that are joined in a fixed order, with and without wide instructions.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_mm256_cvtph_ps;

use half::f16;

use super::simd::dispatch;

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

dispatch!(
    /// Σ w · x.
    dot_f32(w: &[f32], x: &[f32]) -> f32, dot_f32_body);
dispatch!(
    /// Σ w · x of bfloat16 bits.
    dot_bf16(w: &[u16], x: &[f32]) -> f32, dot_bf16_body);
dispatch!(
    dot_2(row: CodedRow<'_>, x: &[f32]) -> f32, dot_coded::<2>);
dispatch!(
    dot_3(row: CodedRow<'_>, x: &[f32]) -> f32, dot_coded::<3>);
dispatch!(
    dot_4(row: CodedRow<'_>, x: &[f32]) -> f32, dot_coded::<4>);
dispatch!(
    dot_8(row: CodedRow<'_>, x: &[f32]) -> f32, dot_coded::<8>);
dispatch!(
    widen_2(row: CodedRow<'_>, to: &mut [f32]), widen_coded::<2>);
dispatch!(
    widen_3(row: CodedRow<'_>, to: &mut [f32]), widen_coded::<3>);
dispatch!(
    widen_4(row: CodedRow<'_>, to: &mut [f32]), widen_coded::<4>);
dispatch!(
    widen_8(row: CodedRow<'_>, to: &mut [f32]), widen_coded::<8>);

impl CodedRow<'_> {
    /// Σ w · x over whole lanes; `bits` is 2, 3, 4 or 8.
    pub(crate) fn dot(self, bits: u8, x: &[f32]) -> f32 {
        match bits {
            2 => dot_2(self, x),
            3 => dot_3(self, x),
            4 => dot_4(self, x),
            _ => dot_8(self, x),
        }
    }

    /// The weights that the row stands for.
    pub(crate) fn widen(self, bits: u8, to: &mut [f32]) {
        match bits {
            2 => widen_2(self, to),
            3 => widen_3(self, to),
            4 => widen_4(self, to),
            _ => widen_8(self, to),
        }
    }
}

/// The weights of every [`LANES`] codes in turn, eight at a time, with the place of the first. Plain
/// loops over registers: through iterators and arrays of all lanes this took fifty times as long.
#[inline(always)]
fn each_eight<const BITS: usize>(row: CodedRow<'_>, mut take: impl FnMut(usize, [f32; 8])) {
    for (lane, (codes, &group)) in
        row.codes.chunks_exact(LANES / 8 * BITS).zip(row.group_of).enumerate()
    {
        let (scale, zero) = (row.scales[group as usize], f32::from(row.zeros[group as usize]));
        for (eight, bytes) in codes.chunks_exact(BITS).enumerate() {
            let mut weights = codes_of::<BITS>(bytes);
            for weight in &mut weights {
                // Exact: a code is of 8 bits at most, a scale of 11.
                *weight = (*weight - zero) * scale;
            }
            take(LANES * lane + 8 * eight, weights);
        }
    }
}

/// Eight codes from their bits: they lie in `BITS` whole bytes.
#[inline(always)]
fn codes_of<const BITS: usize>(bytes: &[u8]) -> [f32; 8] {
    let mut codes = [0.0; 8];
    if BITS == 8 {
        for (code, &byte) in codes.iter_mut().zip(bytes) {
            *code = f32::from(byte);
        }
        return codes;
    }
    let mut word = [0; 4];
    word[..BITS].copy_from_slice(bytes);
    let word = u32::from_le_bytes(word);
    for i in 0..8 {
        // Signed: the conversion that processors have.
        codes[i] = (word >> (BITS * i) & ((1 << BITS) - 1)) as i32 as f32;
    }
    codes
}

/// Sum of all lanes, in halves.
#[inline(always)]
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

#[inline(always)]
fn dot_coded<const BITS: usize>(row: CodedRow<'_>, x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let x = x.as_chunks::<8>().0;
    each_eight::<BITS>(row, |at, weights| {
        let (x, sums) = (&x[at / 8], &mut sums[at % LANES..at % LANES + 8]);
        for i in 0..8 {
            sums[i] += weights[i] * x[i];
        }
    });
    total(sums)
}

#[inline(always)]
fn widen_coded<const BITS: usize>(row: CodedRow<'_>, to: &mut [f32]) {
    let to = to.as_chunks_mut::<8>().0;
    each_eight::<BITS>(row, |at, weights| to[at / 8] = weights);
}

/// Σ w · x, `widen` giving the values of [`LANES`] stored ones.
#[inline(always)]
fn dot_of<T: Copy + Default>(
    w: &[T],
    x: &[f32],
    widen: impl Fn(&[T; LANES]) -> [f32; LANES],
) -> f32 {
    let (whole, rest) = w.as_chunks::<LANES>();
    let (x_whole, x_rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    let mut add = |w: &[T; LANES], x: &[f32; LANES]| {
        let w = widen(w);
        for i in 0..LANES {
            sums[i] += w[i] * x[i];
        }
    };
    for (w, x) in whole.iter().zip(x_whole) {
        add(w, x);
    }
    if !rest.is_empty() {
        let (mut w_last, mut x_last) = ([T::default(); LANES], [0.0; LANES]);
        w_last[..rest.len()].copy_from_slice(rest);
        x_last[..x_rest.len()].copy_from_slice(x_rest);
        add(&w_last, &x_last);
    }
    total(sums)
}

#[inline(always)]
fn dot_f32_body(w: &[f32], x: &[f32]) -> f32 {
    dot_of(w, x, |w| *w)
}

#[inline(always)]
fn dot_bf16_body(w: &[u16], x: &[f32]) -> f32 {
    dot_of(w, x, |w| w.map(|bits| f32::from_bits(u32::from(bits) << 16)))
}

/// Σ w · x of fp16 values: with the processor's own conversion where it has one, since the portable
/// one costs as much as all else.
#[expect(unsafe_code, reason = "calls a function with run-time checked target features")]
pub(crate) fn dot_f16(w: &[f16], x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        // SAFETY: both target features were detected on this processor just above.
        return unsafe { dot_f16_wide(w, x) };
    }
    dot_of(w, x, |w| w.map(f16::to_f32))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn dot_f16_wide(w: &[f16], x: &[f32]) -> f32 {
    dot_of(w, x, |w| {
        let mut wide = [0.0; LANES];
        for (to, eight) in wide.as_chunks_mut::<8>().0.iter_mut().zip(w.as_chunks::<8>().0) {
            *to = widen_eight(eight);
        }
        wide
    })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn widen_eight(values: &[f16; 8]) -> [f32; 8] {
    let bits: [u16; 8] = bytemuck::cast(*values);
    bytemuck::cast(_mm256_cvtph_ps(bytemuck::cast(bits)))
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
            let portable = dot_of(&halves, &x, |w| w.map(f16::to_f32));
            assert_eq!(dot_f16(&halves, &x), portable, "{count}");
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
        }
    }
}
