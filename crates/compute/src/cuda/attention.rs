//! Launches of the causal attention kernels.

use std::sync::Arc;

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::context::Cuda;
use super::dense::int;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::error::{Error, Result};

/// Causal attention by the rule, window by window; the caller has checked shapes and rule.
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

/// Queues a kernel: windows of `seq_len` queries each; of one window, `past` keys come before them.
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
    const OP: &str = "attention";
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    check_shape(heads, kv_heads, head_dim)?;
    let keys = past + seq_len;
    // A window that reaches to the first key hides none.
    let window = rule.window.filter(|&window| window < keys);
    let kernel = Kernel::of(head_dim, rule.softcap.is_some() || window.is_some())?;
    let function = cuda.kernel_with_shared(kernel.file, kernel.name, kernel.shared())?;
    let config = LaunchConfig {
        grid_dim: (seq_len.div_ceil(kernel.queries) as u32, heads as u32, windows as u32),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: kernel.shared() as u32,
    };
    let (heads, kv_heads, dim) = (int(heads)?, int(kv_heads)?, int(head_dim)?);
    let (rows, past, window) = (int(seq_len)?, int(past)?, int(window.unwrap_or(keys))?);
    let (inner, outer) = exponents(rule, head_dim);
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(&q).arg(&k).arg(&v).arg(&out).arg(&heads).arg(&kv_heads);
    if kernel.file == RULED {
        launch.arg(&dim).arg(&rows).arg(&past).arg(&window).arg(&inner).arg(&outer);
    } else {
        launch.arg(&rows).arg(&past).arg(&outer);
    }
    // SAFETY: the arguments are the kernel's; the caller vouches for what is at the addresses.
    unsafe { launch.launch(config) }.stage(OP)?;
    Ok(())
}

/// What products are multiplied by before a cap, and what scores are after it: the kernels' exponential is of
/// base 2, and so is that of their hyperbolic tangent.
pub(super) fn exponents(rule: &AttentionRule, head_dim: usize) -> (f32, f32) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    match rule.softcap {
        Some(cap) => (2.0 * LOG2_E * (rule.scale / cap), LOG2_E * cap),
        // One rounding, as ever; the product with the scale has two.
        None if rule.scale == AttentionRule::llama(head_dim).scale => {
            (0.0, LOG2_E / (head_dim as f32).sqrt())
        }
        None => (0.0, LOG2_E * rule.scale),
    }
}

const THREADS: u32 = 128;
const PLAIN: &str = "attention.cu";
const RULED: &str = "attention_ruled.cu";

/// A kernel, with what its file says of it.
struct Kernel {
    file: &'static str,
    name: &'static str,
    /// Columns of its tiles.
    columns: usize,
    /// Queries of a block.
    queries: usize,
}

impl Kernel {
    /// Keys of a step at most.
    const KEYS: usize = 64;

    /// The kernel for heads of so many features; with a cap or a window where scores are `ruled`.
    fn of(head_dim: usize, ruled: bool) -> Result<Self> {
        if !ruled && let Some(name) = plain(head_dim) {
            return Ok(Self { file: PLAIN, name, columns: head_dim, queries: 128 });
        }
        let (name, columns, queries) = match (head_dim, head_dim % 8) {
            (2..=32, 0) => ("attention_ruled_32", 32, 128),
            (33..=64, 0) => ("attention_ruled_64", 64, 128),
            (65..=80, 0) => ("attention_ruled_80", 80, 128),
            (81..=96, 0) => ("attention_ruled_96", 96, 128),
            (97..=112, 0) => ("attention_ruled_112", 112, 128),
            (113..=128, 0) => ("attention_ruled_128", 128, 128),
            (129..=160, 0) => ("attention_ruled_160", 160, 64),
            (161..=192, 0) => ("attention_ruled_192", 192, 64),
            (193..=256, 0) => ("attention_ruled_256", 256, 64),
            (2..=128, 2 | 4 | 6) => ("attention_words_128", 128, 64),
            (129..=256, 2 | 4 | 6) => ("attention_words_256", 256, 64),
            _ => {
                let reason = format!("head_dim {head_dim} is no even number up to 256");
                return Err(Error::Unsupported { op: "attention", reason });
            }
        };
        Ok(Self { file: RULED, name, columns, queries })
    }

    /// Bytes of shared memory, rows being padded by eight values.
    fn shared(&self) -> usize {
        (self.queries + 2 * Self::KEYS) * (self.columns + 8) * 2
    }
}

/// The kernel for scores without cap and window, of the sizes that most models have.
fn plain(head_dim: usize) -> Option<&'static str> {
    match head_dim {
        16 => Some("attention_16"),
        32 => Some("attention_32"),
        64 => Some("attention_64"),
        80 => Some("attention_80"),
        96 => Some("attention_96"),
        128 => Some("attention_128"),
        _ => None,
    }
}

/// That the step's kernels have heads of this size.
pub(crate) fn has_steps(head_dim: usize) -> bool {
    plain(head_dim).is_some()
}

/// That heads are of a size that the kernels have, and that query heads share key heads evenly.
pub(crate) fn check_shape(heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
    Kernel::of(head_dim, true)?;
    if kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads) {
        return Ok(());
    }
    let reason = format!("{heads} query heads do not share {kv_heads} key heads evenly");
    Err(Error::Unsupported { op: "attention", reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory that a block may ask for on every card since `sm_80`.
    const LEAST_SHARED: usize = 99 << 10;

    #[test]
    fn every_even_size_has_a_kernel_that_it_fits() {
        let text = include_str!("../../../../kernels/attention_ruled.cu");
        for head_dim in 0..300 {
            for ruled in [false, true] {
                let Ok(kernel) = Kernel::of(head_dim, ruled) else {
                    assert!(head_dim % 2 == 1 || head_dim == 0 || head_dim > 256, "{head_dim}");
                    continue;
                };
                assert!(head_dim % 2 == 0 && (2..=kernel.columns).contains(&head_dim));
                assert!(kernel.shared() <= LEAST_SHARED, "{head_dim}");
                let pieces = if kernel.name.contains("words") { 2 } else { 8 };
                assert_eq!(head_dim % pieces, 0, "{}", kernel.name);
                if kernel.file == RULED {
                    let (name, columns) = (kernel.name, kernel.columns);
                    let made = format!("ATTENTION({name}, {columns}, {})", pieces == 2);
                    assert!(text.contains(&made), "{made}");
                    let two = columns <= 128 && pieces == 8;
                    assert_eq!(kernel.queries, if two { 128 } else { 64 }, "{name}");
                } else {
                    assert_eq!(head_dim, kernel.columns);
                }
            }
        }
    }

    #[test]
    fn a_capped_score_is_what_the_rule_says() {
        let rule = AttentionRule { scale: 0.07, softcap: Some(30.0), window: None };
        let (inner, outer) = exponents(&rule, 64);
        for product in [-900.0_f64, -3.0, 0.5, 400.0] {
            // As the kernel has it: 1 − 2 / (2^(product · inner) + 1), times outer, to the base 2.
            let tanh = 1.0 - 2.0 / ((product * f64::from(inner)).exp2() + 1.0);
            let weight = (tanh * f64::from(outer)).exp2();
            let want = ((product * 0.07 / 30.0).tanh() * 30.0).exp();
            assert!((weight / want - 1.0).abs() < 1e-5, "{product}: {weight} {want}");
        }
        let plain = exponents(&AttentionRule::llama(80), 80);
        assert_eq!(plain, (0.0, std::f32::consts::LOG2_E / 80.0_f32.sqrt()));
    }
}
