//! Keys and values of a block's sequences on a card.

use std::sync::Arc;

use cudarc::driver::result;
use half::f16;

use super::attention;
use super::buffer::Buffer;
use super::context::Cuda;
use super::elementwise::rope_rows;
use super::error::StageContext;
use super::matrix::{Matrix, ensure_same_card};
use super::transfer::address;
use crate::attention_rule::AttentionRule;
use crate::attention_shape::AttentionShape;
use crate::error::{Error, Result};
use crate::kv_cache::{CacheShape, Span};
use crate::rope::RopeTable;

/// Keys and values, fp16, each `[slots, capacity, kv_heads, head_dim]`: the rows of a sequence as a
/// matrix has them. The memory is shared by all clones, and work in the order of the stream writes it.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    cuda: Arc<Cuda>,
    keys: Buffer<f16>,
    values: Buffer<f16>,
}

impl Cache {
    pub(crate) fn new(cuda: &Arc<Cuda>, shape: CacheShape) -> Result<Self> {
        const STAGE: &str = "keys and values";
        let count = shape.slots * shape.capacity * shape.kv_heads * shape.head_dim;
        Ok(Self {
            cuda: Arc::clone(cuda),
            keys: cuda.zeros(STAGE, count)?,
            values: cuda.zeros(STAGE, count)?,
        })
    }

    /// The card.
    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// Addresses of keys and values.
    pub(super) fn addresses(&self) -> [u64; 2] {
        [&self.keys, &self.values].map(|buffer| address(buffer.slice(), self.cuda.stream()))
    }

    /// As [`crate::Device::cached_attention`], which has checked everything.
    pub(crate) fn attend(
        &mut self,
        q: &Matrix,
        k: &Matrix,
        v: &Matrix,
        shape: CacheShape,
        spans: &[Span],
        rule: &AttentionRule,
    ) -> Result<Matrix> {
        const OP: &str = "cached_attention";
        ensure_same_card(OP, &[q, k, v])?;
        if !Arc::ptr_eq(q.cuda(), &self.cuda) {
            return Err(Error::DeviceMismatch { op: OP });
        }
        [q, k, v].iter().try_for_each(|x| x.f16(OP).map(|_| ()))?;
        let mut out = Matrix::uninit_f16(&self.cuda, OP, q.shape())?;
        let to = out.address_mut()?;
        let CacheShape { capacity, heads, kv_heads, head_dim, .. } = shape;
        let (wide, narrow) = ((heads * head_dim * 2) as u64, (kv_heads * head_dim * 2) as u64);
        let mut first = 0;
        for span in spans {
            let sequence = (span.slot * capacity) as u64 * narrow;
            let kept = self.addresses().map(|at| at + sequence);
            for (from, to) in [k, v].iter().zip(kept) {
                let from = from.address() + first * narrow;
                let to = to + span.start as u64 * narrow;
                // SAFETY: the span's rows lie within the matrix and, as the caller has checked, within
                // its sequence's part of the cache.
                unsafe { self.copy(OP, from, to, span.len * narrow as usize)? };
            }
            let operands = ([q.address() + first * wide, kept[0], kept[1]], to + first * wide);
            let shape = AttentionShape { heads, kv_heads, head_dim, seq_len: span.len };
            if span.len > 0 {
                // SAFETY: q and out hold the span's rows, the cache all up to its last.
                unsafe { attention::launch(&self.cuda, operands, shape, 1, span.start, rule)? };
            }
            first += span.len as u64;
        }
        Ok(out)
    }

    /// Queues a copy on the card.
    ///
    /// # Safety
    /// Both addresses are of so many bytes that live until the work queued now is done.
    unsafe fn copy(&self, stage: &'static str, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.cuda.context().bind_to_thread().stage(stage)?;
        let stream = self.cuda.stream().cu_stream();
        // SAFETY: the caller vouches for both.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }.stage(stage)
    }
}

/// As [`crate::Device::rope_spans`], which has checked everything.
pub(crate) fn rope_spans(x: &mut Matrix, table: &RopeTable, spans: &[Span]) -> Result<()> {
    let mut first = 0;
    for span in spans {
        rope_rows(x, table, first..first + span.len, span.len, span.start)?;
        first += span.len;
    }
    Ok(())
}
