//! Causal attention, one head and one band of queries at a time.
//!
//! A task holds `BAND × seq_len` scores, never `seq_len × seq_len`, and skips the keys after the
//! band: half of the arithmetic of a full product.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::rows::slice_mut;
use super::simd;
use super::tiles::tiles_mut;
use crate::attention_shape::AttentionShape;

/// Queries of one band: 128 × 4096 scores are 2 MiB.
const BAND: usize = 128;

/// softmax(q kᵀ / √d) v for every window and head; shapes were checked by the caller.
pub(crate) fn causal(
    q: &Array2<f32>,
    k: &Array2<f32>,
    v: &Array2<f32>,
    shape: AttentionShape,
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
) {
    let seq_len = k.nrows();
    let before = seq_len - q.nrows();
    let scale = 1.0 / (q.ncols() as f32).sqrt();
    let mut scratch = vec![0.0_f32; BAND.min(q.nrows()) * seq_len];
    for first in (0..q.nrows()).step_by(BAND) {
        let rows = BAND.min(q.nrows() - first);
        // Positions of the band's queries.
        let (start, end) = (before + first, before + first + rows);
        let band = &mut scratch[..rows * end];
        #[expect(clippy::expect_used, reason = "the band was cut to this shape just above")]
        let mut scores = ArrayViewMut2::from_shape((rows, end), band).expect("rows × end scores");
        general_mat_mul(
            scale,
            &q.slice(s![first..first + rows, ..]),
            &k.slice(s![..end, ..]).t(),
            0.0,
            &mut scores,
        );
        let mut sums = [0.0_f32; BAND];
        for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
            let (seen, future) = slice_mut(&mut row).split_at_mut(start + i + 1);
            sums[i] = simd::exp_sum(seen, simd::max(seen));
            future.fill(0.0);
        }
        let mut context = out.slice_mut(s![first..first + rows, ..]);
        general_mat_mul(1.0, &scores, &v.slice(s![..end, ..]), 0.0, &mut context);
        for (mut row, sum) in context.rows_mut().into_iter().zip(sums) {
            row.mapv_inplace(|x| x / sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::largest;

    /// The definition, in f64, token by token.
    fn oracle(q: &Array2<f32>, k: &Array2<f32>, v: &Array2<f32>, s: AttentionShape) -> Array2<f64> {
        Array2::from_shape_fn(q.dim(), |(t, c)| {
            let (window, position) = (t / s.seq_len * s.seq_len, t % s.seq_len);
            let (head, feature) = (c / s.head_dim, c % s.head_dim);
            let kv = head / (s.heads / s.kv_heads) * s.head_dim;
            let score = |j: usize| -> f64 {
                (0..s.head_dim)
                    .map(|d| {
                        f64::from(q[[t, head * s.head_dim + d]])
                            * f64::from(k[[window + j, kv + d]])
                    })
                    .sum::<f64>()
                    / (s.head_dim as f64).sqrt()
            };
            let weights: Vec<f64> = (0..=position).map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights
                .iter()
                .enumerate()
                .map(|(j, w)| w / sum * f64::from(v[[window + j, kv + feature]]))
                .sum()
        })
    }

    #[test]
    fn grouped_query_attention_matches_the_definition() {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 300.0 - 1.6;
        for seq_len in [1, 5, 130, 257] {
            let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 8, seq_len };
            let tokens = 2 * seq_len;
            let q = Array2::from_shape_fn((tokens, 32), |(i, j)| value(i * 32 + j));
            let k = Array2::from_shape_fn((tokens, 16), |(i, j)| value(11 + i * 16 + j));
            let v = Array2::from_shape_fn((tokens, 16), |(i, j)| value(17 + i * 16 + j));
            let out = causal(&q, &k, &v, shape).mapv(f64::from);
            let worst = largest(&(out - oracle(&q, &k, &v, shape)));
            assert!(worst < 2e-6, "seq_len {seq_len}: worst error {worst:e}");
        }
    }
}
