//! Weights that stay on the card as their file has them, in the order in which tensor cores take them.
//!
//! `kernels/coded.cuh` tells the order. Columns stand side by side by group, so that one scale holds for
//! whole sub-blocks, and a token's values are brought into the same order before they are multiplied.

use std::sync::Arc;

use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use half::f16;
use rayon::prelude::*;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::dense::int;
use super::error::StageContext;
use super::matrix::Matrix;
use super::transfer::address;
use crate::error::{Error, Result};
use crate::resident::CodedMatrix;

const STAGE: &str = "keeping a weight";
/// As in `coded.cuh`: rows of a tile, columns of a sub-block.
pub(super) const TILE_ROWS: usize = 16;
pub(super) const SUB: usize = 32;

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
    words: usize,
    grid: Option<Grid>,
    order: Order,
}

/// What codes mean.
#[derive(Debug)]
struct Grid {
    /// `[row tiles, runs, TILE_ROWS]`, as are the zeros.
    scales: Buffer<f16>,
    /// Where they differ.
    zeros: Option<Buffer<u8>>,
    /// Where they do not.
    zero: u8,
    /// Sub-blocks that share a scale, and how many such runs there are.
    run: usize,
    runs: usize,
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

impl Coded {
    /// A quantized weight; the caller has checked that its parts fit one another.
    pub(crate) fn quantized(cuda: &Arc<Cuda>, matrix: &CodedMatrix<'_>) -> Result<Self> {
        let &CodedMatrix { bits, rows, cols, codes, zeros, scales, group_of } = matrix;
        let Grouping { places, run, group_of_run } = by_group(group_of, zeros.len() / rows);
        let order = Order::new(cuda, places, subs(bits) * SUB)?;
        let grid = Grid::new(cuda, rows, scales, zeros, run, &group_of_run)?;
        let codes = cuda.copied(STAGE, codes)?;
        Self::tiled(cuda, bits, (rows, cols), Some(grid), order, &codes)
    }

    /// A weight in fp16.
    pub(crate) fn dense(matrix: &Matrix) -> Result<Self> {
        let (shape, cuda) = (matrix.shape(), matrix.cuda());
        let order = Order { places: None };
        let Values::F16(values) = matrix.values() else {
            return Err(Error::WrongType { op: STAGE, needs: "f16" });
        };
        Self::tiled(cuda, 16, shape, None, order, values)
    }

    fn tiled<T>(
        cuda: &Arc<Cuda>,
        bits: u8,
        (rows, cols): (usize, usize),
        grid: Option<Grid>,
        order: Order,
        values: &Buffer<T>,
    ) -> Result<Self>
    where
        T: DeviceRepr,
    {
        let padded = order.len().unwrap_or(cols).next_multiple_of(subs(bits) * SUB);
        let (steps, row_tiles) = (padded / (subs(bits) * SUB), rows.div_ceil(TILE_ROWS));
        let words = row_tiles * steps * lane_words(bits) * 32;
        let mut tiles = cuda.uninit::<u32>(STAGE, words)?;
        let function = cuda.kernel("coded_tiles.cu", tiles_name(bits))?;
        let places = order.address(cuda);
        let sides = (int(rows)?, int(cols)?, int(steps)?, int(row_tiles)?);
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(values.slice()).arg(&places).arg(tiles.make_mut()?);
        launch.arg(&sides.0).arg(&sides.1).arg(&sides.2).arg(&sides.3);
        // SAFETY: the arguments are the kernel's: values hold rows × cols, places as many columns of the
        // weight as the tiles have, or are null, and the tiles' words were counted above.
        unsafe { launch.launch(cuda.spread(words)) }.stage(STAGE)?;
        Ok(Self { cuda: Arc::clone(cuda), bits, rows, cols, steps, tiles, words, grid, order })
    }

    /// The same weight in memory of its own.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let cuda = &self.cuda;
        let grid = match &self.grid {
            Some(grid) => Some(Grid {
                scales: duplicate(cuda, &grid.scales)?,
                zeros: grid.zeros.as_ref().map(|zeros| duplicate(cuda, zeros)).transpose()?,
                ..*grid
            }),
            None => None,
        };
        let places = match &self.order.places {
            Some((places, there)) => Some((places.clone(), duplicate(cuda, there)?)),
            None => None,
        };
        let tiles = duplicate(cuda, &self.tiles)?;
        let (cuda, order) = (Arc::clone(cuda), Order { places });
        Ok(Self { cuda, tiles, grid, order, ..*self })
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

    /// Sub-blocks of a run, and runs.
    pub(super) fn runs(&self) -> (usize, usize) {
        self.grid.as_ref().map_or((1, 1), |grid| (grid.run, grid.runs))
    }

    /// Addresses of tiles, scales and zeros; the code that means 0 where there are no zeros.
    pub(super) fn addresses(&self) -> ([u64; 3], u8) {
        let stream = self.cuda.stream();
        let tiles = address(self.tiles.slice(), stream);
        let Some(grid) = &self.grid else { return ([tiles, 0, 0], 0) };
        let zeros = grid.zeros.as_ref().map_or(0, |zeros| address(zeros.slice(), stream));
        ([tiles, address(grid.scales.slice(), stream), zeros], grid.zero)
    }

    /// Address of the column at every place; 0 where each stands in its own.
    pub(super) fn places(&self) -> u64 {
        self.order.address(&self.cuda)
    }

    /// Whether tokens in the order of one are in that of the other, and the kernels can take both at once.
    pub(crate) fn goes_with(&self, other: &Self) -> bool {
        let places =
            |weight: &Self| weight.order.places.as_ref().map(|places| &places.0 as *const _);
        let same = places(self) == places(other)
            || self.order.places.as_ref().map(|p| &p.0)
                == other.order.places.as_ref().map(|p| &p.0);
        let layout = |weight: &Self| (weight.bits, weight.cols, weight.steps, weight.runs());
        layout(self) == layout(other) && same
    }

    /// Bytes that a product with a few tokens reads.
    pub(crate) fn bytes(&self) -> usize {
        let cells = |grid: &Grid| {
            let cells = self.rows.div_ceil(TILE_ROWS) * TILE_ROWS * grid.runs;
            cells * if grid.zeros.is_some() { 3 } else { 2 }
        };
        4 * self.words + self.grid.as_ref().map_or(0, cells)
    }

    /// Tokens `[tokens, cols]` in this weight's order, fp16; shared where they are already.
    pub(super) fn in_order(&self, x: &Matrix) -> Result<Matrix> {
        const OP: &str = "gather_columns";
        let padded = self.padded();
        let half = matches!(x.values(), Values::F16(_));
        if half && self.order.places.is_none() && padded == self.cols {
            return Ok(x.clone());
        }
        let mut out = Matrix::uninit_f16(&self.cuda, OP, (x.rows(), padded))?;
        if x.rows() == 0 {
            return Ok(out);
        }
        let name = if half { "gather_columns_f16" } else { "gather_columns_f32" };
        let function = self.cuda.kernel("gather_columns.cu", name)?;
        let (places, from) = (self.places(), x.address());
        let (cols, width) = (int(self.cols)?, int(padded)?);
        let config = per_place(padded, x.rows());
        let mut launch = self.cuda.stream().launch_builder(&function);
        launch.arg(&from).arg(&places).arg(out.f16_mut(OP)?).arg(&cols).arg(&width);
        // SAFETY: the arguments are the kernel's; x holds rows of `cols` values of its type, places, where
        // there are any, `padded` columns of them.
        unsafe { launch.launch(config) }.stage(OP)?;
        Ok(out)
    }

    /// The weight in fp16, its columns in its own order: `[rows, padded]`.
    pub(super) fn widened(&self) -> Result<Matrix> {
        const OP: &str = "coded_widen";
        let mut out = Matrix::uninit_f16(&self.cuda, OP, (self.rows, self.padded()))?;
        let function = self.cuda.kernel("coded_tiles.cu", widen_name(self.bits))?;
        let ([tiles, scales, zeros], zero) = self.addresses();
        let (row_tiles, (run, runs)) = (self.rows.div_ceil(TILE_ROWS), self.runs());
        let sides = [int(self.rows)?, int(self.steps)?, int(row_tiles)?, int(run)?, int(runs)?];
        let zero = i32::from(zero);
        let mut launch = self.cuda.stream().launch_builder(&function);
        launch.arg(&tiles).arg(&scales).arg(&zeros).arg(&zero).arg(out.f16_mut(OP)?);
        for side in &sides {
            launch.arg(side);
        }
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

/// A thread for every place of every token.
pub(super) fn per_place(padded: usize, tokens: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (padded.div_ceil(256) as u32, tokens as u32, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
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

    fn address(&self, cuda: &Cuda) -> u64 {
        self.places.as_ref().map_or(0, |places| address(places.1.slice(), cuda.stream()))
    }
}

impl Grid {
    /// From scales and zeros `[groups, rows]`.
    fn new(
        cuda: &Arc<Cuda>,
        rows: usize,
        scales: &[f16],
        zeros: &[u8],
        run: usize,
        group_of_run: &[u32],
    ) -> Result<Self> {
        let zero = zeros.first().copied().unwrap_or_default();
        let differ = zeros.iter().any(|&z| z != zero);
        let zeros = match differ {
            true => Some(cuda.copied(STAGE, &by_tile(zeros, rows, group_of_run))?),
            false => None,
        };
        Ok(Self {
            scales: cuda.copied(STAGE, &by_tile(scales, rows, group_of_run))?,
            zeros,
            zero,
            run: run.max(1),
            runs: group_of_run.len(),
        })
    }
}

/// Cells `[groups, rows]` as `[row tiles, runs, TILE_ROWS]`.
fn by_tile<T: Copy + Default + Send + Sync>(
    cells: &[T],
    rows: usize,
    group_of_run: &[u32],
) -> Vec<T> {
    let stride = group_of_run.len() * TILE_ROWS;
    let mut tiled = vec![T::default(); rows.div_ceil(TILE_ROWS) * stride];
    tiled.par_chunks_mut(stride.max(1)).enumerate().for_each(|(tile, to)| {
        let first = tile * TILE_ROWS;
        let count = TILE_ROWS.min(rows - first);
        for (to, &group) in to.chunks_mut(TILE_ROWS).zip(group_of_run) {
            to[..count].copy_from_slice(&cells[group as usize * rows + first..][..count]);
        }
    });
    tiled
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
