//! Launches of the kernels of a step, on memory that the program has laid out.
//!
//! The launches are safe functions over addresses, since `step` alone calls them, with the memory of its
//! own room and of weights that live as long as the program.

use std::sync::Arc;

use cudarc::driver::{CudaStream, LaunchConfig};
use half::f16;

use super::context::Cuda;
use super::dense::int;
use super::dependent::{Arguments, launch};
use super::ordered::{Ordered, per_place};
use super::product::Launch;
use crate::error::Result;
use crate::kv_cache::CacheShape;

/// How keys are cut for attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splits {
    /// Splits of the longest sequence.
    pub(super) count: usize,
    /// Keys of a split.
    keys: usize,
}

impl Splits {
    /// Keys that a block of threads takes at a time; as in `step_attention.cu`.
    const KEYS: usize = 64;
    /// Splits of a sequence, about: enough to fill a card, and few enough to be put together.
    const MOST: usize = 128;
    /// More of them are put together in their own order and gathered afterwards: a value that is fetched
    /// alone costs a sector of 32 bytes of each.
    const GATHERED: usize = 8;

    /// Enough to fill a card at long contexts, and no smaller than pays.
    pub(super) fn of(shape: CacheShape) -> Self {
        let keys = shape.capacity.div_ceil(Self::MOST).next_multiple_of(Self::KEYS).max(Self::KEYS);
        Self { count: shape.capacity.div_ceil(keys).max(1), keys }
    }

    /// For sequences of up to so many keys: few sizes, as each is recorded by itself, of four times as many
    /// splits each. Where sequences are cut stays, and so do a token's bits.
    pub(super) fn up_to(self, keys: usize) -> Self {
        const FIRST: usize = 4;
        let needed = keys.div_ceil(self.keys);
        let mut count = FIRST;
        while count < needed {
            count *= 4;
        }
        Self { count: count.min(self.count), ..self }
    }

    /// Query heads that a block of threads takes, of those that share a key head: all, up to 8, for the keys
    /// are read once for them; fewer where too few blocks for the card come of that. A head's bits are the
    /// same.
    fn group(&self, shape: CacheShape, tokens: usize, processors: usize) -> usize {
        let together = shape.heads / shape.kv_heads;
        let blocks = |group: usize| shape.kv_heads * together.div_ceil(group) * self.count * tokens;
        let mut group = together.next_power_of_two().min(8);
        while group > 1 && blocks(group / 2) <= 2 * processors {
            group /= 2;
        }
        group
    }

    /// Whether values are put together in their own order before they are brought into another.
    pub(super) fn join_then_gather(&self, to: &Ordered) -> bool {
        to.places != 0 && self.count > Self::GATHERED
    }
}

/// `Operands` of `step_attention.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Operands {
    qkv: u64,
    cache: [u64; 2],
    at: u64,
    angles: [u64; 2],
    gains: [u64; 2],
    sums: u64,
    stats: u64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    capacity: i32,
    split: i32,
    eps: f32,
    scale: f32,
}

/// Operands of attention.
pub(super) struct Attention {
    /// Queries, keys and values.
    pub(super) qkv: u64,
    /// Keys and values of the sequences.
    pub(super) cache: [u64; 2],
    /// Sequence and position of every token.
    pub(super) at: u64,
    /// Cosines and sines.
    pub(super) angles: [u64; 2],
    /// Gains of query and key heads, or 0.
    pub(super) gains: [u64; 2],
    pub(super) eps: f32,
    /// What splits leave for each other.
    pub(super) sums: u64,
    pub(super) stats: u64,
    pub(super) shape: CacheShape,
    pub(super) splits: Splits,
}

/// Launches for so many tokens, on the stream of all work or one that records them.
pub(super) struct Launcher<'a> {
    pub(super) cuda: &'a Arc<Cuda>,
    pub(super) stream: &'a CudaStream,
    pub(super) tokens: usize,
}

macro_rules! arguments {
    ($($value:expr),* $(,)?) => {{
        let mut arguments = Arguments::new();
        $(arguments.push($value);)*
        arguments
    }};
}

impl Launcher<'_> {
    /// hidden / rms · gain in a weight's order.
    pub(super) fn norm(
        &self,
        (hidden, gain, eps): (u64, u64, f32),
        cols: usize,
        to: &Ordered,
    ) -> Result<()> {
        const NAME: &str = "step_norm";
        let function = self.cuda.kernel("step_norm.cu", NAME)?;
        let config = per_place(to.padded as usize, self.tokens);
        let cols = int(cols)?;
        let mut given = arguments![&hidden, &gain, to, &cols, &eps];
        // SAFETY: the arguments are the kernel's, over memory of the program for so many tokens.
        unsafe { launch((self.cuda, self.stream), NAME, &function, config, &mut given) }
    }

    /// A product that was prepared.
    pub(super) fn product(&self, prepared: &Launch) -> Result<()> {
        // SAFETY: as above.
        unsafe { prepared.queue(self.cuda, self.stream) }
    }

    /// Norms of heads where there are gains, rotary embedding, keys and values into the cache, and every
    /// split's share of attention.
    pub(super) fn attention(&self, of: &Attention) -> Result<()> {
        let CacheShape { heads, kv_heads, head_dim, capacity, .. } = of.shape;
        let Splits { count, keys: split } = of.splits;
        let processors = self.cuda.driver().multiprocessors();
        let group = of.splits.group(of.shape, self.tokens, processors);
        let name = match group {
            1 => "step_attention_1",
            2 => "step_attention_2",
            4 => "step_attention_4",
            _ => "step_attention_8",
        };
        let halves = 2 * Splits::KEYS * head_dim;
        let shared = halves * size_of::<f16>() + group * (128 + Splits::KEYS) * size_of::<f32>();
        let function = self.cuda.kernel("step_attention.cu", name)?;
        let chunks = (heads / kv_heads).div_ceil(group);
        let config = grid((kv_heads * chunks, count, self.tokens), 128, shared);
        let operands = Operands {
            qkv: of.qkv,
            cache: of.cache,
            at: of.at,
            angles: of.angles,
            gains: of.gains,
            sums: of.sums,
            stats: of.stats,
            heads: int(heads)?,
            kv_heads: int(kv_heads)?,
            dim: int(head_dim)?,
            capacity: int(capacity)?,
            split: int(split)?,
            eps: of.eps,
            scale: std::f32::consts::LOG2_E / (head_dim as f32).sqrt(),
        };
        let mut given = arguments![&operands];
        // SAFETY: as above; positions are within the cache and the table, and what the kernel reads before
        // its wait, positions and keys of earlier tokens, was there before the step: see `Program::run`.
        unsafe { launch((self.cuda, self.stream), name, &function, config, &mut given) }
    }

    /// The splits put together, in the order of the output projection.
    pub(super) fn join(&self, of: &Attention, to: &Ordered) -> Result<()> {
        const NAME: &str = "step_join";
        let function = self.cuda.kernel("step_attention.cu", NAME)?;
        let config = grid(((to.padded as usize).div_ceil(128), self.tokens, 1), 512, 0);
        let (heads, dim) = (int(of.shape.heads)?, int(of.shape.head_dim)?);
        let (count, split) = (int(of.splits.count)?, int(of.splits.keys)?);
        let mut given = arguments![&of.sums, &of.stats, &of.at, to, &heads, &dim, &count, &split];
        // SAFETY: as above.
        unsafe { launch((self.cuda, self.stream), NAME, &function, config, &mut given) }
    }

    /// fp16 values brought into the order of a weight.
    pub(super) fn gather(&self, from: u64, cols: usize, to: &Ordered) -> Result<()> {
        const NAME: &str = "gather_columns_f16";
        let function = self.cuda.kernel("gather_columns.cu", NAME)?;
        let config = per_place(to.padded as usize, self.tokens);
        let cols = int(cols)?;
        let mut given = arguments![&from, to, &cols];
        // SAFETY: as above.
        unsafe { launch((self.cuda, self.stream), NAME, &function, config, &mut given) }
    }

    /// silu(gate) · up in a weight's order.
    pub(super) fn silu(&self, (gate, up): (u64, u64), cols: usize, to: &Ordered) -> Result<()> {
        const NAME: &str = "step_silu";
        let function = self.cuda.kernel("step_silu.cu", NAME)?;
        let config = per_place(to.padded as usize, self.tokens);
        let cols = int(cols)?;
        let mut given = arguments![&gate, &up, to, &cols];
        // SAFETY: as above.
        unsafe { launch((self.cuda, self.stream), NAME, &function, config, &mut given) }
    }
}

fn grid((x, y, z): (usize, usize, usize), threads: u32, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_texts_have_blocks_for_the_whole_card() {
        let group = |heads, kv_heads, capacity, tokens| {
            let shape = CacheShape { slots: 16, capacity, heads, kv_heads, head_dim: 128 };
            Splits::of(shape).group(shape, tokens, 132)
        };
        assert_eq!(group(64, 8, 160, 1), 1);
        assert_eq!(group(64, 8, 160, 2), 2);
        assert_eq!(group(64, 8, 160, 16), 8);
        assert_eq!(group(64, 8, 4096, 1), 8);
        // As many as share a key head, whatever that leaves idle.
        assert_eq!(group(6, 6, 160, 16), 1);
        assert_eq!(group(12, 4, 4096, 4), 4);
        assert_eq!(group(56, 8, 4096, 4), 8);
    }

    #[test]
    fn sequences_are_cut_alike_however_long_they_are() {
        let shape = CacheShape { slots: 1, capacity: 9000, heads: 8, kv_heads: 8, head_dim: 64 };
        let all = Splits::of(shape);
        assert_eq!((all.count, all.keys), (71, 128));
        for (keys, count) in [(1, 4), (512, 4), (513, 16), (2049, 64), (8193, 71), (9000, 71)] {
            let some = all.up_to(keys);
            assert_eq!((some.count, some.keys), (count, 128), "{keys}");
        }
        let small = Splits::of(CacheShape { capacity: 100, ..shape });
        assert_eq!(small.up_to(100).count, 2);
    }
}
