//! Linears whose rows several ranks have solved, each a shard of them.

use std::borrow::Cow;
use std::ops::Range;

use gptq_compute::{Device, Ranks, Tensor, share};
use gptq_quant::{Codes, Stored};
use half::f16;

use crate::error::Result;

/// Rows that stay together: what a task of the solver takes, on either device, so that a shard is
/// solved as the whole would be.
pub(crate) const SHARD_ROWS: usize = 64;

/// What rank 0 has of a solved linear: its own shard, and the others' as they came.
#[derive(Debug)]
pub(crate) struct RowShards {
    first: Stored,
    /// Codes and scales of each other rank.
    others: Vec<Vec<Vec<u32>>>,
    rows: usize,
}

impl RowShards {
    /// A linear of one shard.
    pub(crate) fn whole(stored: Stored) -> Self {
        Self { rows: stored.out_features, first: stored, others: Vec::new() }
    }

    /// Brings the shards of a linear of `rows` rows to rank 0; `None` on the others, which may have
    /// none.
    pub(crate) fn collect(ranks: &Ranks, own: Option<Stored>, rows: usize) -> Result<Option<Self>> {
        let (words, first) = match own {
            Some(stored) if !ranks.is_first() => (words(stored), None),
            first => (Vec::new(), first),
        };
        let all = ranks.collect(words)?;
        Ok(all.zip(first).map(|(all, first)| {
            let others = all.into_iter().skip(1).collect();
            Self { first, others, rows }
        }))
    }

    /// The linear.
    pub(crate) fn join(self) -> Stored {
        let Self { first, others, rows } = self;
        if others.is_empty() {
            return first;
        }
        let size = others.len() + 1;
        let mut shares: Vec<usize> =
            (0..size).map(|r| share(rows, SHARD_ROWS, r, size).len()).collect();
        // Ranks without rows come last, and their messages are empty.
        shares.retain(|&rows| rows > 0);
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for message in others {
            let mut parts = message.into_iter();
            codes.extend(parts.next());
            scales.extend(parts.next());
        }
        let Stored { in_features, groups, g_idx, .. } = first;
        let codes = match first.codes {
            Codes::Packed(words) => {
                codes.insert(0, words);
                Codes::Packed(beside(&codes, &shares))
            }
            Codes::Plain(mut all) => {
                for (words, rows) in codes.iter().zip(&shares[1..]) {
                    let bytes: &[u8] = bytemuck::cast_slice(words);
                    all.extend(&bytes[..rows * in_features]);
                }
                Codes::Plain(all)
            }
        };
        let halves = |(words, rows): (&Vec<u32>, &usize)| {
            let halves: &[f16] = bytemuck::cast_slice(words);
            halves[..rows * groups].to_vec()
        };
        let mut shards: Vec<Vec<f16>> = scales.iter().zip(&shares[1..]).map(halves).collect();
        shards.insert(0, first.scales);
        let scales = beside(&shards, &shares);
        Stored { out_features: rows, in_features, codes, scales, groups, g_idx }
    }
}

/// Codes and scales as they travel.
fn words(stored: Stored) -> Vec<Vec<u32>> {
    let codes = match stored.codes {
        Codes::Packed(words) => words,
        Codes::Plain(codes) => bytemuck::pod_collect_to_vec(&codes),
    };
    vec![codes, bytemuck::pod_collect_to_vec(&stored.scales)]
}

/// Matrices of as many columns as `columns` says, side by side.
fn beside<T: Copy>(parts: &[Vec<T>], columns: &[usize]) -> Vec<T> {
    let height = parts[0].len() / columns[0].max(1);
    let mut whole = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for row in 0..height {
        for (part, &n) in parts.iter().zip(columns) {
            whole.extend_from_slice(&part[row * n..(row + 1) * n]);
        }
    }
    whole
}

/// Rows `range` of a weight; the weight itself when that is all of them.
pub(crate) fn rows_of<'t>(
    device: &Device,
    weight: &'t Tensor,
    range: Range<usize>,
) -> Result<Cow<'t, Tensor>> {
    if range.len() == weight.rows() {
        return Ok(Cow::Borrowed(weight));
    }
    let rows: Vec<u32> = range.map(|row| row as u32).collect();
    Ok(Cow::Owned(device.select_rows(weight, &rows)?))
}

/// The ranks' numbers added up, in rank order; every rank has as many.
pub(crate) fn summed(ranks: &Ranks, numbers: Vec<f64>) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; numbers.len()];
    for part in exchanged(ranks, &numbers)? {
        for (sum, number) in sums.iter_mut().zip(part) {
            *sum += number;
        }
    }
    Ok(sums)
}

/// The largest of each of the ranks' numbers; every rank has as many.
pub(crate) fn largest(ranks: &Ranks, numbers: Vec<f64>) -> Result<Vec<f64>> {
    let mut most = numbers.clone();
    for part in exchanged(ranks, &numbers)? {
        for (most, number) in most.iter_mut().zip(part) {
            *most = most.max(number);
        }
    }
    Ok(most)
}

/// Every rank's numbers, in rank order.
pub(crate) fn exchanged(ranks: &Ranks, numbers: &[f64]) -> Result<Vec<Vec<f64>>> {
    let parts = ranks.exchange(bytemuck::pod_collect_to_vec(numbers))?;
    Ok(parts.iter().map(|words| bytemuck::pod_collect_to_vec(words)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(rows: std::ops::Range<usize>, packed: bool) -> Stored {
        let (n, groups) = (32, 2);
        let code = |row: usize, col: usize| (row * 7 + col) % 16;
        let codes = if packed {
            // Eight codes a word, words of one row under each other.
            let word = |group: usize, row: usize| {
                (0..8).fold(0, |w, i| w | (code(row, 8 * group + i) as u32) << (4 * i))
            };
            let all = (0..n / 8).flat_map(|g| rows.clone().map(move |row| (g, row)));
            Codes::Packed(all.map(|(g, row)| word(g, row)).collect())
        } else {
            let all = rows.clone().flat_map(|row| (0..n).map(move |col| code(row, col) as u8));
            Codes::Plain(all.collect())
        };
        let scales = (0..groups).flat_map(|g| rows.clone().map(move |row| (g, row)));
        let scales = scales.map(|(g, row)| f16::from_f32((g * 1000 + row) as f32)).collect();
        let out_features = rows.len();
        Stored { out_features, in_features: n, codes, scales, groups, g_idx: vec![0; n] }
    }

    #[test]
    fn shards_make_up_the_linear() {
        for (rows, size) in [(200, 2), (200, 3), (64, 2), (65, 4)] {
            for packed in [false, true] {
                let range = |rank| share(rows, SHARD_ROWS, rank, size);
                let others = (1..size).map(|rank| {
                    let range = range(rank);
                    if range.is_empty() { Vec::new() } else { words(stored(range, packed)) }
                });
                let shards =
                    RowShards { first: stored(range(0), packed), others: others.collect(), rows };
                let (whole, joined) = (stored(0..rows, packed), shards.join());
                assert_eq!(joined.out_features, rows);
                assert_eq!(joined.scales, whole.scales);
                match (joined.codes, whole.codes) {
                    (Codes::Plain(a), Codes::Plain(b)) => assert_eq!(a, b),
                    (Codes::Packed(a), Codes::Packed(b)) => assert_eq!(a, b),
                    _ => panic!("codes changed their form"),
                }
            }
        }
    }
}
