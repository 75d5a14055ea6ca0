//! Launches of the kernels of a step, on memory that the program has laid out.
//!
//! The launches are safe functions over addresses, since `step` alone calls them, with the memory of its
//! own room and of weights that live as long as the program.

use std::sync::Arc;

use cudarc::driver::LaunchConfig;

use super::coded::per_place;
use super::context::Cuda;
use super::dense::int;
use super::dependent::{Arguments, launch};
use super::product::Launch;
use crate::error::Result;
use crate::kv_cache::CacheShape;

/// Where a token's values go in a weight's order: the column at every place or 0, places of a row, address.
type Ordered = (u64, usize, u64);

/// How keys are cut for attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splits {
    /// Splits of the longest sequence.
    pub(super) count: usize,
    /// Keys of a split.
    keys: usize,
    /// Query heads that a block of threads takes.
    group: usize,
}

impl Splits {
    /// Enough to fill a card at long contexts, and no smaller than pays.
    pub(super) fn of(shape: CacheShape) -> Self {
        const LEAST: usize = 256;
        const MOST: usize = 1024;
        let keys = shape.capacity.div_ceil(64).next_multiple_of(LEAST).clamp(LEAST, MOST);
        let group = match shape.heads / shape.kv_heads {
            0 | 1 => 1,
            2 => 2,
            3 | 4 => 4,
            _ => 8,
        };
        Self { count: shape.capacity.div_ceil(keys).max(1), keys, group }
    }
}

/// Operands of attention.
pub(super) struct Attention {
    pub(super) qkv: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) at: u64,
    pub(super) sums: u64,
    pub(super) stats: u64,
    pub(super) shape: CacheShape,
    pub(super) splits: Splits,
}

/// Launches for so many tokens.
pub(super) struct Launcher<'a> {
    pub(super) cuda: &'a Arc<Cuda>,
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
        (places, padded, out): Ordered,
    ) -> Result<()> {
        const NAME: &str = "step_norm";
        let function = self.cuda.kernel("step_norm.cu", NAME)?;
        let config = grid((self.tokens, 1, 1), 1024, 0);
        let (cols, padded) = (int(cols)?, int(padded)?);
        let mut given = arguments![&hidden, &gain, &places, &out, &cols, &padded, &eps];
        // SAFETY: the arguments are the kernel's, over memory of the program for so many tokens.
        unsafe { launch(self.cuda, NAME, &function, config, &mut given) }
    }

    /// A product that was prepared.
    pub(super) fn product(&self, prepared: &Launch) -> Result<()> {
        let mut given = arguments![&prepared.product];
        let (function, config) = (&prepared.function, prepared.config);
        // SAFETY: as above.
        unsafe { launch(self.cuda, "coded_linear", function, config, &mut given) }
    }

    /// Norms of heads where there are gains, rotary embedding, and keys and values into the cache.
    pub(super) fn rope(
        &self,
        qkv: u64,
        ([q_gain, k_gain], eps): ([u64; 2], f32),
        [cos, sin]: [u64; 2],
        (at, keys, values): (u64, u64, u64),
        shape: CacheShape,
    ) -> Result<()> {
        const NAME: &str = "step_rope";
        let function = self.cuda.kernel("step_rope.cu", NAME)?;
        let config = grid((shape.heads + 2 * shape.kv_heads, self.tokens, 1), 32, 0);
        let (heads, kv_heads) = (int(shape.heads)?, int(shape.kv_heads)?);
        let (half, capacity) = (int(shape.head_dim / 2)?, int(shape.capacity)?);
        let mut given = arguments![
            &qkv, &q_gain, &k_gain, &eps, &cos, &sin, &at, &keys, &values, &heads, &kv_heads,
            &half, &capacity,
        ];
        // SAFETY: as above; positions are within the cache and the table.
        unsafe { launch(self.cuda, NAME, &function, config, &mut given) }
    }

    /// Every split's share of attention.
    pub(super) fn attention(&self, of: &Attention) -> Result<()> {
        let CacheShape { heads, kv_heads, head_dim, capacity, .. } = of.shape;
        let Splits { count, keys: split, group } = of.splits;
        let name = match group {
            1 => "step_attention_1",
            2 => "step_attention_2",
            4 => "step_attention_4",
            _ => "step_attention_8",
        };
        let shared = (group * split + 9 * group * 128) * size_of::<f32>();
        let function = self.cuda.kernel_with_shared("step_attention.cu", name, shared)?;
        let chunks = (heads / kv_heads).div_ceil(group);
        let config = grid((kv_heads * chunks, count, self.tokens), 256, shared);
        let scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
        let stride = int((heads + 2 * kv_heads) * head_dim)?;
        let (heads, kv_heads, dim) = (int(heads)?, int(kv_heads)?, int(head_dim)?);
        let (capacity, split) = (int(capacity)?, int(split)?);
        let mut given = arguments![
            &of.qkv, &of.keys, &of.values, &of.at, &of.sums, &of.stats, &stride, &heads, &kv_heads,
            &dim, &capacity, &split, &scale,
        ];
        // SAFETY: as above.
        unsafe { launch(self.cuda, name, &function, config, &mut given) }
    }

    /// The splits put together, in the order of the output projection.
    pub(super) fn join(&self, of: &Attention, (places, padded, out): Ordered) -> Result<()> {
        const NAME: &str = "step_join";
        let function = self.cuda.kernel("step_attention.cu", NAME)?;
        let config = per_place(padded, self.tokens);
        let (heads, dim) = (int(of.shape.heads)?, int(of.shape.head_dim)?);
        let (count, split) = (int(of.splits.count)?, int(of.splits.keys)?);
        let padded = int(padded)?;
        let mut given = arguments![
            &of.sums, &of.stats, &of.at, &places, &out, &heads, &dim, &count, &split, &padded,
        ];
        // SAFETY: as above.
        unsafe { launch(self.cuda, NAME, &function, config, &mut given) }
    }

    /// silu(gate) · up in a weight's order.
    pub(super) fn silu(
        &self,
        (gate, up): (u64, u64),
        cols: usize,
        (places, padded, out): Ordered,
    ) -> Result<()> {
        const NAME: &str = "step_silu";
        let function = self.cuda.kernel("step_silu.cu", NAME)?;
        let config = per_place(padded, self.tokens);
        let (cols, padded) = (int(cols)?, int(padded)?);
        let mut given = arguments![&gate, &up, &places, &out, &cols, &padded];
        // SAFETY: as above.
        unsafe { launch(self.cuda, NAME, &function, config, &mut given) }
    }
}

fn grid((x, y, z): (usize, usize, usize), threads: u32, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}
