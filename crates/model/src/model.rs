//! A checkpoint as a model: embeddings, blocks one at a time, final norm and head.

use gptq_checkpoint::{
    Checkpoint, DenseId, DenseShape, EMBEDDING, Experts, FINAL_NORM, GptqLinear, HEAD, LEAVES,
    LinearShape, ModelConfig, NormShape, TensorRef,
};
use gptq_compute::cuda::{PackedLinear, dequantize};
use gptq_compute::{Device, FloatType, HostMatrix, Ranks, Tensor};
use half::f16;

use crate::block::{Block, BlockParts, Gains, Linear};
use crate::block_rule::{BlockRule, Norm, Ropes};
use crate::error::{Error, Result};
use crate::experts::Mixture;
use crate::values::{SourcePrecision, Values};

/// A checkpoint, dense or GPTQ, and the device to run it on.
#[derive(Debug)]
pub struct Model<'a> {
    checkpoint: &'a Checkpoint,
    device: Device,
    precision: SourcePrecision,
    embedding: Values<'a>,
    /// Tokens of the longest windows.
    seq_len: usize,
    /// Angles for windows of that length.
    ropes: Ropes,
    ranks: Ranks,
}

/// The norm before the head. What logits are multiplied by is in its gain.
#[derive(Clone, Debug)]
pub struct FinalNorm {
    pub(crate) rule: Norm,
    pub(crate) gain: Vec<f32>,
}

impl FinalNorm {
    /// A model's, with this gain.
    #[must_use]
    pub fn new(config: &ModelConfig, mut gain: Vec<f32>) -> Self {
        gain.iter_mut().for_each(|gain| *gain *= config.factors.logits);
        Self { rule: Norm::of(config), gain }
    }

    /// Takes the gradient of the normed states, which [`Self::apply`] gives for `hidden`, to that of `hidden`, in
    /// f32; both `[tokens, hidden]`.
    ///
    /// # Errors
    /// Those of the device, and [`Error::NoBackward`] for a norm that takes means off.
    pub fn backward(&self, device: &Device, hidden: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        if self.rule.layer {
            let why = "the last norm takes means off";
            return Err(Error::NoBackward { what: "The head".to_owned(), why });
        }
        let mut of_hidden = device.zeros(hidden.rows(), hidden.cols())?;
        let (gain, eps) = (&self.gain, self.rule.eps);
        device.rms_norm_backward_add(hidden, gain, eps, gradient, &mut of_hidden)?;
        Ok(of_hidden)
    }

    /// Of hidden states `[tokens, hidden]`.
    pub fn apply(&self, device: &Device, hidden: &Tensor) -> Result<Tensor> {
        self.rule.apply(device, hidden, &self.gain, hidden.cols())
    }
}

/// Final norm and language-model head on a device.
#[derive(Debug)]
pub struct Head<W = Tensor> {
    pub(crate) norm: FinalNorm,
    pub(crate) weight: W,
}

impl<W> Head<W> {
    /// Final norm of hidden states `[tokens, hidden]`.
    pub fn norm(&self, device: &Device, hidden: &Tensor) -> Result<Tensor> {
        self.norm.apply(device, hidden)
    }

    /// The head's weights `[vocab, hidden]`.
    pub fn weight(&self) -> &W {
        &self.weight
    }
}

/// Refuses windows of more tokens than the model was made for.
///
/// # Errors
/// [`Error::ContextExceeded`].
pub fn check_context(config: &ModelConfig, seq_len: usize) -> Result<()> {
    let max = config.positions();
    if seq_len > max { Err(Error::ContextExceeded { seq_len, max }) } else { Ok(()) }
}

impl<'a> Model<'a> {
    /// Prepares to run windows of up to `seq_len` tokens.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] when the windows are longer than the model was made for, and as
    /// [`Checkpoint::check_tensors`].
    pub fn new(
        checkpoint: &'a Checkpoint,
        device: Device,
        precision: SourcePrecision,
        seq_len: usize,
    ) -> Result<Self> {
        let config = checkpoint.config();
        check_context(config, seq_len)?;
        checkpoint.check_tensors()?;
        let table =
            checkpoint.tensor_shaped(EMBEDDING, &[config.vocab_size, config.hidden_size])?;
        table.check_finite()?;
        let embedding = Values::read(table, precision)?;
        checkpoint.release(EMBEDDING);
        Ok(Self {
            checkpoint,
            device,
            precision,
            embedding,
            seq_len,
            ropes: Ropes::of(config, seq_len),
            ranks: Ranks::alone(),
        })
    }

    /// Runs the model together with other ranks, each of which holds it and has its share of the
    /// windows.
    #[must_use]
    pub fn with_ranks(mut self, ranks: Ranks) -> Self {
        self.ranks = ranks;
        self
    }

    /// Replaces the embedding, row-major `[vocab, hidden]`: the model's own, turned into other
    /// coordinates.
    ///
    /// # Panics
    /// When the number of values is another.
    #[must_use]
    pub fn with_embedding(mut self, values: Vec<f16>) -> Self {
        let config = self.config();
        assert_eq!(values.len(), config.vocab_size * config.hidden_size, "values of the embedding");
        self.embedding = Values::Half(values);
        self
    }

    /// The device that runs the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the weights become on their way to the device.
    pub fn precision(&self) -> SourcePrecision {
        self.precision
    }

    /// The ranks that run the model.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// The model's shape.
    pub fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    /// The checkpoint behind the model.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// Rotary angles for windows of `seq_len` tokens (see [`Ropes::for_windows`]).
    pub fn ropes(&self, seq_len: usize) -> &Ropes {
        self.ropes.for_windows(seq_len)
    }

    /// Embeddings of `ids`, `[ids.len(), hidden]`.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let config = self.config();
        let table = self.embedding.matrix(config.vocab_size, config.hidden_size);
        let mut rows = self.device.gather_rows(table, ids)?;
        let factor = match config.embedding_factor_is_rounded() {
            true => self.embedding.rounded(config.factors.embedding),
            false => config.factors.embedding,
        };
        if factor != 1.0 {
            self.device.scale(&mut rows, factor)?;
        }
        Ok(rows)
    }

    /// Loads one block; quantized linears are dequantized to what their file means.
    ///
    /// # Errors
    /// Missing tensors, wrong shapes, and NaN or infinities in the weights.
    pub fn load_block(&self, index: usize) -> Result<Block> {
        self.load_block_on(&self.device, index)
    }

    /// As [`Self::load_block`], to another device than the one that runs the model.
    pub fn load_block_on(&self, device: &Device, index: usize) -> Result<Block> {
        let frame = self.load_frame_on(device, index)?;
        Ok(Block::new(frame.with_weights(|Linear { name, weight: shape, .. }| {
            self.load_linear(device, name, shape)
        })?))
    }

    /// Loads a block without its linears' weights, in whose places their shapes are.
    ///
    /// # Errors
    /// As [`Self::load_block`].
    pub fn load_frame(&self, index: usize) -> Result<BlockParts<LinearShape>> {
        self.load_frame_on(&self.device, index)
    }

    pub(crate) fn load_frame_on(
        &self,
        device: &Device,
        index: usize,
    ) -> Result<BlockParts<LinearShape>> {
        let config = self.config();
        let prefix = ModelConfig::block_prefix(index);
        let linear = |shape: LinearShape| {
            let name = format!("{prefix}.{}", shape.name);
            let bias = self.load_bias(&name, &shape)?;
            Ok(Linear { id: shape.id, name, weight: shape, bias })
        };
        let norm = |norm: NormShape| {
            Ok((norm.id, self.gain(&format!("{prefix}.{}.weight", norm.name), &norm.shape)?))
        };
        let linears = config.block_linears(index).into_iter().map(linear);
        let gains = config.block_norms(index).into_iter().map(norm);
        Ok(BlockParts {
            index,
            linears: linears.collect::<Result<_>>()?,
            gains: Gains::new(gains.collect::<Result<_>>()?, config.norm.offset()),
            mixture: config.experts(index).map(|e| self.mixture(device, index, e)).transpose()?,
            rule: BlockRule::of(config, index, self.seq_len),
        })
    }

    /// Loads what routes tokens to the experts of a block.
    fn mixture(&self, device: &Device, index: usize, experts: &Experts) -> Result<Mixture> {
        let config = self.config();
        let prefix = ModelConfig::block_prefix(index);
        let (mut router, mut correction, mut shared_gate) = (None, None, None);
        for DenseShape { id, name, shape, .. } in config.block_dense(index) {
            let name = format!("{prefix}.{name}");
            match (id, shape.as_slice()) {
                (DenseId::Router, &[rows, cols]) => {
                    router = Some(self.matrix(device, &name, rows, cols)?);
                }
                (DenseId::SharedGate, &[rows, cols]) => {
                    shared_gate = Some(self.matrix(device, &name, rows, cols)?);
                }
                (_, shape) => {
                    let tensor = self.checkpoint.tensor_shaped(&name, shape)?;
                    tensor.check_finite()?;
                    correction = Some(tensor.to_f32());
                    self.checkpoint.release(&name);
                }
            }
        }
        // The first of the tensors listed.
        let Some(router) = router else { unreachable!("every block with experts has a router") };
        Ok(Mixture { experts: experts.clone(), router, correction, shared_gate })
    }

    /// Brings a block in host memory to the device: as it is on the CPU, its weights rounded to fp16
    /// on a GPU. With `exact`, a block on a GPU keeps those in host memory as well.
    ///
    /// # Errors
    /// A weight beyond fp16, for a GPU or with `exact`: what is made of it could not be held.
    pub fn place(&self, block: Block, exact: bool) -> Result<Block> {
        let tensor = |name: &str| format!("{name}.weight");
        let Device::Cuda(_) = self.device else {
            for linear in block.linears().iter().filter(|_| exact) {
                let beyond = |v: &&f32| !f16::from_f32(**v).is_finite();
                let count = linear.weight.as_host().iter().filter(beyond).count();
                if count > 0 {
                    let source = gptq_compute::Error::HalfOverflow { count };
                    return Err(Error::Overflow { tensor: tensor(&linear.name), source });
                }
            }
            return Ok(block);
        };
        block.place(exact, |name, weight| {
            let host = weight.as_host().as_standard_layout();
            let bytes = bytemuck::cast_slice(host.as_slice().unwrap_or_default());
            let matrix = HostMatrix::new(bytes, FloatType::F32, weight.rows(), weight.cols());
            self.device.upload(matrix).map_err(|source| overflow(|| tensor(name), source))
        })
    }

    /// Loads the final norm and the head.
    pub fn load_head(&self) -> Result<Head> {
        let config = self.config();
        Ok(Head {
            norm: self.final_norm()?,
            weight: self.matrix(&self.device, HEAD, config.vocab_size, config.hidden_size)?,
        })
    }

    fn load_linear(&self, device: &Device, name: &str, shape: &LinearShape) -> Result<Tensor> {
        let (rows, cols) = (shape.out_features, shape.in_features);
        match self.gptq_linear(name, shape)? {
            Some(linear) => dequantized(device, &linear),
            None => self.matrix(device, &format!("{name}.weight"), rows, cols),
        }
    }

    /// Reads a quantized linear and gives its pages back; `None` for one that is dense.
    pub(crate) fn gptq_linear(
        &self,
        name: &str,
        shape: &LinearShape,
    ) -> Result<Option<GptqLinear>> {
        if !self.checkpoint.has_gptq_linear(name) {
            return Ok(None);
        }
        let linear = self.checkpoint.gptq_linear(name, shape)?;
        for leaf in LEAVES {
            self.checkpoint.release(&format!("{name}.{leaf}"));
        }
        Ok(Some(linear))
    }

    /// Brings a dense weight `[rows, cols]` to the device and gives its pages back.
    fn matrix(&self, device: &Device, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor_shaped(name, &[rows, cols])?;
        let matrix = match device {
            Device::Cpu => {
                tensor.check_finite()?;
                let values = Values::read(tensor, self.precision)?;
                device.upload(values.matrix(rows, cols))?
            }
            // A GPU's weights are fp16 whatever the precision; it rounds, and looks for values
            // that are not finite afterwards, on its own.
            Device::Cuda(_) => {
                let values = Values::read(tensor, SourcePrecision::Stored)?;
                let matrix = values.matrix(rows, cols);
                device.upload(matrix).map_err(|source| overflow(|| name.to_owned(), source))?
            }
        };
        self.checkpoint.release(name);
        Ok(matrix)
    }

    /// Bias of a linear; `None` also for one of zeros, which adds nothing.
    fn load_bias(&self, name: &str, shape: &LinearShape) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.checkpoint.linear_bias(name, shape)? else { return Ok(None) };
        let bias = self.values(&tensor)?;
        Ok(Some(bias).filter(|bias| bias.iter().any(|&v| v != 0.0)))
    }

    /// The norm before the head.
    pub(crate) fn final_norm(&self) -> Result<FinalNorm> {
        let config = self.config();
        Ok(FinalNorm::new(config, self.gain(FINAL_NORM, &[config.hidden_size])?))
    }

    /// Gain of a norm, as it is multiplied with.
    fn gain(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.checkpoint.tensor_shaped(name, shape)?;
        tensor.check_finite()?;
        let mut values = self.values(&tensor)?;
        let offset = self.config().norm.offset();
        values.iter_mut().for_each(|value| *value += offset);
        self.checkpoint.release(name);
        Ok(values)
    }

    fn values(&self, tensor: &TensorRef<'_>) -> Result<Vec<f32>> {
        Ok(match self.precision {
            SourcePrecision::Stored => tensor.to_f32(),
            SourcePrecision::Half => tensor.to_f16()?.iter().map(|v| v.to_f32()).collect(),
        })
    }
}

/// Names the tensor that does not fit in fp16.
fn overflow(tensor: impl FnOnce() -> String, source: gptq_compute::Error) -> Error {
    match source {
        gptq_compute::Error::HalfOverflow { .. } => Error::Overflow { tensor: tensor(), source },
        other => Error::Compute(other),
    }
}

/// What a quantized linear means, `[out, in]`: f32 on the CPU, fp16 on a GPU.
fn dequantized(device: &Device, linear: &GptqLinear) -> Result<Tensor> {
    let (rows, cols) = (linear.out_features, linear.in_features);
    match device {
        Device::Cpu => {
            let values = linear.dequantize();
            let bytes = bytemuck::cast_slice(&values);
            Ok(device.upload(HostMatrix::new(bytes, FloatType::F32, rows, cols))?)
        }
        Device::Cuda(cuda) => {
            let packed = PackedLinear {
                bits: linear.bits.get(),
                rows,
                cols,
                qweight: &linear.qweight,
                qzeros: &linear.qzeros,
                scales: &linear.scales,
                g_idx: bytemuck::cast_slice(&linear.g_idx),
            };
            Ok(dequantize(cuda, &packed)?)
        }
    }
}
