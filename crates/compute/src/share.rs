//! How rows or windows are dealt out to ranks.

use std::ops::Range;

/// The part of `total` rows, windows or the like that falls to `rank` of `size`: neighboring ones
/// in whole units, the first ranks having one unit more where they do not divide evenly.
pub fn share(total: usize, unit: usize, rank: usize, size: usize) -> Range<usize> {
    let units = total.div_ceil(unit.max(1));
    let start = |rank: usize| (units / size * rank + (units % size).min(rank)) * unit;
    start(rank).min(total)..start(rank + 1).min(total)
}
