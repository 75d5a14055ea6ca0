//! Gradients of causal attention, one head and one band of queries at a time.
//!
//! With P the weights, dP = dout · vᵀ and δ the products of each query's dout and out, scores have the gradient
//! P · (dP − δ): what a weight would gain, less what all of the row lose for it.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use rayon::prelude::*;

use super::attention::weights;
use super::rows::slice_mut;
use super::simd;
use super::tiles::tiles_mut;
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;

/// Queries of one band, as in `attention`.
const BAND: usize = 128;

/// What the forward read and made, and the gradient by what it made.
pub(crate) struct Operands<'a> {
    pub(crate) q: &'a Array2<f32>,
    pub(crate) k: &'a Array2<f32>,
    pub(crate) v: &'a Array2<f32>,
    pub(crate) out: &'a Array2<f32>,
    pub(crate) dout: &'a Array2<f32>,
}

/// The same of one head over one window.
struct Head<'a> {
    q: ArrayView2<'a, f32>,
    k: ArrayView2<'a, f32>,
    v: ArrayView2<'a, f32>,
    out: ArrayView2<'a, f32>,
    dout: ArrayView2<'a, f32>,
}

/// Gradients by q, k and v; the caller has checked shapes and rule.
pub(crate) fn causal(
    of: &Operands<'_>,
    shape: AttentionShape,
    rule: &AttentionRule,
) -> [Array2<f32>; 3] {
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    let together = heads / kv_heads;
    let mut dq = Array2::zeros(of.q.dim());
    let [mut dk, mut dv] = [of.k, of.v].map(|x| Array2::zeros(x.dim()));
    let queries = tiles_mut(dq.view_mut(), seq_len, together * head_dim);
    let keys = tiles_mut(dk.view_mut(), seq_len, head_dim);
    let values = tiles_mut(dv.view_mut(), seq_len, head_dim);
    // A key head's gradients are sums over its query heads, in their order, by one task.
    let tasks: Vec<_> = queries.into_iter().zip(keys).zip(values).collect();
    tasks.into_par_iter().for_each(|((mut dq, mut dk), mut dv)| {
        let window = dk.row..dk.row + seq_len;
        for head in 0..together {
            let inside = head * head_dim..(head + 1) * head_dim;
            let columns = dq.col + inside.start..dq.col + inside.end;
            let head = Head {
                q: of.q.slice(s![window.clone(), columns.clone()]),
                k: of.k.slice(s![window.clone(), dk.col..dk.col + head_dim]),
                v: of.v.slice(s![window.clone(), dk.col..dk.col + head_dim]),
                out: of.out.slice(s![window.clone(), columns.clone()]),
                dout: of.dout.slice(s![window.clone(), columns]),
            };
            let dq = dq.view.slice_mut(s![.., inside]);
            one_head(&head, (dq, dk.view.view_mut(), dv.view.view_mut()), rule);
        }
    });
    [dq, dk, dv]
}

/// Writes dq, and adds to dk and dv.
fn one_head(
    head: &Head<'_>,
    (mut dq, mut dk, mut dv): (
        ArrayViewMut2<'_, f32>,
        ArrayViewMut2<'_, f32>,
        ArrayViewMut2<'_, f32>,
    ),
    rule: &AttentionRule,
) {
    let seq_len = head.k.nrows();
    for first in (0..seq_len).step_by(BAND) {
        let end = (first + BAND).min(seq_len);
        let oldest = rule.first_key(first);
        let (queries, keys) = (s![first..end, ..], s![oldest..end, ..]);
        let (q, dout) = (head.q.slice(queries), head.dout.slice(queries));
        let (k, v) = (head.k.slice(keys), head.v.slice(keys));
        let mut p = Array2::zeros((end - first, end - oldest));
        general_mat_mul(rule.scale, &q, &k.t(), 0.0, &mut p);
        let slopes = normalize(&mut p, (first, oldest), rule);
        general_mat_mul(1.0, &p.t(), &dout, 1.0, &mut dv.slice_mut(keys));

        let mut ds = Array2::zeros(p.dim());
        general_mat_mul(1.0, &dout, &v.t(), 0.0, &mut ds);
        for (i, (mut ds, p)) in ds.rows_mut().into_iter().zip(p.rows()).enumerate() {
            let products = dout.row(i).into_iter().zip(head.out.row(first + i));
            let delta = products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() as f32;
            ds.zip_mut_with(&p, |ds, p| *ds = p * (*ds - delta));
        }
        if let Some(slopes) = slopes {
            ds *= &slopes;
        }
        general_mat_mul(rule.scale, &ds, &k, 0.0, &mut dq.slice_mut(queries));
        general_mat_mul(rule.scale, &ds.t(), &q, 1.0, &mut dk.slice_mut(keys));
    }
}

/// Turns scaled products of queries from `first` on with keys from `oldest` on into weights, 0 where a query does
/// not see a key; under a cap, how much of a change each lets through as well.
fn normalize(
    scores: &mut Array2<f32>,
    (first, oldest): (usize, usize),
    rule: &AttentionRule,
) -> Option<Array2<f32>> {
    let slopes = rule.softcap.map(|cap| {
        scores.rows_mut().into_iter().for_each(|mut row| simd::softcap(slice_mut(&mut row), cap));
        scores.mapv(|score| 1.0 - (score / cap) * (score / cap))
    });
    let capped = AttentionRule { softcap: None, ..*rule };
    for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
        let (past, future) = slice_mut(&mut row).split_at_mut(first + i + 1 - oldest);
        let (forgotten, seen) = past.split_at_mut(rule.first_key(first + i) - oldest);
        let sum = weights(seen, &capped);
        seen.iter_mut().for_each(|weight| *weight /= sum);
        forgotten.fill(0.0);
        future.fill(0.0);
    }
    slopes
}
