//! A checkpoint as a model: embeddings, blocks one at a time, final norm and head.

use gptq_checkpoint::{Checkpoint, GptqLinear, LinearShape, ModelConfig};
use gptq_compute::cuda::{PackedLinear, dequantise};
use gptq_compute::{Device, FloatType, HostMatrix, Ranks, RopeTable, Tensor};
use half::f16;

use crate::block::{Block, BlockParts};
use crate::error::{Error, Result};
use crate::values::Values;

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// What a dense checkpoint's weights become on their way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourcePrecision {
    /// The stored values.
    Stored,
    /// Rounded to fp16, the type of a GPTQ file and of the models that the published branches were
    /// made from; a finite value beyond fp16 is an error.
    Half,
}

/// A Llama checkpoint, dense or GPTQ, and the device to run it on.
#[derive(Debug)]
pub struct Model<'a> {
    checkpoint: &'a Checkpoint,
    device: Device,
    precision: SourcePrecision,
    embedding: Values<'a>,
    rope: RopeTable,
    ranks: Ranks,
}

/// Final norm and language-model head on a device.
#[derive(Debug)]
pub struct Head {
    norm: Vec<f32>,
    eps: f32,
    weight: Tensor,
}

impl Head {
    /// Final norm of hidden states `[tokens, hidden]`.
    pub fn norm(&self, device: &Device, hidden: &Tensor) -> Result<Tensor> {
        Ok(device.rms_norm(hidden, &self.norm, self.eps)?)
    }

    /// The head's weights `[vocab, hidden]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl<'a> Model<'a> {
    /// Prepares to run windows of up to `seq_len` tokens.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] when the windows are longer than the model was made for.
    pub fn new(
        checkpoint: &'a Checkpoint,
        device: Device,
        precision: SourcePrecision,
        seq_len: usize,
    ) -> Result<Self> {
        let config = checkpoint.config();
        let max = config.max_position_embeddings;
        if seq_len > max {
            return Err(Error::ContextExceeded { seq_len, max });
        }
        let rope = RopeTable::new(config.rope_theta, config.head_dim, seq_len);
        let table =
            checkpoint.tensor_shaped(EMBEDDING, &[config.vocab_size, config.hidden_size])?;
        table.check_finite()?;
        let embedding = Values::read(&table, precision)?;
        Ok(Self { checkpoint, device, precision, embedding, rope, ranks: Ranks::alone() })
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

    /// Rotary angles up to the window length.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Embeddings of `ids`, `[ids.len(), hidden]`.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let config = self.config();
        let table = self.embedding.matrix(config.vocab_size, config.hidden_size);
        Ok(self.device.gather_rows(table, ids)?)
    }

    /// Loads one block; quantised linears are dequantised to what their file means.
    ///
    /// # Errors
    /// Missing tensors, wrong shapes, and NaN or infinities in the weights.
    pub fn load_block(&self, index: usize) -> Result<Block> {
        self.load_block_on(&self.device, index)
    }

    /// As [`Self::load_block`], to another device than the one that runs the model.
    pub fn load_block_on(&self, device: &Device, index: usize) -> Result<Block> {
        let config = self.config();
        let prefix = ModelConfig::block_prefix(index);
        let shapes = config.block_linears();
        let mut linears = Vec::with_capacity(shapes.len());
        for shape in &shapes {
            linears.push(self.load_linear(device, &format!("{prefix}.{}", shape.name), shape)?);
        }
        let norm = |name: &str| self.vector(&format!("{prefix}.{name}.weight"));
        Ok(Block::new(BlockParts {
            index,
            linears,
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            norm_eps: config.rms_norm_eps,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        }))
    }

    /// Loads the final norm and the head (the embeddings, where they are tied).
    pub fn load_head(&self) -> Result<Head> {
        let config = self.config();
        let tied = config.tie_word_embeddings && !self.checkpoint.contains(HEAD);
        let name = if tied { EMBEDDING } else { HEAD };
        Ok(Head {
            norm: self.vector(FINAL_NORM)?,
            eps: config.rms_norm_eps,
            weight: self.matrix(&self.device, name, config.vocab_size, config.hidden_size)?,
        })
    }

    fn load_linear(&self, device: &Device, name: &str, shape: &LinearShape) -> Result<Tensor> {
        let (rows, cols) = (shape.out_features, shape.in_features);
        if self.checkpoint.has_gptq_linear(name) {
            let linear = self.checkpoint.gptq_linear(name, shape)?;
            for leaf in ["qweight", "qzeros", "scales", "g_idx"] {
                self.checkpoint.release(&format!("{name}.{leaf}"));
            }
            return dequantised(device, &linear);
        }
        self.matrix(device, &format!("{name}.weight"), rows, cols)
    }

    /// Brings a dense weight `[rows, cols]` to the device and gives its pages back.
    fn matrix(&self, device: &Device, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor_shaped(name, &[rows, cols])?;
        let matrix = match device {
            Device::Cpu => {
                tensor.check_finite()?;
                let values = Values::read(&tensor, self.precision)?;
                device.upload(values.matrix(rows, cols))?
            }
            // A GPU's weights are fp16 whatever the precision; it rounds, and looks for values
            // that are not finite afterwards, on its own.
            Device::Cuda(_) => {
                let values = Values::read(&tensor, SourcePrecision::Stored)?;
                device.upload(values.matrix(rows, cols)).map_err(|source| match source {
                    gptq_compute::Error::HalfOverflow { .. } => {
                        Error::Overflow { tensor: name.to_owned(), source }
                    }
                    other => Error::Compute(other),
                })?
            }
        };
        self.checkpoint.release(name);
        Ok(matrix)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.checkpoint.tensor_shaped(name, &[self.config().hidden_size])?;
        tensor.check_finite()?;
        Ok(match self.precision {
            SourcePrecision::Stored => tensor.to_f32(),
            SourcePrecision::Half => tensor.to_f16()?.iter().map(|v| v.to_f32()).collect(),
        })
    }
}

/// What a quantised linear means, `[out, in]`: f32 on the CPU, fp16 on a GPU.
fn dequantised(device: &Device, linear: &GptqLinear) -> Result<Tensor> {
    let (rows, cols) = (linear.out_features, linear.in_features);
    match device {
        Device::Cpu => {
            let values = linear.dequantise();
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
                zero_offset: 1,
            };
            Ok(dequantise(cuda, &packed)?)
        }
    }
}
