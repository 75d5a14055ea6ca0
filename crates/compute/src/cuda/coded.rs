//! Weights that stay on the card as their file has them, in the order in which tensor cores take them.
//!
//! `kernels/coded.cuh` tells the order. Columns stand side by side by group, so that one scale holds for
//! whole sub-blocks, and a token's values are brought into the same order before they are multiplied.

use std::sync::Arc;

use cudarc::driver::{DeviceRepr, PushKernelArg};
use half::f16;
use rayon::prelude::*;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::dense::int;
use super::error::StageContext;
use super::matrix::Matrix;
use super::ordered::{CELL_WORDS, Ordered, per_place};
use super::shares::slots;
use super::transfer::address;
use crate::error::{Error, Result};
use crate::resident::CodedMatrix;

const STAGE: &str = "keeping a weight";
const GATHER: &str = "gather_columns";
/// As in `coded.cuh`: rows of a tile, columns of a sub-block.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const SUB: usize = 32;
/// Tokens of a launch: a grid's second side is no longer.
const MOST_ROWS: usize = 65_535;
/// Bytes that a thread copies at a time.
const VECTOR: usize = 16;

/// A weight `[rows, cols]` on a card.
#[derive(Debug)]
pub(crate) struct Coded {
    cuda: Arc<Cuda>,
    bits: u8,
    rows: usize,
    cols: usize,
    /// Steps of a row tile.
    steps: usize,
    tiles: Buffer<u32>,
    cells: Buffer<u8>,
    grid: Grid,
    order: Order,
}

/// What codes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    /// Sub-blocks of a cell.
    pub(super) every: usize,
    /// Vectors of 16 bytes that the cells of a step are.
    pub(super) tail: usize,
    /// Whether zeros are among them, or else the code that means 0.
    pub(super) zeros: bool,
    pub(super) zero: u8,
}

/// Which column of a token stands at each place of a weight's row, −1 for none.
#[derive(Debug)]
struct Order {
    /// `None` where every column stands in its own place.
    places: Option<(Vec<i32>, Buffer<i32>)>,
}

/// Sub-blocks of a step, as in `coded.cuh`.
pub(super) fn subs(bits: u8) -> usize {
    match bits {
        2 | 3 => 8,
        4 | 8 => 4,
        _ => 2,
    }
}

/// Words that a lane has of a step.
fn lane_words(bits: u8) -> usize {
    subs(bits) * usize::from(bits) / 2
}

/// Words of the tiles of so many rows and steps.
fn tile_words(bits: u8, rows: usize, steps: usize) -> usize {
    rows.div_ceil(TILE_ROWS) * steps * lane_words(bits) * 32
}

/// Bytes of a step of a row tile: of codes, and of cells of so many vectors.
pub(super) fn step_bytes(bits: u8, tail: usize) -> [usize; 2] {
    [lane_words(bits) * 32 * size_of::<u32>(), tail * VECTOR]
}

/// Bytes of the cells of so many rows and steps, `tail` vectors each.
fn cell_bytes(rows: usize, steps: usize, tail: usize) -> usize {
    rows.div_ceil(TILE_ROWS) * steps * tail * VECTOR
}

/// Vectors of a step's cells: of scales, and of zeros where these differ.
fn cell_vectors(bits: u8, every: usize, zeros: bool) -> usize {
    subs(bits) / every * if zeros { 3 } else { 2 }
}

/// Sub-blocks of a cell, of groups of `run`.
fn sub_blocks_of_cell(run: usize) -> usize {
    [4, 2].into_iter().find(|n| run.is_multiple_of(*n)).unwrap_or(1)
}

/// Bytes that a weight takes on a card: symmetric codes in groups of so many columns or of all, or with 16
/// bits fp16 values. The order of its columns, four bytes each after act-order, is not counted.
pub(crate) fn kept_bytes(bits: u8, (rows, cols): (usize, usize), group: Option<usize>) -> usize {
    let size = group.unwrap_or(cols).min(cols);
    // Groups that do not fill sub-blocks are filled up.
    let columns = match size.is_multiple_of(SUB) {
        true => cols,
        false => cols / size * size.next_multiple_of(SUB) + cols % size,
    };
    let steps = columns.div_ceil(subs(bits) * SUB);
    let every = sub_blocks_of_cell(if size.is_multiple_of(SUB) { size / SUB } else { 1 });
    let tail = if bits < 16 { cell_vectors(bits, every, false) } else { 0 };
    tile_words(bits, rows, steps) * size_of::<u32>() + cell_bytes(rows, steps, tail)
}

/// The columns of groups side by side, and the group of every run of sub-blocks.
struct Grouping {
    places: Vec<i32>,
    /// Sub-blocks of a run.
    run: usize,
    group_of_run: Vec<u32>,
}

/// Whole sub-blocks to every group: as the groups are where all but the last have the same number of whole
/// ones, otherwise filled up one by one.
fn by_group(group_of: &[u32], groups: usize) -> Grouping {
    let mut members = vec![Vec::new(); groups];
    for (column, &group) in (0..).zip(group_of) {
        members[group as usize].push(column);
    }
    let used: Vec<_> = (0..).zip(members).filter(|(_, columns)| !columns.is_empty()).collect();
    let size = used.first().map_or(0, |(_, columns): &(u32, Vec<i32>)| columns.len());
    let (last, others) = match used.split_last() {
        Some((last, others)) => (last.1.len(), others),
        None => (0, &used[..]),
    };
    let even = size.is_multiple_of(SUB)
        && last <= size
        && others.iter().all(|(_, columns)| columns.len() == size);
    let (mut places, mut group_of_run) = (Vec::new(), Vec::new());
    let run = if even { size / SUB } else { 1 };
    for (group, columns) in used {
        let blocks = columns.len().div_ceil(SUB);
        places.extend(columns);
        places.resize(places.len().next_multiple_of(SUB), -1);
        group_of_run.extend(std::iter::repeat_n(group, if even { 1 } else { blocks }));
    }
    Grouping { places, run, group_of_run }
}

impl Grouping {
    /// The group of every cell of `every` sub-blocks; beyond the last column any.
    fn of_cells(&self, count: usize, every: usize) -> Vec<u32> {
        let last = self.group_of_run.len().saturating_sub(1);
        let group = |cell: usize| {
            self.group_of_run.get((cell * every / self.run.max(1)).min(last)).copied().unwrap_or(0)
        };
        (0..count).map(group).collect()
    }
}

impl Coded {
    /// A quantized weight; the caller has checked that its parts fit one another.
    pub(crate) fn quantized(cuda: &Arc<Cuda>, matrix: &CodedMatrix<'_>) -> Result<Self> {
        let &CodedMatrix { bits, rows, cols, codes, zeros, scales, group_of } = matrix;
        let grouping = by_group(group_of, zeros.len() / rows);
        let every = sub_blocks_of_cell(grouping.run);
        let zero = zeros.first().copied().unwrap_or_default();
        let differ = zeros.iter().any(|&z| z != zero);
        let count = subs(bits) / every;
        let tail = cell_vectors(bits, every, differ);
        let steps = grouping.places.len().div_ceil(subs(bits) * SUB);
        // Step by step: scales, then zeros.
        let groups = grouping.of_cells(steps * count, every);
        let mut cells = vec![0_u8; cell_bytes(rows, steps, tail)];
        let of_tile = cells.par_chunks_mut((steps * tail * VECTOR).max(1));
        of_tile.enumerate().for_each(|(tile, bytes)| {
            let rows_here = tile * TILE_ROWS..rows.min((tile + 1) * TILE_ROWS);
            let of_step = bytes.chunks_mut(tail * VECTOR);
            for (cells, groups) in of_step.zip(groups.chunks(count)) {
                let (to_scales, to_zeros) = cells.split_at_mut(count * TILE_ROWS * 2);
                for (i, &group) in groups.iter().enumerate() {
                    let from = group as usize * rows;
                    let here = from + rows_here.start..from + rows_here.end;
                    for (row, at) in here.enumerate() {
                        let to = i * TILE_ROWS + row % 8 * 2 + row / 8;
                        to_scales[2 * to..][..2].copy_from_slice(&scales[at].to_le_bytes());
                        if differ {
                            to_zeros[to] = zeros[at];
                        }
                    }
                }
            }
        });
        let order = Order::new(cuda, grouping.places, subs(bits) * SUB)?;
        let codes = cuda.copied(STAGE, codes)?;
        let grid = Grid { every, tail, zeros: differ, zero };
        let cells = (grid, cuda.copied(STAGE, &cells)?);
        Self::tiled(cuda, bits, (rows, cols), cells, order, &codes)
    }

    /// A weight in fp16.
    pub(crate) fn dense(matrix: &Matrix) -> Result<Self> {
        let (shape, cuda) = (matrix.shape(), matrix.cuda());
        let Values::F16(values) = matrix.values() else {
            return Err(Error::WrongType { op: STAGE, needs: "f16" });
        };
        let grid = Grid { every: 1, tail: 0, zeros: false, zero: 0 };
        let cells = (grid, cuda.zeros(STAGE, 1)?);
        Self::tiled(cuda, 16, shape, cells, Order { places: None }, values)
    }

    fn tiled<T: DeviceRepr>(
        cuda: &Arc<Cuda>,
        bits: u8,
        (rows, cols): (usize, usize),
        (grid, cells): (Grid, Buffer<u8>),
        order: Order,
        values: &Buffer<T>,
    ) -> Result<Self> {
        let padded = order.len().unwrap_or(cols).next_multiple_of(subs(bits) * SUB);
        let (steps, row_tiles) = (padded / (subs(bits) * SUB), rows.div_ceil(TILE_ROWS));
        let words = tile_words(bits, rows, steps);
        let mut tiles = cuda.uninit::<u32>(STAGE, words)?;
        let function = cuda.kernel("coded_tiles.cu", tiles_name(bits))?;
        let places = order.address(cuda);
        let sides = [rows, cols, steps, row_tiles];
        let sides: Vec<i32> = sides.into_iter().map(int).collect::<Result<_>>()?;
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(values.slice()).arg(&places).arg(tiles.make_mut()?);
        for side in &sides {
            launch.arg(side);
        }
        // SAFETY: the arguments are the kernel's: values hold rows × cols, places as many columns of the
        // weight as the tiles have, or are null, and the tiles' words were counted above.
        unsafe { launch.launch(cuda.spread(words)) }.stage(STAGE)?;
        Ok(Self { cuda: Arc::clone(cuda), bits, rows, cols, steps, tiles, cells, grid, order })
    }

    /// The same weight in memory of its own.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let cuda = &self.cuda;
        let places = match &self.order.places {
            Some((places, there)) => Some((places.clone(), duplicate(cuda, there)?)),
            None => None,
        };
        let (tiles, cells) = (duplicate(cuda, &self.tiles)?, duplicate(cuda, &self.cells)?);
        let (cuda, order) = (Arc::clone(cuda), Order { places });
        Ok(Self { cuda, tiles, cells, order, ..*self })
    }

    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bits of a value.
    pub(super) fn bits(&self) -> u8 {
        self.bits
    }

    /// Steps of a row tile.
    pub(super) fn steps(&self) -> usize {
        self.steps
    }

    /// Columns of a token in this weight's order.
    pub(super) fn padded(&self) -> usize {
        self.steps * subs(self.bits) * SUB
    }

    /// What its codes mean.
    pub(super) fn grid(&self) -> Grid {
        self.grid
    }

    /// Addresses of tiles and cells.
    pub(super) fn addresses(&self) -> [u64; 2] {
        let stream = self.cuda.stream();
        [address(self.tiles.slice(), stream), address(self.cells.slice(), stream)]
    }

    /// Whether tokens in the order of one are in that of the other, and the kernels can take both at once.
    pub(crate) fn goes_with(&self, other: &Self) -> bool {
        let layout = |weight: &Self| (weight.bits, weight.cols, weight.steps, weight.grid.every);
        layout(self) == layout(other) && self.order.same(&other.order)
    }

    /// Bytes that a product with a few tokens reads.
    pub(crate) fn bytes(&self) -> usize {
        let words = tile_words(self.bits, self.rows, self.steps);
        words * size_of::<u32>() + cell_bytes(self.rows, self.steps, self.grid.tail)
    }

    /// Where tokens' values go for products of this weight with so many of them.
    pub(super) fn ordered(&self, x: u64, cells: u64, tokens: usize) -> Result<Ordered> {
        let every = if self.bits < 16 { self.grid.every } else { 0 };
        let (places, padded) = (self.order.address(&self.cuda), int(self.padded())?);
        Ok(Ordered {
            places,
            x,
            cells,
            padded,
            every: int(every)?,
            slots: int(slots(self, tokens))?,
        })
    }

    /// Tokens `[tokens, cols]` in this weight's order, fp16.
    pub(super) fn in_order(&self, x: &Matrix) -> Result<Matrix> {
        let mut out = Matrix::uninit_f16(&self.cuda, GATHER, (x.rows(), self.padded()))?;
        let to = Ordered { every: 0, slots: 0, ..self.ordered(out.address_mut()?, 0, 1)? };
        self.gather(x, (0, x.rows()), to)?;
        Ok(out)
    }

    /// So many tokens from one of `x` on as products with that many take them, and what belongs to their cells.
    pub(super) fn in_cells(
        &self,
        x: &Matrix,
        (first, tokens): (usize, usize),
    ) -> Result<(Matrix, Buffer<i32>)> {
        let rows = tokens.max(slots(self, tokens));
        let mut out = Matrix::uninit_f16(&self.cuda, GATHER, (rows, self.padded()))?;
        let count = rows * self.padded() / SUB / self.grid.every * CELL_WORDS;
        let cells = self.cuda.uninit::<i32>(GATHER, count)?;
        let cells_address = address(cells.slice(), self.cuda.stream());
        let to = self.ordered(out.address_mut()?, cells_address, tokens)?;
        self.gather(x, (first, tokens), to)?;
        Ok((out, cells))
    }

    /// So many tokens from one on.
    fn gather(&self, x: &Matrix, (first, tokens): (usize, usize), to: Ordered) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        if tokens > MOST_ROWS {
            let reason = format!("{tokens} tokens at a time are more than {MOST_ROWS}");
            return Err(Error::Unsupported { op: GATHER, reason });
        }
        let half = matches!(x.values(), Values::F16(_));
        let name = if half { "gather_columns_f16" } else { "gather_columns_f32" };
        let function = self.cuda.kernel("gather_columns.cu", name)?;
        let bytes = if half { size_of::<f16>() } else { size_of::<f32>() };
        let (from, cols) = (x.address() + (first * self.cols * bytes) as u64, int(self.cols)?);
        let config = per_place(self.padded(), tokens);
        let mut launch = self.cuda.stream().launch_builder(&function);
        launch.arg(&from).arg(&to).arg(&cols);
        // SAFETY: the arguments are the kernel's; x holds rows of `cols` values of its type, places, where
        // there are any, `padded` columns of them, and the caller made room for as many and their cells.
        unsafe { launch.launch(config) }.stage(GATHER)?;
        Ok(())
    }

    /// The weight in fp16, its columns in its own order: `[rows, padded]`.
    pub(super) fn widened(&self) -> Result<Matrix> {
        const OP: &str = "coded_widen";
        let mut out = Matrix::uninit_f16(&self.cuda, OP, (self.rows, self.padded()))?;
        let function = self.cuda.kernel("coded_tiles.cu", widen_name(self.bits))?;
        let row_tiles = self.rows.div_ceil(TILE_ROWS);
        let Grid { every, tail, zeros, zero } = self.grid;
        let ([tiles, cells], every, tail) = (self.addresses(), int(every)?, int(tail)?);
        let (zeros, zero) = (i32::from(zeros), i32::from(zero));
        let sides = [int(self.rows)?, int(self.steps)?, int(row_tiles)?];
        let mut launch = self.cuda.stream().launch_builder(&function);
        launch.arg(&tiles).arg(&cells).arg(&every).arg(&zeros).arg(&zero).arg(out.f16_mut(OP)?);
        launch.arg(&sides[0]).arg(&sides[1]).arg(&sides[2]).arg(&tail);
        // SAFETY: the arguments are the kernel's, and out was made for them.
        unsafe { launch.launch(self.cuda.spread(row_tiles * self.steps * 32)) }.stage(OP)?;
        Ok(out)
    }
}

fn duplicate<T: DeviceRepr>(cuda: &Cuda, from: &Buffer<T>) -> Result<Buffer<T>> {
    let mut to = cuda.uninit::<T>(STAGE, from.slice().len())?;
    cuda.stream().memcpy_dtod(from.slice(), to.make_mut()?).stage(STAGE)?;
    Ok(to)
}

impl Order {
    /// Filled up to whole steps.
    fn new(cuda: &Cuda, mut places: Vec<i32>, step: usize) -> Result<Self> {
        let own = places.iter().zip(0..).all(|(&place, i)| place == i || place == -1)
            && places.iter().skip_while(|&&place| place >= 0).all(|&place| place == -1);
        if own {
            return Ok(Self { places: None });
        }
        places.resize(places.len().next_multiple_of(step), -1);
        let there = cuda.copied(STAGE, &places)?;
        Ok(Self { places: Some((places, there)) })
    }

    /// Places of a row, where they are not the columns'.
    fn len(&self) -> Option<usize> {
        self.places.as_ref().map(|places| places.0.len())
    }

    fn same(&self, other: &Self) -> bool {
        match (&self.places, &other.places) {
            (Some(one), Some(other)) => one.0 == other.0,
            (one, other) => one.is_none() && other.is_none(),
        }
    }

    fn address(&self, cuda: &Cuda) -> u64 {
        self.places.as_ref().map_or(0, |places| address(places.1.slice(), cuda.stream()))
    }
}

fn tiles_name(bits: u8) -> &'static str {
    match bits {
        2 => "coded_tiles_2",
        3 => "coded_tiles_3",
        4 => "coded_tiles_4",
        8 => "coded_tiles_8",
        _ => "coded_tiles_16",
    }
}

fn widen_name(bits: u8) -> &'static str {
    match bits {
        2 => "coded_widen_2",
        3 => "coded_widen_3",
        4 => "coded_widen_4",
        8 => "coded_widen_8",
        _ => "coded_widen_16",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits a code, and a scale a group: what the file has, where tiles are full.
    #[test]
    fn full_tiles_take_what_a_file_does() {
        let codes = 8192 * 28_672;
        for (bits, group) in [(4, 32), (4, 64), (4, 128), (3, 128), (2, 64), (8, 128)] {
            let scales = codes / group * 2;
            let bytes = codes * usize::from(bits) / 8 + scales;
            assert_eq!(
                kept_bytes(bits, (8192, 28_672), Some(group)),
                bytes,
                "{bits} bits, {group}"
            );
        }
        assert_eq!(kept_bytes(16, (32_000, 8192), None), 32_000 * 8192 * 2);
        // One group repeats its scale every 128 columns; rows and columns are filled up.
        assert_eq!(kept_bytes(4, (16, 256), None), 16 * 256 / 2 + 2 * 16 * 2);
        assert_eq!(kept_bytes(4, (1, 1), None), kept_bytes(4, (16, 128), Some(32)));
    }

    /// Every column once, in sub-blocks of one group each.
    #[test]
    fn sub_blocks_hold_one_group() {
        type Case<'a> = (usize, usize, &'a dyn Fn(usize) -> u32);
        let groupings: [Case<'_>; 5] = [
            (576, 5, &|column| column as u32 / 128),
            (96, 3, &|column| (column * 7 % 3) as u32),
            (96, 2, &|column| u32::from(column == 40)),
            (64, 4, &|column| column as u32 / 16),
            (40, 1, &|_| 0),
        ];
        for (cols, groups, group) in groupings {
            let group_of: Vec<u32> = (0..cols).map(group).collect();
            let Grouping { places, run, group_of_run } = by_group(&group_of, groups);
            let mut seen: Vec<i32> = places.iter().copied().filter(|&place| place >= 0).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..cols as i32), "{cols} columns");
            for (i, &place) in places.iter().enumerate().filter(|(_, place)| **place >= 0) {
                let run = (i / SUB / run).min(group_of_run.len() - 1);
                assert_eq!(group_of_run[run], group_of[place as usize], "{cols}: place {i}");
            }
        }
        let even = by_group(&[0; 256].map(|_: u32| 0), 1);
        assert_eq!((even.run, even.group_of_run.len()), (8, 1));
    }
}
