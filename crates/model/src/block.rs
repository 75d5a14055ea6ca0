//! One decoder block: its weights, its norms, and how they are put together.

use gptq_checkpoint::{LinearId, NormId};
use gptq_compute::{KvCache, Resident, StepBlock, Tensor};
use half::f16;

use crate::block_rule::BlockRule;
use crate::error::Result;
use crate::experts::Mixture;
use crate::stage::Stage;

/// To the nearest fp16 values.
fn round(values: &mut [f32]) {
    values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
}

/// A decoder block on a device.
#[derive(Clone, Debug)]
pub struct Block<W = Tensor> {
    parts: BlockParts<W>,
    /// Weights in host memory, of which those on the device are a rounding; empty or all.
    exact: Vec<Tensor>,
}

/// A linear of a block on a device.
#[derive(Clone, Debug)]
pub struct Linear<W = Tensor> {
    /// Which one.
    pub id: LinearId,
    /// Prefix of its tensors in a checkpoint.
    pub name: String,
    /// Its weights `[out_features, in_features]`.
    pub weight: W,
    /// Its bias of `out_features` values, where there is one.
    pub bias: Option<Vec<f32>>,
}

/// The gains of a block's norms, as they are multiplied with.
#[derive(Clone, Debug, Default)]
pub struct Gains {
    of: Vec<(NormId, Vec<f32>)>,
    /// What files hold less of each.
    offset: f32,
}

impl Gains {
    /// These gains, which files hold less `offset`.
    #[must_use]
    pub fn new(of: Vec<(NormId, Vec<f32>)>, offset: f32) -> Self {
        Self { of, offset }
    }

    /// The gain of a norm, where the block has it.
    #[must_use]
    pub fn get(&self, id: NormId) -> Option<&[f32]> {
        self.of.iter().find(|(norm, _)| *norm == id).map(|(_, gain)| gain.as_slice())
    }

    /// Replaces a gain by ones and returns it.
    fn take(&mut self, id: NormId) -> Option<Vec<f32>> {
        let (_, gain) = self.of.iter_mut().find(|(norm, _)| *norm == id)?;
        let ones = vec![1.0; gain.len()];
        Some(std::mem::replace(gain, ones))
    }

    /// Rounds them to what fp16 files hold.
    fn round(&mut self) {
        let offset = self.offset;
        let gains = self.of.iter_mut().flat_map(|(_, gain)| gain);
        gains.for_each(|gain| *gain = f16::from_f32(*gain - offset).to_f32() + offset);
    }
}

/// What a block is made of.
#[derive(Clone, Debug)]
pub struct BlockParts<W = Tensor> {
    /// Position in the model, from 0.
    pub index: usize,
    /// The linears, in the order of [`ModelConfig::block_linears`].
    ///
    /// [`ModelConfig::block_linears`]: gptq_checkpoint::ModelConfig::block_linears
    pub linears: Vec<Linear<W>>,
    /// Gains of the norms.
    pub gains: Gains,
    /// What routes tokens to experts, in a block that has them.
    pub mixture: Option<Mixture>,
    /// How they are put together.
    pub rule: BlockRule,
}

impl<W> BlockParts<W> {
    /// The same with other weights, each made from what it replaces.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn with_weights<V, E>(
        self,
        mut make: impl FnMut(&Linear<W>) -> std::result::Result<V, E>,
    ) -> std::result::Result<BlockParts<V>, E> {
        let Self { index, linears, gains, mixture, rule } = self;
        let linears = linears.into_iter().map(|linear| {
            let weight = make(&linear)?;
            Ok(Linear { id: linear.id, name: linear.name, weight, bias: linear.bias })
        });
        Ok(BlockParts {
            index,
            linears: linears.collect::<std::result::Result<_, E>>()?,
            gains,
            mixture,
            rule,
        })
    }
}

impl<W> Block<W> {
    /// A block of these parts.
    pub fn new(parts: BlockParts<W>) -> Self {
        Self { parts, exact: Vec::new() }
    }

    /// Position in the model, from 0.
    pub fn index(&self) -> usize {
        self.parts.index
    }

    /// All linears, in the order of [`ModelConfig::block_linears`].
    ///
    /// [`ModelConfig::block_linears`]: gptq_checkpoint::ModelConfig::block_linears
    pub fn linears(&self) -> &[Linear<W>] {
        &self.parts.linears
    }

    /// Which linears there are, in the same order.
    pub fn ids(&self) -> Vec<LinearId> {
        self.linears().iter().map(|linear| linear.id).collect()
    }

    /// The linears of a stage, in the same order.
    pub fn stage(&self, stage: Stage) -> impl Iterator<Item = &Linear<W>> {
        self.linears().iter().filter(move |linear| Stage::of(linear.id) == stage)
    }

    /// Whether there is such a linear.
    pub fn has(&self, id: LinearId) -> bool {
        self.linears().iter().any(|linear| linear.id == id)
    }

    /// The norm whose values a stage's linears read; `None` where they read something else.
    pub fn norm_before(&self, stage: Stage) -> Option<NormId> {
        let id = match stage {
            Stage::Qkv => NormId::BeforeAttention,
            Stage::GateUp if self.rule().parallel => NormId::BeforeAttention,
            Stage::GateUp => NormId::BeforeMlp,
            Stage::Output | Stage::Down => return None,
        };
        self.gains().get(id).map(|_| id)
    }

    /// Place of a linear among [`Self::linears`].
    ///
    /// # Panics
    /// When the block has no such linear.
    pub fn place_of(&self, id: LinearId) -> usize {
        let place = self.linears().iter().position(|linear| linear.id == id);
        place.unwrap_or_else(|| panic!("block {} has no linear {id:?}", self.index()))
    }

    /// A linear.
    ///
    /// # Panics
    /// As [`Self::place_of`].
    pub fn linear(&self, id: LinearId) -> &Linear<W> {
        &self.parts.linears[self.place_of(id)]
    }

    /// How the parts are put together.
    pub fn rule(&self) -> &BlockRule {
        &self.parts.rule
    }

    /// The gains of the norms.
    pub fn gains(&self) -> &Gains {
        &self.parts.gains
    }

    /// What routes tokens to experts; `None` in a block that has one MLP for all tokens.
    pub fn mixture(&self) -> Option<&Mixture> {
        self.parts.mixture.as_ref()
    }

    /// The block without its weights, for others to be put in their places.
    pub fn frame(&self) -> BlockParts<()> {
        let linear = |linear: &Linear<W>| Linear {
            id: linear.id,
            name: linear.name.clone(),
            weight: (),
            bias: linear.bias.clone(),
        };
        BlockParts {
            index: self.index(),
            linears: self.linears().iter().map(linear).collect(),
            gains: self.gains().clone(),
            mixture: self.mixture().cloned(),
            rule: *self.rule(),
        }
    }
}

impl Block {
    /// Replaces a linear's weights, by what its quantized form dequantizes to.
    ///
    /// # Panics
    /// As [`Self::place_of`].
    pub fn set_weight(&mut self, id: LinearId, weight: Tensor) {
        let place = self.place_of(id);
        self.parts.linears[place].weight = weight;
    }

    /// Bias of a linear, for writing.
    ///
    /// # Panics
    /// As [`Self::place_of`].
    pub fn bias_mut(&mut self, id: LinearId) -> Option<&mut [f32]> {
        let place = self.place_of(id);
        self.parts.linears[place].bias.as_deref_mut()
    }

    /// What routes tokens to experts, for rotations to turn.
    pub fn mixture_mut(&mut self) -> Option<&mut Mixture> {
        self.parts.mixture.as_mut()
    }

    /// Moves every weight through `place`, to a device that rounds it; `keep` holds on to what goes
    /// in.
    pub(crate) fn place(
        mut self,
        keep: bool,
        place: impl Fn(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        if let Some(Mixture { router, shared_gate, .. }) = &mut self.parts.mixture {
            for weight in [Some(router), shared_gate.as_mut()].into_iter().flatten() {
                *weight = place("router", weight)?;
            }
        }
        for linear in &mut self.parts.linears {
            let placed = place(&linear.name, &linear.weight)?;
            let exact = std::mem::replace(&mut linear.weight, placed);
            if keep {
                self.exact.push(exact);
            }
        }
        Ok(self)
    }

    /// The weights that the device's are a rounding of, in the order of [`Self::linears`] and in
    /// host memory, where the block was placed with them; empty otherwise.
    pub fn take_exact(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.exact)
    }

    /// Replaces the gain of a norm by ones and returns it, for linears to take over.
    pub fn take_gain(&mut self, id: NormId) -> Option<Vec<f32>> {
        self.parts.gains.take(id)
    }

    /// Rounds the biases to fp16, as files hold them.
    pub fn round_biases(&mut self) {
        let biases = self.parts.linears.iter_mut().filter_map(|linear| linear.bias.as_mut());
        biases.for_each(|bias| round(bias));
    }

    /// Rounds the gains of all norms and what routes tokens to fp16, as files hold them; for a block in host
    /// memory.
    ///
    /// # Panics
    /// For a block with experts on another device.
    pub fn round_dense(&mut self) {
        self.parts.gains.round();
        if let Some(Mixture { router, shared_gate, .. }) = &mut self.parts.mixture {
            for weight in [Some(router), shared_gate.as_mut()].into_iter().flatten() {
                *weight =
                    Tensor::from_host(weight.as_host().mapv(|value| f16::from_f32(value).to_f32()));
            }
        }
    }
}

impl Block<Resident> {
    /// What a device's program for steps is made of, with the cache that they go on with; `None` for a
    /// block of other parts. Whether the program computes what the block does is
    /// [`has_step_program`](crate::has_step_program)'s matter.
    pub fn step<'a>(&'a self, cache: &'a KvCache) -> Option<StepBlock<'a>> {
        let linears = LinearId::LLAMA.map(|id| self.linears().iter().find(|l| l.id == id));
        let [Some(q), Some(k), Some(v), Some(o), Some(gate), Some(up), Some(down)] = linears else {
            return None;
        };
        let linears = [q, k, v, o, gate, up, down];
        let gains = self.gains();
        let head_norms = gains.get(NormId::Queries).zip(gains.get(NormId::Keys));
        Some(StepBlock {
            linears: linears.map(|linear| &linear.weight),
            biases: linears.map(|linear| linear.bias.as_deref()),
            head_norms: head_norms.map(|(queries, keys)| [queries, keys]),
            norms: [gains.get(NormId::BeforeAttention)?, gains.get(NormId::BeforeMlp)?],
            cache,
        })
    }
}
