//! Where matrices live and who multiplies them.
//!
//! Every operation of a Llama block is a method here, dispatched on the device; `block_parts.rs` has what
//! blocks of other families need besides. Shapes are checked on entry, so that the code behind need not.

use std::sync::Arc;

use ndarray::Array2;

use crate::activation::Activation;
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::block_parts::ensure_cap;
use crate::cpu;
use crate::cuda::{self, Cuda, MemoryInfo, Offloaded, Prefetched};
use crate::error::{Error, Result, ensure_shape};
use crate::host::HostMatrix;
use crate::rope::RopeTable;
use crate::tensor::{Storage, Tensor};

/// A processor that holds tensors and computes on them.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// The host: f32 data, all cores of the current rayon pool.
    #[default]
    Cpu,
    /// An NVIDIA card: fp16 weights and activations, f32 sums and hidden states.
    Cuda(Arc<Cuda>),
}

/// A tensor that takes no device memory until it is fetched: see [`Device::offload`].
#[derive(Debug)]
pub struct OffloadedTensor(OffloadedStorage);

#[derive(Debug)]
enum OffloadedStorage {
    /// On the CPU, where a tensor is in host memory anyway.
    Here(Tensor),
    Cuda(Offloaded),
}

/// An offloaded tensor on its way back: see [`Device::prefetch`].
#[derive(Debug)]
pub struct PrefetchedTensor(PrefetchedStorage);

#[derive(Debug)]
enum PrefetchedStorage {
    Here(Tensor),
    Cuda(Prefetched),
}

impl PrefetchedTensor {
    /// The tensor; work queued from now on waits for its arrival.
    pub fn wait(self) -> Result<Tensor> {
        match self.0 {
            PrefetchedStorage::Here(x) => Ok(x),
            PrefetchedStorage::Cuda(prefetched) => Ok(Tensor(Storage::Cuda(prefetched.wait()?))),
        }
    }
}

impl Device {
    /// [`Self::chunk_tokens`] of the CPU: as few as products still run at full speed with.
    pub const CPU_CHUNK_TOKENS: usize = 4096;
    /// [`Self::chunk_tokens`] of any card. Its Gram adds so many tokens at a time, so whole chunks
    /// give the same sums however windows are cut.
    pub const GPU_CHUNK_TOKENS: usize = cuda::gram::CHUNK_TOKENS;

    /// [`Self::dtype`] of the CPU.
    pub const CPU_DTYPE: &'static str = "f32";
    /// [`Self::dtype`] of any card.
    pub const GPU_DTYPE: &'static str = "fp16";

    /// Tokens that are best computed together.
    pub fn chunk_tokens(&self) -> usize {
        match self {
            Self::Cpu => Self::CPU_CHUNK_TOKENS,
            Self::Cuda(_) => Self::GPU_CHUNK_TOKENS,
        }
    }

    /// NVIDIA card `ordinal`, with its kernels compiled.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::Cuda(Cuda::new(ordinal)?))
    }

    /// The first NVIDIA card that the kernels support, or else the CPU. A card that is there but
    /// does not open is an error: running on the CPU instead would take hours and say nothing.
    pub fn best() -> Result<Self> {
        match cuda::probe().cards.iter().find(|card| card.supported) {
            Some(card) => Self::cuda(card.ordinal),
            None => Ok(Self::Cpu),
        }
    }

    /// Memory of the card and how much of it this device holds; none on the CPU.
    pub fn memory(&self) -> Result<Option<MemoryInfo>> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda(cuda) => cuda.memory().map(Some),
        }
    }

    /// Waits for all queued work; what failed on the way is reported under the name of `stage`.
    pub fn synchronize(&self, stage: &'static str) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(cuda) => cuda.synchronize(stage),
        }
    }

    /// Moves a tensor out of device memory, beside the work that is queued next.
    pub fn offload(&self, x: Tensor) -> Result<OffloadedTensor> {
        match x.0 {
            Storage::Cuda(m) => {
                Ok(OffloadedTensor(OffloadedStorage::Cuda(cuda::offload::offload(m)?)))
            }
            storage @ Storage::Cpu(_) => {
                Ok(OffloadedTensor(OffloadedStorage::Here(Tensor(storage))))
            }
        }
    }

    /// Starts to bring an offloaded tensor back, beside the work that is queued; it stays offloaded
    /// too.
    pub fn prefetch(&self, offloaded: &mut OffloadedTensor) -> Result<PrefetchedTensor> {
        Ok(PrefetchedTensor(match &mut offloaded.0 {
            OffloadedStorage::Here(x) => PrefetchedStorage::Here(x.clone()),
            OffloadedStorage::Cuda(offloaded) => {
                PrefetchedStorage::Cuda(cuda::offload::prefetch(offloaded)?)
            }
        }))
    }

    /// The device's name for reports.
    pub fn name(&self) -> String {
        match self {
            Self::Cuda(cuda) => cuda.kind(),
            Self::Cpu => format!("cpu ({} threads)", rayon::current_num_threads()),
        }
    }

    /// What results may depend on to the bit: the card, or the CPU whatever its number of threads.
    /// Of a CPU its widest instructions count, too, by which matrixmultiply and the row loops
    /// choose their code: a fused multiply-add rounds once where others round twice.
    pub fn kind(&self) -> String {
        match self {
            Self::Cuda(_) => self.name(),
            Self::Cpu => format!("cpu ({}{})", std::env::consts::ARCH, cpu_features()),
        }
    }

    /// Type of the numbers that products are made of.
    pub fn dtype(&self) -> &'static str {
        match self {
            Self::Cpu => Self::CPU_DTYPE,
            Self::Cuda(_) => Self::GPU_DTYPE,
        }
    }

    /// Copies a matrix to the device: exact on the CPU (f32), rounded to fp16 on a GPU.
    ///
    /// # Errors
    /// [`Error::HalfOverflow`] when a value is not finite in fp16, on a GPU.
    pub fn upload(&self, matrix: HostMatrix<'_>) -> Result<Tensor> {
        match self {
            Self::Cpu => Ok(Tensor(Storage::Cpu(cpu::rows::upload(matrix)))),
            Self::Cuda(cuda) => Ok(Tensor(Storage::Cuda(cuda::upload::upload(cuda, matrix)?))),
        }
    }

    /// Copies f32 values `[rows, cols]` to the device.
    pub fn upload_f32(&self, values: Array2<f32>) -> Result<Tensor> {
        match self {
            Self::Cpu => Ok(Tensor::from_host(values)),
            Self::Cuda(cuda) => Ok(Tensor(Storage::Cuda(cuda::Matrix::upload_f32(cuda, &values)?))),
        }
    }

    /// Rows `ids` of `table`: token embeddings `[ids.len(), table.cols]`, f32 on every device.
    pub fn gather_rows(&self, table: HostMatrix<'_>, ids: &[u32]) -> Result<Tensor> {
        if let Some(&row) = ids.iter().find(|&&id| id as usize >= table.rows()) {
            return Err(Error::RowOutOfRange { row: row as usize, rows: table.rows() });
        }
        match self {
            Self::Cpu => Ok(Tensor(Storage::Cpu(cpu::rows::gather(table, ids)))),
            Self::Cuda(cuda) => Ok(Tensor(Storage::Cuda(cuda::upload::gather(cuda, table, ids)?))),
        }
    }

    /// Rows `rows` of `x`, in that order.
    pub fn select_rows(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        if let Some(&row) = rows.iter().find(|&&row| row as usize >= x.rows()) {
            return Err(Error::RowOutOfRange { row: row as usize, rows: x.rows() });
        }
        match &x.0 {
            Storage::Cpu(a) => Ok(Tensor(Storage::Cpu(cpu::rows::select(a, rows)))),
            Storage::Cuda(m) => Ok(Tensor(Storage::Cuda(cuda::elementwise::select_rows(m, rows)?))),
        }
    }

    /// x / rms(x) · gain, row by row. A gain of fewer than x.cols() values norms every run of so
    /// many by itself: the heads of queries and keys.
    pub fn rms_norm(&self, x: &Tensor, gain: &[f32], eps: f32) -> Result<Tensor> {
        let fits = !gain.is_empty() && x.cols().is_multiple_of(gain.len());
        ensure_shape(fits, "rms_norm", x.shape(), (1, gain.len()))?;
        match &x.0 {
            Storage::Cpu(a) => Ok(Tensor(Storage::Cpu(cpu::elementwise::rms_norm(a, gain, eps)))),
            Storage::Cuda(m) => {
                Ok(Tensor(Storage::Cuda(cuda::elementwise::rms_norm(m, gain, eps)?)))
            }
        }
    }

    /// x · wᵀ: `[tokens, in] · [out, in]ᵀ → [tokens, out]`.
    pub fn linear(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        ensure_shape(x.cols() == w.cols(), "linear", x.shape(), w.shape())?;
        match (&x.0, &w.0) {
            (Storage::Cpu(x), Storage::Cpu(w)) => {
                let mut out = Array2::zeros((x.nrows(), w.nrows()));
                cpu::matmul::matmul_nt(x.view(), w.view(), 0.0, out.view_mut());
                Ok(Tensor(Storage::Cpu(out)))
            }
            (Storage::Cuda(x), Storage::Cuda(w)) => {
                Ok(Tensor(Storage::Cuda(cuda::gemm::linear(x, w)?)))
            }
            _ => Err(Error::DeviceMismatch { op: "linear" }),
        }
    }

    /// residual += x · wᵀ.
    pub fn linear_add(&self, x: &Tensor, w: &Tensor, residual: &mut Tensor) -> Result<()> {
        ensure_shape(x.cols() == w.cols(), "linear_add", x.shape(), w.shape())?;
        let out = (x.rows(), w.rows());
        ensure_shape(residual.shape() == out, "linear_add", out, residual.shape())?;
        match (&x.0, &w.0, &mut residual.0) {
            (Storage::Cpu(x), Storage::Cpu(w), Storage::Cpu(r)) => {
                cpu::matmul::matmul_nt(x.view(), w.view(), 1.0, r.view_mut());
                Ok(())
            }
            (Storage::Cuda(x), Storage::Cuda(w), Storage::Cuda(r)) => {
                cuda::gemm::linear_add(x, w, r)
            }
            _ => Err(Error::DeviceMismatch { op: "linear_add" }),
        }
    }

    /// Adds `bias`, one value a column, to every row in place.
    pub fn add_bias(&self, x: &mut Tensor, bias: &[f32]) -> Result<()> {
        ensure_shape(x.cols() == bias.len(), "add_bias", x.shape(), (1, bias.len()))?;
        match &mut x.0 {
            Storage::Cpu(a) => cpu::elementwise::add_bias(a, bias),
            Storage::Cuda(m) => cuda::elementwise::add_bias(m, bias)?,
        }
        Ok(())
    }

    /// (x − mean) / √(variance + eps) · gain over every run of `features` values of a row, fp16 on a GPU: a
    /// norm without bias (arXiv 1607.06450). The gain has `features` values, or one for each column.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for columns that are no whole runs and gains of other lengths.
    pub fn layer_norm(
        &self,
        x: &Tensor,
        gain: &[f32],
        features: usize,
        eps: f32,
    ) -> Result<Tensor> {
        const OP: &str = "layer_norm";
        let runs = features > 0 && x.cols().is_multiple_of(features);
        ensure_shape(runs, OP, x.shape(), (1, features))?;
        let gains = gain.len() == features || gain.len() == x.cols();
        ensure_shape(gains, OP, x.shape(), (1, gain.len()))?;
        Ok(Tensor(match &x.0 {
            Storage::Cpu(a) => Storage::Cpu(cpu::elementwise::layer_norm(a, gain, features, eps)),
            Storage::Cuda(m) => {
                Storage::Cuda(cuda::block_parts::layer_norm(m, gain, features, eps)?)
            }
        }))
    }

    /// Rotates each head of `x` `[windows · seq_len, heads · head_dim]` by its position in place, as the
    /// table has it.
    pub fn rope(&self, x: &mut Tensor, table: &RopeTable, seq_len: usize) -> Result<()> {
        table.ensure_heads("rope", x.shape())?;
        ensure_shape(
            seq_len <= table.positions() && x.rows().is_multiple_of(seq_len),
            "rope",
            x.shape(),
            (seq_len, table.head_dim),
        )?;
        match &mut x.0 {
            Storage::Cpu(a) => cpu::elementwise::rope(a, table, seq_len),
            Storage::Cuda(m) => cuda::elementwise::rope(m, table, seq_len)?,
        }
        Ok(())
    }

    /// Causal attention per window of `seq_len` tokens, `[tokens, heads · head_dim]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`], and [`Error::Unsupported`] for a rule without weights and, on a GPU, for
    /// heads as [`Self::check_heads`] refuses.
    pub fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
        rule: &AttentionRule,
    ) -> Result<Tensor> {
        rule.check("attention")?;
        let queries = (q.rows(), shape.heads * shape.head_dim);
        let keys = (q.rows(), shape.kv_heads * shape.head_dim);
        ensure_shape(
            q.shape() == queries && q.rows().is_multiple_of(shape.seq_len),
            "attention",
            q.shape(),
            queries,
        )?;
        ensure_shape(k.shape() == keys, "attention", k.shape(), keys)?;
        ensure_shape(v.shape() == keys, "attention", v.shape(), keys)?;
        match (&q.0, &k.0, &v.0) {
            (Storage::Cpu(q), Storage::Cpu(k), Storage::Cpu(v)) => {
                Ok(Tensor(Storage::Cpu(cpu::attention::causal(q, k, v, shape, rule))))
            }
            (Storage::Cuda(q), Storage::Cuda(k), Storage::Cuda(v)) => {
                Ok(Tensor(Storage::Cuda(cuda::attention::causal(q, k, v, shape, rule)?)))
            }
            _ => Err(Error::DeviceMismatch { op: "attention" }),
        }
    }

    /// activation(gate) · up, element by element.
    pub fn gated(&self, gate: Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        const OP: &str = "gated";
        ensure_shape(gate.shape() == up.shape(), OP, gate.shape(), up.shape())?;
        match (gate.0, &up.0) {
            (Storage::Cpu(gate), Storage::Cpu(up)) => {
                Ok(Tensor(Storage::Cpu(cpu::elementwise::gated(gate, up, activation))))
            }
            (Storage::Cuda(gate), Storage::Cuda(up)) => {
                Ok(Tensor(Storage::Cuda(cuda::elementwise::gated(gate, up, activation)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }

    /// −log p(target) in nats for rows of final hidden states `[tokens, hidden]` under the head
    /// `[vocab, hidden]`; `targets` has one id a row. Logits go through [`Self::softcap`] where there is a
    /// cap.
    pub fn token_nll(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        targets: &[u32],
        softcap: Option<f32>,
    ) -> Result<Vec<f32>> {
        ensure_cap("token_nll", softcap)?;
        ensure_shape(hidden.cols() == head.cols(), "token_nll", hidden.shape(), head.shape())?;
        ensure_shape(
            hidden.rows() == targets.len(),
            "token_nll",
            hidden.shape(),
            (targets.len(), 1),
        )?;
        if let Some(&row) = targets.iter().find(|&&t| t as usize >= head.rows()) {
            return Err(Error::RowOutOfRange { row: row as usize, rows: head.rows() });
        }
        match (&hidden.0, &head.0) {
            (Storage::Cpu(h), Storage::Cpu(w)) => {
                Ok(cpu::token_loss::token_nll(h, w, targets, softcap))
            }
            (Storage::Cuda(h), Storage::Cuda(w)) => {
                cuda::token_loss::token_nll(h, w, targets, softcap)
            }
            _ => Err(Error::DeviceMismatch { op: "token_nll" }),
        }
    }

    /// KL(p‖q) in nats a row, p and q being the next-token distributions of two pairs of final
    /// hidden states and heads over the same vocabulary, both with the same cap on logits, if any.
    pub fn token_kl(
        &self,
        p: (&Tensor, &Tensor),
        q: (&Tensor, &Tensor),
        softcap: Option<f32>,
    ) -> Result<Vec<f32>> {
        ensure_cap("token_kl", softcap)?;
        for (hidden, head) in [p, q] {
            ensure_shape(hidden.cols() == head.cols(), "token_kl", hidden.shape(), head.shape())?;
        }
        ensure_shape(p.0.rows() == q.0.rows(), "token_kl", p.0.shape(), q.0.shape())?;
        ensure_shape(p.1.rows() == q.1.rows(), "token_kl", p.1.shape(), q.1.shape())?;
        match (&p.0.0, &p.1.0, &q.0.0, &q.1.0) {
            (Storage::Cpu(ph), Storage::Cpu(pw), Storage::Cpu(qh), Storage::Cpu(qw)) => {
                Ok(cpu::token_loss::token_kl((ph, pw), (qh, qw), softcap))
            }
            (Storage::Cuda(ph), Storage::Cuda(pw), Storage::Cuda(qh), Storage::Cuda(qw)) => {
                cuda::token_loss::token_kl((ph, pw), (qh, qw), softcap)
            }
            _ => Err(Error::DeviceMismatch { op: "token_kl" }),
        }
    }

    /// A weight `[rows, cols]` on a GPU with every value rounded to nearest on the grid of its row's
    /// group of `group` columns: AutoGPTQ's symmetric scale in fp16, codes from 0 to `max_code`, `zero`
    /// meaning 0. The host's is `gptq_quant::round_to_nearest`, which makes the codes as well.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`] for a tensor in host memory, and those of the launch.
    pub fn round_groups(
        &self,
        weight: &Tensor,
        group: usize,
        (zero, max_code): (f32, f32),
    ) -> Result<Tensor> {
        match (self, &weight.0) {
            (Self::Cuda(_), Storage::Cuda(m)) => Ok(Tensor(Storage::Cuda(
                cuda::elementwise::round_groups(m, group, zero, max_code)?,
            ))),
            _ => Err(Error::DeviceMismatch { op: "round_groups" }),
        }
    }

    /// True when every value is finite.
    pub fn all_finite(&self, x: &Tensor) -> Result<bool> {
        match &x.0 {
            Storage::Cpu(a) => Ok(cpu::elementwise::all_finite(a)),
            Storage::Cuda(m) => cuda::elementwise::all_finite(m),
        }
    }
}

/// The instructions by which products and row loops are chosen at run time, as matrixmultiply
/// (without its feature `avx512`) and `cpu::simd` test for them.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> &'static str {
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        ", fma"
    } else if is_x86_feature_detected!("avx") {
        ", avx"
    } else {
        ", sse2"
    }
}

/// Elsewhere there is one code for all processors of an architecture.
#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> &'static str {
    ""
}
