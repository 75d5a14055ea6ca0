//! Launch of the causal attention kernel.

use std::sync::Arc;

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::context::Cuda;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::error::{Error, Result};

/// Queries and keys of a block, and threads; as in `attention.cu`.
const QUERIES: usize = 128;
const KEYS: usize = 64;
const THREADS: u32 = 128;

/// softmax(q kᵀ / √`head_dim`) v, causal, window by window; the caller has checked the shapes.
pub(crate) fn causal(
    q: &Matrix,
    k: &Matrix,
    v: &Matrix,
    shape: AttentionShape,
    rule: &AttentionRule,
) -> Result<Matrix> {
    const OP: &str = "attention";
    let seq_len = shape.seq_len;
    ensure_same_card(OP, &[q, k, v])?;
    [q, k, v].iter().try_for_each(|x| x.f16(OP).map(|_| ()))?;
    let cuda = q.cuda();
    let mut out = Matrix::uninit_f16(cuda, OP, q.shape())?;
    if q.rows() == 0 {
        return Ok(out);
    }
    let (from, to) = ([q, k, v].map(Matrix::address), out.address_mut()?);
    // SAFETY: rows are whole windows and columns whole heads, as the caller has checked.
    unsafe { launch(cuda, (from, to), shape, q.rows() / seq_len, 0, rule)? };
    Ok(out)
}

/// Queues the kernel: windows of `seq_len` queries each; of one window, `past` keys come before them.
///
/// # Safety
/// The addresses are those of fp16 matrices q, k, v and out of so many rows and of the shape's heads.
pub(super) unsafe fn launch(
    cuda: &Arc<Cuda>,
    ([q, k, v], out): ([u64; 3], u64),
    shape: AttentionShape,
    windows: usize,
    past: usize,
    rule: &AttentionRule,
) -> Result<()> {
    if *rule != AttentionRule::llama(shape.head_dim) {
        let reason = "its kernel is not written yet".into();
        return Err(Error::Unsupported { op: "attention", reason });
    }
    const OP: &str = "attention";
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    let shared = (QUERIES + 2 * KEYS) * (head_dim + 8) * 2;
    let function = cuda.kernel_with_shared("attention.cu", kernel_name(head_dim)?, shared)?;
    let config = LaunchConfig {
        grid_dim: (seq_len.div_ceil(QUERIES) as u32, heads as u32, windows as u32),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    let (heads, kv_heads) = (heads as i32, kv_heads as i32);
    let (window, past) = (seq_len as i32, past as i32);
    // The kernel's exponential is of base 2.
    let scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(&q).arg(&k).arg(&v).arg(&out);
    launch.arg(&heads).arg(&kv_heads).arg(&window).arg(&past).arg(&scale);
    // SAFETY: the arguments are the kernel's; the caller vouches for what is at the addresses.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(())
}

fn kernel_name(head_dim: usize) -> Result<&'static str> {
    match head_dim {
        16 => Ok("attention_16"),
        32 => Ok("attention_32"),
        64 => Ok("attention_64"),
        80 => Ok("attention_80"),
        96 => Ok("attention_96"),
        128 => Ok("attention_128"),
        _ => Err(Error::Unsupported {
            op: "attention",
            reason: format!("head_dim {head_dim} is none of 16, 32, 64, 80, 96, 128"),
        }),
    }
}

/// That heads are of a size that the kernels have, and that query heads share key heads evenly.
pub(crate) fn check_shape(heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
    kernel_name(head_dim)?;
    if kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads) {
        return Ok(());
    }
    let reason = format!("{heads} query heads do not share {kv_heads} key heads evenly");
    Err(Error::Unsupported { op: "attention", reason })
}
