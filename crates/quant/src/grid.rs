//! The symmetric grid: scales of groups, codes of weights.

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
