//! Keys and values of the tokens so far, for a block whose sequences grow.

use std::sync::Arc;

use crate::attention_rule::AttentionRule;
use crate::cpu;
use crate::cuda::{self, Cuda};
use crate::device::Device;
use crate::error::{Error, Result, ensure_shape};
use crate::rope::RopeTable;
use crate::tensor::{Storage, Tensor};

/// Sizes of a block's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Sequences that are held beside each other.
    pub slots: usize,
    /// Tokens of the longest.
    pub capacity: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of one head.
    pub head_dim: usize,
}

/// Tokens that follow one another in a sequence: so many rows of a tensor. The rows of all spans follow
/// one another, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The sequence's place in the cache.
    pub slot: usize,
    /// Position of the first token: as many are in the cache.
    pub start: usize,
    /// How many.
    pub len: usize,
}

/// Keys and values of one block: f32 on the CPU, fp16 on a GPU.
#[derive(Debug)]
pub struct KvCache(Kept, CacheShape);

#[derive(Debug)]
enum Kept {
    Cpu(cpu::cached_attention::Cache),
    Cuda(cuda::kv::Cache),
}

impl KvCache {
    pub(crate) fn shape(&self) -> CacheShape {
        self.1
    }

    /// What this card has of it.
    pub(crate) fn on(&self, cuda: &Arc<Cuda>) -> Option<&cuda::kv::Cache> {
        match &self.0 {
            Kept::Cuda(cache) if Arc::ptr_eq(cache.cuda(), cuda) => Some(cache),
            _ => None,
        }
    }
}

impl Device {
    /// An empty cache.
    ///
    /// # Errors
    /// Memory that is not to be had, on a GPU.
    pub fn kv_cache(&self, shape: CacheShape) -> Result<KvCache> {
        let kept = match self {
            Self::Cpu => Kept::Cpu(cpu::cached_attention::Cache::new(shape)),
            Self::Cuda(cuda) => Kept::Cuda(cuda::kv::Cache::new(cuda, shape)?),
        };
        Ok(KvCache(kept, shape))
    }

    /// Rotates each head of `x` by the position of its row in place; see [`Self::rope`].
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for rows that are not those of the spans and positions that the table
    /// does not have.
    pub fn rope_spans(&self, x: &mut Tensor, table: &RopeTable, spans: &[Span]) -> Result<()> {
        const OP: &str = "rope_spans";
        table.ensure_heads(OP, x.shape())?;
        let fits = spans.iter().all(|span| span.start + span.len <= table.positions());
        ensure_shape(fits, OP, x.shape(), (table.positions(), table.head_dim))?;
        ensure_rows(OP, x, spans)?;
        match &mut x.0 {
            Storage::Cpu(x) => {
                cpu::elementwise::rope_at(x, table, &positions(spans));
                Ok(())
            }
            Storage::Cuda(x) => cuda::kv::rope_spans(x, table, spans),
        }
    }

    /// Takes the spans' keys and values `[rows, kv_heads · head_dim]` into the cache, then lets each
    /// row of `q` `[rows, heads · head_dim]` attend to its sequence up to itself, as the rule has it. Keys
    /// are rotated already. A slot has at most one span.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for operands of other rows or widths and spans beyond the cache,
    /// [`Error::DeviceMismatch`], and [`Error::Unsupported`] as [`Self::attention`].
    pub fn cached_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
        spans: &[Span],
        rule: &AttentionRule,
    ) -> Result<Tensor> {
        const OP: &str = "cached_attention";
        rule.check(OP)?;
        let shape = cache.1;
        for (x, heads) in [(q, shape.heads), (k, shape.kv_heads), (v, shape.kv_heads)] {
            ensure_rows(OP, x, spans)?;
            let width = heads * shape.head_dim;
            ensure_shape(x.cols() == width, OP, x.shape(), (x.rows(), width))?;
        }
        let mut used = vec![false; shape.slots];
        for span in spans {
            let fits = span.slot < shape.slots
                && span.start + span.len <= shape.capacity
                && !std::mem::replace(&mut used[span.slot], true);
            ensure_shape(
                fits,
                OP,
                (span.slot, span.start + span.len),
                (shape.slots, shape.capacity),
            )?;
        }
        match (&q.0, &k.0, &v.0, &mut cache.0) {
            (Storage::Cpu(q), Storage::Cpu(k), Storage::Cpu(v), Kept::Cpu(cache)) => {
                Ok(Tensor(Storage::Cpu(cache.attend(q, k, v, shape, spans, rule))))
            }
            (Storage::Cuda(q), Storage::Cuda(k), Storage::Cuda(v), Kept::Cuda(cache)) => {
                Ok(Tensor(Storage::Cuda(cache.attend(q, k, v, shape, spans, rule)?)))
            }
            _ => Err(Error::DeviceMismatch { op: OP }),
        }
    }
}

/// The position of every row.
fn positions(spans: &[Span]) -> Vec<usize> {
    spans.iter().flat_map(|span| span.start..span.start + span.len).collect()
}

fn ensure_rows(op: &'static str, x: &Tensor, spans: &[Span]) -> Result<()> {
    let rows = spans.iter().map(|span| span.len).sum();
    ensure_shape(x.rows() == rows, op, x.shape(), (rows, x.cols()))
}
