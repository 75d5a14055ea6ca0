//! Launches of the gradients of causal attention: two kernels, see `kernels/attention_backward.cu`.

use cudarc::driver::{LaunchConfig, PushKernelArg};

use super::attention::{check_shape, exponents};
use super::dense::int;
use super::elementwise::to_f16;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::error::{Error, Result};

const FILE: &str = "attention_backward.cu";
const THREADS: u32 = 128;
/// Queries or keys of a block, and queries of a step over them.
const TILE: usize = 64;
const STEP: usize = 32;

/// What the forward read and made, and the gradient by what it made.
pub(crate) struct Operands<'a> {
    pub(crate) q: &'a Matrix,
    pub(crate) k: &'a Matrix,
    pub(crate) v: &'a Matrix,
    pub(crate) out: &'a Matrix,
    pub(crate) dout: &'a Matrix,
}

/// Gradients by q, k and v in fp16; the caller has checked shapes and rule.
pub(crate) fn causal(
    of: &Operands<'_>,
    shape: AttentionShape,
    rule: &AttentionRule,
) -> Result<[Matrix; 3]> {
    const OP: &str = "attention_backward";
    let &Operands { q, k, v, out, dout } = of;
    ensure_same_card(OP, &[q, k, v, out, dout])?;
    [q, k, v, out].iter().try_for_each(|x| x.f16(OP).map(|_| ()))?;
    let AttentionShape { heads, kv_heads, head_dim, seq_len } = shape;
    check_shape(heads, kv_heads, head_dim)?;
    let kernels = Kernels::of(head_dim)?;
    let (cuda, dout) = (q.cuda(), to_f16(dout)?);
    let mut dq = Matrix::uninit_f16(cuda, OP, q.shape())?;
    let mut dk = Matrix::uninit_f16(cuda, OP, k.shape())?;
    let mut dv = Matrix::uninit_f16(cuda, OP, v.shape())?;
    if q.rows() == 0 {
        return Ok([dq, dk, dv]);
    }
    let mut norms = cuda.uninit::<f32>(OP, q.rows() * heads)?;
    let mut deltas = cuda.uninit::<f32>(OP, q.rows() * heads)?;
    let (inner, outer) = exponents(rule, head_dim);
    let window = int(rule.window.unwrap_or(seq_len).min(seq_len))?;
    let sides = [int(heads)?, int(kv_heads)?, int(head_dim)?, int(seq_len)?];
    let config = |across: usize, shared: usize| LaunchConfig {
        grid_dim: (seq_len.div_ceil(TILE) as u32, across as u32, (q.rows() / seq_len) as u32),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: shared as u32,
    };

    let function = cuda.kernel_with_shared(FILE, kernels.queries, kernels.queries_shared())?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(q.f16(OP)?).arg(k.f16(OP)?).arg(v.f16(OP)?).arg(out.f16(OP)?).arg(dout.f16(OP)?);
    launch.arg(dq.f16_mut(OP)?).arg(norms.make_mut()?).arg(deltas.make_mut()?);
    sides.iter().for_each(|side| {
        launch.arg(side);
    });
    launch.arg(&window).arg(&inner).arg(&outer).arg(&rule.scale);
    // SAFETY: the arguments are the kernel's; rows are whole windows and columns whole heads, as the caller has
    // checked, and norms and deltas have a value for every query and head.
    unsafe { launch.launch(config(heads, kernels.queries_shared())) }.stage(OP)?;

    let function = cuda.kernel_with_shared(FILE, kernels.keys, kernels.keys_shared())?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(q.f16(OP)?).arg(k.f16(OP)?).arg(v.f16(OP)?).arg(dout.f16(OP)?);
    launch.arg(dk.f16_mut(OP)?).arg(dv.f16_mut(OP)?).arg(norms.slice()).arg(deltas.slice());
    sides.iter().for_each(|side| {
        launch.arg(side);
    });
    launch.arg(&window).arg(&inner).arg(&outer).arg(&rule.scale);
    // SAFETY: as above.
    unsafe { launch.launch(config(kv_heads * kernels.parts(), kernels.keys_shared())) }
        .stage(OP)?;
    Ok([dq, dk, dv])
}

/// The two kernels for heads of up to so many columns, with what their file says of them.
struct Kernels {
    columns: usize,
    queries: &'static str,
    keys: &'static str,
}

impl Kernels {
    fn of(head_dim: usize) -> Result<Self> {
        macro_rules! of {
            ($columns:literal) => {
                Self {
                    columns: $columns,
                    queries: concat!("attention_backward_queries_", $columns),
                    keys: concat!("attention_backward_keys_", $columns),
                }
            };
        }
        Ok(match head_dim {
            0..=32 => of!(32),
            33..=64 => of!(64),
            65..=96 => of!(96),
            97..=128 => of!(128),
            129..=192 => of!(192),
            193..=256 => of!(256),
            _ => {
                let reason = format!("head_dim {head_dim} is more than 256");
                return Err(Error::Unsupported { op: "attention_backward", reason });
            }
        })
    }

    /// Parts of the columns of dk and dv.
    fn parts(&self) -> usize {
        if self.columns > 128 { 2 } else { 1 }
    }

    /// Bytes of shared memory, rows being padded by eight values.
    fn queries_shared(&self) -> usize {
        let keys = if self.columns > 64 { 32 } else { 64 };
        (2 * TILE + 2 * keys * self.stages()) * (self.columns + 8) * 2
    }

    fn keys_shared(&self) -> usize {
        (2 * TILE + 2 * STEP * self.stages()) * (self.columns + 8) * 2
    }

    /// Steps that have a place in shared memory.
    fn stages(&self) -> usize {
        if self.columns > 128 { 1 } else { 2 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory that a block may ask for on every card since `sm_80`.
    const LEAST_SHARED: usize = 99 << 10;

    #[test]
    fn every_size_has_kernels_that_it_fits() {
        let text = include_str!("../../../../kernels/attention_backward.cu");
        for head_dim in 2..=256 {
            let kernels = Kernels::of(head_dim).unwrap();
            assert!(head_dim <= kernels.columns);
            assert!(kernels.queries_shared().max(kernels.keys_shared()) <= LEAST_SHARED);
            assert!(text.contains(&format!("ATTENTION_BACKWARD({})", kernels.columns)));
        }
        assert!(Kernels::of(257).is_err());
    }
}
