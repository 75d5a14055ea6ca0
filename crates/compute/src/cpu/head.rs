//! The language-model head: losses and divergences without holding all logits.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, s};
use rayon::prelude::*;

use super::simd;

/// Rows of logits held by one task: 32 × 49,152 values are 6 MiB.
const ROWS_PER_TASK: usize = 32;

/// −log softmax(hidden · headᵀ)[target], one value a row.
pub(crate) fn token_nll(hidden: &Array2<f32>, head: &Array2<f32>, targets: &[u32]) -> Vec<f32> {
    let chunks: Vec<Vec<f32>> = chunk_starts(targets.len())
        .map(|start| {
            let logits = logits(hidden, head, start);
            logits
                .rows()
                .into_iter()
                .zip(&targets[start..])
                .map(|(row, &target)| log_norm(row.as_slice()) - row[target as usize])
                .collect()
        })
        .collect();
    chunks.concat()
}

/// KL(p‖q) of the two distributions of every row.
pub(crate) fn token_kl(
    (p_hidden, p_head): (&Array2<f32>, &Array2<f32>),
    (q_hidden, q_head): (&Array2<f32>, &Array2<f32>),
) -> Vec<f32> {
    let chunks: Vec<Vec<f32>> = chunk_starts(p_hidden.nrows())
        .map(|start| {
            let (p, q) = (logits(p_hidden, p_head, start), logits(q_hidden, q_head, start));
            p.rows()
                .into_iter()
                .zip(q.rows())
                .map(|(p, q)| match (p.as_slice(), q.as_slice()) {
                    (Some(p), Some(q)) => {
                        simd::kl(p, simd::log_sum_exp(p), q, simd::log_sum_exp(q)) as f32
                    }
                    _ => f32::NAN,
                })
                .collect()
        })
        .collect();
    chunks.concat()
}

fn chunk_starts(rows: usize) -> impl IndexedParallelIterator<Item = usize> {
    (0..rows.div_ceil(ROWS_PER_TASK)).into_par_iter().map(|chunk| chunk * ROWS_PER_TASK)
}

/// Logits of up to `ROWS_PER_TASK` rows from `start`.
fn logits(hidden: &Array2<f32>, head: &Array2<f32>, start: usize) -> Array2<f32> {
    let end = (start + ROWS_PER_TASK).min(hidden.nrows());
    let mut out = Array2::zeros((end - start, head.nrows()));
    general_mat_mul(1.0, &hidden.slice(s![start..end, ..]), &head.t(), 0.0, &mut out);
    out
}

fn log_norm(row: Option<&[f32]>) -> f32 {
    row.map_or(f32::NAN, simd::log_sum_exp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_divergences_match_f64() {
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 500.0 - 1.0;
        let hidden = Array2::from_shape_fn((70, 12), |(i, j)| value(i * 12 + j));
        let other = Array2::from_shape_fn((70, 12), |(i, j)| value(5 + i * 12 + j));
        let head = Array2::from_shape_fn((101, 12), |(i, j)| value(9 + i * 12 + j));
        let targets: Vec<u32> = (0..70).map(|i| (i * 37 % 101) as u32).collect();
        let log_softmax = |h: &Array2<f32>| {
            let mut l = h.mapv(f64::from).dot(&head.mapv(f64::from).t());
            for mut row in l.rows_mut() {
                let norm = row.iter().map(|v| v.exp()).sum::<f64>().ln();
                row.mapv_inplace(|v| v - norm);
            }
            l
        };
        let (p, q) = (log_softmax(&hidden), log_softmax(&other));
        for (i, nll) in token_nll(&hidden, &head, &targets).iter().enumerate() {
            assert!((f64::from(*nll) + p[[i, targets[i] as usize]]).abs() < 1e-5);
        }
        for (i, kl) in token_kl((&hidden, &head), (&other, &head)).iter().enumerate() {
            let exact: f64 = p.row(i).iter().zip(q.row(i)).map(|(a, b)| a.exp() * (a - b)).sum();
            assert!((f64::from(*kl) - exact).abs() < 1e-5, "row {i}: {kl} {exact}");
        }
    }
}
