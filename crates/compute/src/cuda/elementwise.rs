//! Launches of the row-wise and element-wise kernels.

use std::sync::Arc;

use cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use half::f16;

use super::block_parts::gelu_mul;
use super::buffer::{Buffer, Values};
use super::context::Cuda;
use super::dense::int;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use super::rope_table::DeviceTable;
use crate::activation::Activation;
use crate::error::{Error, Result};
use crate::rope::{RopeLayout, RopeTable};

/// A block of 256 threads for each of `rows` rows.
pub(super) fn block_per_row(rows: usize) -> LaunchConfig {
    LaunchConfig { grid_dim: (rows as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 }
}

/// A block for each of `runs` runs of `cols` values, with threads for eight of them each, up to 256: one as short
/// as a head would leave most of these idle.
pub(super) fn block_per_run(runs: usize, cols: usize) -> LaunchConfig {
    let mut config = block_per_row(runs);
    config.block_dim.0 = cols.div_ceil(8).next_multiple_of(32).min(256) as u32;
    config
}

/// x / rms(x) · gain as fp16 over every run of gain.len() values of a row, from hidden states in f32
/// or from fp16.
pub(crate) fn rms_norm(x: &Matrix, gain: &[f32], eps: f32) -> Result<Matrix> {
    const OP: &str = "rms_norm";
    let cuda = x.cuda();
    let mut out = Matrix::uninit_f16(cuda, OP, x.shape())?;
    if x.rows() == 0 {
        return Ok(out);
    }
    // To the kernel a run is a row.
    let config = match x.cols() / gain.len() {
        1 => block_per_row(x.rows()),
        runs => block_per_run(x.rows() * runs, gain.len()),
    };
    let cols = gain.len() as i32;
    let gain = cuda.copied(OP, gain)?;
    let name = match x.values() {
        Values::F32(_) => "rms_norm_f32",
        Values::F16(_) => "rms_norm_f16",
    };
    let function = cuda.kernel("rms_norm.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    x.pass(&mut launch);
    launch.arg(gain.slice()).arg(out.f16_mut(OP)?).arg(&cols).arg(&eps);
    // SAFETY: the arguments are the kernel's; x and out hold runs × cols values, gain cols.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(out)
}

/// Adds a bias to every row of x, fp16 or f32, in place.
pub(crate) fn add_bias(x: &mut Matrix, bias: &[f32]) -> Result<()> {
    const OP: &str = "add_bias";
    let cuda = Arc::clone(x.cuda());
    if x.rows() == 0 {
        return Ok(());
    }
    let (cols, config) = (x.cols() as i32, block_per_row(x.rows()));
    let bias = cuda.copied(OP, bias)?;
    let half = matches!(x.values(), Values::F16(_));
    let name = if half { "add_bias_f16" } else { "add_bias_f32" };
    let function = cuda.kernel("add_bias.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    match half {
        true => launch.arg(x.f16_mut(OP)?),
        false => launch.arg(x.f32_mut(OP)?),
    };
    launch.arg(bias.slice()).arg(&cols);
    // SAFETY: the arguments are the kernel's for the type of x, which holds rows × cols values; bias
    // holds cols.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(())
}

pub(super) fn device_table(cuda: &Arc<Cuda>, table: &RopeTable) -> Result<DeviceTable> {
    if let Some(kept) = table.on_cuda.get()
        && std::ptr::eq(kept.cuda.as_ptr(), Arc::as_ptr(cuda))
    {
        return Ok(kept.clone());
    }
    let fresh = DeviceTable {
        cuda: Arc::downgrade(cuda),
        cos: cuda.copied("rope", &table.cos)?,
        sin: cuda.copied("rope", &table.sin)?,
    };
    // Another card keeps the place, when it came first.
    let _ = table.on_cuda.set(fresh.clone());
    Ok(fresh)
}

/// Rotates every head of x by its row's position, in place.
pub(crate) fn rope(x: &mut Matrix, table: &RopeTable, seq_len: usize) -> Result<()> {
    let rows = 0..x.rows();
    rope_rows(x, table, rows, seq_len, 0)
}

/// The same of some rows, windows of `seq_len`, the first position of each being `first`.
pub(crate) fn rope_rows(
    x: &mut Matrix,
    table: &RopeTable,
    rows: std::ops::Range<usize>,
    seq_len: usize,
    first: usize,
) -> Result<()> {
    const OP: &str = "rope";
    let cuda = Arc::clone(x.cuda());
    let angles = device_table(&cuda, table)?;
    if rows.is_empty() {
        return Ok(());
    }
    let config = LaunchConfig { block_dim: (128, 1, 1), ..block_per_row(rows.len()) };
    let cols = x.cols();
    let heads = int(cols / table.head_dim)?;
    let (half, dim) = (int(table.half)?, int(table.head_dim)?);
    let (seq_len, first) = (seq_len as i32, first as i32);
    let (file, name) = match table.layout {
        RopeLayout::Half if table.is_plain() => ("rope.cu", "rope"),
        RopeLayout::Half => ("rope_part.cu", "rope_halves"),
        RopeLayout::Interleaved => ("rope_part.cu", "rope_pairs"),
    };
    if table.layout == RopeLayout::Interleaved && !table.head_dim.is_multiple_of(2) {
        let reason = format!("heads of {} features are not made of pairs", table.head_dim);
        return Err(Error::Unsupported { op: OP, reason });
    }
    let function = cuda.kernel(file, name)?;
    let mut values = x.f16_mut(OP)?.slice_mut(rows.start * cols..rows.end * cols);
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(&mut values).arg(angles.cos.slice()).arg(angles.sin.slice()).arg(&heads);
    if !table.is_plain() {
        launch.arg(&dim);
    }
    launch.arg(&half).arg(&seq_len).arg(&first);
    // SAFETY: the arguments are the kernel's; the caller has checked that cols is whole heads, which have
    // at least 2 half features, and that the table covers the positions.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(())
}

/// activation(gate) · up, in place of `gate`.
pub(crate) fn gated(gate: Matrix, up: &Matrix, activation: Activation) -> Result<Matrix> {
    match activation {
        Activation::Silu => silu_mul(gate, up),
        Activation::GeluTanh => gelu_mul(gate, up),
    }
}

fn silu_mul(mut gate: Matrix, up: &Matrix) -> Result<Matrix> {
    const OP: &str = "silu_mul";
    ensure_same_card(OP, &[&gate, up])?;
    let cuda = Arc::clone(gate.cuda());
    let count = gate.rows() * gate.cols();
    let n = count as i64;
    let function = cuda.kernel("silu_mul.cu", "silu_mul")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(gate.f16_mut(OP)?).arg(up.f16(OP)?).arg(&n);
    // SAFETY: the arguments are the kernel's, and both matrices hold n values.
    unsafe { launch.launch(cuda.spread(count.div_ceil(8))) }.stage(OP)?;
    Ok(gate)
}

/// True when every value is finite; waits for all queued work.
pub(crate) fn all_finite(x: &Matrix) -> Result<bool> {
    const OP: &str = "all_finite";
    let cuda = x.cuda();
    let count = x.rows() * x.cols();
    let n = count as i64;
    let mut bad = cuda.zeros::<u32>(OP, 1)?;
    let name = match x.values() {
        Values::F16(_) => "finite_f16",
        Values::F32(_) => "finite_f32",
    };
    let function = cuda.kernel("finite.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    x.pass(&mut launch);
    launch.arg(&n).arg(bad.make_mut()?);
    // SAFETY: the arguments are the kernel's, and x holds n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(cuda.read(OP, bad.slice(), 1)? == [0])
}

/// Every value of x on the grid of its row's group of `group` columns, whose codes reach from 0 to
/// `max_code`, `zero` meaning 0.
pub(crate) fn round_groups(x: &Matrix, group: usize, zero: f32, max_code: f32) -> Result<Matrix> {
    const OP: &str = "round_groups";
    const ROWS: usize = 8;
    let cuda = x.cuda();
    let mut out = Matrix::uninit_f16(cuda, OP, x.shape())?;
    let groups = x.cols().div_ceil(group.max(1));
    if x.rows() == 0 || groups == 0 {
        return Ok(out);
    }
    let (rows, cols, group) = (int(x.rows())?, int(x.cols())?, int(group)?);
    let config = LaunchConfig {
        grid_dim: (x.rows().div_ceil(ROWS) as u32, groups as u32, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    };
    let function = cuda.kernel("round_groups.cu", "round_groups")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(x.f16(OP)?).arg(out.f16_mut(OP)?).arg(&rows).arg(&cols).arg(&group);
    launch.arg(&zero).arg(&max_code);
    // SAFETY: the arguments are the kernel's; x and out hold rows × cols values, and the kernel cuts
    // the last group at cols.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(out)
}

/// Rows `ids` of x, in that order and in x's type; the caller has checked the range.
pub(crate) fn select_rows(x: &Matrix, ids: &[u32]) -> Result<Matrix> {
    const OP: &str = "select_rows";
    let cuda = x.cuda();
    let shape = (ids.len(), x.cols());
    let mut out = match x.values() {
        Values::F16(_) => Matrix::uninit_f16(cuda, OP, shape)?,
        Values::F32(_) => Matrix::uninit_f32(cuda, OP, shape)?,
    };
    if ids.is_empty() {
        return Ok(out);
    }
    let stride = (x.bytes() / x.rows().max(1)) as i64;
    let ids_there = cuda.copied(OP, ids)?;
    let function = cuda.kernel("select_rows.cu", "select_rows")?;
    let mut launch = cuda.stream().launch_builder(&function);
    match x.values() {
        Values::F16(values) => {
            launch.arg(values.slice()).arg(ids_there.slice()).arg(out.f16_mut(OP)?)
        }
        Values::F32(values) => {
            launch.arg(values.slice()).arg(ids_there.slice()).arg(out.f32_mut(OP)?)
        }
    };
    launch.arg(&stride);
    // SAFETY: the arguments are the kernel's; every id is a row of x, and out has a row for each.
    unsafe { launch.launch(block_per_row(ids.len())) }.stage(OP)?;
    Ok(out)
}

/// x as fp16; shared when it is fp16 already. Values past fp16 become infinite.
pub(crate) fn to_f16(x: &Matrix) -> Result<Matrix> {
    let Values::F32(values) = x.values() else { return Ok(x.clone()) };
    let out = converted::<f32, f16>(x, values, "f32_to_f16")?;
    Ok(Matrix::from_f16(x.cuda(), x.shape(), out))
}

/// x as f32; shared when it is f32 already.
pub(crate) fn to_f32(x: &Matrix) -> Result<Matrix> {
    let Values::F16(values) = x.values() else { return Ok(x.clone()) };
    let out = converted::<f16, f32>(x, values, "f16_to_f32")?;
    Ok(Matrix::from_f32(x.cuda(), x.shape(), out))
}

fn converted<A: DeviceRepr, B: DeviceRepr>(
    x: &Matrix,
    values: &Buffer<A>,
    name: &'static str,
) -> Result<Buffer<B>> {
    const OP: &str = "converting values";
    let cuda = x.cuda();
    let count = x.rows() * x.cols();
    let n = count as i64;
    let mut out = cuda.uninit::<B>(OP, count)?;
    let mut ignored = cuda.zeros::<u32>(OP, 1)?;
    let function = cuda.kernel("convert.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(values.slice()).arg(out.make_mut()?).arg(&n).arg(ignored.make_mut()?);
    // SAFETY: the arguments are the kernel's for these two types; both buffers hold n values.
    unsafe { launch.launch(cuda.spread(count / 2)) }.stage(OP)?;
    Ok(out)
}
