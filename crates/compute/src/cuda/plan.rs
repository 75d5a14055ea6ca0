//! How the columns of a solve are cut into blocks and windows.
//!
//! A *block* is solved by one kernel. A *window* is a run of blocks whose errors reach the near
//! columns, which the window's own blocks and groups read, after each block, and the far columns in
//! one product when the window ends. Counted for 28672 rows: after each block alone, a product of
//! depth 128 does 64 operations a byte of W, little above what the card balances; at depth 1024 it
//! is bound by arithmetic alone, and W's far columns are read and written an eighth as often.

use std::ops::Range;

/// Most columns of a block: AutoGPTQ's value, and part of its numerics.
pub(super) const BLOCK: usize = 128;
/// Columns of a window before its errors are sent to the far columns.
const WINDOW: usize = 1024;

/// A run of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// The blocks, in order; they are adjacent.
    pub(super) blocks: Vec<Range<usize>>,
    /// Columns before this one are near: every block of the window updates them at once.
    pub(super) near_end: usize,
}

impl Window {
    /// First column of the window.
    pub(super) fn start(&self) -> usize {
        self.blocks.first().map_or(0, |b| b.start)
    }

    /// End of the last block.
    pub(super) fn end(&self) -> usize {
        self.blocks.last().map_or(0, |b| b.end)
    }
}

/// Windows over `n` columns. With `fresh`, a block never reaches beyond the group it starts in, so
/// that every group's scale sees all corrections of the columns before the group.
pub(super) fn windows(n: usize, group: Option<usize>, fresh: bool) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut at = 0;
    while at < n {
        let (start, mut blocks) = (at, Vec::new());
        while at < n && at - start < WINDOW {
            let end = block_end(at, n, group.filter(|_| fresh));
            blocks.push(at..end);
            at = end;
        }
        // Groups that start in the window are read to their end.
        let near_end = group.map_or(at, |g| at.next_multiple_of(g)).min(n);
        windows.push(Window { blocks, near_end });
    }
    windows
}

fn block_end(start: usize, n: usize, group: Option<usize>) -> usize {
    let end = (start + BLOCK).min(n);
    group.map_or(end, |g| end.min((start / g + 1) * g))
}

/// Most columns that the blocks of one window have together.
pub(super) fn widest(windows: &[Window]) -> usize {
    windows.iter().map(|w| w.end() - w.start()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_columns_once() {
        for n in [1, 127, 128, 160, 1024, 1025, 8192] {
            for group in [None, Some(1), Some(32), Some(100), Some(128), Some(192), Some(5000)] {
                for fresh in [false, true] {
                    let windows = windows(n, group, fresh);
                    let mut at = 0;
                    for block in windows.iter().flat_map(|w| &w.blocks) {
                        assert_eq!(block.start, at);
                        assert!(block.len() <= BLOCK && !block.is_empty());
                        at = block.end;
                    }
                    assert_eq!(at, n);
                    assert!(widest(&windows) < WINDOW + BLOCK);
                }
            }
        }
    }

    #[test]
    fn groups_of_a_window_lie_within_its_near_columns() {
        for group in [32, 96, 128, 200, 1024, 3000] {
            for window in windows(8192, Some(group), false) {
                let last = (window.end() - 1) / group;
                assert_eq!(window.near_end, ((last + 1) * group).min(8192));
            }
        }
    }

    #[test]
    fn fresh_blocks_stay_within_a_group() {
        for window in windows(1000, Some(96), true) {
            for block in window.blocks {
                assert_eq!(block.start / 96, (block.end - 1) / 96);
            }
        }
        assert_eq!(windows(300, Some(192), true)[0].blocks, [0..128, 128..192, 192..300]);
        assert_eq!(windows(300, Some(192), false)[0].blocks, [0..128, 128..256, 256..300]);
    }
}
