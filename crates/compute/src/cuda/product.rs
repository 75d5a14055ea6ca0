//! Products of weights that stay on the card with few tokens, by one kernel, or with many, by cuBLAS.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use half::f16;

use super::buffer::Buffer;
use super::coded::Coded;
use super::context::Cuda;
use super::dense::int;
use super::dependent::{self, Arguments};
use super::elementwise::to_f16;
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::Matrix;
use super::shares::Plan;
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

/// Addresses of tokens in the weights' order, of what belongs to their cells, and of where slices leave their
/// shares, as many values as [`share_values`] says.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Inputs {
    pub(super) x: u64,
    pub(super) cells: u64,
    pub(super) shares: u64,
}

const _: () = assert!(size_of::<Product>() == 216, "as in coded_ring.cuh");

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
        // SAFETY: the argument is the kernel's; the caller vouches for its addresses.
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

/// Values that slices of a product of some weights that go together leave, 0 where there is one slice.
pub(super) fn share_values(weights: &[&Coded], tokens: usize) -> usize {
    let rows = weights.iter().map(|weight| weight.shape().0);
    Plan::new(weights[0], rows, tokens).share_values()
}

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
    let (file, names) = names(weight.bits());
    let name = names[(every / 2).min(2)][plan.kind as usize];
    let function = cuda.kernel_with_shared(file, name, plan.most_shared)?;
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
        join,
    })
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
    let (ordered, cells) = w.in_cells(x)?;
    let rows = w.shape().0;
    if rows == 0 {
        return Ok(());
    }
    let stream = w.cuda().stream();
    let most = FEW_TOKENS.min(x.rows());
    let shares = w.cuda().uninit::<f32>(op, share_values(&[w], most))?;
    for first in (0..x.rows()).step_by(FEW_TOKENS) {
        let tokens = FEW_TOKENS.min(x.rows() - first);
        // The last ones may be cut into more slices than all before.
        let shares = match tokens == most {
            true => shares.clone(),
            false => w.cuda().uninit::<f32>(op, share_values(&[w], tokens))?,
        };
        let inputs = inputs_at((&ordered, &cells, &shares), first, stream);
        let out = out + (first * rows * size_of::<f32>()) as u64;
        let output = Output { weight: w, bias: 0, out, stride: rows };
        let launch = prepare(&[output], inputs, tokens, add)?;
        // SAFETY: the weight's addresses are its own, x is in its order, the outputs were made for the product
        // and the shares for its slices.
        unsafe { launch.queue_after_all(op, stream) }?;
    }
    Ok(())
}

/// Tokens from `first` on, all of them in a weight's order.
fn inputs_at(
    (x, cells, shares): (&Matrix, &Buffer<i32>, &Buffer<f32>),
    first: usize,
    stream: &Arc<CudaStream>,
) -> Inputs {
    let a_token = cells.slice().len() / x.rows().max(1) * size_of::<i32>();
    Inputs {
        x: x.address() + (first * x.cols() * size_of::<f16>()) as u64,
        cells: address(cells.slice(), stream) + (first * a_token) as u64,
        shares: address(shares.slice(), stream),
    }
}

/// Seconds of a launch of tokens with each of some sets of weights that go together, one after the other as
/// a step has them; the best of some rounds.
pub(crate) fn seconds(x: &Matrix, sets: &[Vec<&Coded>]) -> Result<f64> {
    const OP: &str = "timing of products";
    const ROUNDS: usize = 5;
    let first = &sets[0];
    let (cuda, tokens) = (first[0].cuda(), x.rows());
    let (ordered, cells) = first[0].in_cells(x)?;
    let shares = cuda.uninit::<f32>(OP, share_values(first, tokens))?;
    let inputs = inputs_at((&ordered, &cells, &shares), 0, cuda.stream());
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

/// The kernel's file and its variants in the order of [`Kind`], with cells of one sub-block, of two and of four.
/// Values in fp16 have no cells.
fn names(bits: u8) -> (&'static str, &'static [[&'static str; 4]]) {
    macro_rules! of {
        ($bits:literal) => {
            (
                concat!("coded_linear_", $bits, ".cu"),
                &[of!(@ $bits, "_1"), of!(@ $bits, "_2"), of!(@ $bits, "_4")],
            )
        };
        (@ $bits:literal, $every:literal) => {
            [
                concat!("coded_linear_", $bits, "_pair", $every),
                concat!("coded_linear_", $bits, "_single", $every),
                concat!("coded_linear_", $bits, "_eight", $every),
                concat!("coded_linear_", $bits, "_sixteen", $every),
            ]
        };
    }
    match bits {
        2 => of!(2),
        3 => of!(3),
        4 => of!(4),
        8 => of!(8),
        _ => (
            "coded_linear_16.cu",
            &[[
                "coded_linear_16_pair",
                "coded_linear_16_single",
                "coded_linear_16_eight",
                "coded_linear_16_sixteen",
            ]],
        ),
    }
}
