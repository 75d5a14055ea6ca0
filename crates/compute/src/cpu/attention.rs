//! Causal attention, one head and one band of queries at a time.
//!
//! A task holds `BAND × seq_len` scores, never `seq_len × seq_len`, and skips the keys after the
//! band, half of the arithmetic of a full product, and those that its first query no longer attends to.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::rows::slice_mut;
use super::simd;
use super::tiles::tiles_mut;
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;

/// Queries of one band: 128 × 4096 scores are 2 MiB.
const BAND: usize = 128;

/// Attention by the rule for every window and head; the caller has checked shapes and rule.
pub(crate) fn causal(
    q: &Array2<f32>,
    k: &Array2<f32>,
    v: &Array2<f32>,
    shape: AttentionShape,
    rule: &AttentionRule,
) -> Array2<f32> {
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    let mut out = Array2::zeros(q.dim());
    tiles_mut(out.view_mut(), seq_len, head_dim).into_par_iter().for_each(|tile| {
        let head = tile.col / head_dim;
        let kv = head / (heads / kv_heads) * head_dim;
        let window = tile.row..tile.row + seq_len;
        one_head(
            q.slice(s![window.clone(), tile.col..tile.col + head_dim]),
            k.slice(s![window.clone(), kv..kv + head_dim]),
            v.slice(s![window, kv..kv + head_dim]),
            tile.view,
            rule,
        );
    });
    out
}

/// Attention of one head over one window or its end: keys and values `[seq_len, head_dim]`, queries the
/// last so many tokens'.
pub(crate) fn one_head(
    q: ArrayView2<'_, f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    mut out: ArrayViewMut2<'_, f32>,
    rule: &AttentionRule,
) {
    let seq_len = k.nrows();
    let before = seq_len - q.nrows();
    let mut scratch = vec![0.0_f32; BAND.min(q.nrows()) * seq_len];
    for first in (0..q.nrows()).step_by(BAND) {
        let rows = BAND.min(q.nrows() - first);
        // Positions of the band's queries, and the first key that any of them attends to.
        let (start, end) = (before + first, before + first + rows);
        let oldest = rule.first_key(start);
        let band = &mut scratch[..rows * (end - oldest)];
        #[expect(clippy::expect_used, reason = "the band was cut to this shape just above")]
        let mut scores =
            ArrayViewMut2::from_shape((rows, end - oldest), band).expect("rows × keys scores");
        general_mat_mul(
            rule.scale,
            &q.slice(s![first..first + rows, ..]),
            &k.slice(s![oldest..end, ..]).t(),
            0.0,
            &mut scores,
        );
        let mut sums = [0.0_f32; BAND];
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let (past, future) = slice_mut(&mut row).split_at_mut(start + i + 1 - oldest);
            let (forgotten, seen) = past.split_at_mut(rule.first_key(start + i) - oldest);
            sums[i] = weights(seen, rule);
            forgotten.fill(0.0);
            future.fill(0.0);
        }
        let mut context = out.slice_mut(s![first..first + rows, ..]);
        general_mat_mul(1.0, &scores, &v.slice(s![oldest..end, ..]), 0.0, &mut context);
        for (mut row, sum) in context.rows_mut().into_iter().zip(sums) {
            row.mapv_inplace(|x| x / sum);
        }
    }
}

/// Turns scores of one query into weights, whose sum is returned.
pub(crate) fn weights(scores: &mut [f32], rule: &AttentionRule) -> f32 {
    if let Some(cap) = rule.softcap {
        simd::softcap(scores, cap);
    }
    let largest = simd::max(scores);
    simd::exp_sum(scores, largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::largest;

    /// The definition, in f64, token by token.
    fn oracle(
        (q, k, v): (&Array2<f32>, &Array2<f32>, &Array2<f32>),
        s: AttentionShape,
        rule: &AttentionRule,
    ) -> Array2<f64> {
        Array2::from_shape_fn(q.dim(), |(t, c)| {
            let (window, position) = (t / s.seq_len * s.seq_len, t % s.seq_len);
            let (head, feature) = (c / s.head_dim, c % s.head_dim);
            let kv = head / (s.heads / s.kv_heads) * s.head_dim;
            let score = |j: usize| -> f64 {
                let product: f64 = (0..s.head_dim)
                    .map(|d| {
                        f64::from(q[[t, head * s.head_dim + d]])
                            * f64::from(k[[window + j, kv + d]])
                    })
                    .sum();
                let score = product * f64::from(rule.scale);
                rule.softcap.map_or(score, |cap| {
                    let cap = f64::from(cap);
                    (score / cap).tanh() * cap
                })
            };
            let seen = rule.window.unwrap_or(usize::MAX);
            let weights: Vec<(usize, f64)> = (0..=position)
                .filter(|j| position - j < seen)
                .map(|j| (j, score(j).exp()))
                .collect();
            let sum: f64 = weights.iter().map(|(_, w)| w).sum();
            weights.iter().map(|(j, w)| w / sum * f64::from(v[[window + j, kv + feature]])).sum()
        })
    }

    #[test]
    fn grouped_query_attention_matches_the_definition() {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 300.0 - 1.6;
        let plain = AttentionRule::llama(8);
        for seq_len in [1, 5, 130, 257] {
            let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, seq_len };
            let tokens = 2 * seq_len;
            let q = Array2::from_shape_fn((tokens, 32), |(i, j)| value(i * 32 + j));
            let k = Array2::from_shape_fn((tokens, 16), |(i, j)| value(11 + i * 16 + j));
            let v = Array2::from_shape_fn((tokens, 16), |(i, j)| value(17 + i * 16 + j));
            for rule in [
                plain,
                AttentionRule { scale: 0.1, ..plain },
                AttentionRule { softcap: Some(1.5), ..plain },
                AttentionRule { window: Some(1), ..plain },
                AttentionRule { window: Some(7), softcap: Some(3.0), ..plain },
                AttentionRule { window: Some(129), ..plain },
                AttentionRule { window: Some(1000), ..plain },
            ] {
                let out = causal(&q, &k, &v, shape, &rule).mapv(f64::from);
                let worst = largest(&(out - oracle((&q, &k, &v), shape, &rule)));
                assert!(worst < 2e-6, "seq_len {seq_len}, {rule:?}: worst error {worst:e}");
            }
        }
    }
}
