//! The forward pass of a block, cut between its linears into stages.

use gptq_checkpoint::{LinearId, NormId};
use gptq_compute::{AttentionShape, Device, KvCache, Resident, Span, Tensor};

use crate::block::{Block, Linear};
use crate::block_rule::{BlockRule, Ropes};
use crate::error::Result;
use crate::stage::{Reading, Stage};

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
    Windows(usize),
    /// Ends of sequences whose beginnings are in a cache.
    Spans(&'a [Span], &'a mut KvCache),
}

impl Block {
    /// Inputs of a stage's linears, `[tokens, in_features]`, from the hidden states that the stages
    /// before have left, over whole windows of `seq_len` tokens. Where gate and up are those of experts, these
    /// read rows of them: see [`Self::routes`].
    ///
    /// For o and down the norm before q or gate is computed once more, since it is not at hand: one
    /// pass over memory against holding all of it. In a parallel block gate, up and down read the
    /// states before o's products are added: see [`Self::next_input`].
    pub fn stage_input(
        &self,
        device: &Device,
        stage: Stage,
        hidden: &Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<Tensor> {
        match stage {
            Stage::Qkv | Stage::GateUp => self.normed(device, stage, hidden),
            Stage::Output | Stage::Down => {
                let before = self.normed(device, stage.before(), hidden)?;
                self.next_input(device, stage, &before, ropes, seq_len)
            }
        }
    }

    /// Inputs of o from those of q, or of down from those of gate.
    ///
    /// # Panics
    /// For other stages, whose inputs come from hidden states, and for the down projections of experts, each of
    /// which has inputs of its own: [`Self::expert_activation`].
    pub fn next_input(
        &self,
        device: &Device,
        stage: Stage,
        before: &Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<Tensor> {
        match stage {
            Stage::Output => self.attention(device, before, ropes, &mut Rows::Windows(seq_len)),
            Stage::Down => self.activation(device, before),
            Stage::Qkv | Stage::GateUp => panic!("{stage:?} reads hidden states"),
        }
    }
}

impl<W: Weight> Block<W> {
    /// Queries and keys of whole windows of `seq_len` tokens as attention compares them, from the inputs of q:
    /// normed, and turned by their places.
    ///
    /// # Errors
    /// Those of the device.
    pub fn queries_keys(
        &self,
        device: &Device,
        input: &Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<[Tensor; 2]> {
        let [q, k, _] = self.placed(device, input, ropes, seq_len)?;
        Ok([q, k])
    }

    /// What attention makes of the inputs of v for one query head: A X `[tokens, in]`, A being the weights
    /// that the head gives to the tokens of its window, from `queries` and `keys` of [`Self::queries_keys`],
    /// and X the inputs. Its contexts are A X Wᵀ, where W are the rows of v that it reads.
    ///
    /// # Errors
    /// Those of the device.
    pub fn attended(
        &self,
        device: &Device,
        [queries, keys]: &[Tensor; 2],
        input: &Tensor,
        head: usize,
        seq_len: usize,
    ) -> Result<Tensor> {
        let BlockRule { heads, kv_heads, head_dim, attention: rule, .. } = self.rule();
        let (n, part) = (input.cols(), *head_dim);
        // As many heads that attend alike as the inputs are wide; what the last of them has too much of is
        // taken from the first columns, and is left out of the result.
        let copies = n.div_ceil(part);
        let spread = |x: &Tensor, at: usize| {
            let one = device.columns(x, at * part..(at + 1) * part)?;
            device.joined(&vec![&one; copies])
        };
        let q = spread(queries, head)?;
        let k = spread(keys, head / (heads / kv_heads))?;
        let shape = AttentionShape { heads: copies, kv_heads: copies, head_dim: part, seq_len };
        let missing = copies * part - n;
        if missing == 0 {
            return Ok(device.attention(&q, &k, input, shape, rule)?);
        }
        let values = device.joined(&[input, &device.columns(input, 0..missing)?])?;
        let attended = device.attention(&q, &k, &values, shape, rule)?;
        Ok(device.columns(&attended, 0..n)?)
    }

    /// Outputs of a linear with its bias.
    pub(crate) fn project(&self, device: &Device, input: &Tensor, id: LinearId) -> Result<Tensor> {
        let Linear { weight, bias, .. } = self.linear(id);
        let mut output = weight.multiply(device, input)?;
        if let Some(bias) = bias {
            device.add_bias(&mut output, bias)?;
        }
        Ok(output)
    }

    /// The normed values of a norm, `None` where the block has none such.
    pub(crate) fn norm(&self, device: &Device, id: NormId, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(gain) = self.gains().get(id) else { return Ok(None) };
        let rule = self.rule();
        let features = match id {
            NormId::Queries | NormId::Keys => rule.head_dim,
            _ => x.cols(),
        };
        rule.norm.apply(device, x, gain, features).map(Some)
    }

    /// What q or gate reads: the hidden states, normed where the block has a norm before it.
    pub(crate) fn normed(&self, device: &Device, stage: Stage, hidden: &Tensor) -> Result<Tensor> {
        let normed = match self.norm_before(stage) {
            Some(id) => self.norm(device, id, hidden)?,
            None => None,
        };
        match normed {
            Some(normed) => Ok(normed),
            None => Ok(device.activations(hidden)?),
        }
    }

    /// Queries, keys and values.
    pub(crate) fn queries_keys_values(
        &self,
        device: &Device,
        input: &Tensor,
    ) -> Result<[Tensor; 3]> {
        if !self.has(LinearId::Qkv) {
            let project = |id| self.project(device, input, id);
            return Ok([project(LinearId::Q)?, project(LinearId::K)?, project(LinearId::V)?]);
        }
        let BlockRule { heads, kv_heads, head_dim, .. } = *self.rule();
        let fused = self.project(device, input, LinearId::Qkv)?;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let part = |from, count| device.columns(&fused, from..from + count);
        Ok([part(0, queries)?, part(queries, keys)?, part(queries + keys, keys)?])
    }

    /// Queries, keys and values, the former two normed head by head where the block does so.
    fn normed_heads(&self, device: &Device, input: &Tensor) -> Result<[Tensor; 3]> {
        let [mut q, mut k, v] = self.queries_keys_values(device, input)?;
        if let Some(normed) = self.norm(device, NormId::Queries, &q)? {
            q = normed;
        }
        if let Some(normed) = self.norm(device, NormId::Keys, &k)? {
            k = normed;
        }
        Ok([q, k, v])
    }

    /// Queries, keys and values of whole windows, with rotary embedding.
    fn placed(
        &self,
        device: &Device,
        input: &Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<[Tensor; 3]> {
        let [mut q, mut k, v] = self.normed_heads(device, input)?;
        if let Some(kind) = self.rule().rope {
            for x in [&mut q, &mut k] {
                device.rope(x, ropes.of_kind(kind), seq_len)?;
            }
        }
        Ok([q, k, v])
    }

    /// Input of o from the inputs of q, k, v: projections, norms of heads, rotary embedding, causal
    /// attention.
    fn attention(
        &self,
        device: &Device,
        input: &Tensor,
        ropes: &Ropes,
        rows: &mut Rows<'_>,
    ) -> Result<Tensor> {
        let BlockRule { heads, kv_heads, head_dim, rope, attention: rule, .. } = self.rule();
        match rows {
            Rows::Windows(seq_len) => {
                let [q, k, v] = self.placed(device, input, ropes, *seq_len)?;
                let (heads, kv_heads, head_dim) = (*heads, *kv_heads, *head_dim);
                let shape = AttentionShape { heads, kv_heads, head_dim, seq_len: *seq_len };
                Ok(device.attention(&q, &k, &v, shape, rule)?)
            }
            Rows::Spans(spans, cache) => {
                let [mut q, mut k, v] = self.normed_heads(device, input)?;
                if let Some(kind) = rope {
                    for x in [&mut q, &mut k] {
                        device.rope_spans(x, ropes.of_kind(*kind), spans)?;
                    }
                }
                Ok(device.cached_attention(&q, &k, &v, cache, spans, rule)?)
            }
        }
    }

    /// Outputs of gate and up.
    pub(crate) fn gate_up(&self, device: &Device, input: &Tensor) -> Result<[Tensor; 2]> {
        if !self.has(LinearId::GateUp) {
            let project = |id| self.project(device, input, id);
            return Ok([project(LinearId::Gate)?, project(LinearId::Up)?]);
        }
        let fused = self.project(device, input, LinearId::GateUp)?;
        let (inner, all) = (fused.cols() / 2, fused.cols());
        Ok([device.columns(&fused, 0..inner)?, device.columns(&fused, inner..all)?])
    }

    /// Input of down: activation(gate(input)) · up(input), `[tokens, intermediate]`.
    fn activation(&self, device: &Device, input: &Tensor) -> Result<Tensor> {
        let [gate, up] = self.gate_up(device, input)?;
        Ok(device.gated(gate, &up, self.rule().activation)?)
    }

    /// Adds what a stage gives to the hidden states: the products of o or down, normed and scaled where
    /// the block does so. Those of the other linears go into the next stage's inputs alone. For experts there is
    /// [`Self::expert_output`].
    pub fn stage_output(
        &self,
        device: &Device,
        stage: Stage,
        input: &Tensor,
        hidden: &mut Tensor,
    ) -> Result<()> {
        let (id, norm) = match stage {
            Stage::Qkv | Stage::GateUp => return Ok(()),
            Stage::Output => (LinearId::O, NormId::AfterAttention),
            Stage::Down => (LinearId::Down, NormId::AfterMlp),
        };
        let factor = self.rule().residual;
        if factor == 1.0 && self.gains().get(norm).is_none() {
            let Linear { weight, bias, .. } = self.linear(id);
            weight.multiply_add(device, input, hidden)?;
            if let Some(bias) = bias {
                device.add_bias(hidden, bias)?;
            }
            return Ok(());
        }
        let output = self.project(device, input, id)?;
        let output = self.norm(device, norm, &output)?.unwrap_or(output);
        Ok(device.add_scaled(hidden, &output, factor)?)
    }

    /// The whole block over whole windows of `seq_len` tokens, in place of `hidden`.
    pub fn forward(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<()> {
        self.forward_looking(device, hidden, ropes, seq_len, |_, _| Ok(()))
    }

    /// As [`Self::forward`], showing `look` the inputs of every stage's linears, of experts one expert's after the
    /// other's; experts that no token goes through read nothing.
    pub fn forward_looking(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        ropes: &Ropes,
        seq_len: usize,
        look: impl FnMut(Reading, &Tensor) -> Result<()>,
    ) -> Result<()> {
        self.pass(device, hidden, ropes, Rows::Windows(seq_len), look)
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
        ropes: &Ropes,
        spans: &[Span],
        cache: &mut KvCache,
    ) -> Result<()> {
        self.pass(device, hidden, ropes, Rows::Spans(spans, cache), |_, _| Ok(()))
    }

    /// The stages in order.
    fn pass(
        &self,
        device: &Device,
        hidden: &mut Tensor,
        ropes: &Ropes,
        mut rows: Rows<'_>,
        mut look: impl FnMut(Reading, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let input = self.normed(device, Stage::Qkv, hidden)?;
        look(Stage::Qkv.into(), &input)?;
        let contexts = self.attention(device, &input, ropes, &mut rows)?;
        look(Stage::Output.into(), &contexts)?;
        let shared = self.rule().parallel.then_some(input);
        self.stage_output(device, Stage::Output, &contexts, hidden)?;
        drop(contexts);
        let input = match shared {
            Some(input) => input,
            None => self.normed(device, Stage::GateUp, hidden)?,
        };
        if self.mixture().is_some() {
            return self.mixed(device, &input, hidden, &mut look);
        }
        look(Stage::GateUp.into(), &input)?;
        let activation = self.activation(device, &input)?;
        drop(input);
        look(Stage::Down.into(), &activation)?;
        self.stage_output(device, Stage::Down, &activation, hidden)
    }
}
