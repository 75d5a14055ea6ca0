//! The symmetric grid: scales of groups, codes of weights.
//!
//! Every scale of every recipe passes through [`file_scale`], on the host as on a card
//! (`kernels/half.cuh`): the file keeps scales in fp16, whose ends need a rule.

use half::f16;

use crate::choices::Signs;

/// Scale of one row of one group as AutoGPTQ's `Quantizer.find_params` computes it (per channel,
/// symmetric, no MSE search).
///
/// Its oddities are kept: the range is widened by zero, a row without a negative value spends the
/// whole range 0..max on its 2^bits − 1 steps, and an all-zero row gets the range −1..1.
pub(crate) fn absmax_scale(row: &[f32], max_code: f32) -> f32 {
    let mut low = row.iter().fold(0.0_f32, |a, &v| a.min(v));
    let mut high = row.iter().fold(0.0_f32, |a, &v| a.max(v));
    if low < 0.0 {
        high = high.max(-low);
        low = -high;
    }
    if low == 0.0 && high == 0.0 {
        (low, high) = (-1.0, 1.0);
    }
    (high - low) / max_code
}

/// Candidates of the clip search, as multiples of the absmax scale: 0.35 to 1.05 in equal steps.
/// Above 1 the extremes move off the rounding tie that absmax puts them on. The largest of 8192 normal
/// weights is 4 deviations from 0, of which a step of 2 bits wants one: 0.37 of its absmax scale.
pub(crate) fn clip_ratios() -> [f32; CLIP_STEPS] {
    std::array::from_fn(|i| 0.35 + 0.7 * i as f32 / (CLIP_STEPS - 1) as f32)
}

/// Candidates of the clip search with their signs: the positive ones first, so that of equals they win.
pub(crate) fn signed_ratios(signs: Signs) -> Vec<f32> {
    let ratios = clip_ratios();
    match signs {
        Signs::Positive => ratios.to_vec(),
        Signs::Both => ratios.into_iter().chain(ratios.map(|ratio| -ratio)).collect(),
    }
}

/// How many candidates of a sign there are.
pub(crate) const CLIP_STEPS: usize = 48;

/// Adding and subtracting 1.5·2^23 rounds what is small to an integer, half to even, without a libm
/// call.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// The scale among `ratios` · 2 · absmax / max_code that minimizes Σ importance (w − ŵ)², the first
/// of equals; `half` rounds each candidate to fp16 before it is judged.
pub(crate) fn searched_scale(
    row: &[f32],
    importance: &[f32],
    ratios: &[f32],
    (zero, max_code): (f32, f32),
    half: bool,
) -> f32 {
    let base = clip_base(row, max_code);
    let (mut best, mut least) = (file_scale(base, max_code, half), f32::INFINITY);
    for ratio in ratios {
        let scale = file_scale(ratio * base, max_code, half);
        let loss = weighted_loss(row, importance, scale, zero, max_code);
        if loss < least {
            (best, least) = (scale, loss);
        }
    }
    best
}

/// What the candidates are multiples of: 2 · absmax / max_code, or 2 / max_code for zeros.
pub(crate) fn clip_base(row: &[f32], max_code: f32) -> f32 {
    let absmax = row.iter().fold(0.0_f32, |a, &v| a.max(v.abs()));
    2.0 * if absmax == 0.0 { 1.0 } else { absmax } / max_code
}

/// The scale as the solver is to use it: one that the file can hold. `half` rounds it to fp16 first.
///
/// fp16 has two ends. A scale that it would round to 0 is lifted to the smallest it has, 2⁻²⁴: a
/// group of tiny weights keeps a grid. A scale under which the lowest code means more than fp16's
/// largest number is lowered until it does not: loaders compute in fp16. One that fp16 cannot hold
/// at all is left alone, for [`stored_scales`](crate::solved::stored_scales) to refuse. A negative
/// scale is treated as its magnitude.
pub(crate) fn file_scale(scale: f32, max_code: f32, half: bool) -> f32 {
    let magnitude = scale.abs();
    let rounded = f16::from_f32(magnitude);
    if rounded == f16::ZERO {
        return f16::MIN_POSITIVE_SUBNORMAL.to_f32().copysign(scale);
    }
    if !rounded.is_finite() {
        return scale;
    }
    // The lowest code is 2^(bits − 1) steps below 0; a power of two, so fp16 holds the quotient.
    let most = f16::MAX.to_f32() / ((max_code + 1.0) / 2.0);
    (if half { rounded.to_f32() } else { magnitude }).min(most).copysign(scale)
}

/// Σ importance (w − ŵ)² in lanes, so that it runs four wide on any x86-64.
fn weighted_loss(row: &[f32], importance: &[f32], scale: f32, zero: f32, max_code: f32) -> f32 {
    const LANES: usize = 8;
    let term = |w: f32, h: f32| {
        // Bounds are integers, so clamping first gives the same code as rounding first.
        let code = ((w / scale).clamp(-zero, max_code - zero) + ROUND) - ROUND;
        let d = code * scale - w;
        d * d * h
    };
    let mut lanes = [0.0_f32; LANES];
    let (rows, rest) = row.as_chunks::<LANES>();
    let (weights, rest_weights) = importance.as_chunks::<LANES>();
    for (w, h) in rows.iter().zip(weights) {
        for lane in 0..LANES {
            lanes[lane] += term(w[lane], h[lane]);
        }
    }
    let rest: f32 = rest.iter().zip(rest_weights).map(|(&w, &h)| term(w, h)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Code of `w`: round half to even, shift, clamp. IEEE division, because extremes of a group sit
/// exactly on rounding ties and a multiplication by 1/scale would move them.
pub(crate) fn code(w: f32, scale: f32, zero: f32, max_code: f32) -> f32 {
    ((w / scale).round_ties_even() + zero).clamp(0.0, max_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_follow_find_params() {
        assert_eq!(absmax_scale(&[-1.0, 0.5], 15.0), 2.0 / 15.0);
        assert_eq!(absmax_scale(&[-0.5, 1.5], 7.0), 3.0 / 7.0);
        assert_eq!(absmax_scale(&[0.25, 3.0], 15.0), 3.0 / 15.0);
        assert_eq!(absmax_scale(&[0.0, 0.0], 15.0), 2.0 / 15.0);
        assert_eq!(absmax_scale(&[0.0, 0.0], 7.0), 2.0 / 7.0);
    }

    #[test]
    fn the_search_finds_the_best_candidate() {
        let row: Vec<f32> = (0..37).map(|i| ((i * 29) % 37) as f32 / 9.0 - 2.0).collect();
        let importance: Vec<f32> = (0..37).map(|i| 1.0 + ((i * 5) % 7) as f32).collect();
        let exact = |scale: f32| -> f64 {
            let loss = |(w, h): (&f32, &f32)| {
                let (w, scale) = (f64::from(*w), f64::from(scale));
                let code = (w / scale).round_ties_even().clamp(-4.0, 3.0);
                f64::from(*h) * (code * scale - w).powi(2)
            };
            row.iter().zip(&importance).map(loss).sum()
        };
        let ratios = clip_ratios();
        assert_eq!((ratios[0], ratios[CLIP_STEPS - 1]), (0.35, 1.05));
        for half in [false, true] {
            let found = searched_scale(&row, &importance, &ratios, (4.0, 7.0), half);
            let base = absmax_scale(&row, 7.0);
            let least = ratios.iter().map(|r| exact(file_scale(r * base, 7.0, half)));
            let least = least.fold(f64::INFINITY, f64::min);
            assert!(exact(found) <= least * (1.0 + 1e-5));
            assert!(exact(found) < exact(base), "clipping pays on this row");
            assert!(!half || f16::from_f32(found).to_f32() == found);
        }
        assert_eq!(searched_scale(&[0.0; 3], &[1.0; 3], &ratios, (8.0, 15.0), true), {
            file_scale(0.35 * (2.0 / 15.0), 15.0, true)
        });
    }

    #[test]
    fn scales_fit_both_ends_of_fp16() {
        let least = 2.0_f32.powi(-24);
        for half in [false, true] {
            // fp16 rounds half of its smallest number to 0, and what is above that up.
            for tiny in [0.0, 1e-30, 0.5 * least] {
                assert_eq!(file_scale(tiny, 15.0, half), least);
            }
            assert!(f16::from_f32(file_scale(0.51 * least, 15.0, half)).to_f32() == least);
            // 16 levels reach 8 steps down: 65504 / 8 = 8188 is the largest whose values all fit.
            assert_eq!(file_scale(8733.0, 15.0, half), 8188.0);
            assert_eq!(file_scale(43_669.0, 3.0, half), 32_752.0);
            assert_eq!(file_scale(513.8, 255.0, half), 511.75);
            assert_eq!(file_scale(8188.0, 15.0, half), 8188.0);
            for scale in [1e-30, 0.51 * least, 0.1, 8733.0, 1e6] {
                assert_eq!(file_scale(-scale, 15.0, half), -file_scale(scale, 15.0, half));
            }
            // What no fp16 number is near stays what it is, to be refused.
            assert_eq!(file_scale(1e6, 15.0, half), 1e6);
            assert!(file_scale(f32::INFINITY, 15.0, half).is_infinite());
            assert!(file_scale(f32::NAN, 15.0, half).is_nan());
        }
        // In between nothing changes but the rounding.
        assert_eq!(file_scale(0.1, 15.0, false), 0.1);
        assert_eq!(file_scale(0.1, 15.0, true), f16::from_f32(0.1).to_f32());
    }

    #[test]
    fn the_extreme_rounds_half_to_even_and_clips() {
        // A step of exactly 1 puts both extremes on a tie: −7.5 goes to −8, 7.5 to 8 and is clipped.
        let s = absmax_scale(&[-7.5, 7.5], 15.0);
        assert_eq!(s, 1.0);
        assert_eq!(code(7.5, s, 8.0, 15.0), 15.0);
        assert_eq!(code(-7.5, s, 8.0, 15.0), 0.0);
        assert_eq!(code(2.5, s, 8.0, 15.0), 10.0);
        assert_eq!(code(0.0, s, 8.0, 15.0), 8.0);
    }
}
