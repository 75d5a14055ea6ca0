//! Products of weights that stay on the card with few tokens, by one kernel, or with many, by cuBLAS.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use half::f16;

use super::coded::{Coded, TILE_ROWS, subs};
use super::context::Cuda;
use super::dense::int;
use super::dependent::{self, Arguments};
use super::elementwise::to_f16;
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, TRANSPOSED, gemm};
use super::matrix::Matrix;
use super::timing::Timer;
use crate::error::{Error, Result};

/// Tokens that the kernel takes at a time; more are a product of matrices.
pub(crate) const FEW_TOKENS: usize = 16;
/// Weights that a launch takes.
pub(crate) const PARTS: usize = 3;

/// `Part` of `coded_linear.cuh`.
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

/// `Product` of `coded_linear.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Product {
    parts: [Part; PARTS],
    x: u64,
    x_sums: u64,
    part_count: i32,
    steps: i32,
    x_stride: i32,
    tokens: i32,
    add: i32,
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

/// A launch of the kernel.
pub(super) struct Launch {
    function: CudaFunction,
    config: LaunchConfig,
    product: Product,
}

impl Launch {
    /// Queues the kernel, behind one that it need not wait for at once.
    ///
    /// # Safety
    /// What the product's addresses are of lives until the work is done; see [`dependent::launch`].
    pub(super) unsafe fn queue(&self, cuda: &Cuda, stream: &CudaStream) -> Result<()> {
        let mut arguments = Arguments::new();
        arguments.push(&self.product);
        // SAFETY: the argument is the kernel's, which keeps to the rule; the caller vouches for the rest.
        unsafe {
            dependent::launch(
                (cuda, stream),
                "coded_linear",
                &self.function,
                self.config,
                &mut arguments,
            )
        }
    }
}

/// What a variant of the kernel takes; as in `coded_linear.cuh`.
struct Variant {
    tokens: usize,
    row_tiles: usize,
    warps: usize,
}

/// The variants of a card, in the order of [`names`].
struct Variants {
    all: [Variant; 4],
    /// Bytes of shared memory of a block, and where it takes sixteen tokens.
    room: [usize; 2],
}

/// Of cards whose blocks may have 227 KiB of shared memory, and of all others.
static LARGE: Variants = Variants {
    all: [
        Variant { tokens: 2, row_tiles: 2, warps: 16 },
        Variant { tokens: 2, row_tiles: 1, warps: 16 },
        Variant { tokens: 8, row_tiles: 2, warps: 16 },
        Variant { tokens: FEW_TOKENS, row_tiles: 4, warps: 8 },
    ],
    room: [184_320, 221_184],
};
static SMALL: Variants = Variants {
    all: [
        Variant { tokens: 2, row_tiles: 2, warps: 8 },
        Variant { tokens: 2, row_tiles: 1, warps: 8 },
        Variant { tokens: 8, row_tiles: 1, warps: 8 },
        Variant { tokens: FEW_TOKENS, row_tiles: 1, warps: 8 },
    ],
    room: [101_376; 2],
};

impl Variants {
    /// Those that were compiled for an architecture.
    fn of(arch: &str) -> &'static Self {
        match arch.get(3..5) {
            Some("90" | "10" | "11") => &LARGE,
            _ => &SMALL,
        }
    }

    /// The variant for so many tokens and weights of so many rows on so many multiprocessors. Two row tiles at
    /// a time are faster, unless the last of them keep too few multiprocessors busy.
    fn choose(&self, tokens: usize, rows: &[usize], multiprocessors: usize) -> usize {
        if tokens > 2 {
            return if tokens <= 8 { 2 } else { 3 };
        }
        let turns = |variant: &Variant| variant.units(rows).div_ceil(multiprocessors);
        usize::from(2 * turns(&self.all[0]) * 4 > turns(&self.all[1]) * 5)
    }

    /// Bytes of dynamic shared memory of one of them.
    fn shared(&self, chosen: usize, bits: u8, every: usize) -> usize {
        let Variant { tokens, row_tiles, warps } = self.all[chosen];
        let cells = if bits < 16 { subs(bits) / every } else { 0 };
        let stage = row_tiles * (subs(bits) * usize::from(bits) / 8 * 512 + cells * 48);
        let turns = if tokens == 2 { 4 } else { 2 };
        let sums = turns * warps * row_tiles * TILE_ROWS * tokens * 4;
        let room = self.room[usize::from(tokens == FEW_TOKENS)];
        warps * ((room - sums) / (warps * stage)).min(8) * stage + sums
    }
}

impl Variant {
    /// Units of weights of so many rows.
    fn units(&self, rows: &[usize]) -> usize {
        rows.iter().map(|rows| rows.div_ceil(self.row_tiles * TILE_ROWS)).sum()
    }
}

/// Prepares the product of tokens at `x`, in the weights' common order, with some weights that go together;
/// and of the sums of every 32 of their values.
pub(super) fn prepare(
    outputs: &[Output<'_>],
    (x, x_sums): (u64, u64),
    tokens: usize,
    add: bool,
) -> Result<Launch> {
    let weight = outputs[0].weight;
    let (cuda, bits, every) = (weight.cuda(), weight.bits(), weight.grid().every);
    let rows: Vec<_> = outputs.iter().map(|output| output.weight.shape().0).collect();
    let processors = cuda.driver().multiprocessors();
    let variants = Variants::of(cuda.arch());
    let chosen = variants.choose(tokens, &rows, processors);
    let (variant, (file, names)) = (&variants.all[chosen], names(bits));
    let shared = variants.shared(chosen, bits, every);
    let name = names[chosen + variants.all.len() * (every / 2).min(2)];
    let function = cuda.kernel_with_shared(file, name, shared)?;
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
    Ok(Launch {
        function,
        config: LaunchConfig {
            grid_dim: (variant.units(&rows).min(processors) as u32, 1, 1),
            block_dim: (32 * variant.warps as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        },
        product: Product {
            parts,
            x,
            x_sums,
            part_count: int(outputs.len())?,
            steps: int(weight.steps())?,
            x_stride: int(weight.padded())?,
            tokens: int(tokens)?,
            add: add.into(),
        },
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
    let (ordered, sums) = w.in_order(x)?;
    let rows = w.shape().0;
    if rows == 0 {
        return Ok(());
    }
    for first in (0..x.rows()).step_by(FEW_TOKENS) {
        let tokens = FEW_TOKENS.min(x.rows() - first);
        let x_at = ordered.address() + (first * ordered.cols() * size_of::<f16>()) as u64;
        let sums_at = sums.address() + (first * sums.cols() * size_of::<f32>()) as u64;
        let out = out + (first * rows * size_of::<f32>()) as u64;
        let output = Output { weight: w, bias: 0, out, stride: rows };
        let Launch { function, config, product } =
            prepare(&[output], (x_at, sums_at), tokens, add)?;
        let mut launch = w.cuda().stream().launch_builder(&function);
        launch.arg(&product);
        // SAFETY: the argument is the kernel's; the weight's addresses are its own, x is in its order and
        // the outputs were made for the product.
        unsafe { launch.launch(config) }.stage(op)?;
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
    let (ordered, sums) = first[0].in_order(x)?;
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
        prepare(&outputs, (ordered.address(), sums.address()), tokens, false)
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
    let (x, wide) = (w.in_order(x)?.0, w.widened()?);
    let (cuda, k) = (w.cuda(), w.padded());
    let left = Operand::new(cuda, wide.f16(op)?, 0, k, TRANSPOSED);
    let right = Operand::new(cuda, x.f16(op)?, 0, k, PLAIN);
    // SAFETY: both operands have `padded` columns, and the caller made the target [x.rows, w.rows].
    unsafe { gemm(cuda, op, (w.shape().0, x.rows(), k), (left, right), beta, target) }
}

/// The kernel's file and its variants, in the order of [`Variants`], with cells of one sub-block, of two and of
/// four. Values in fp16 have no cells.
fn names(bits: u8) -> (&'static str, [&'static str; 12]) {
    macro_rules! of {
        ($bits:literal, $($every:literal),*) => {
            (
                concat!("coded_linear_", $bits, ".cu"),
                [$(
                    concat!("coded_linear_", $bits, "_pair_", $every),
                    concat!("coded_linear_", $bits, "_single_", $every),
                    concat!("coded_linear_", $bits, "_eight_", $every),
                    concat!("coded_linear_", $bits, "_sixteen_", $every),
                )*],
            )
        };
    }
    match bits {
        2 => of!(2, 1, 2, 4),
        3 => of!(3, 1, 2, 4),
        4 => of!(4, 1, 2, 4),
        8 => of!(8, 1, 2, 4),
        _ => of!(16, 1, 1, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_fits_a_multiprocessor() {
        for (variants, most) in [(&LARGE, 227 << 10), (&SMALL, 99 << 10)] {
            for (chosen, bits) in
                (0..4).flat_map(|chosen| [2, 3, 4, 8, 16].map(|bits| (chosen, bits)))
            {
                for every in [1, 2, 4] {
                    let shared = variants.shared(chosen, bits, every);
                    assert!(shared <= most, "variant {chosen}, {bits} bits: {shared}");
                }
            }
        }
    }

    #[test]
    fn one_row_tile_at_a_time_is_for_what_two_share_badly() {
        assert_eq!(LARGE.choose(1, &[8192], 132), 0);
        assert_eq!(LARGE.choose(2, &[28_672, 28_672], 132), 0);
        assert_eq!(LARGE.choose(1, &[1024], 132), 1);
        assert_eq!(LARGE.choose(3, &[2560], 132), 2);
        assert_eq!(SMALL.choose(16, &[2560], 108), 3);
    }

    #[test]
    fn cards_with_much_shared_memory_are_known() {
        for (arch, large) in [
            ("sm_80", false),
            ("sm_89", false),
            ("sm_90a", true),
            ("sm_100a", true),
            ("sm_120a", false),
        ] {
            assert_eq!(std::ptr::eq(Variants::of(arch), &LARGE), large, "{arch}");
        }
    }
}
