//! The GPTQ solver on the device: one linear, given the factor of its inputs' Hessian.
//!
//! W is gathered into f32 in solve order. Each block of columns is solved by one kernel, row by row
//! in parallel (`gptq_block`), with scales that another wrote just before (`group_scales`); cuBLAS
//! spreads the errors over the columns to come, in f32. Codes and fp16 weights are then put back
//! into the weights' order (`unpermute`). Several linears share a factor by calling [`solve`] with
//! the same `upper`, `order` and `dead`.
//!
//! Memory beside the weight and U, for `[rows, n]`: 4 B a value for W, 2 for the new weight, 1 + 1
//! for codes, and 4 · 1024 a row for errors: 2.0 GB for 28672 × 8192. All sums run in a fixed order.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};
use half::f16;

use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::dense::{Block, Product, int, multiply};
use super::error::StageContext;
use super::factor::rows_launch;
use super::matrix::Matrix;
use super::pack;
use super::permutation::SolveOrder;
use super::plan::{Window, widest, windows};
use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};

const OP: &str = "the GPTQ solve";
/// Rows of a block of `gptq_block`.
const ROWS: usize = 64;
/// Rows of a block of `group_scales`: one a warp.
const SCALE_ROWS: usize = 8;

/// A search for the scale that loses least, weighted by the Hessian's diagonal.
#[derive(Clone, Copy, Debug)]
pub struct ClipSearch<'a> {
    /// Candidates, as multiples of the scale 2 · absmax / (2^bits − 1), of either sign.
    pub ratios: &'a [f32],
    /// diag(H) in solve order.
    pub importance: &'a [f32],
    /// A group's candidates are judged by what solving it leaves, in blocks of 128 columns that do not
    /// know of each other, not by its weights' errors weighted with `importance`. With fresh weights.
    pub by_solving: bool,
}

/// The solver's choices.
#[derive(Clone, Copy, Debug)]
pub struct SolveOptions<'a> {
    /// Width of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Consecutive columns, in solve order, that share a scale; `None` is all.
    pub group_size: Option<usize>,
    /// A group's scale is computed from weights corrected for every column before the group, dead
    /// columns being zero. Otherwise from weights corrected up to the last block of 128 columns, as
    /// AutoGPTQ does; for one group a row, from the weights before dead columns were zeroed.
    pub fresh: bool,
    /// Scales are rounded to fp16 before codes are chosen, and a code's value before its error is
    /// computed: the weights that the file dequantizes to on a card, which keeps them in fp16.
    pub half_scales: bool,
    /// AutoGPTQ's absmax scales when `None`.
    pub search: Option<ClipSearch<'a>>,
}

/// A quantized linear on the device, columns in the weights' own order.
#[derive(Debug)]
pub struct Solved {
    cuda: Arc<Cuda>,
    codes: Buffer<u8>,
    shape: (usize, usize),
    bits: u8,
    /// Scales `[groups, rows]` in f32; groups are consecutive columns in solve order.
    pub scales: Vec<f32>,
    /// fp16(scale · (code − zero)) `[rows, n]`.
    pub weight: Tensor,
    /// Σ err² = tr((W − Ŵ) H (W − Ŵ)ᵀ); NaN or infinite when a weight is.
    pub loss: f64,
}

impl Solved {
    /// Codes `[rows, n]`, row-major.
    pub fn codes(&self) -> Result<Vec<u8>> {
        self.cuda.read("copying codes", self.codes.slice(), self.shape.0 * self.shape.1)
    }

    /// The codes as the file's `qweight` `[n / 32 · bits, rows]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when n is no multiple of 32.
    pub fn pack(&self) -> Result<Vec<u32>> {
        let words = pack::pack(&self.cuda, self.codes.slice(), self.shape, self.bits)?;
        let count = self.shape.0 * self.shape.1 / 32 * usize::from(self.bits);
        self.cuda.read("copying packed codes", words.slice(), count)
    }
}

/// Quantizes `weight` `[rows, n]` (fp16 or f32) along U `[n, n]`, which is in solve order.
///
/// # Errors
/// Shapes that do not fit, an `order` that is no permutation, or a failure of the device. A weight
/// that is not finite is no error here: it shows in [`Solved::loss`].
pub fn solve(
    weight: &Tensor,
    upper: &Tensor,
    order: &[u32],
    dead: &[bool],
    options: &SolveOptions<'_>,
) -> Result<Solved> {
    let (rows, n) = weight.shape();
    check(weight, upper, order, options)?;
    let source = on_device(weight)?;
    let cuda = source.cuda();
    let order = SolveOrder::upload(cuda, order, dead)?;
    let mut solver = Solver::new(source, on_device(upper)?, &order, options)?;
    for window in windows(n, options.group_size, options.fresh) {
        solver.solve_window(&window)?;
    }
    let (codes, values) = solver.unpermute(&order)?;
    let losses = cuda.read(OP, solver.row_loss.slice(), rows)?;
    let scales = cuda.read(OP, solver.scales.slice(), solver.groups * rows)?;
    Ok(Solved {
        cuda: Arc::clone(cuda),
        codes,
        shape: (rows, n),
        bits: options.bits,
        scales,
        weight: Tensor(Storage::Cuda(Matrix::from_f16(cuda, (rows, n), values))),
        loss: losses.iter().sum(),
    })
}

/// The operands on the device, and where the solve writes.
struct Solver<'a> {
    cuda: &'a Arc<Cuda>,
    options: SolveOptions<'a>,
    rows: usize,
    n: usize,
    group: usize,
    groups: usize,
    upper: &'a CudaSlice<f32>,
    search: Option<Search>,
    /// `[rows, n]` in solve order, corrected as the solve proceeds.
    weight: Buffer<f32>,
    /// Errors of one window `[rows, width]`.
    errors: Buffer<f32>,
    width: usize,
    codes: Buffer<u8>,
    scales: Buffer<f32>,
    row_loss: Buffer<f64>,
}

/// A [`ClipSearch`] on the device.
struct Search {
    ratios: Buffer<f32>,
    count: i32,
    importance: Buffer<f32>,
    /// Scale and loss of each candidate and row, where groups are tried.
    trials: Option<Buffer<f32>>,
}

impl<'a> Solver<'a> {
    fn new(
        source: &'a Matrix,
        upper: &'a Matrix,
        order: &SolveOrder,
        options: &SolveOptions<'a>,
    ) -> Result<Self> {
        let (cuda, (rows, n)) = (source.cuda(), source.shape());
        let fresh = options.fresh;
        let width = widest(&windows(n, options.group_size, fresh));
        let group = options.group_size.unwrap_or(n).min(n);
        let groups = n.div_ceil(group);
        let mut solver = Self {
            cuda,
            options: *options,
            rows,
            n,
            group,
            groups,
            upper: upper.f32(OP)?,
            search: options.search.map(|s| Search::upload(cuda, s, (rows, fresh))).transpose()?,
            weight: cuda.uninit(OP, rows * n)?,
            errors: cuda.uninit(OP, rows * width)?,
            width,
            codes: cuda.uninit(OP, rows * n)?,
            scales: cuda.uninit(OP, groups * rows)?,
            row_loss: cuda.zeros(OP, rows)?,
        };
        solver.gather(source, order, fresh)?;
        Ok(solver)
    }

    /// Brings the weights into solve order; scales of whole rows are written here.
    fn gather(&mut self, source: &Matrix, order: &SolveOrder, fresh: bool) -> Result<()> {
        let whole_rows = self.options.group_size.is_none();
        if whole_rows && !fresh && order.any_dead {
            let none = self.cuda.zeros::<u8>(OP, self.n)?;
            self.permute(source, order, none.slice())?;
            self.write_scales(0, 1)?;
            return self.permute(source, order, order.dead.slice());
        }
        self.permute(source, order, order.dead.slice())?;
        if whole_rows { self.choose_scales(0..1) } else { Ok(()) }
    }

    fn permute(&mut self, source: &Matrix, order: &SolveOrder, dead: &CudaSlice<u8>) -> Result<()> {
        let (rows, n) = (int(self.rows)?, int(self.n)?);
        let name = match source.values() {
            Values::F16(_) => "permute_columns_f16",
            Values::F32(_) => "permute_columns_f32",
        };
        let kernel = self.cuda.kernel("permute_columns.cu", name)?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        source.pass(&mut launch);
        launch.arg(order.order.slice()).arg(dead).arg(self.weight.make_mut()?);
        launch.arg(&rows).arg(&n);
        // SAFETY: the arguments are the kernel's; both matrices hold rows × n values, order and dead
        // n, and the order was checked to be a permutation.
        unsafe { launch.launch(rows_launch(self.rows)) }.stage(OP)?;
        Ok(())
    }

    /// Scales of groups `first .. first + count` from the weights as they are now.
    fn write_scales(&mut self, first: usize, count: usize) -> Result<()> {
        let start = first * self.group;
        let at = Block::of_mut(self.cuda, self.weight.make_mut()?, self.n).at(0, start);
        let scales = Block::of_mut(self.cuda, self.scales.make_mut()?, self.rows);
        let scales = scales.at(first, 0);
        let (rows, ld, group) = (int(self.rows)?, int(self.n)?, int(self.group)?);
        let columns = int(self.n - start)?;
        let (zero, max_code) = self.grid();
        let half_scales = i32::from(self.options.half_scales);
        let name = if self.search.is_some() { "group_scales_search" } else { "group_scales" };
        let kernel = self.cuda.kernel("group_scales.cu", name)?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        launch.arg(at.address());
        let importance;
        if let Some(search) = &self.search {
            importance = Block::of(self.cuda, search.importance.slice(), self.n).at(0, start);
            launch.arg(importance.address()).arg(search.ratios.slice()).arg(&search.count);
        }
        launch.arg(scales.address()).arg(&rows).arg(&ld).arg(&columns).arg(&group);
        if self.search.is_some() {
            launch.arg(&zero);
        }
        launch.arg(&max_code).arg(&half_scales);
        let config = LaunchConfig {
            grid_dim: (self.rows.div_ceil(SCALE_ROWS) as u32, count as u32, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's, in its order for both names; `first + count` is at
        // most the number of groups, and the kernel cuts the last one at `columns`.
        unsafe { launch.launch(config) }.stage(OP)?;
        Ok(())
    }

    fn solve_window(&mut self, window: &Window) -> Result<()> {
        for block in &window.blocks {
            let groups = block.start.div_ceil(self.group)..block.end.div_ceil(self.group);
            if self.options.group_size.is_some() && !groups.is_empty() {
                self.choose_scales(groups)?;
            }
            self.solve_block(block.start, block.end, block.start - window.start())?;
            self.spread(block.start..block.end, window.start(), block.end..window.near_end)?;
        }
        self.spread(window.start()..window.end(), window.start(), window.near_end..self.n)
    }

    /// Scales of these groups, of which the first begins where the solve has come to.
    fn choose_scales(&mut self, groups: std::ops::Range<usize>) -> Result<()> {
        if self.search.as_ref().is_none_or(|search| search.trials.is_none()) {
            return self.write_scales(groups.start, groups.len());
        }
        // Fresh weights: a block begins at most one group.
        groups.into_iter().try_for_each(|group| self.try_scales(group))
    }

    /// The scale of a group, by solving it with every candidate.
    fn try_scales(&mut self, group: usize) -> Result<()> {
        let (start, end) = (group * self.group, ((group + 1) * self.group).min(self.n));
        let (zero, max_code) = self.grid();
        let weight = Block::of_mut(self.cuda, self.weight.make_mut()?, self.n);
        let scales = Block::of_mut(self.cuda, self.scales.make_mut()?, self.rows);
        let (weight, scales) = (weight.at(0, start), scales.at(group, 0));
        let upper = Block::of(self.cuda, self.upper, self.n).at(start, start);
        let (rows, ld, columns) = (int(self.rows)?, int(self.n)?, int(end - start)?);
        let half_scales = i32::from(self.options.half_scales);
        let Some(Search { ratios, count, trials: Some(trials), .. }) = &mut self.search else {
            return Ok(());
        };
        let trials = trials.make_mut()?;
        let kernel = self.cuda.kernel("gptq_try.cu", "gptq_try")?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        launch.arg(weight.address()).arg(upper.address()).arg(ratios.slice()).arg(&mut *trials);
        launch.arg(&rows).arg(&ld).arg(&columns).arg(&zero).arg(&max_code);
        launch.arg(&half_scales);
        let config = |blocks: usize, candidates: i32| LaunchConfig {
            grid_dim: (blocks as u32, candidates as u32, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's; columns start .. end lie within W and U, there is
        // a trial for each candidate and row, and rows are checked inside.
        unsafe { launch.launch(config(self.rows.div_ceil(ROWS), *count)) }.stage(OP)?;
        let kernel = self.cuda.kernel("gptq_try.cu", "gptq_pick")?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        launch.arg(trials).arg(scales.address()).arg(&rows).arg(&*count);
        // SAFETY: the arguments are the kernel's; the trials are those just written, and the scales
        // of a group are `rows`.
        unsafe { launch.launch(config(self.rows.div_ceil(256), 1)) }.stage(OP)?;
        Ok(())
    }

    /// Solves columns `start .. end`; their errors go to the window's columns from `offset` on.
    fn solve_block(&mut self, start: usize, end: usize, offset: usize) -> Result<()> {
        let first = start / self.group;
        let weight = Block::of_mut(self.cuda, self.weight.make_mut()?, self.n);
        let scales = Block::of(self.cuda, self.scales.slice(), self.rows).at(first, 0);
        let codes = Block::of_mut(self.cuda, self.codes.make_mut()?, self.n);
        let errors = Block::of_mut(self.cuda, self.errors.make_mut()?, self.width);
        let (weight, codes, errors) =
            (weight.at(0, start), codes.at(0, start), errors.at(0, offset));
        let upper = Block::of(self.cuda, self.upper, self.n).at(start, start);
        let (rows, ld, width) = (int(self.rows)?, int(self.n)?, int(end - start)?);
        let (err_ld, group) = (int(self.width)?, int(self.group)?);
        let groups_left = int(self.groups - first)?;
        let until = int((first + 1) * self.group - start)?;
        let (zero, max_code) = self.grid();
        let half_values = i32::from(self.options.half_scales);
        let kernel = self.cuda.kernel("gptq_block.cu", "gptq_block")?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        launch.arg(weight.address()).arg(upper.address());
        launch.arg(scales.address()).arg(codes.address()).arg(errors.address());
        launch.arg(self.row_loss.make_mut()?);
        launch.arg(&rows).arg(&ld).arg(&err_ld).arg(&width).arg(&groups_left).arg(&until);
        launch.arg(&group).arg(&zero).arg(&max_code).arg(&half_values);
        let config = LaunchConfig {
            grid_dim: (self.rows.div_ceil(ROWS) as u32, 1, 1),
            block_dim: (256, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's; columns start .. end and offset .. offset + width
        // lie within their matrices, and rows are checked inside.
        unsafe { launch.launch(config) }.stage(OP)?;
        Ok(())
    }

    /// Corrects columns `to` for the columns `from`, whose errors lie in the window at `window`:
    /// W[:, to] −= Err · U[from, to].
    fn spread(
        &mut self,
        from: std::ops::Range<usize>,
        window: usize,
        to: std::ops::Range<usize>,
    ) -> Result<()> {
        const STAGE: &str = "spreading the errors";
        let shape = Product { m: self.rows, n: to.len(), k: from.len() };
        let weight = Block::of_mut(self.cuda, self.weight.make_mut()?, self.n);
        let errors = Block::of(self.cuda, self.errors.slice(), self.width);
        let upper = Block::of(self.cuda, self.upper, self.n);
        let (row, col, at) = (from.start, to.start, from.start - window);
        let operands = (errors.at(0, at), upper.at(row, col), weight.at(0, col));
        // SAFETY: the blocks lie within their matrices, which the solver keeps until it has waited
        // for the queue; `to` begins where `from` ends or later, so nothing overlaps.
        unsafe { multiply(self.cuda, STAGE, shape, (-1.0, 1.0), operands) }
    }

    /// Codes and fp16 weights in the weights' own order.
    fn unpermute(&mut self, order: &SolveOrder) -> Result<(Buffer<u8>, Buffer<f16>)> {
        let count = self.rows * self.n;
        let mut codes = self.cuda.uninit::<u8>(OP, count)?;
        let mut values = self.cuda.uninit::<f16>(OP, count)?;
        let (rows, n, group) = (int(self.rows)?, int(self.n)?, int(self.group)?);
        let (zero, _) = self.grid();
        let kernel = self.cuda.kernel("unpermute.cu", "unpermute")?;
        let mut launch = self.cuda.stream().launch_builder(&kernel);
        launch.arg(self.codes.slice()).arg(self.scales.slice()).arg(order.inverse.slice());
        launch.arg(codes.make_mut()?).arg(values.make_mut()?);
        launch.arg(&rows).arg(&n).arg(&group).arg(&zero);
        // SAFETY: the arguments are the kernel's; all matrices hold rows × n values, the inverse n
        // checked ones, and there are n / group scales a row, rounded up.
        unsafe { launch.launch(rows_launch(self.rows)) }.stage(OP)?;
        Ok((codes, values))
    }

    /// Code of 0.0 and the largest code.
    fn grid(&self) -> (f32, f32) {
        let codes = 1_u32 << self.options.bits;
        ((codes / 2) as f32, (codes - 1) as f32)
    }
}

impl Search {
    /// `fresh` says that groups of so many rows are corrected when their scales are chosen.
    fn upload(cuda: &Cuda, search: ClipSearch<'_>, (rows, fresh): (usize, bool)) -> Result<Self> {
        let count = search.ratios.len();
        let tries = search.by_solving && fresh;
        Ok(Self {
            ratios: cuda.copied(OP, search.ratios)?,
            count: int(count)?,
            importance: cuda.copied(OP, search.importance)?,
            trials: tries.then(|| cuda.uninit(OP, 2 * count * rows)).transpose()?,
        })
    }
}

fn on_device(tensor: &Tensor) -> Result<&Matrix> {
    match &tensor.0 {
        Storage::Cuda(matrix) => Ok(matrix),
        Storage::Cpu(_) => Err(Error::DeviceMismatch { op: OP }),
    }
}

fn check(weight: &Tensor, upper: &Tensor, order: &[u32], options: &SolveOptions<'_>) -> Result<()> {
    let n = weight.cols();
    ensure_shape(upper.shape() == (n, n), OP, weight.shape(), upper.shape())?;
    ensure_shape(order.len() == n, OP, weight.shape(), (order.len(), 1))?;
    if let Some(search) = &options.search {
        let importance = search.importance.len();
        ensure_shape(importance == n, OP, weight.shape(), (importance, 1))?;
    }
    if options.group_size == Some(0) || !matches!(options.bits, 2 | 3 | 4 | 8) {
        let (bits, group) = (options.bits, options.group_size);
        let reason = format!("{bits} bits with groups of {group:?}");
        return Err(Error::Unsupported { op: OP, reason });
    }
    Ok(())
}
