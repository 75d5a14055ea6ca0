//! Gradients of a block's operations with respect to their inputs: what training group scales needs.
//!
//! Each takes the gradient of the loss by the operation's output, dy, and gives that by its inputs. Weights and
//! biases have none: what is trained are scales, whose gradient is [`Device::scale_gradient`], and gains. On a GPU gradients of
//! activations are fp16, those of hidden states f32; a caller multiplies the loss by a power of two that keeps
//! small ones above fp16's least, and looks for overflow by [`Device::all_finite`].

use ndarray::Array2;

use crate::activation::Activation;
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::block_parts::ensure_cap;
use crate::cpu;
use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::rope::RopeTable;
use crate::tensor::{Storage, Tensor};

impl Device {
    /// dx of y = x · wᵀ: dy · w, `[tokens, out] · [out, in] → [tokens, in]`, in the activations' type.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn linear_backward(&self, dy: &Tensor, w: &Tensor) -> Result<Tensor> {
        const OP: &str = "linear_backward";
        ensure_shape(dy.cols() == w.rows(), OP, dy.shape(), w.shape())?;
        match (&dy.0, &w.0) {
            (Storage::Cpu(dy), Storage::Cpu(w)) => {
                let mut dx = Array2::zeros((dy.nrows(), w.ncols()));
                cpu::matmul::matmul_nt(dy.view(), w.t(), 0.0, dx.view_mut());
                Ok(Tensor(Storage::Cpu(dx)))
            }
            (Storage::Cuda(dy), Storage::Cuda(w)) => {
                Ok(Tensor(Storage::Cuda(cuda::backward::linear(dy, w)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// dx += dy · w, in the type of dx: the sum over the linears that read one input.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn linear_backward_add(&self, dy: &Tensor, w: &Tensor, dx: &mut Tensor) -> Result<()> {
        const OP: &str = "linear_backward_add";
        ensure_shape(dy.cols() == w.rows(), OP, dy.shape(), w.shape())?;
        let shape = (dy.rows(), w.cols());
        ensure_shape(dx.shape() == shape, OP, shape, dx.shape())?;
        match (&dy.0, &w.0, &mut dx.0) {
            (Storage::Cpu(dy), Storage::Cpu(w), Storage::Cpu(dx)) => {
                cpu::matmul::matmul_nt(dy.view(), w.t(), 1.0, dx.view_mut());
                Ok(())
            }
            (Storage::Cuda(dy), Storage::Cuda(w), Storage::Cuda(dx)) => {
                cuda::backward::linear_add(dy, w, dx)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// dx of [`Self::rms_norm`] of `x` with the same gain and eps, in the activations' type: for norms of heads and
    /// of what a sublayer gives.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &[f32],
        eps: f32,
        dy: &Tensor,
    ) -> Result<Tensor> {
        const OP: &str = "rms_norm_backward";
        ensure_norm(OP, x, gain, dy)?;
        match (&x.0, &dy.0) {
            (Storage::Cpu(x), Storage::Cpu(dy)) => {
                let mut dx = Array2::zeros(x.dim());
                cpu::backward::rms_norm_add(x, gain, eps, dy, &mut dx);
                Ok(Tensor(Storage::Cpu(dx)))
            }
            (Storage::Cuda(x), Storage::Cuda(dy)) => {
                Ok(Tensor(Storage::Cuda(cuda::backward::rms_norm(x, gain, eps, dy)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// The same added to `dx`, which is f32: for norms of hidden states, whose gradient has come past the
    /// sublayer too.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], [`Error::DeviceMismatch`], and [`Error::WrongType`] for a `dx` of fp16.
    pub fn rms_norm_backward_add(
        &self,
        x: &Tensor,
        gain: &[f32],
        eps: f32,
        dy: &Tensor,
        dx: &mut Tensor,
    ) -> Result<()> {
        const OP: &str = "rms_norm_backward_add";
        ensure_norm(OP, x, gain, dy)?;
        ensure_shape(dx.shape() == x.shape(), OP, x.shape(), dx.shape())?;
        match (&x.0, &dy.0, &mut dx.0) {
            (Storage::Cpu(x), Storage::Cpu(dy), Storage::Cpu(dx)) => {
                cpu::backward::rms_norm_add(x, gain, eps, dy, dx);
                Ok(())
            }
            (Storage::Cuda(x), Storage::Cuda(dy), Storage::Cuda(dx)) => {
                cuda::backward::rms_norm_add(x, gain, eps, dy, dx)
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// The gradients of [`Self::gated`] by gate and up, where `gate` is what the activation was taken of.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] and [`Error::DeviceMismatch`].
    pub fn gated_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        activation: Activation,
    ) -> Result<(Tensor, Tensor)> {
        const OP: &str = "gated_backward";
        ensure_shape(gate.shape() == up.shape(), OP, gate.shape(), up.shape())?;
        ensure_shape(gate.shape() == dy.shape(), OP, gate.shape(), dy.shape())?;
        match (&gate.0, &up.0, &dy.0) {
            (Storage::Cpu(gate), Storage::Cpu(up), Storage::Cpu(dy)) => {
                let (gate, up) = cpu::backward::gated(gate.clone(), up.clone(), dy, activation);
                Ok((Tensor(Storage::Cpu(gate)), Tensor(Storage::Cpu(up))))
            }
            (Storage::Cuda(gate), Storage::Cuda(up), Storage::Cuda(dy)) => {
                let (gate, up) = cuda::backward::gated(gate, up, dy, activation)?;
                Ok((Tensor(Storage::Cuda(gate)), Tensor(Storage::Cuda(up))))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// Turns the gradient by the output of [`Self::rope`] into that by its input, in place: each pair is rotated
    /// back by its angle.
    ///
    /// # Errors
    /// Those of [`Self::rope`].
    pub fn rope_backward(&self, dx: &mut Tensor, table: &RopeTable, seq_len: usize) -> Result<()> {
        self.rope(dx, table.reversed(), seq_len)
    }

    /// The gradients by q, k and v of [`Self::attention`] of them, which gave `out`. Scores are computed again.
    /// Sums run in a fixed order.
    ///
    /// # Errors
    /// Those of [`Self::attention`].
    pub fn attention_backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        dout: &Tensor,
        shape: AttentionShape,
        rule: &AttentionRule,
    ) -> Result<[Tensor; 3]> {
        const OP: &str = "attention_backward";
        rule.check(OP)?;
        let queries = (q.rows(), shape.heads * shape.head_dim);
        let keys = (q.rows(), shape.kv_heads * shape.head_dim);
        let whole = shape.seq_len > 0 && q.rows().is_multiple_of(shape.seq_len);
        ensure_shape(whole, OP, q.shape(), (shape.seq_len, 0))?;
        let even = shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads);
        ensure_shape(even, OP, queries, keys)?;
        for (x, wanted) in [(q, queries), (k, keys), (v, keys), (out, queries), (dout, queries)] {
            ensure_shape(x.shape() == wanted, OP, x.shape(), wanted)?;
        }
        match (&q.0, &k.0, &v.0, &out.0, &dout.0) {
            (
                Storage::Cpu(q),
                Storage::Cpu(k),
                Storage::Cpu(v),
                Storage::Cpu(out),
                Storage::Cpu(dout),
            ) => {
                let of = cpu::attention_backward::Operands { q, k, v, out, dout };
                let gradients = cpu::attention_backward::causal(&of, shape, rule);
                Ok(gradients.map(|gradient| Tensor(Storage::Cpu(gradient))))
            }
            (
                Storage::Cuda(q),
                Storage::Cuda(k),
                Storage::Cuda(v),
                Storage::Cuda(out),
                Storage::Cuda(dout),
            ) => {
                let of = cuda::attention_backward::Operands { q, k, v, out, dout };
                let gradients = cuda::attention_backward::causal(&of, shape, rule)?;
                Ok(gradients.map(|gradient| Tensor(Storage::Cuda(gradient))))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// KL(p‖q) in nats a row, as [`Self::token_kl`] has it of the same operands, and the gradient of `scale` · Σ KL
    /// by the hidden states of q: `[tokens, hidden]`, f32 on every device.
    ///
    /// # Errors
    /// Those of [`Self::token_kl`].
    pub fn kl_backward(
        &self,
        p: (&Tensor, &Tensor),
        q: (&Tensor, &Tensor),
        softcap: Option<f32>,
        scale: f32,
    ) -> Result<(Vec<f32>, Tensor)> {
        const OP: &str = "kl_backward";
        ensure_cap(OP, softcap)?;
        for (hidden, head) in [p, q] {
            ensure_shape(hidden.cols() == head.cols(), OP, hidden.shape(), head.shape())?;
        }
        ensure_shape(p.0.rows() == q.0.rows(), OP, p.0.shape(), q.0.shape())?;
        ensure_shape(p.1.rows() == q.1.rows(), OP, p.1.shape(), q.1.shape())?;
        match (&p.0.0, &p.1.0, &q.0.0, &q.1.0) {
            (Storage::Cpu(ph), Storage::Cpu(pw), Storage::Cpu(qh), Storage::Cpu(qw)) => {
                let (kl, dx) = cpu::token_loss::kl_backward((ph, pw), (qh, qw), softcap, scale);
                Ok((kl, Tensor(Storage::Cpu(dx))))
            }
            (Storage::Cuda(ph), Storage::Cuda(pw), Storage::Cuda(qh), Storage::Cuda(qw)) => {
                let (kl, dx) = cuda::backward::kl((ph, pw), (qh, qw), softcap, scale)?;
                Ok((kl, Tensor(Storage::Cuda(dx))))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

/// That a gain is of whole runs of x, and dy of its shape.
fn ensure_norm(op: &'static str, x: &Tensor, gain: &[f32], dy: &Tensor) -> Result<()> {
    let fits = !gain.is_empty() && x.cols().is_multiple_of(gain.len());
    ensure_shape(fits, op, x.shape(), (1, gain.len()))?;
    ensure_shape(x.shape() == dy.shape(), op, x.shape(), dy.shape())
}
