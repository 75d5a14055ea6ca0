//! One decoder block: its weights, and its forward pass cut between the linears.

use gptq_checkpoint::ModelConfig;
use gptq_compute::{
    Activation, AttentionRule, AttentionShape, Device, KvCache, Resident, RopeTable, Span,
    StepBlock, Tensor,
};
use half::f16;

use crate::error::Result;

/// A linear of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearId {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl LinearId {
    /// All linears, in the order of [`ModelConfig::LINEARS`].
    pub const ALL: [Self; 7] =
        [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
}

/// Linears that read the same inputs; the order in which a block is calibrated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// q, k and v read the normed hidden states.
    Qkv,
    /// o reads the heads' contexts.
    Output,
    /// gate and up read the normed hidden states after attention.
    GateUp,
    /// down reads silu(gate) · up.
    Down,
}

impl Stage {
    /// The stages in forward order.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];

    /// The linears of this stage.
    pub fn linears(self) -> &'static [LinearId] {
        match self {
            Self::Qkv => &[LinearId::Q, LinearId::K, LinearId::V],
            Self::Output => &[LinearId::O],
            Self::GateUp => &[LinearId::Gate, LinearId::Up],
            Self::Down => &[LinearId::Down],
        }
    }
}

/// To the nearest fp16 values.
fn round(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
}

/// A weight `[out, in]` in a form that tokens can be multiplied with.
pub trait Weight {
    /// x · wᵀ: `[tokens, in] → [tokens, out]`.
    ///
    /// # Errors
    /// Those of the device.
    fn multiply(&self, device: &Device, x: &Tensor) -> Result<Tensor>;

    /// residual += x · wᵀ.
    ///
    /// # Errors
    /// Those of the device.
    fn multiply_add(&self, device: &Device, x: &Tensor, residual: &mut Tensor) -> Result<()>;
}

impl Weight for Tensor {
    fn multiply(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        Ok(device.linear(x, self)?)
    }

    fn multiply_add(&self, device: &Device, x: &Tensor, residual: &mut Tensor) -> Result<()> {
        Ok(device.linear_add(x, self, residual)?)
    }
}

impl Weight for Resident {
    fn multiply(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        Ok(device.resident_linear(x, self)?)
    }

    fn multiply_add(&self, device: &Device, x: &Tensor, residual: &mut Tensor) -> Result<()> {
        Ok(device.resident_linear_add(x, self, residual)?)
    }
}

/// What the rows of a pass are, and what each of them attends to: itself and what is before it.
enum Rows<'a> {
    /// Whole windows of so many tokens.
    Windows(&'a RopeTable, usize),
    /// Ends of sequences whose beginnings are in a cache.
    Spans(&'a RopeTable, &'a [Span], &'a mut KvCache),
}

/// A decoder block on a device.
#[derive(Clone, Debug)]
pub struct Block<W = Tensor> {
    parts: BlockParts<W>,
    /// Weights in host memory, of which those on the device are a rounding; empty or all seven.
    exact: Vec<Tensor>,
}

/// What a block is made of.
#[derive(Clone, Debug)]
pub struct BlockParts<W = Tensor> {
    /// Position in the model, from 0.
    pub index: usize,
    /// The seven weights `[out_features, in_features]`, in the order of [`LinearId::ALL`].
    pub linears: Vec<W>,
    /// Their biases, of `out_features` values where there is one.
    pub biases: [Option<Vec<f32>>; 7],
    /// Gains of the norms of every query head and of every key head, where there are such norms.
    pub head_norms: Option<[Vec<f32>; 2]>,
    /// Gain of the norm before attention.
    pub input_norm: Vec<f32>,
    /// Gain of the norm before the MLP.
    pub post_attention_norm: Vec<f32>,
    /// Added to mean squares in norms.
    pub norm_eps: f32,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
}

impl<W> BlockParts<W> {
    /// The same with other weights.
    #[must_use]
    pub fn with_linears<V>(self, linears: Vec<V>) -> BlockParts<V> {
        BlockParts {
            index: self.index,
            linears,
            biases: self.biases,
            head_norms: self.head_norms,
            input_norm: self.input_norm,
            post_attention_norm: self.post_attention_norm,
            norm_eps: self.norm_eps,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }
}

impl<W> Block<W> {
    /// A block of these parts.
    ///
    /// # Panics
    /// When there are not seven linears.
    pub fn new(parts: BlockParts<W>) -> Self {
        assert_eq!(parts.linears.len(), LinearId::ALL.len(), "linears of a block");
        Self { parts, exact: Vec::new() }
    }

    /// Position in the model, from 0.
    pub fn index(&self) -> usize {
        self.parts.index
    }

    /// Weights of a linear `[out_features, in_features]`.
    pub fn linear(&self, id: LinearId) -> &W {
        &self.parts.linears[id as usize]
    }

    /// Prefix of a linear's tensors in a checkpoint.
    #[must_use]
    pub fn linear_name(&self, id: LinearId) -> String {
        let prefix = ModelConfig::block_prefix(self.index());
        format!("{prefix}.{}", ModelConfig::LINEARS[id as usize])
    }

    /// Bias of a linear.
    pub fn bias(&self, id: LinearId) -> Option<&[f32]> {
        self.parts.biases[id as usize].as_deref()
    }
}

impl Block {
    /// Replaces a linear's weights, by what its quantized form dequantizes to.
    pub fn set_linear(&mut self, id: LinearId, weight: Tensor) {
        self.parts.linears[id as usize] = weight;
    }

    /// Bias of a linear, for writing.
    pub fn bias_mut(&mut self, id: LinearId) -> Option<&mut [f32]> {
        self.parts.biases[id as usize].as_deref_mut()
    }

    /// Moves every weight through `place`, to a device that rounds it; `keep` holds on to what goes
    /// in.
    pub(crate) fn place(
        mut self,
        keep: bool,
        place: impl Fn(LinearId, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        for id in LinearId::ALL {
            let placed = place(id, self.linear(id))?;
            let exact = std::mem::replace(&mut self.parts.linears[id as usize], placed);
            if keep {
                self.exact.push(exact);
            }
        }
        Ok(self)
    }

    /// The weights that the device's are a rounding of, in the order of [`LinearId::ALL`] and in
    /// host memory, where the block was placed with them; empty otherwise.
    pub fn take_exact(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.exact)
    }

    /// Replaces the gains of both norms by ones and returns them, for linears to take over: first
    /// that before attention, then that before the MLP.
    pub fn take_gains(&mut self) -> [Vec<f32>; 2] {
        [&mut self.parts.input_norm, &mut self.parts.post_attention_norm].map(|gain| {
            let ones = vec![1.0; gain.len()];
            std::mem::replace(gain, ones)
        })
    }

    /// Rounds the biases to fp16, as files hold them.
    pub fn round_biases(&mut self) {
        self.parts.biases.iter_mut().flatten().for_each(|bias| round(bias));
    }

    /// Rounds the gains of all norms to fp16, as files hold them.
    pub fn round_norms(&mut self) {
        let BlockParts { input_norm, post_attention_norm, head_norms, .. } = &mut self.parts;
        let norms = [input_norm, post_attention_norm].into_iter();
        norms.chain(head_norms.iter_mut().flatten()).for_each(|gain| round(gain));
    }

    /// Inputs of a stage's linears, `[tokens, in_features]`, from the hidden states that the stages
    /// before have left, over whole windows of `seq_len` tokens.
    ///
    /// For o and down the norm before q or gate is computed once more, since it is not at hand: one
    /// pass over memory against holding all of it.
    pub fn stage_input(
        &self,
        device: &Device,
        stage: Stage,
        hidden: &Tensor,
        rope: &RopeTable,
        seq_len: usize,
    ) -> Result<Tensor> {
        self.next_input(device, stage, hidden, None, &mut Rows::Windows(rope, seq_len))
    }
}

impl Block<Resident> {
    /// What a device's program for steps is made of, with the cache that they go on with.
    pub fn step<'a>(&'a self, cache: &'a KvCache) -> StepBlock<'a> {
        let norms = &self.parts.head_norms;
        StepBlock {
            linears: LinearId::ALL.map(|id| self.linear(id)),
            biases: LinearId::ALL.map(|id| self.bias(id)),
            head_norms: norms.as_ref().map(|norms| norms.each_ref().map(Vec::as_slice)),
            norms: [&self.parts.input_norm, &self.parts.post_attention_norm],
            cache,
        }
    }
}

impl<W: Weight> Block<W> {
    /// Outputs of a linear with its bias.
    fn project(&self, device: &Device, input: &Tensor, id: LinearId) -> Result<Tensor> {
        let mut output = self.linear(id).multiply(device, input)?;
        if let Some(bias) = self.bias(id) {
            device.add_bias(&mut output, bias)?;
        }
        Ok(output)
    }

    /// Input of o from the inputs of q, k, v: projections, norms of heads, rotary embedding, causal
    /// attention.
    fn attention(&self, device: &Device, input: &Tensor, rows: &mut Rows<'_>) -> Result<Tensor> {
        let mut q = self.project(device, input, LinearId::Q)?;
        let mut k = self.project(device, input, LinearId::K)?;
        let v = self.project(device, input, LinearId::V)?;
        if let Some([q_gain, k_gain]) = &self.parts.head_norms {
            q = device.rms_norm(&q, q_gain, self.parts.norm_eps)?;
            k = device.rms_norm(&k, k_gain, self.parts.norm_eps)?;
        }
        let rule = AttentionRule::llama(self.parts.head_dim);
        match rows {
            Rows::Windows(rope, seq_len) => {
                device.rope(&mut q, rope, *seq_len)?;
                device.rope(&mut k, rope, *seq_len)?;
                let BlockParts { heads, kv_heads, head_dim, .. } = self.parts;
                let shape = AttentionShape { heads, kv_heads, head_dim, seq_len: *seq_len };
                Ok(device.attention(&q, &k, &v, shape, &rule)?)
            }
            Rows::Spans(rope, spans, cache) => {
                device.rope_spans(&mut q, rope, spans)?;
                device.rope_spans(&mut k, rope, spans)?;
                Ok(device.cached_attention(&q, &k, &v, cache, spans, &rule)?)
            }
        }
    }

    /// Input of down: silu(gate(input)) · up(input), `[tokens, intermediate]`.
    fn activation(&self, device: &Device, input: &Tensor) -> Result<Tensor> {
        let gate = self.project(device, input, LinearId::Gate)?;
        let up = self.project(device, input, LinearId::Up)?;
        Ok(device.gated(gate, &up, Activation::Silu)?)
    }

    /// As [`Block::stage_input`], of any rows, from the inputs of the stage before where they are at hand.
    fn next_input(
        &self,
        device: &Device,
        stage: Stage,
        hidden: &Tensor,
        before: Option<&Tensor>,
        rows: &mut Rows<'_>,
    ) -> Result<Tensor> {
        let BlockParts { input_norm, post_attention_norm, norm_eps, .. } = &self.parts;
        let normed = |gain: &[f32]| Ok(device.rms_norm(hidden, gain, *norm_eps)?);
        match (stage, before) {
            (Stage::Qkv, _) => normed(input_norm),
            (Stage::Output, Some(input)) => self.attention(device, input, rows),
            (Stage::Output, None) => self.attention(device, &normed(input_norm)?, rows),
            (Stage::GateUp, _) => normed(post_attention_norm),
            (Stage::Down, Some(input)) => self.activation(device, input),
            (Stage::Down, None) => self.activation(device, &normed(post_attention_norm)?),
        }
    }

    /// Adds what a stage gives to the hidden states: the products of o or down. Those of the other
    /// linears go into the next stage's inputs alone.
    pub fn stage_output(
        &self,
        device: &Device,
        stage: Stage,
        input: &Tensor,
        hidden: &mut Tensor,
    ) -> Result<()> {
        let id = match stage {
            Stage::Qkv | Stage::GateUp => return Ok(()),
            Stage::Output => LinearId::O,
            Stage::Down => LinearId::Down,
        };
        self.linear(id).multiply_add(device, input, hidden)?;
        if let Some(bias) = self.bias(id) {
            device.add_bias(hidden, bias)?;
        }
        Ok(())
    }

    /// The whole block over whole windows of `seq_len` tokens, in place of `hidden`.
    pub fn forward(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        rope: &RopeTable,
        seq_len: usize,
    ) -> Result<()> {
        self.forward_looking(device, hidden, rope, seq_len, |_, _| Ok(()))
    }

    /// As [`Self::forward`], showing `look` the inputs of every stage's linears.
    pub fn forward_looking(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        rope: &RopeTable,
        seq_len: usize,
        look: impl FnMut(Stage, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.pass(device, hidden, Rows::Windows(rope, seq_len), look)
    }

    /// The whole block over the ends of sequences, in place of their hidden states; their keys and
    /// values go into `cache`.
    ///
    /// # Errors
    /// Those of the device, spans beyond the cache among them.
    pub fn forward_spans(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        rope: &RopeTable,
        spans: &[Span],
        cache: &mut KvCache,
    ) -> Result<()> {
        self.pass(device, hidden, Rows::Spans(rope, spans, cache), |_, _| Ok(()))
    }

    /// The stages in order.
    fn pass(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        mut rows: Rows<'_>,
        mut look: impl FnMut(Stage, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut before = None;
        for stage in Stage::ALL {
            let input = self.next_input(device, stage, hidden, before.as_ref(), &mut rows)?;
            look(stage, &input)?;
            self.stage_output(device, stage, &input, hidden)?;
            before = Some(input);
        }
        Ok(())
    }
}
