//! The forward pass of a block, cut between its linears into stages.

use gptq_checkpoint::{LinearId, NormId};
use gptq_compute::{
    Activation, AttentionRule, AttentionShape, Device, KvCache, Resident, RopeTable, Span, Tensor,
};

use crate::block::{Block, BlockRule, Linear};
use crate::error::Result;
use crate::stage::Stage;

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

impl Block {
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

impl<W: Weight> Block<W> {
    /// Outputs of a linear with its bias.
    fn project(&self, device: &Device, input: &Tensor, id: LinearId) -> Result<Tensor> {
        let Linear { weight, bias, .. } = self.linear(id);
        let mut output = weight.multiply(device, input)?;
        if let Some(bias) = bias {
            device.add_bias(&mut output, bias)?;
        }
        Ok(output)
    }

    /// Normed values.
    ///
    /// # Panics
    /// When the block has no such norm.
    fn norm(&self, device: &Device, id: NormId, x: &Tensor) -> Result<Tensor> {
        let gain = self.gains().get(id);
        let gain = gain.unwrap_or_else(|| panic!("block {} has no norm {id:?}", self.index()));
        Ok(device.rms_norm(x, gain, self.rule().norm_eps)?)
    }

    /// Input of o from the inputs of q, k, v: projections, norms of heads, rotary embedding, causal
    /// attention.
    fn attention(&self, device: &Device, input: &Tensor, rows: &mut Rows<'_>) -> Result<Tensor> {
        let mut q = self.project(device, input, LinearId::Q)?;
        let mut k = self.project(device, input, LinearId::K)?;
        let v = self.project(device, input, LinearId::V)?;
        if self.gains().get(NormId::Queries).is_some() {
            q = self.norm(device, NormId::Queries, &q)?;
            k = self.norm(device, NormId::Keys, &k)?;
        }
        let rule = AttentionRule::llama(self.rule().head_dim);
        match rows {
            Rows::Windows(rope, seq_len) => {
                device.rope(&mut q, rope, *seq_len)?;
                device.rope(&mut k, rope, *seq_len)?;
                let BlockRule { heads, kv_heads, head_dim, .. } = *self.rule();
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
        let normed = |id| self.norm(device, id, hidden);
        match (stage, before) {
            (Stage::Qkv, _) => normed(NormId::BeforeAttention),
            (Stage::Output, Some(input)) => self.attention(device, input, rows),
            (Stage::Output, None) => {
                self.attention(device, &normed(NormId::BeforeAttention)?, rows)
            }
            (Stage::GateUp, _) => normed(NormId::BeforeMlp),
            (Stage::Down, Some(input)) => self.activation(device, input),
            (Stage::Down, None) => self.activation(device, &normed(NormId::BeforeMlp)?),
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
        let Linear { weight, bias, .. } = self.linear(id);
        weight.multiply_add(device, input, hidden)?;
        if let Some(bias) = bias {
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
