//! A model that stays on its devices whole, and sequences that it goes on with token by token.
//!
//! The forward pass is that of [`crate::Block`]; what differs is where attention finds the tokens
//! before, and that weights are kept as their file has them. Several devices have a part of the blocks each.

use gptq_checkpoint::{
    Checkpoint, Expert, LinearId, ModelConfig, NormId, NormShape, RopeKind, RopeScaling,
};
use gptq_compute::{CacheShape, Device, Resident, Span, Steps, Tensor};
use ndarray::{Array2, Axis};

use crate::block::{Block, Linear};
use crate::block_rule::BlockRule;
use crate::decoder_part::{Part, PartCache, keep_head, shares};
use crate::error::{Error, Result};
use crate::model::{Head, Model};
use crate::values::SourcePrecision;

/// Tokens of a prompt that go through the model at a time: what they take besides the weights is a few
/// activations of so many rows.
pub const PASS_TOKENS: usize = 512;

/// The most tokens that a sequence of this model can have, and what says so.
#[must_use]
pub fn context_limit(config: &ModelConfig) -> (usize, &'static str) {
    // Beyond, every new token would turn the keys that are there.
    match &config.rope.scaling {
        RopeScaling::Dynamic { .. } => (
            config.max_position_embeddings,
            "a cache can hold of a model with `dynamic` rope_scaling",
        ),
        RopeScaling::LongRope(long) if long.original_context < config.positions() => (
            long.original_context,
            "a cache can hold of a model with `longrope` rope_scaling \
             (original_max_position_embeddings)",
        ),
        _ => (config.positions(), "the model was made for (max_position_embeddings)"),
    }
}

/// Whether a GPU has a program for whole steps of this model in sequences of up to `context` tokens:
/// where norms, rotations and attention are Llama's. Others go through the forward operation by operation.
#[must_use]
pub fn has_step_program(config: &ModelConfig, context: usize) -> bool {
    let llama = |norm: &NormShape| match norm.id {
        NormId::Queries | NormId::Keys => norm.size() == config.head_dim,
        NormId::BeforeAttention | NormId::BeforeMlp => true,
        NormId::AfterAttention | NormId::AfterMlp => false,
    };
    let block = |block| {
        BlockRule::of(config, block, context).is_llama()
            && config.block_norms(block).iter().all(llama)
            && config.block_linears(block).iter().map(|linear| linear.id).eq(LinearId::LLAMA)
    };
    let rotates_all = config.rope.dims == config.head_dim && !config.is_interleaved();
    rotates_all && (0..config.num_hidden_layers).all(block)
}

/// A model whose blocks all stay on their devices.
#[derive(Debug)]
pub struct Decoder<'a> {
    /// On the first device.
    model: Model<'a>,
    parts: Vec<Part>,
    /// On the last device.
    head: Head<Resident>,
    last: Device,
    context: usize,
}

/// Keys and values of every block, for some sequences at a time.
#[derive(Debug)]
pub struct Cache {
    parts: Vec<PartCache>,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    capacity: usize,
}

impl Cache {
    /// Tokens of a sequence so far.
    #[must_use]
    pub fn len(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Tokens that a sequence can have.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets a sequence but for its first tokens.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        self.lengths[slot] = self.lengths[slot].min(len);
    }

    /// Counts tokens that are there now.
    fn take(&mut self, spans: &[Span]) {
        for span in spans {
            self.lengths[span.slot] = span.start + span.len;
        }
    }

    /// Where so many more tokens of a sequence go.
    fn span(&self, slot: usize, len: usize) -> Result<Span> {
        let start = self.lengths[slot];
        if start + len > self.capacity {
            return Err(Error::ContextFull { capacity: self.capacity });
        }
        Ok(Span { slot, start, len })
    }
}

impl<'a> Decoder<'a> {
    /// Loads every block; `progress` hears of each. Sequences have up to `context` tokens. Several devices
    /// get blocks that follow one another, the last also the head: as many as fill them alike.
    ///
    /// # Errors
    /// [`Error::ContextTooLong`], [`Error::TooManyDevices`], and as [`Model::new`] and
    /// [`Model::load_block`].
    ///
    /// # Panics
    /// Without a device.
    pub fn load(
        checkpoint: &'a Checkpoint,
        devices: &[Device],
        context: usize,
        mut progress: impl FnMut(usize),
    ) -> Result<Self> {
        let (Some(first), Some(last)) = (devices.first(), devices.last()) else {
            panic!("a decoder needs a device");
        };
        let (most, why) = context_limit(checkpoint.config());
        if context > most {
            return Err(Error::ContextTooLong { context, most, why });
        }
        let config = checkpoint.config();
        for device in devices {
            let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
            device.check_heads(heads, kv_heads, config.head_dim)?;
        }
        let model = Model::new(checkpoint, first.clone(), SourcePrecision::Stored, context)?;
        let shares = shares(checkpoint, devices)?;
        let head = keep_head(&model, last)?;
        let parts = devices.iter().zip(shares);
        let parts = parts.map(|(device, blocks)| Part::load(&model, device, blocks, &mut progress));
        let parts = parts.collect::<Result<_>>()?;
        Ok(Self { model, parts, head, last: last.clone(), context })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &'a ModelConfig {
        self.model.config()
    }

    /// The device that has the head, and final hidden states.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.last
    }

    /// Bytes of weights that one step of one sequence reads: of experts those of one token.
    #[must_use]
    pub fn step_bytes(&self) -> usize {
        let block = |block: &Block<Resident>| -> usize {
            let bytes = |linear: &Linear<Resident>| linear.weight.bytes();
            let routed = |l: &&Linear<_>| matches!(l.id.expert(), Some(Expert::Routed(_)));
            let all: usize = block.linears().iter().map(bytes).sum();
            let Some(mixture) = block.mixture() else { return all };
            let of_experts: usize = block.linears().iter().filter(routed).map(bytes).sum();
            let experts = &mixture.experts;
            let router =
                mixture.router.bytes() + mixture.shared_gate.as_ref().map_or(0, Tensor::bytes);
            all - of_experts + of_experts / experts.count * experts.per_token + router
        };
        let blocks = self.parts.iter().flat_map(|part| &part.blocks);
        blocks.map(block).sum::<usize>() + self.head.weight.bytes()
    }

    /// An empty cache for `slots` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::ContextTooLong`] for more than the decoder was loaded for, and those of the device.
    pub fn cache(&self, slots: usize, capacity: usize) -> Result<Cache> {
        if capacity > self.context {
            let why = "the model was loaded for";
            return Err(Error::ContextTooLong { context: capacity, most: self.context, why });
        }
        let shape = cache_shape(self.config(), slots, capacity);
        let rope = has_step_program(self.config(), self.context)
            .then(|| self.model.ropes(self.context).of_kind(RopeKind::Global));
        let norm = &self.head.norm;
        let mut parts = Vec::with_capacity(self.parts.len());
        for (i, part) in self.parts.iter().enumerate() {
            let last = (i + 1 == self.parts.len()).then_some(norm.gain.as_slice());
            parts.push(part.cache(
                shape,
                rope,
                (self.config().hidden_size, norm.rule.eps),
                last,
            )?);
        }
        Ok(Cache { parts, lengths: vec![0; slots], capacity })
    }

    /// Goes on with a sequence by some tokens; their final hidden states `[ids.len(), hidden]`, normed.
    ///
    /// # Errors
    /// [`Error::ContextFull`], with nothing taken, and those of the device.
    pub fn feed(&self, cache: &mut Cache, slot: usize, ids: &[u32]) -> Result<Tensor> {
        let span = cache.span(slot, ids.len())?;
        if (1..=PASS_TOKENS).contains(&ids.len()) {
            return self.pass(cache, ids, &[span]);
        }
        // What several passes give is put together in host memory.
        let mut hidden = Array2::zeros((ids.len(), self.config().hidden_size));
        for (part, mut rows) in
            ids.chunks(PASS_TOKENS).zip(hidden.axis_chunks_iter_mut(Axis(0), PASS_TOKENS))
        {
            let span = cache.span(slot, part.len())?;
            rows.assign(&self.pass(cache, part, &[span])?.to_host()?);
        }
        Ok(self.device().upload_f32(hidden)?)
    }

    /// Goes on with some sequences by a token each: their final hidden states, a row each.
    ///
    /// # Errors
    /// [`Error::ContextFull`], with nothing taken, and those of the device.
    pub fn step(&self, cache: &mut Cache, next: &[(usize, u32)]) -> Result<Tensor> {
        let spans =
            next.iter().map(|&(slot, _)| cache.span(slot, 1)).collect::<Result<Vec<_>>>()?;
        let ids: Vec<_> = next.iter().map(|&(_, id)| id).collect();
        let few = (1..=Steps::MOST_TOKENS).contains(&spans.len());
        if !few || cache.parts.iter().any(|part| part.steps.is_none()) {
            return self.pass(cache, &ids, &spans);
        }
        self.through_parts(cache, &ids, &spans, |_, kept, hidden| {
            if let Some(steps) = &mut kept.steps {
                *hidden = steps.run(hidden, &spans)?;
            }
            Ok(())
        })
    }

    /// The last row of hidden states: what the token after a prompt is chosen by.
    ///
    /// # Errors
    /// Those of the device; there must be a row.
    pub fn last_row(&self, hidden: &Tensor) -> Result<Tensor> {
        let last = u32::try_from(hidden.rows()).unwrap_or(u32::MAX).wrapping_sub(1);
        Ok(self.device().select_rows(hidden, &[last])?)
    }

    /// Logits `[rows, vocab]` of final hidden states.
    ///
    /// # Errors
    /// Those of the device.
    pub fn logits(&self, hidden: &Tensor) -> Result<Array2<f32>> {
        let mut logits = self.device().resident_logits(hidden, &self.head.weight)?;
        if let Some(cap) = self.config().logit_softcap {
            self.device().softcap(&mut logits, cap)?;
        }
        Ok(logits.to_host()?)
    }

    /// All blocks over `ids`, the rows of `spans`.
    fn pass(&self, cache: &mut Cache, ids: &[u32], spans: &[Span]) -> Result<Tensor> {
        let ropes = self.model.ropes(self.context);
        let hidden = self.through_parts(cache, ids, spans, |part, kept, hidden| {
            part.pass(kept, hidden, ropes, spans)
        })?;
        self.head.norm(self.device(), &hidden)
    }

    /// Takes the embeddings of `ids` from part to part, by what `each` does on its device, and counts the tokens.
    fn through_parts(
        &self,
        cache: &mut Cache,
        ids: &[u32],
        spans: &[Span],
        each: impl Fn(&Part, &mut PartCache, &mut Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let mut hidden = self.model.embed(ids)?;
        for (i, (part, kept)) in self.parts.iter().zip(&mut cache.parts).enumerate() {
            if i > 0 {
                hidden = part.bring(&hidden)?;
            }
            each(part, kept, &mut hidden)?;
        }
        cache.take(spans);
        Ok(hidden)
    }
}

/// Sizes of every block's cache.
fn cache_shape(config: &ModelConfig, slots: usize, capacity: usize) -> CacheShape {
    CacheShape {
        slots,
        capacity,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}
