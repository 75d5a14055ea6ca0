//! One new token of every sequence through a whole model, as a program of the card's own.
//!
//! What a step asks of a card besides the reading of weights is some hundred small kernels, whose launches
//! one by one would take as long as the reading. The program is laid out once, in memory that stays, and
//! recorded as a graph that is launched as a whole.

use std::sync::Arc;

use crate::cuda;
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::kv_cache::{CacheShape, KvCache, Span};
use crate::resident::Resident;
use crate::rope::RopeTable;
use crate::tensor::{Storage, Tensor};

/// A block of a [`StepModel`].
#[derive(Debug)]
pub struct StepBlock<'a> {
    /// q, k, v, o, gate, up, down.
    pub linears: [&'a Resident; 7],
    /// Their biases.
    pub biases: [Option<&'a [f32]>; 7],
    /// Gains of the norms of every query head and of every key head.
    pub head_norms: Option<[&'a [f32]; 2]>,
    /// Gains of the norms before attention and before the MLP.
    pub norms: [&'a [f32]; 2],
    /// The keys and values that steps go on with.
    pub cache: &'a KvCache,
}

/// What a step goes through: a model, or the blocks of it that one card holds.
#[derive(Debug)]
pub struct StepModel<'a> {
    /// In order.
    pub blocks: Vec<StepBlock<'a>>,
    /// Values of a hidden state.
    pub width: usize,
    /// Gain of the last norm; `None` where another card's blocks follow.
    pub norm: Option<&'a [f32]>,
    /// Added to mean squares in norms.
    pub eps: f32,
    /// Angles of at least as many positions as a cache has.
    pub rope: &'a RopeTable,
}

/// A program for the steps of the sequences of some caches.
#[derive(Debug)]
pub struct Steps(cuda::step::Program);

impl Steps {
    /// Tokens that a step takes at most.
    pub const MOST_TOKENS: usize = cuda::step::MOST_TOKENS;

    /// Takes hidden states `[spans.len(), hidden]` of one new token each, f32, through the blocks: fp16 and
    /// normed where the model has a last norm, f32 without. Keys and values go into the caches.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for spans that are not single tokens of different sequences within the
    /// caches, [`Error::DeviceMismatch`], and those of launches.
    pub fn run(&mut self, hidden: &Tensor, spans: &[Span]) -> Result<Tensor> {
        const OP: &str = "a step";
        let shape = self.0.shape();
        let fits = spans
            .iter()
            .all(|span| span.len == 1 && span.slot < shape.slots && span.start < shape.capacity);
        let mut slots: Vec<_> = spans.iter().map(|span| span.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        let room = (1..=Self::MOST_TOKENS).contains(&spans.len());
        ensure_shape(
            fits && room && slots.len() == spans.len() && hidden.rows() == spans.len(),
            OP,
            hidden.shape(),
            (spans.len(), self.0.width()),
        )?;
        ensure_shape(hidden.cols() == self.0.width(), OP, hidden.shape(), (1, self.0.width()))?;
        match &hidden.0 {
            Storage::Cuda(hidden) if Arc::ptr_eq(hidden.cuda(), self.0.cuda()) => {
                Ok(Tensor(Storage::Cuda(self.0.run(hidden, spans)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

impl Device {
    /// A program for this model, whose blocks are Llama's and whose caches all have this shape; `None` on the
    /// CPU, which has no need of one, and where its kernels do not have heads of this size or rotations of
    /// this kind: such models take their steps block by block.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for query heads that do not share key heads evenly, [`Error::ShapeMismatch`] for
    /// parts that do not fit one another, [`Error::DeviceMismatch`], and memory that is not to be had.
    pub fn steps(&self, model: &StepModel<'_>, shape: CacheShape) -> Result<Option<Steps>> {
        const OP: &str = "steps";
        let Self::Cuda(cuda) = self else { return Ok(None) };
        cuda::attention::check_shape(shape.heads, shape.kv_heads, shape.head_dim)?;
        if !cuda::attention::has_steps(shape.head_dim) || !model.rope.is_plain() {
            return Ok(None);
        }
        let width = model.width;
        let normed = model.norm.map_or(width, <[f32]>::len);
        ensure_shape(normed == width, OP, (normed, 1), (width, 1))?;
        let positions = (model.rope.positions(), 2 * model.rope.half);
        ensure_shape(
            positions.0 >= shape.capacity && positions.1 == shape.head_dim,
            OP,
            positions,
            (shape.capacity, shape.head_dim),
        )?;
        model.blocks.iter().try_for_each(|block| block.check(width, shape))?;
        Ok(Some(Steps(cuda::step::Program::new(cuda, model, shape)?)))
    }
}

impl StepBlock<'_> {
    /// That its parts fit one another.
    fn check(&self, width: usize, shape: CacheShape) -> Result<()> {
        const OP: &str = "steps";
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let wide = self.linears[4].shape().0;
        let wanted = [
            (queries, width),
            (keys, width),
            (keys, width),
            (width, queries),
            (wide, width),
            (wide, width),
            (width, wide),
        ];
        for ((linear, bias), wanted) in self.linears.iter().zip(&self.biases).zip(wanted) {
            ensure_shape(linear.shape() == wanted, OP, linear.shape(), wanted)?;
            let len = bias.map_or(wanted.0, <[f32]>::len);
            ensure_shape(len == wanted.0, OP, (len, 1), (wanted.0, 1))?;
        }
        for gain in self.norms {
            ensure_shape(gain.len() == width, OP, (gain.len(), 1), (width, 1))?;
        }
        for gain in self.head_norms.iter().flatten() {
            ensure_shape(gain.len() == shape.head_dim, OP, (gain.len(), 1), (shape.head_dim, 1))?;
        }
        let kept = self.cache.shape();
        let (found, wanted) = ((kept.slots, kept.capacity), (shape.slots, shape.capacity));
        ensure_shape(kept == shape, OP, found, wanted)
    }
}

impl Device {
    /// That attention of such heads can be computed here, before anything is loaded for it.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_heads(&self, heads: usize, kv_heads: usize, head_dim: usize) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(_) => cuda::attention::check_shape(heads, kv_heads, head_dim),
        }
    }
}
