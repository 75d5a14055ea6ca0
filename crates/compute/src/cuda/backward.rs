//! Launches of the gradients of a block's operations, and of steps along gradients.
//!
//! dX = dY · W runs on tensor cores in fp16 with f32 sums, as the forward's products; so does the gradient by hidden
//! states under a head, chunk of tokens by chunk, as logits are made.

use std::sync::Arc;

use cudarc::driver::PushKernelArg;

use super::buffer::Values;
use super::dense::int;
use super::elementwise::{block_per_row, block_per_run, to_f16};
use super::error::StageContext;
use super::gemm::{Operand, PLAIN, gemm};
use super::matrix::{Matrix, ensure_same_card};
use super::token_loss::{capped_logits, chunks};
use crate::activation::Activation;
use crate::adam::Adam;
use crate::error::Result;

/// dy · w as fp16.
pub(crate) fn linear(dy: &Matrix, w: &Matrix) -> Result<Matrix> {
    const OP: &str = "linear_backward";
    ensure_same_card(OP, &[dy, w])?;
    let mut dx = Matrix::uninit_f16(dy.cuda(), OP, (dy.rows(), w.cols()))?;
    let target = Operand::new(dy.cuda(), dx.f16_mut(OP)?, 0, w.cols(), PLAIN);
    multiply(OP, dy, w, 0.0, target)?;
    Ok(dx)
}

/// dx += dy · w; dx is f32 or fp16.
pub(crate) fn linear_add(dy: &Matrix, w: &Matrix, dx: &mut Matrix) -> Result<()> {
    const OP: &str = "linear_backward_add";
    ensure_same_card(OP, &[dy, w, dx])?;
    let cuda = Arc::clone(dy.cuda());
    let target = match dx.values() {
        Values::F16(_) => Operand::new(&cuda, dx.f16_mut(OP)?, 0, w.cols(), PLAIN),
        Values::F32(_) => Operand::new(&cuda, dx.f32_mut(OP)?, 0, w.cols(), PLAIN),
    };
    multiply(OP, dy, w, 1.0, target)
}

fn multiply(op: &'static str, dy: &Matrix, w: &Matrix, beta: f32, target: Operand) -> Result<()> {
    let (dy, w) = (to_f16(dy)?, to_f16(w)?);
    let (cuda, (out, cols)) = (dy.cuda(), w.shape());
    // Column-major: the transposed gradient, wᵀ · dyᵀ.
    let left = Operand::new(cuda, w.f16(op)?, 0, cols, PLAIN);
    let right = Operand::new(cuda, dy.f16(op)?, 0, out, PLAIN);
    // SAFETY: the caller has checked that dy has w's rows as columns and made the target [dy.rows, w.cols].
    unsafe { gemm(cuda, op, (cols, dy.rows(), out), (left, right), beta, target) }
}

/// The gradient of a norm of every run of gain.len() values as fp16.
pub(crate) fn rms_norm(x: &Matrix, gain: &[f32], eps: f32, dy: &Matrix) -> Result<Matrix> {
    const OP: &str = "rms_norm_backward";
    let mut dx = Matrix::uninit_f16(x.cuda(), OP, x.shape())?;
    launch_norm(OP, x, gain, eps, dy, &mut dx)?;
    Ok(dx)
}

/// The same added to `dx`, which is f32.
pub(crate) fn rms_norm_add(
    x: &Matrix,
    gain: &[f32],
    eps: f32,
    dy: &Matrix,
    dx: &mut Matrix,
) -> Result<()> {
    const OP: &str = "rms_norm_backward_add";
    dx.f32(OP)?;
    launch_norm(OP, x, gain, eps, dy, dx)
}

fn launch_norm(
    op: &'static str,
    x: &Matrix,
    gain: &[f32],
    eps: f32,
    dy: &Matrix,
    dx: &mut Matrix,
) -> Result<()> {
    ensure_same_card(op, &[x, dy, dx])?;
    if x.rows() == 0 {
        return Ok(());
    }
    let cuda = x.cuda();
    // As in the forward, a run is a row to the kernel.
    let config = block_per_run(x.rows() * (x.cols() / gain.len()), gain.len());
    let cols = int(gain.len())?;
    let gain = cuda.copied(op, gain)?;
    let name = match (x.values(), dy.values(), dx.values()) {
        (Values::F32(_), Values::F32(_), Values::F16(_)) => "rms_norm_backward_f32_f32",
        (Values::F32(_), Values::F16(_), Values::F16(_)) => "rms_norm_backward_f32_f16",
        (Values::F16(_), Values::F32(_), Values::F16(_)) => "rms_norm_backward_f16_f32",
        (Values::F16(_), Values::F16(_), Values::F16(_)) => "rms_norm_backward_f16_f16",
        (Values::F32(_), Values::F32(_), Values::F32(_)) => "rms_norm_backward_f32_f32_add",
        (Values::F32(_), Values::F16(_), Values::F32(_)) => "rms_norm_backward_f32_f16_add",
        (Values::F16(_), Values::F32(_), Values::F32(_)) => "rms_norm_backward_f16_f32_add",
        (Values::F16(_), Values::F16(_), Values::F32(_)) => "rms_norm_backward_f16_f16_add",
    };
    let function = cuda.kernel("rms_norm_backward.cu", name)?;
    let (x_at, dy_at, dx_at) = (x.address(), dy.address(), dx.address_mut()?);
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(&x_at).arg(gain.slice()).arg(&dy_at).arg(&dx_at).arg(&cols).arg(&eps);
    // SAFETY: the arguments are the kernel's for these types; x, dy and dx hold runs × cols values, gain cols.
    unsafe { launch.launch(config) }.stage(op)?;
    Ok(())
}

/// The gradients of activation(gate) · up by gate and up.
pub(crate) fn gated(
    gate: &Matrix,
    up: &Matrix,
    dy: &Matrix,
    activation: Activation,
) -> Result<(Matrix, Matrix)> {
    const OP: &str = "gated_backward";
    ensure_same_card(OP, &[gate, up, dy])?;
    let cuda = gate.cuda();
    let dy = to_f16(dy)?;
    let mut d_gate = Matrix::uninit_f16(cuda, OP, gate.shape())?;
    let mut d_up = Matrix::uninit_f16(cuda, OP, gate.shape())?;
    let count = gate.rows() * gate.cols();
    let n = count as i64;
    let name = match activation {
        Activation::Silu => "silu_mul_backward",
        Activation::GeluTanh => "gelu_mul_backward",
    };
    let function = cuda.kernel("gated_backward.cu", name)?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(gate.f16(OP)?).arg(up.f16(OP)?).arg(dy.f16(OP)?);
    launch.arg(d_gate.f16_mut(OP)?).arg(d_up.f16_mut(OP)?).arg(&n);
    // SAFETY: the arguments are the kernel's, and all matrices hold n values.
    unsafe { launch.launch(cuda.spread(count.div_ceil(8))) }.stage(OP)?;
    Ok((d_gate, d_up))
}

/// KL(p‖q) a row, and the gradient of scale · Σ KL by the hidden states of q; waits for all queued work.
pub(crate) fn kl(
    p: (&Matrix, &Matrix),
    q: (&Matrix, &Matrix),
    softcap: Option<f32>,
    scale: f32,
) -> Result<(Vec<f32>, Matrix)> {
    const OP: &str = "kl_backward";
    ensure_same_card(OP, &[p.0, p.1, q.0, q.1])?;
    let (p_hidden, p_head) = (to_f16(p.0)?, to_f16(p.1)?);
    let (q_hidden, q_head) = (to_f16(q.0)?, to_f16(q.1)?);
    let (cuda, (rows, hidden)) = (p_hidden.cuda(), q_hidden.shape());
    let mut out = cuda.uninit::<f32>(OP, rows)?;
    let mut dx = Matrix::uninit_f32(cuda, OP, (rows, hidden))?;
    let (vocab, cap) = (int(p_head.rows())?, softcap.unwrap_or(0.0));
    let function = cuda.kernel("nll.cu", "kl_gradient")?;
    for chunk in chunks(rows, p_head.rows()) {
        let p_logits = capped_logits((&p_hidden, &p_head), chunk.clone(), softcap)?;
        let q_logits = capped_logits((&q_hidden, &q_head), chunk.clone(), softcap)?;
        let mut gradient = Matrix::uninit_f16(cuda, OP, (chunk.len(), p_head.rows()))?;
        let mut values = out.make_mut()?.slice_mut(chunk.clone());
        let mut launch = cuda.stream().launch_builder(&function);
        launch.arg(p_logits.f32(OP)?).arg(q_logits.f32(OP)?).arg(&mut values);
        launch.arg(gradient.f16_mut(OP)?).arg(&vocab).arg(&scale).arg(&cap);
        // SAFETY: the arguments are the kernel's; all four have a row for each block.
        unsafe { launch.launch(block_per_row(chunk.len())) }.stage(OP)?;
        let offset = chunk.start * hidden;
        let target = Operand::new(cuda, dx.f32_mut(OP)?, offset, hidden, PLAIN);
        multiply(OP, &gradient, &q_head, 0.0, target)?;
    }
    Ok((cuda.read(OP, out.slice(), rows)?, dx))
}

/// A step of Adam in place.
pub(crate) fn adam_step(
    gradient: &Matrix,
    (mean, square): (&mut Matrix, &mut Matrix),
    values: &mut Matrix,
    adam: &Adam,
) -> Result<()> {
    const OP: &str = "adam_step";
    ensure_same_card(OP, &[gradient, mean, square, values])?;
    let cuda = Arc::clone(gradient.cuda());
    let count = gradient.rows() * gradient.cols();
    let n = count as i64;
    let (mean_factor, root_factor) = adam.corrections();
    let less = [1.0 - adam.beta1, 1.0 - adam.beta2];
    let function = cuda.kernel("adam.cu", "adam")?;
    let mut launch = cuda.stream().launch_builder(&function);
    launch.arg(gradient.f32(OP)?).arg(mean.f32_mut(OP)?).arg(square.f32_mut(OP)?);
    launch.arg(values.f32_mut(OP)?);
    launch.arg(&adam.gradient_factor).arg(&less[0]).arg(&less[1]).arg(&adam.learning_rate);
    launch.arg(&mean_factor).arg(&root_factor).arg(&adam.epsilon).arg(&n);
    // SAFETY: the arguments are the kernel's, and all matrices hold n values.
    unsafe { launch.launch(cuda.spread(count)) }.stage(OP)?;
    Ok(())
}
