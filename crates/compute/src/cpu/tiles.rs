//! Cutting a matrix into rectangular tiles that threads may write at the same time.

use ndarray::{ArrayViewMut2, Axis};

/// One tile and the position of its first element.
pub(crate) struct Tile<'a, T> {
    pub(crate) row: usize,
    pub(crate) col: usize,
    pub(crate) view: ArrayViewMut2<'a, T>,
}

/// Cuts `matrix` into tiles of at most `rows` × `cols`, in row-major order of tiles.
pub(crate) fn tiles_mut<T>(
    matrix: ArrayViewMut2<'_, T>,
    rows: usize,
    cols: usize,
) -> Vec<Tile<'_, T>> {
    let mut tiles = Vec::new();
    let mut below = matrix;
    let mut row = 0;
    while below.nrows() > 0 {
        let height = rows.min(below.nrows());
        let (band, rest) = below.split_at(Axis(0), height);
        let mut right = band;
        let mut col = 0;
        while right.ncols() > 0 {
            let width = cols.min(right.ncols());
            let (view, rest) = right.split_at(Axis(1), width);
            tiles.push(Tile { row, col, view });
            col += width;
            right = rest;
        }
        row += height;
        below = rest;
    }
    tiles
}
