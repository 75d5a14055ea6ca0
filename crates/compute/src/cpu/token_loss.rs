//! The language-model head: losses and divergences without holding all logits.

use ndarray::{Array2, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::block_parts;
use super::matmul::matmul_nt;
use super::rows::{slice, slice_mut};
use super::simd;

/// Rows of logits held at a time, by all threads together: 512 × 49,152 values are 100 MiB. A
/// product packs the whole head for each of its bands, so low ones lose: 32 rows took 1.6 times as
/// long.
const BAND: usize = 512;

/// −log softmax(hidden · headᵀ)[target], one value a row.
pub(crate) fn token_nll(
    hidden: &Array2<f32>,
    head: &Array2<f32>,
    targets: &[u32],
    softcap: Option<f32>,
) -> Vec<f32> {
    let mut room = Logits::new(hidden, head, softcap);
    let mut losses = Vec::with_capacity(targets.len());
    for (band, targets) in targets.chunks(BAND).enumerate() {
        let logits = room.band(band, hidden, head);
        losses.par_extend(targets.par_iter().enumerate().map(|(i, &target)| {
            let row = slice(logits.row(i));
            simd::log_sum_exp(row) - row[target as usize]
        }));
    }
    losses
}

/// KL(p‖q) of the two distributions of every row.
pub(crate) fn token_kl(
    (p_hidden, p_head): (&Array2<f32>, &Array2<f32>),
    (q_hidden, q_head): (&Array2<f32>, &Array2<f32>),
    softcap: Option<f32>,
) -> Vec<f32> {
    let mut p_room = Logits::new(p_hidden, p_head, softcap);
    let mut q_room = Logits::new(q_hidden, q_head, softcap);
    let mut divergences = Vec::with_capacity(p_hidden.nrows());
    for band in 0..p_hidden.nrows().div_ceil(BAND) {
        let p = p_room.band(band, p_hidden, p_head);
        let q = q_room.band(band, q_hidden, q_head);
        divergences.par_extend((0..p.nrows()).into_par_iter().map(|i| {
            let (p, q) = (slice(p.row(i)), slice(q.row(i)));
            simd::kl(p, simd::log_sum_exp(p), q, simd::log_sum_exp(q)) as f32
        }));
    }
    divergences
}

/// KL(p‖q) of every row, and the gradient of scale · Σ KL by the hidden states of q: with softmaxes p and q,
/// scale · (q − p) · q_head, each logit's part times what its cap lets through.
pub(crate) fn kl_backward(
    (p_hidden, p_head): (&Array2<f32>, &Array2<f32>),
    (q_hidden, q_head): (&Array2<f32>, &Array2<f32>),
    softcap: Option<f32>,
    scale: f32,
) -> (Vec<f32>, Array2<f32>) {
    let mut p_room = Logits::new(p_hidden, p_head, softcap);
    let mut q_room = Logits::new(q_hidden, q_head, softcap);
    let mut divergences = Vec::with_capacity(p_hidden.nrows());
    let mut dx = Array2::zeros(q_hidden.dim());
    for (band, mut dx) in dx.axis_chunks_iter_mut(Axis(0), BAND).enumerate() {
        let p = p_room.band(band, p_hidden, p_head);
        q_room.band(band, q_hidden, q_head);
        let mut q = q_room.room.slice_mut(s![..p.nrows(), ..]);
        let mut rows: Vec<_> = q.axis_iter_mut(Axis(0)).collect();
        divergences.par_extend(rows.par_iter_mut().enumerate().map(|(i, q)| {
            let (p, q) = (slice(p.row(i)), slice_mut(q));
            let (p_norm, q_norm) = (simd::log_sum_exp(p), simd::log_sum_exp(q));
            let divergence = simd::kl(p, p_norm, q, q_norm) as f32;
            for (q, p) in q.iter_mut().zip(p) {
                let slope = softcap.map_or(1.0, |cap| 1.0 - (*q / cap) * (*q / cap));
                *q = scale * slope * ((*q - q_norm).exp() - (p - p_norm).exp());
            }
            divergence
        }));
        matmul_nt(q.view(), q_head.t(), 0.0, dx.view_mut());
    }
    (divergences, dx)
}

/// Room for one band of logits, used again for the next.
struct Logits {
    room: Array2<f32>,
    softcap: Option<f32>,
}

impl Logits {
    fn new(hidden: &Array2<f32>, head: &Array2<f32>, softcap: Option<f32>) -> Self {
        Self { room: Array2::zeros((BAND.min(hidden.nrows()), head.nrows())), softcap }
    }

    /// Logits of the band's rows.
    fn band(
        &mut self,
        band: usize,
        hidden: &Array2<f32>,
        head: &Array2<f32>,
    ) -> ArrayView2<'_, f32> {
        let start = band * BAND;
        let end = (start + BAND).min(hidden.nrows());
        let rows = hidden.slice(s![start..end, ..]);
        let mut logits = self.room.slice_mut(s![..end - start, ..]);
        matmul_nt(rows, head.view(), 0.0, logits.view_mut());
        if let Some(cap) = self.softcap {
            block_parts::softcap(logits, cap);
        }
        self.room.slice(s![..end - start, ..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_divergences_match_f64() {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 500.0 - 1.0;
        // A whole band and a ragged one.
        let rows = BAND + 70;
        let hidden = Array2::from_shape_fn((rows, 12), |(i, j)| value(i * 12 + j));
        let other = Array2::from_shape_fn((rows, 12), |(i, j)| value(5 + i * 12 + j));
        let head = Array2::from_shape_fn((101, 12), |(i, j)| value(9 + i * 12 + j));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 37 % 101) as u32).collect();
        let column = |v: Vec<f32>| Array2::from_shape_vec((rows, 1), v).unwrap().mapv(f64::from);
        for softcap in [None, Some(2.0)] {
            let log_softmax = |h: &Array2<f32>| {
                let mut l = h.mapv(f64::from).dot(&head.mapv(f64::from).t());
                if let Some(cap) = softcap.map(f64::from) {
                    l.mapv_inplace(|v| (v / cap).tanh() * cap);
                }
                for mut row in l.rows_mut() {
                    let norm = row.iter().map(|v| v.exp()).sum::<f64>().ln();
                    row.mapv_inplace(|v| v - norm);
                }
                l
            };
            let (p, q) = (log_softmax(&hidden), log_softmax(&other));
            let losses = column(token_nll(&hidden, &head, &targets, softcap));
            let found = column(token_kl((&hidden, &head), (&other, &head), softcap));
            for i in 0..rows {
                let nll = losses[[i, 0]];
                assert!((nll + p[[i, targets[i] as usize]]).abs() < 1e-5, "{softcap:?}, {i}");
                let kl: f64 = p.row(i).iter().zip(q.row(i)).map(|(a, b)| a.exp() * (a - b)).sum();
                let got = found[[i, 0]];
                assert!((got - kl).abs() < 1e-5, "{softcap:?}, row {i}: {got} {kl}");
            }
        }
    }
}
