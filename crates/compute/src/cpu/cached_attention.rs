//! Attention of sequences that grow, over keys and values that are kept.
//!
//! A few new tokens read the cache row by row, for a product of matrices would first copy all of it;
//! a prompt goes through bands of scores like a window.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::attention::{one_head, weights};
use super::dots::dot_f32;
use super::rows::{slice, slice_mut};
use super::simd;
use super::tiles::tiles_mut;
use crate::attention_rule::AttentionRule;
use crate::kv_cache::{CacheShape, Span};

/// New tokens from which on products of matrices pay.
const MANY: usize = 8;

/// Keys and values, f32, each `[slots, kv_heads, capacity, head_dim]`: what a head reads lies together.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Cache {
    pub(crate) fn new(shape: CacheShape) -> Self {
        let count = shape.slots * shape.capacity * shape.kv_heads * shape.head_dim;
        Self { keys: vec![0.0; count], values: vec![0.0; count] }
    }

    /// As [`crate::Device::cached_attention`], which has checked everything.
    pub(crate) fn attend(
        &mut self,
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
        shape: CacheShape,
        spans: &[Span],
        rule: &AttentionRule,
    ) -> Array2<f32> {
        let mut first = 0;
        for span in spans {
            let rows = first..first + span.len;
            append(&mut self.keys, k.slice(s![rows.clone(), ..]), shape, span);
            append(&mut self.values, v.slice(s![rows, ..]), shape, span);
            first += span.len;
        }
        let mut out = Array2::zeros(q.dim());
        let mut below = out.view_mut();
        let mut tasks = Vec::new();
        let mut first = 0;
        for span in spans {
            let (band, rest) = below.split_at(ndarray::Axis(0), span.len);
            below = rest;
            let tiles = tiles_mut(band, span.len.max(1), shape.head_dim);
            tasks.extend(tiles.into_iter().map(|tile| (span, first, tile)));
            first += span.len;
        }
        tasks.into_par_iter().for_each(|(span, first, tile)| {
            let head = tile.col / shape.head_dim;
            let kept = shape.kept(span.slot, head / (shape.heads / shape.kv_heads));
            let end = span.start + span.len;
            let seen = kept.start..kept.start + end * shape.head_dim;
            let (keys, values) = (&self.keys[seen.clone()], &self.values[seen]);
            let q = q.slice(s![first..first + span.len, tile.col..tile.col + shape.head_dim]);
            if span.len < MANY {
                few(q, (keys, values), span.start, tile.view, rule);
            } else {
                one_head(q, matrix(keys, shape), matrix(values, shape), tile.view, rule);
            }
        });
        out
    }
}

impl CacheShape {
    /// Where a head of a slot is.
    fn kept(&self, slot: usize, kv_head: usize) -> Range<usize> {
        let size = self.capacity * self.head_dim;
        let at = (slot * self.kv_heads + kv_head) * size;
        at..at + size
    }
}

fn matrix(values: &[f32], shape: CacheShape) -> ArrayView2<'_, f32> {
    #[expect(clippy::expect_used, reason = "the values were cut to whole tokens by the caller")]
    ArrayView2::from_shape((values.len() / shape.head_dim, shape.head_dim), values)
        .expect("whole tokens of a head")
}

/// Puts a span's rows into their places, head by head.
fn append(to: &mut [f32], rows: ArrayView2<'_, f32>, shape: CacheShape, span: &Span) {
    for (position, row) in (span.start..).zip(rows.rows()) {
        for (head, values) in slice(row).chunks_exact(shape.head_dim).enumerate() {
            let at = shape.kept(span.slot, head).start + position * shape.head_dim;
            to[at..at + shape.head_dim].copy_from_slice(values);
        }
    }
}

/// Attention of one head's new tokens, `q` and `out` `[tokens, head_dim]`, the first at `start`.
fn few(
    q: ArrayView2<'_, f32>,
    (keys, values): (&[f32], &[f32]),
    start: usize,
    mut out: ArrayViewMut2<'_, f32>,
    rule: &AttentionRule,
) {
    let head_dim = q.ncols();
    let mut scores = Vec::with_capacity(keys.len() / head_dim);
    for (i, (q, mut out)) in q.rows().into_iter().zip(out.rows_mut()).enumerate() {
        let position = start + i;
        let seen = rule.first_key(position) * head_dim..(position + 1) * head_dim;
        scores.clear();
        let keys = keys[seen.clone()].chunks_exact(head_dim);
        scores.extend(keys.map(|key| rule.scale * dot_f32(key, slice(q))));
        let sum = weights(&mut scores, rule);
        let out = slice_mut(&mut out);
        simd::weighted_sum(&scores, &values[seen], out);
        out.iter_mut().for_each(|value| *value /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention_shape::AttentionShape;
    use crate::cpu::attention::causal;
    use crate::testing::largest;

    const HEADS: usize = 4;
    const KV_HEADS: usize = 2;
    const HEAD_DIM: usize = 12;

    fn noise(rows: usize, heads: usize, seed: usize) -> Array2<f32> {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 300.0 - 1.6;
        Array2::from_shape_fn((rows, heads * HEAD_DIM), |(i, j)| value(seed + i * 97 + j))
    }

    /// Two sequences that grow by pieces of any length have what whole windows of them have.
    #[test]
    fn growing_sequences_have_what_windows_have() {
        let plain = AttentionRule::llama(HEAD_DIM);
        grow_by_pieces(&plain);
        grow_by_pieces(&AttentionRule { scale: 0.2, softcap: Some(2.0), window: Some(20) });
        grow_by_pieces(&AttentionRule { window: Some(3), ..plain });
    }

    fn grow_by_pieces(rule: &AttentionRule) {
        let shape = CacheShape {
            slots: 3,
            capacity: 170,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
        };
        let lengths = [161, 23];
        let operands = |sequence: usize| {
            let rows = lengths[sequence];
            [(HEADS, 5), (KV_HEADS, 11), (KV_HEADS, 17)]
                .map(|(heads, seed)| noise(rows, heads, seed + 1000 * sequence))
        };
        let all = [operands(0), operands(1)];
        let mut cache = Cache::new(shape);
        let mut found = [Vec::new(), Vec::new()];
        // Alone, together, one by one, few and many; slot 0 is the second sequence's.
        let pieces: [[usize; 2]; 6] = [[9, 0], [1, 20], [130, 1], [1, 1], [3, 0], [17, 1]];
        let mut at = [0, 0];
        for piece in pieces {
            let mut spans = Vec::new();
            let mut rows: [Vec<_>; 3] = [const { Vec::new() }; 3];
            for sequence in 0..2 {
                let (start, len) = (at[sequence], piece[sequence]);
                spans.push(Span { slot: 2 - 2 * sequence, start, len });
                for (rows, operand) in rows.iter_mut().zip(&all[sequence]) {
                    rows.push(operand.slice(s![start..start + len, ..]));
                }
                at[sequence] += len;
            }
            let [q, k, v] = rows.map(|rows| ndarray::concatenate(ndarray::Axis(0), &rows).unwrap());
            let out = cache.attend(&q, &k, &v, shape, &spans, rule);
            let (first, second) = out.view().split_at(ndarray::Axis(0), piece[0]);
            for (found, rows) in found.iter_mut().zip([first, second]) {
                found.extend(rows.iter().copied());
            }
        }
        assert_eq!(at, lengths);
        for (sequence, found) in found.into_iter().enumerate() {
            let [q, k, v] = &all[sequence];
            let shape = AttentionShape {
                heads: HEADS,
                kv_heads: KV_HEADS,
                head_dim: HEAD_DIM,
                seq_len: lengths[sequence],
            };
            let found = Array2::from_shape_vec(q.dim(), found).unwrap();
            let worst = largest(&(found - causal(q, k, v, shape, rule)).mapv(f64::from));
            assert!(worst < 3e-6, "{rule:?}, sequence {sequence}: worst error {worst:e}");
        }
    }
}
