//! Keys and values of the tokens so far, for a block whose sequences grow.

use crate::cpu;
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

/// Keys and values of one block.
#[derive(Clone, Debug)]
pub struct KvCache(pub(crate) cpu::cached_attention::Cache, CacheShape);

impl Device {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::CpuOnly`] on a GPU.
    pub fn kv_cache(&self, shape: CacheShape) -> Result<KvCache> {
        self.cpu_only("kv_cache")?;
        Ok(KvCache(cpu::cached_attention::Cache::new(shape), shape))
    }

    /// Rotates each head of `x` by the position of its row in place; see [`Self::rope`].
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for rows that are not those of the spans and positions that the table
    /// does not have, [`Error::CpuOnly`] on a GPU.
    pub fn rope_spans(&self, x: &mut Tensor, table: &RopeTable, spans: &[Span]) -> Result<()> {
        const OP: &str = "rope_spans";
        let fits = x.cols().is_multiple_of(2 * table.half)
            && spans.iter().all(|span| span.start + span.len <= table.positions());
        ensure_shape(fits, OP, x.shape(), (table.positions(), 2 * table.half))?;
        ensure_rows(OP, x, spans)?;
        match &mut x.0 {
            Storage::Cpu(x) => {
                cpu::elementwise::rope_at(x, table, &positions(spans));
                Ok(())
            }
            Storage::Cuda(_) => Err(Error::CpuOnly { op: OP }),
        }
    }

    /// Takes the spans' keys and values `[rows, kv_heads · head_dim]` into the cache, then lets each
    /// row of `q` `[rows, heads · head_dim]` attend to its sequence up to itself: softmax(q kᵀ /
    /// √head_dim) v. Keys are rotated already. A slot has at most one span.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for operands of other rows or widths and spans beyond the cache,
    /// [`Error::CpuOnly`] on a GPU.
    pub fn cached_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
        spans: &[Span],
    ) -> Result<Tensor> {
        const OP: &str = "cached_attention";
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
        match (&q.0, &k.0, &v.0) {
            (Storage::Cpu(q), Storage::Cpu(k), Storage::Cpu(v)) => {
                Ok(Tensor(Storage::Cpu(cache.0.attend(q, k, v, shape, spans))))
            }
            _ => Err(Error::CpuOnly { op: OP }),
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
