//! The backward pass of a block over whole windows.
//!
//! What the forward pass would have to keep is computed once more from the block's inputs: a model then
//! holds one block's activations and the states between its blocks, whatever its depth (Chen et al.,
//! arXiv 1604.06174). Weights have no gradient here: whoever tunes them is shown, for every linear, the
//! inputs and the gradient of the outputs, from which any of theirs follows.

use gptq_checkpoint::{LinearId, ModelConfig, NormId, NormKind};
use gptq_compute::{AttentionShape, Device, Tensor};

use crate::block::Block;
use crate::block_rule::{BlockRule, Ropes};
use crate::error::{Error, Result};
use crate::stage::Stage;

/// Receives the inputs `[tokens, in]` of a linear and the gradient `[tokens, out]` of its outputs.
pub type LinearSink<'s> = dyn FnMut(LinearId, &Tensor, &Tensor) -> Result<()> + 's;

/// Why a model's blocks have no backward pass; `None` where they have.
#[must_use]
pub fn without_backward(config: &ModelConfig) -> Option<&'static str> {
    reason(config.norm == NormKind::Layer, config.is_parallel(), config.any_experts().is_some())
}

fn reason(layer_norms: bool, parallel: bool, experts: bool) -> Option<&'static str> {
    match (layer_norms, parallel, experts) {
        (true, ..) => Some("norms take means off"),
        (_, true, _) => Some("attention and the MLP are added at once"),
        (.., true) => Some("experts read the tokens that are routed to them"),
        _ => None,
    }
}

/// Queries, keys and values on their way to attention.
struct Heads {
    /// Queries and keys before the norms of heads, where there are such.
    plain: [Option<Tensor>; 2],
    /// Queries and keys as attention reads them, and values.
    qkv: [Tensor; 3],
}

/// What a block computes before the MLP.
struct Attention {
    /// What q, k and v read.
    input: Tensor,
    heads: Heads,
    contexts: Tensor,
}

impl Block {
    /// Takes the gradient of the hidden states behind the block, over whole windows of `seq_len` tokens, to
    /// that of `hidden`, those before it; both `[tokens, hidden]`, the gradient in f32. `sink` is shown
    /// every linear.
    ///
    /// # Errors
    /// [`Error::NoBackward`] where [`without_backward`] says why, and those of the device and of `sink`.
    pub fn backward(
        &self,
        device: &Device,
        hidden: &Tensor,
        gradient: &mut Tensor,
        ropes: &Ropes,
        seq_len: usize,
        sink: &mut LinearSink<'_>,
    ) -> Result<()> {
        let rule = self.rule();
        if let Some(why) = reason(rule.norm.layer, rule.parallel, self.mixture().is_some()) {
            return Err(Error::NoBackward { what: format!("Block {}", self.index()), why });
        }
        let attention = self.attention_forward(device, hidden, ropes, seq_len)?;
        let mut between = hidden.clone();
        self.stage_output(device, Stage::Output, &attention.contexts, &mut between)?;
        self.mlp_backward(device, &between, gradient, sink)?;
        drop(between);
        self.attention_backward(device, hidden, attention, gradient, (ropes, seq_len), sink)
    }

    /// As the forward pass up to the contexts, which o reads.
    fn attention_forward(
        &self,
        device: &Device,
        hidden: &Tensor,
        ropes: &Ropes,
        seq_len: usize,
    ) -> Result<Attention> {
        let input = self.normed(device, Stage::Qkv, hidden)?;
        let [mut q, mut k, v] = self.queries_keys_values(device, &input)?;
        let normed = |id, x: &mut Tensor| -> Result<Option<Tensor>> {
            let normed = self.norm(device, id, x)?;
            Ok(normed.map(|normed| std::mem::replace(x, normed)))
        };
        let plain = [normed(NormId::Queries, &mut q)?, normed(NormId::Keys, &mut k)?];
        if let Some(kind) = self.rule().rope {
            for x in [&mut q, &mut k] {
                device.rope(x, ropes.of_kind(kind), seq_len)?;
            }
        }
        let (shape, rule) = (self.shape(seq_len), &self.rule().attention);
        let contexts = device.attention(&q, &k, &v, shape, rule)?;
        Ok(Attention { input, heads: Heads { plain, qkv: [q, k, v] }, contexts })
    }

    fn shape(&self, seq_len: usize) -> AttentionShape {
        let BlockRule { heads, kv_heads, head_dim, .. } = *self.rule();
        AttentionShape { heads, kv_heads, head_dim, seq_len }
    }

    /// From the gradient behind the MLP to that of the states before it, `hidden`.
    fn mlp_backward(
        &self,
        device: &Device,
        hidden: &Tensor,
        gradient: &mut Tensor,
        sink: &mut LinearSink<'_>,
    ) -> Result<()> {
        let input = self.normed(device, Stage::GateUp, hidden)?;
        let [gate, up] = self.gate_up(device, &input)?;
        let activation = device.gated(gate.clone(), &up, self.rule().activation)?;
        let inner = self.output_backward(device, Stage::Down, &activation, gradient, sink)?;
        drop(activation);
        let (gate, up) = device.gated_backward(&gate, &up, &inner, self.rule().activation)?;
        drop(inner);
        let outputs = match self.has(LinearId::GateUp) {
            true => vec![(LinearId::GateUp, device.joined(&[&gate, &up])?)],
            false => vec![(LinearId::Gate, gate), (LinearId::Up, up)],
        };
        self.input_backward(device, Stage::GateUp, (hidden, &input), outputs, gradient, sink)
    }

    /// From the gradient behind attention to that of the states before it, `hidden`.
    fn attention_backward(
        &self,
        device: &Device,
        hidden: &Tensor,
        attention: Attention,
        gradient: &mut Tensor,
        (ropes, seq_len): (&Ropes, usize),
        sink: &mut LinearSink<'_>,
    ) -> Result<()> {
        let Attention { input, heads: Heads { plain, qkv: [q, k, v] }, contexts } = attention;
        let of_contexts = self.output_backward(device, Stage::Output, &contexts, gradient, sink)?;
        let (shape, rule) = (self.shape(seq_len), &self.rule().attention);
        let [mut dq, mut dk, dv] =
            device.attention_backward([&q, &k, &v], &contexts, &of_contexts, shape, rule)?;
        drop((q, k, v, contexts, of_contexts));
        if let Some(kind) = self.rule().rope {
            for x in [&mut dq, &mut dk] {
                device.rope_backward(x, ropes.of_kind(kind), seq_len)?;
            }
        }
        let [plain_q, plain_k] = plain;
        dq = self.norm_backward(device, NormId::Queries, plain_q, dq)?;
        dk = self.norm_backward(device, NormId::Keys, plain_k, dk)?;
        let outputs = match self.has(LinearId::Qkv) {
            true => vec![(LinearId::Qkv, device.joined(&[&dq, &dk, &dv])?)],
            false => vec![(LinearId::Q, dq), (LinearId::K, dk), (LinearId::V, dv)],
        };
        self.input_backward(device, Stage::Qkv, (hidden, &input), outputs, gradient, sink)
    }

    /// The gradient of the inputs of o or down, from that of the hidden states that their products are added
    /// to.
    fn output_backward(
        &self,
        device: &Device,
        stage: Stage,
        input: &Tensor,
        gradient: &Tensor,
        sink: &mut LinearSink<'_>,
    ) -> Result<Tensor> {
        let (id, norm) = match stage {
            Stage::Qkv | Stage::Output => (LinearId::O, NormId::AfterAttention),
            Stage::GateUp | Stage::Down => (LinearId::Down, NormId::AfterMlp),
        };
        let mut output = device.activations(gradient)?;
        if self.rule().residual != 1.0 {
            device.scale(&mut output, self.rule().residual)?;
        }
        let plain = match self.gains().get(norm) {
            Some(_) => Some(self.project(device, input, id)?),
            None => None,
        };
        let output = self.norm_backward(device, norm, plain, output)?;
        sink(id, input, &output)?;
        Ok(device.linear_backward(&output, &self.linear(id).weight)?)
    }

    /// Adds to the gradient of `hidden` what the linears of a stage give it, by the gradients of their outputs;
    /// they read `input`, which is `hidden` normed where there is such a norm.
    fn input_backward(
        &self,
        device: &Device,
        stage: Stage,
        (hidden, input): (&Tensor, &Tensor),
        outputs: Vec<(LinearId, Tensor)>,
        gradient: &mut Tensor,
        sink: &mut LinearSink<'_>,
    ) -> Result<()> {
        let mut of_input = device.zeros(input.rows(), input.cols())?;
        for (id, output) in outputs {
            sink(id, input, &output)?;
            device.linear_backward_add(&output, &self.linear(id).weight, &mut of_input)?;
        }
        match self.norm_before(stage).and_then(|id| self.gains().get(id)) {
            Some(gain) => {
                let eps = self.rule().norm.eps;
                Ok(device.rms_norm_backward_add(hidden, gain, eps, &of_input, gradient)?)
            }
            None => Ok(device.add_scaled(gradient, &of_input, 1.0)?),
        }
    }

    /// The gradient of `plain`, the values before a norm, from that of those behind it; where the block has no
    /// such norm they are the same.
    fn norm_backward(
        &self,
        device: &Device,
        id: NormId,
        plain: Option<Tensor>,
        gradient: Tensor,
    ) -> Result<Tensor> {
        match plain.zip(self.gains().get(id)) {
            Some((plain, gain)) => {
                Ok(device.rms_norm_backward(&plain, gain, self.rule().norm.eps, &gradient)?)
            }
            None => Ok(gradient),
        }
    }
}

#[cfg(test)]
#[path = "backward_tests.rs"]
mod tests;
