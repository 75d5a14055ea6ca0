//! The AutoGPTQ bit stream on the device: packing solved codes, and reading packed weights.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, LaunchConfig, PushKernelArg};
use half::f16;

use super::buffer::Buffer;
use super::context::Cuda;
use super::dense::int;
use super::error::StageContext;
use super::matrix::Matrix;
use crate::error::{Error, Result, ensure_shape};
use crate::tensor::{Storage, Tensor};

/// Rows and columns of a tile of both kernels, and codes of a unit of whole words.
const TILE: (usize, usize) = (32, 256);
const UNIT: usize = 32;

/// A packed linear in host memory, as its tensors lie in the file.
#[derive(Clone, Copy, Debug)]
pub struct PackedLinear<'a> {
    /// Width of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `[cols / 32 · bits, rows]`.
    pub qweight: &'a [u32],
    /// Zeros minus one, `[groups, rows / 32 · bits]`: a zero of 0 is stored as all ones.
    pub qzeros: &'a [u32],
    /// `[groups, rows]`.
    pub scales: &'a [f16],
    /// Group of each input feature.
    pub g_idx: &'a [i32],
}

/// The weights `[rows, cols]` in fp16: scale · (code − zero), rounded once.
///
/// # Errors
/// Tensors that do not fit each other, a `g_idx` beyond the groups, or sides that are no multiples
/// of 32.
pub fn dequantize(cuda: &Arc<Cuda>, packed: &PackedLinear<'_>) -> Result<Tensor> {
    const STAGE: &str = "dequantizing";
    check(packed)?;
    let (rows, cols) = (packed.rows, packed.cols);
    let qweight = cuda.copied(STAGE, packed.qweight)?;
    let qzeros = cuda.copied(STAGE, packed.qzeros)?;
    let scales = cuda.copied(STAGE, packed.scales)?;
    let g_idx = cuda.copied(STAGE, packed.g_idx)?;
    let parts = Packed { words: &qweight, zeros: &qzeros, scales: &scales, g_idx: &g_idx };
    // SAFETY: `check` has compared every length and index.
    unsafe { unpacked(cuda, packed.bits, (rows, cols), &parts) }
        .map(|weight| Tensor(Storage::Cuda(weight)))
}

/// The tensors of a packed linear on the card.
pub(super) struct Packed<'a> {
    pub(super) words: &'a Buffer<u32>,
    pub(super) zeros: &'a Buffer<u32>,
    pub(super) scales: &'a Buffer<f16>,
    pub(super) g_idx: &'a Buffer<i32>,
}

/// The weights `[rows, cols]` in fp16.
///
/// # Safety
/// The parts are as long as [`PackedLinear`] says for sides that are multiples of 32, and every entry of `g_idx` is
/// a group of theirs.
pub(super) unsafe fn unpacked(
    cuda: &Arc<Cuda>,
    bits: u8,
    (rows, cols): (usize, usize),
    parts: &Packed<'_>,
) -> Result<Matrix> {
    const STAGE: &str = "dequantizing";
    let mut weight = Matrix::uninit_f16(cuda, STAGE, (rows, cols))?;
    let name = match bits {
        2 => "dequant_2",
        3 => "dequant_3",
        4 => "dequant_4",
        _ => "dequant_8",
    };
    let kernel = cuda.kernel("dequant.cu", name)?;
    let (height, width) = (int(rows)?, int(cols)?);
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(parts.words.slice()).arg(parts.zeros.slice()).arg(parts.scales.slice());
    launch.arg(parts.g_idx.slice()).arg(weight.f16_mut(STAGE)?).arg(&height).arg(&width);
    // SAFETY: the arguments are the kernel's; the caller vouches for the parts.
    unsafe { launch.launch(tiles(rows, cols)) }.stage(STAGE)?;
    Ok(weight)
}

fn check(packed: &PackedLinear<'_>) -> Result<()> {
    const OP: &str = "dequantize";
    let (rows, cols, bits) = (packed.rows, packed.cols, usize::from(packed.bits));
    supported(OP, (rows, cols), packed.bits)?;
    if !rows.is_multiple_of(UNIT) {
        let reason = format!("{rows} output features are no multiple of {UNIT}");
        return Err(Error::Unsupported { op: OP, reason });
    }
    let groups = packed.scales.len() / rows.max(1);
    let fits =
        |length: usize, wanted: usize| ensure_shape(length == wanted, OP, (length, 1), (wanted, 1));
    fits(packed.qweight.len(), cols / UNIT * bits * rows)?;
    fits(packed.scales.len(), groups * rows)?;
    fits(packed.qzeros.len(), groups * (rows / UNIT * bits))?;
    fits(packed.g_idx.len(), cols)?;
    match packed.g_idx.iter().find(|&&g| usize::try_from(g).map_or(true, |g| g >= groups)) {
        Some(&g) => Err(Error::RowOutOfRange { row: g as usize, rows: groups }),
        None => Ok(()),
    }
}

/// Packs codes `[rows, n]` into `[n / 32 · bits, rows]`.
pub(super) fn pack(
    cuda: &Arc<Cuda>,
    codes: &CudaSlice<u8>,
    (rows, n): (usize, usize),
    bits: u8,
) -> Result<Buffer<u32>> {
    const STAGE: &str = "packing codes";
    supported(STAGE, (rows, n), bits)?;
    let mut words = cuda.uninit::<u32>(STAGE, n / UNIT * usize::from(bits) * rows)?;
    let name = match bits {
        2 => "pack_2",
        3 => "pack_3",
        4 => "pack_4",
        _ => "pack_8",
    };
    let kernel = cuda.kernel("pack.cu", name)?;
    let (height, width) = (int(rows)?, int(n)?);
    let mut launch = cuda.stream().launch_builder(&kernel);
    launch.arg(codes).arg(words.make_mut()?).arg(&height).arg(&width);
    // SAFETY: the arguments are the kernel's; codes hold rows × n values and the words were counted
    // above.
    unsafe { launch.launch(tiles(rows, n)) }.stage(STAGE)?;
    Ok(words)
}

/// Refuses widths and lengths that do not fill whole words.
fn supported(op: &'static str, (_, n): (usize, usize), bits: u8) -> Result<()> {
    if n.is_multiple_of(UNIT) && matches!(bits, 2 | 3 | 4 | 8) {
        return Ok(());
    }
    let reason = format!("{n} codes of {bits} bits do not fill whole words");
    Err(Error::Unsupported { op, reason })
}

fn tiles(rows: usize, cols: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (cols.div_ceil(TILE.1).max(1) as u32, rows.div_ceil(TILE.0).max(1) as u32, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
}
