//! Products of weights that stay on the card with few tokens, by one kernel, or with many, by cuBLAS.

use std::sync::Arc;

use cudarc::driver::sys::CUtensorMap;
use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};

use super::boxes::tensor_map;
use super::buffer::Buffer;
use super::coded::{Coded, TILE_ROWS, step_bytes};
use super::context::Cuda;
use super::dense::int;
use super::dependent::{self, Arguments};
use super::elementwise::to_f16;
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::Matrix;
use super::shares::{Kind, Plan};
use super::timing::Timer;
use super::transfer::address;
use crate::error::{Error, Result};

/// Tokens that the kernel takes at a time; more are a product of matrices.
pub(crate) const FEW_TOKENS: usize = 16;
/// Weights that a launch takes.
pub(crate) const PARTS: usize = 3;

/// `Part` of `coded_ring.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    tiles: u64,
    cells: u64,
    bias: u64,
    out: u64,
    rows: i32,
    zero: i32,
    zeros: i32,
    out_stride: i32,
    tail: i32,
}

/// `Product` of `coded_ring.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    parts: [Part; PARTS],
    inputs: Inputs,
    part_count: i32,
    steps: i32,
    x_stride: i32,
    tokens: i32,
    add: i32,
    slices: i32,
}

/// Addresses of tokens in the weights' order, of what belongs to their cells, and of what parts of a product leave for
/// each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) x: u64,
    pub(super) cells: u64,
    pub(super) shares: u64,
    pub(super) stream_shares: u64,
}

const _: () = assert!(size_of::<Product>() == 224, "as in coded_ring.cuh");

/// `Maps` of `coded_stream.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Maps {
    tiles: [CUtensorMap; PARTS],
    cells: [CUtensorMap; PARTS],
}

// SAFETY: what the driver made for kernels to have as an argument.
unsafe impl DeviceRepr for Maps {}

/// Memory by which parts of a product put their sums together, one product after the other.
pub(super) struct Sums {
    shares: Buffer<f32>,
    /// All zero between products.
    stream_shares: Buffer<f32>,
}

/// How many values of both a product of some weights that go together needs.
pub(super) fn sums_of(weights: &[&Coded], tokens: usize) -> (usize, usize) {
    let rows = weights.iter().map(|weight| weight.shape().0);
    let plan = Plan::new(weights[0], rows, tokens);
    (plan.share_values(), plan.stream_values())
}

impl Sums {
    pub(super) fn new(
        cuda: &Cuda,
        op: &'static str,
        (shares, of_streams): (usize, usize),
    ) -> Result<Self> {
        Ok(Self { shares: cuda.uninit(op, shares)?, stream_shares: cuda.zeros(op, of_streams)? })
    }

    /// With tokens and what belongs to their cells.
    pub(super) fn with(&self, x: u64, cells: u64, stream: &Arc<CudaStream>) -> Inputs {
        let [shares, stream_shares] =
            [&self.shares, &self.stream_shares].map(|buffer| address(buffer.slice(), stream));
        Inputs { x, cells, shares, stream_shares }
    }
}

// SAFETY: integers and addresses, laid out as the kernel's struct.
unsafe impl DeviceRepr for Product {}

/// A weight of a launch with where its bias is, or 0, and where its outputs go, so many values a token.
pub(super) struct Output<'a> {
    pub(super) weight: &'a Coded,
    pub(super) bias: u64,
    pub(super) out: u64,
    pub(super) stride: usize,
}

/// A launch of the kernel, and of the one that adds up shares of slices, if there are some.
pub(super) struct Launch {
    function: CudaFunction,
    config: LaunchConfig,
    product: Product,
    /// Of a stream.
    maps: Option<Box<Maps>>,
    join: Option<Join>,
}

struct Join {
    function: CudaFunction,
    config: LaunchConfig,
    /// Rows of a unit, and units.
    sides: [i32; 2],
}

impl Launch {
    /// Queues the kernels, behind one that they need not wait for at once.
    ///
    /// # Safety
    /// What the product's addresses are of lives until the work is done; see [`dependent::launch`].
    pub(super) unsafe fn queue(&self, cuda: &Cuda, stream: &CudaStream) -> Result<()> {
        let mut arguments = Arguments::new();
        arguments.push(&self.product);
        if let Some(maps) = &self.maps {
            arguments.push(&**maps);
        }
        let on = (cuda, stream);
        // SAFETY: the arguments are the kernels', which keep to the rule; the caller vouches for the rest.
        unsafe {
            dependent::launch(on, "coded_linear", &self.function, self.config, &mut arguments)?;
            let Some(Join { function, config, sides }) = &self.join else { return Ok(()) };
            arguments.push(&sides[0]);
            arguments.push(&sides[1]);
            dependent::launch(on, JOIN, function, *config, &mut arguments)
        }
    }

    /// Queues the kernels as any others.
    ///
    /// # Safety
    /// What the product's addresses are of lives until the work is done.
    unsafe fn queue_after_all(&self, op: &'static str, stream: &CudaStream) -> Result<()> {
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(&self.product);
        if let Some(maps) = &self.maps {
            launch.arg(&**maps);
        }
        // SAFETY: the arguments are the kernel's; the caller vouches for their addresses.
        unsafe { launch.launch(self.config) }.stage(op)?;
        let Some(Join { function, config, sides }) = &self.join else { return Ok(()) };
        let mut launch = stream.launch_builder(function);
        launch.arg(&self.product).arg(&sides[0]).arg(&sides[1]);
        // SAFETY: as above.
        unsafe { launch.launch(*config) }.stage(op)?;
        Ok(())
    }
}

const JOIN: &str = "coded_join";

/// Prepares the product of tokens, in the weights' common order, with some weights that go together.
pub(super) fn prepare(
    outputs: &[Output<'_>],
    inputs: Inputs,
    tokens: usize,
    add: bool,
) -> Result<Launch> {
    let weight = outputs[0].weight;
    let (cuda, every) = (weight.cuda(), weight.grid().every);
    let plan = Plan::new(weight, outputs.iter().map(|output| output.weight.shape().0), tokens);
    let (file, name) = kernel(weight.bits(), every, plan.kind);
    let function = cuda.kernel_with_shared(file, name, plan.most_shared)?;
    let maps = if plan.is_stream() { Some(Box::new(maps(outputs, plan.unit_rows)?)) } else { None };
    let mut parts = [Part::default(); PARTS];
    for (part, output) in parts.iter_mut().zip(outputs) {
        let (weight, grid) = (output.weight, output.weight.grid());
        let [tiles, cells] = weight.addresses();
        let rows = weight.shape().0;
        *part = Part {
            tiles,
            cells,
            bias: output.bias,
            out: output.out,
            rows: int(rows)?,
            zero: grid.zero.into(),
            zeros: grid.zeros.into(),
            out_stride: int(output.stride)?,
            tail: int(grid.tail)?,
        };
    }
    let launch = |blocks: usize, threads: usize, shared: usize| LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    let join = if plan.slices > 1 {
        let fours = plan.units * plan.unit_rows * tokens / 4;
        let blocks = fours.div_ceil(256).clamp(1, 4 * cuda.driver().multiprocessors());
        Some(Join {
            function: cuda.kernel("coded_join.cu", JOIN)?,
            config: launch(blocks, 256, 0),
            sides: [int(plan.unit_rows)?, int(plan.units)?],
        })
    } else {
        None
    };
    Ok(Launch {
        function,
        config: launch(plan.blocks, plan.threads, plan.shared),
        product: Product {
            parts,
            inputs,
            part_count: int(outputs.len())?,
            steps: int(weight.steps())?,
            x_stride: int(weight.padded())?,
            tokens: int(tokens)?,
            add: add.into(),
            slices: int(plan.slices)?,
        },
        maps,
        join,
    })
}

/// Steps of so many rows' tiles and cells, as boxes of each weight.
fn maps(outputs: &[Output<'_>], unit_rows: usize) -> Result<Maps> {
    const OP: &str = "coded_stream";
    let none = CUtensorMap { opaque: [0; 16] };
    let mut maps = Maps { tiles: [none; PARTS], cells: [none; PARTS] };
    for (i, output) in outputs.iter().enumerate() {
        let weight = output.weight;
        let row_tiles = weight.shape().0.div_ceil(TILE_ROWS);
        let [codes, cells] = step_bytes(weight.bits(), weight.grid().tail);
        let [at_tiles, at_cells] = weight.addresses();
        let map = |at: u64, bytes: usize| {
            let a_box = (unit_rows / TILE_ROWS, bytes);
            tensor_map(OP, at, (row_tiles, weight.steps() * bytes), a_box)
        };
        maps.tiles[i] = map(at_tiles, codes)?;
        maps.cells[i] = map(at_cells, cells)?;
    }
    Ok(maps)
}

/// x · wᵀ as fp16.
pub(crate) fn linear(x: &Matrix, w: &Coded) -> Result<Matrix> {
    const OP: &str = "resident_linear";
    if x.rows() <= FEW_TOKENS {
        return to_f16(&logits(x, w)?);
    }
    let mut out = Matrix::uninit_f16(w.cuda(), OP, (x.rows(), w.shape().0))?;
    let target = Operand::new(w.cuda(), out.f16_mut(OP)?, 0, w.shape().0, PLAIN);
    many(OP, x, w, 0.0, target)?;
    Ok(out)
}

/// x · wᵀ as f32, some tokens after the other: of more rows at once a head would be widened whole.
pub(crate) fn logits(x: &Matrix, w: &Coded) -> Result<Matrix> {
    const OP: &str = "resident_logits";
    let mut out = Matrix::uninit_f32(w.cuda(), OP, (x.rows(), w.shape().0))?;
    few(OP, x, w, out.address_mut()?, false)?;
    Ok(out)
}

/// residual += x · wᵀ, in f32.
pub(crate) fn linear_add(x: &Matrix, w: &Coded, residual: &mut Matrix) -> Result<()> {
    const OP: &str = "resident_linear_add";
    if !Arc::ptr_eq(residual.cuda(), w.cuda()) {
        return Err(Error::DeviceMismatch { op: OP });
    }
    residual.f32(OP)?;
    if x.rows() <= FEW_TOKENS {
        return few(OP, x, w, residual.address_mut()?, true);
    }
    let target = Operand::new(w.cuda(), residual.f32_mut(OP)?, 0, w.shape().0, PLAIN);
    many(OP, x, w, 1.0, target)
}

/// By the kernel, into f32 values `[x.rows, w.rows]` at `out`, or added to them.
fn few(op: &'static str, x: &Matrix, w: &Coded, out: u64, add: bool) -> Result<()> {
    let rows = w.shape().0;
    if rows == 0 {
        return Ok(());
    }
    let (cuda, stream) = (w.cuda(), w.cuda().stream());
    for first in (0..x.rows()).step_by(FEW_TOKENS) {
        let tokens = FEW_TOKENS.min(x.rows() - first);
        let (ordered, cells) = w.in_cells(x, (first, tokens))?;
        let sums = Sums::new(cuda, op, sums_of(&[w], tokens))?;
        let inputs = sums.with(ordered.address(), address(cells.slice(), stream), stream);
        let out = out + (first * rows * size_of::<f32>()) as u64;
        let output = Output { weight: w, bias: 0, out, stride: rows };
        let launch = prepare(&[output], inputs, tokens, add)?;
        // SAFETY: the weight's addresses are its own, x is in its order, the outputs were made for the product
        // and the shares for its slices.
        unsafe { launch.queue_after_all(op, stream) }?;
    }
    Ok(())
}

/// Seconds of a launch of tokens with each of some sets of weights that go together, one after the other as
/// a step has them; the best of some rounds.
pub(crate) fn seconds(x: &Matrix, sets: &[Vec<&Coded>]) -> Result<f64> {
    const OP: &str = "timing of products";
    const ROUNDS: usize = 5;
    let first = &sets[0];
    let (cuda, tokens) = (first[0].cuda(), x.rows());
    let (ordered, cells) = first[0].in_cells(x, (0, tokens))?;
    let (sums, stream) = (Sums::new(cuda, OP, sums_of(first, tokens))?, cuda.stream());
    let inputs = sums.with(ordered.address(), address(cells.slice(), stream), stream);
    let outs = first.iter().map(|weight| {
        let mut out = Matrix::uninit_f32(cuda, OP, (tokens, weight.shape().0))?;
        Ok((out.address_mut()?, out))
    });
    let outs = outs.collect::<Result<Vec<_>>>()?;
    let prepared = sets.iter().map(|set| {
        let outputs = set.iter().zip(&outs);
        let outputs: Vec<_> = outputs
            .map(|(&weight, (out, of))| Output { weight, bias: 0, out: *out, stride: of.cols() })
            .collect();
        prepare(&outputs, inputs, tokens, false)
    });
    let prepared = prepared.collect::<Result<Vec<_>>>()?;
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        cuda.synchronize(OP)?;
        let timer = Timer::start(cuda)?;
        for launch in &prepared {
            // SAFETY: the addresses are those of weights, tokens and outputs that outlive the work.
            unsafe { launch.queue(cuda, cuda.stream()) }?;
        }
        least = least.min(timer.stop()?.as_secs_f64());
    }
    Ok(least / sets.len() as f64)
}

/// By cuBLAS, over the weight widened to fp16.
fn many(op: &'static str, x: &Matrix, w: &Coded, beta: f32, target: Operand) -> Result<()> {
    let (x, wide) = (w.in_order(x)?, w.widened()?);
    let (cuda, k) = (w.cuda(), w.padded());
    let left = Operand::new(cuda, wide.f16(op)?, 0, k, TRANSPOSED);
    let right = Operand::new(cuda, x.f16(op)?, 0, k, PLAIN);
    // SAFETY: both operands have `padded` columns, and the caller made the target [x.rows, w.rows].
    unsafe { gemm(cuda, op, (w.shape().0, x.rows(), k), (left, right), beta, target) }
}

/// A kernel's file and name, for cells of one sub-block, of two or of four. Values in fp16 have no cells.
fn kernel(bits: u8, every: usize, kind: Kind) -> (&'static str, &'static str) {
    macro_rules! of {
        ($bits:literal) => {
            match every {
                1 => of!(@ $bits, "_1"),
                2 => of!(@ $bits, "_2"),
                _ => of!(@ $bits, "_4"),
            }
        };
        (@ $bits:literal, $every:literal) => {
            match kind {
                Kind::Pair => of!(@ "coded_linear_", $bits, "_pair", $every),
                Kind::Single => of!(@ "coded_linear_", $bits, "_single", $every),
                Kind::Eight => of!(@ "coded_linear_", $bits, "_eight", $every),
                Kind::Sixteen => of!(@ "coded_linear_", $bits, "_sixteen", $every),
                Kind::StreamEight => of!(@ "coded_stream_", $bits, "_eight", $every),
                Kind::StreamSixteen => of!(@ "coded_stream_", $bits, "_sixteen", $every),
            }
        };
        (@ $file:literal, $bits:literal, $kind:literal, $every:literal) => {
            (concat!($file, $bits, ".cu"), concat!($file, $bits, $kind, $every))
        };
    }
    match bits {
        2 => of!(2),
        3 => of!(3),
        4 => of!(4),
        8 => of!(8),
        _ => (
            "coded_linear_16.cu",
            match kind {
                Kind::Single => "coded_linear_16_single",
                Kind::Eight => "coded_linear_16_eight",
                Kind::Sixteen => "coded_linear_16_sixteen",
                _ => "coded_linear_16_pair",
            },
        ),
    }
}
