//! How much memory a run needs, and what is kept where so that it fits.
//!
//! Bytes are counted from the model's shape. Where a GPU cannot hold everything, inputs of o and
//! down wait in host memory, as many of them as must, and then hidden states too. Of a block with experts
//! what gate and up read waits in their place, and what one expert makes of its tokens.

use gptq_checkpoint::{Experts, LinearId, LinearShape, ModelConfig};
use gptq_compute::{Device, FloatType, Turning};
use gptq_quant::{QuantSpec, Rotate};
use serde::Serialize;

use crate::error::Result;
use crate::host_memory::ensure;
use crate::operations::Extras;

/// Shares of what is kept between stages that wait in host memory, from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Offload {
    /// Of the inputs of o and of down; of experts, of those of gate and up and one's activations.
    pub inputs: f64,
    /// Of the hidden states.
    pub hidden: f64,
}

/// Predicted peaks of a run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryPlan {
    /// What waits in host memory.
    pub offload: Offload,
    /// Peak of device memory in bytes.
    pub device_bytes: u64,
    /// Peak of host memory in bytes, mapped files apart.
    pub host_bytes: u64,
}

/// The sizes of a block that memory depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Weights of all linears.
    pub weights: usize,
    /// Largest in_features.
    pub widest: usize,
    /// Weights of the largest linear.
    pub largest: usize,
    /// Largest out_features.
    pub rows: usize,
    /// Values of a token that are kept from one stage to the next.
    pub kept: usize,
    /// Experts that a token goes through; 0 where it goes through none.
    pub per_token: usize,
}

/// How many times its even share of the tokens an expert may see before its activations are made twice
/// and not kept.
const EVEN_SHARES: usize = 2;

/// Values of activations of `tokens` tokens that are kept of one expert, from the Gram to the product of
/// its down: those of [`EVEN_SHARES`]. What sees more, as the shared expert does, makes them again, which
/// takes the time of two products, where kept ones would take the room of a dense MLP's.
pub(crate) fn kept_activations(experts: &Experts, tokens: usize) -> usize {
    let Experts { count, per_token, intermediate_size, .. } = *experts;
    (tokens * EVEN_SHARES * per_token / count.max(1)).min(tokens) * intermediate_size
}

/// Bytes that an evaluation holds beside branches that are made from the same reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Along {
    /// Of a GPU.
    pub(crate) device: usize,
    /// Of the host.
    pub(crate) host: usize,
}

impl BlockSizes {
    /// Sizes from every linear's rows and columns.
    pub fn new(hidden: usize, intermediate: usize, linears: &[(usize, usize)]) -> Self {
        let max = |of: fn(&(usize, usize)) -> usize| linears.iter().map(of).max().unwrap_or(0);
        Self {
            hidden,
            intermediate,
            weights: linears.iter().map(|(rows, cols)| rows * cols).sum(),
            widest: max(|l| l.1),
            largest: max(|l| l.0 * l.1),
            rows: max(|l| l.0),
            kept: max(|l| l.1),
            per_token: 0,
        }
    }

    /// The same of a block with experts: in the place of down's inputs it keeps gate's, and an expert's
    /// activations.
    #[must_use]
    pub fn with_experts(self, experts: &Experts, linears: &[LinearShape]) -> Self {
        /// Tokens for a share that is exact enough.
        const MANY: usize = 1 << 20;
        let output = linears.iter().find(|linear| linear.id == LinearId::O);
        let of_experts = self.hidden + kept_activations(experts, MANY).div_ceil(MANY);
        Self {
            intermediate: experts.all().map(|e| experts.width(e)).max().unwrap_or(0),
            kept: of_experts.max(output.map_or(0, |output| output.in_features)),
            per_token: experts.per_token,
            ..self
        }
    }

    /// Sizes of a model's blocks; of blocks that differ, the largest of each.
    pub fn of(model: &ModelConfig) -> Self {
        let of_block = |block| {
            let linears = model.block_linears(block);
            let sides: Vec<_> = linears.iter().map(LinearShape::sides).collect();
            let sizes = Self::new(model.hidden_size, widest_of_mlp(model, &linears), &sides);
            model.experts(block).map_or(sizes, |experts| sizes.with_experts(experts, &linears))
        };
        let largest = |a: Self, b: Self| Self {
            hidden: a.hidden.max(b.hidden),
            intermediate: a.intermediate.max(b.intermediate),
            weights: a.weights.max(b.weights),
            widest: a.widest.max(b.widest),
            largest: a.largest.max(b.largest),
            rows: a.rows.max(b.rows),
            kept: a.kept.max(b.kept),
            per_token: a.per_token.max(b.per_token),
        };
        let none = Self::new(model.hidden_size, 0, &[]);
        (0..model.num_hidden_layers).map(of_block).fold(none, largest)
    }
}

/// Width of the MLP, or of gate and up where they are one linear, whose halves are copied.
fn widest_of_mlp(model: &ModelConfig, linears: &[LinearShape]) -> usize {
    let fused = linears.iter().find(|l| l.id == LinearId::GateUp);
    fused.map_or(model.intermediate_size, |linear| linear.out_features)
}

/// Part of a card that a run may fill: the rest is for the context, kernels and fragments.
pub(crate) const USABLE: f64 = 0.94;

/// Pinned buffers that uploads go through, and what CUDA takes of the host.
pub(crate) const STAGING: usize = 1 << 30;

/// Rows of the head that are fitted at a time.
pub(crate) const HEAD_ROWS: usize = 16_384;

/// What is held in one walk over a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of all windows; 0 when there is no calibration.
    pub tokens: usize,
    /// Tokens of windows that the unquantized model alone walks, to judge by.
    pub held_out: usize,
    /// Tokens of the longest window.
    pub seq_len: usize,
    /// What is walked and looked at beside the quantized model's states.
    pub(crate) extras: Extras,
    /// Weights are solved from values wider than those that a GPU's forward uses.
    pub exact: bool,
    /// First Grams that a sweep's branches share, of the residual stream's width.
    pub shared_grams: usize,
}

/// Bytes of host memory that embedding and head take beside the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// While blocks are walked.
    walking: usize,
    /// While the tables are written, after the last block.
    writing: usize,
}

impl Tables {
    /// Of a run of `spec` on a model that is stored in `stored`; `rounds` where a type other than
    /// fp16 is rounded when it is read.
    pub fn of(model: &ModelConfig, spec: &QuantSpec, stored: FloatType, rounds: bool) -> Self {
        let (vocab, width) = (model.vocab_size, model.hidden_size);
        let table = 2 * vocab * width;
        let turned = spec.choices.rotate.turns_stream();
        // A learned rotation is a matrix, and stays to the end.
        let learned = spec.recipe.calibrates() && spec.choices.rotate == Rotate::Learned;
        let matrix = if learned { 4 * width * width } else { 0 };
        let wide = rounds && stored != FloatType::F16;
        // The embedding as the walk reads it: turned, rounded, or the file's own.
        let walking = if turned || wide { table } else { 0 };
        // A fitted head waits while the embedding is turned or rounded once more. It is fitted
        // some rows at a time, in f32, by a map that takes a Hessian and its factor.
        let fits = spec.recipe.calibrates() && spec.choices.head > 0.0;
        let fitting = 8 * HEAD_ROWS.min(vocab) * width + 20 * width * width;
        let copied = if turned || wide { table } else { 0 };
        // Pages of the file stay as long as one table is read.
        let read = copied + stored.size() * vocab * width;
        let writing = if fits { table + read.max(fitting) } else { read };
        let walking = walking + matrix;
        Self { walking, writing: walking + writing }
    }
}

impl Workload {
    /// The first Grams of a sweep.
    fn shared_bytes(self, block: BlockSizes) -> usize {
        4 * self.shared_grams * block.hidden * block.hidden
    }

    /// Device memory of `together` branches alike but for the one whose turn it is: their hidden states, a block
    /// at hand and one read ahead.
    pub(crate) fn waiting(self, block: BlockSizes, together: usize) -> usize {
        let each = 4 * self.states() * block.hidden + 2 * 2 * block.weights;
        each * together.saturating_sub(1)
    }

    /// The Gram of what attention makes of v's inputs and its factor, beside those of q and k, and of one
    /// window the inputs, queries and keys as wide as they are, and what comes of them; `value` bytes each.
    fn attended_bytes(self, block: BlockSizes, value: usize) -> usize {
        if !self.extras.attended {
            return 0;
        }
        8 * block.hidden * block.hidden + 6 * value * self.seq_len * block.hidden
    }

    /// Walks whose states are held.
    fn streams(self) -> usize {
        1 + usize::from(self.extras.reference)
    }

    /// Tokens whose states are held, those of both walks counted twice.
    fn states(self) -> usize {
        self.tokens * self.streams() + self.held_out
    }

    /// Which expert each token goes through and how much of it gets, in host memory: a row and a weight
    /// each, and a row and a weight for the shared one.
    fn route_bytes(self, block: BlockSizes) -> usize {
        if block.per_token == 0 { 0 } else { 8 * self.tokens * (block.per_token + 1) }
    }
}

/// Plans calibrated runs that take turns on a GPU of `budget` bytes, one of which is the usual number.
/// Where nothing fits, the smallest plan is tried: its out-of-memory error says what to lower.
pub fn plan_gpu(block: BlockSizes, works: &[Workload], tables: Tables, budget: u64) -> MemoryPlan {
    let usable = (budget as f64 * USABLE) as usize;
    let need = GpuBytes::together(block, works);
    let over = (need.fixed + need.inputs + need.hidden).saturating_sub(usable);
    if over == 0 {
        return need.plan(Offload::default(), tables);
    }
    // An offloaded share has chunks on their way as well.
    let over = over + need.moving;
    let share = |bytes: usize, of: usize| (bytes as f64 / of.max(1) as f64).min(1.0);
    let inputs = share(over, need.inputs);
    let hidden = share(over.saturating_sub(need.inputs), need.hidden);
    need.plan(Offload { inputs, hidden }, tables)
}

/// What calibrated runs that take turns on this device should offload, all alike: nothing on the CPU.
///
/// # Errors
/// Windows whose states and inputs host memory cannot hold.
pub fn offload(device: &Device, block: BlockSizes, works: &[Workload]) -> Result<Offload> {
    offload_beside(device, block, works, Along::default())
}

/// As [`offload`], for runs beside an evaluation.
pub(crate) fn offload_beside(
    device: &Device,
    block: BlockSizes,
    works: &[Workload],
    along: Along,
) -> Result<Offload> {
    let (offload, in_host) = match device_budget(device)? {
        None => (Offload::default(), works.iter().map(|&work| 4 * states_of(block, work)).sum()),
        Some(budget) => {
            let need = GpuBytes::together(block, works);
            let budget = budget.saturating_sub(along.device as u64);
            let offload = plan_gpu(block, works, Tables::default(), budget).offload;
            (offload, need.offloaded(offload))
        }
    };
    let tokens: usize = works.iter().map(|work| work.tokens).sum();
    let what = match along.host {
        0 => format!("Hidden states and inputs of {tokens} tokens"),
        _ => format!("Hidden states and inputs of {tokens} tokens, and an evaluation beside them,"),
    };
    let needed = in_host.saturating_add(along.host) as u64;
    ensure(&what, needed, "calibrate on fewer or shorter windows")?;
    Ok(offload)
}

/// Bytes of a device that a run may fill, if it has memory of its own.
pub(crate) fn device_budget(device: &Device) -> Result<Option<u64>> {
    let memory = device.memory()?;
    Ok(memory.map(|m| m.budget.min(m.free + m.held) as u64))
}

/// Values of hidden states, and of one stage's inputs, of all tokens.
fn states_of(block: BlockSizes, work: Workload) -> usize {
    work.states() * block.hidden + work.tokens * block.kept
}

/// Bytes on a GPU: fp16 weights and activations, f32 hidden states and matrices.
struct GpuBytes {
    /// What cannot be offloaded.
    fixed: usize,
    /// Inputs of o or down, for all tokens.
    inputs: usize,
    /// Hidden states.
    hidden: usize,
    /// Chunks on their way to and from host memory.
    moving: usize,
    /// Host memory beside what is offloaded.
    host: usize,
}

impl GpuBytes {
    fn new(block: BlockSizes, work: Workload) -> Self {
        let Workload { tokens, seq_len, extras, exact, .. } = work;
        let reference = extras.reference;
        let streams = work.streams();
        // A window longer than a chunk is one of its own.
        let chunk = Device::GPU_CHUNK_TOKENS.max(seq_len).min(tokens.max(1));
        // The block computed, the one read ahead, and the first as it was before.
        let blocks = (1 + streams) * 2 * block.weights;
        // A chunk in flight: gate, up and their product, hidden states coming and going; with a
        // reference, states of both streams and their difference.
        let lacking = if reference { 10 * block.hidden } else { 0 };
        // With experts also the rows of one, and what it gives them.
        let rows = if block.per_token > 0 { 2 * 2 * block.hidden } else { 0 };
        let flight = chunk * (3 * 2 * block.intermediate + 3 * 4 * block.hidden + lacking + rows);
        // The Gram, U, and a quarter of it for the factor's workspace; then the solve (see
        // `gptq_compute`): f32 weights, new fp16 weights, codes twice, a window of errors. A shift
        // is gathered beside U, and the shifted weights are solved from f32.
        let square = block.widest * block.widest;
        let shift = if reference { 4 * block.largest } else { 0 };
        let wide = if exact { 4 * block.largest } else { 0 };
        let solve = 8 * block.largest + 4 * 1024 * block.rows + wide;
        let gathering = 4 * square + flight + shift;
        // The matrix that a block's weights are turned by when they are read ahead.
        let turns = extras.learned && !exact;
        let turning = if turns { Turning::bytes(block.hidden, block.largest) } else { 0 };
        // The Gram of all tokens and its factor, for experts that see too few.
        let all_tokens = if block.per_token > 0 { 8 * block.hidden * block.hidden } else { 0 };
        let solving = (9 * square + solve).max(4 * square + solve + 3 * shift);
        Self {
            fixed: blocks
                + gathering.max(solving)
                + all_tokens
                + turning
                + work.attended_bytes(block, 2)
                + work.shared_bytes(block),
            // The unquantized model's are used at once.
            inputs: 2 * tokens * block.kept,
            hidden: 4 * work.states() * block.hidden,
            moving: 3 * chunk * (2 * block.kept + 4 * block.hidden),
            // Uploads go through pinned buffers; packed results wait for the writer; a block whose
            // rotations are folded is turned in f32, and one more waits to be solved from it.
            host: (2 + 4 + if exact { 4 } else { 0 }) * block.weights
                + STAGING
                + work.route_bytes(block),
        }
    }

    /// Of runs that compute one at a time: the one that does has what cannot be offloaded and its
    /// inputs, each has its states, and the others a block they wait with and one read ahead.
    fn together(block: BlockSizes, works: &[Workload]) -> Self {
        let none = Self { fixed: 0, inputs: 0, hidden: 0, moving: 0, host: 0 };
        let all = works.iter().map(|&work| Self::new(block, work)).reduce(|a, b| Self {
            fixed: a.fixed.max(b.fixed),
            inputs: a.inputs.max(b.inputs),
            hidden: a.hidden + b.hidden,
            moving: a.moving.max(b.moving),
            host: a.host + b.host - STAGING,
        });
        let mut all = all.unwrap_or(none);
        all.fixed += 2 * 2 * block.weights * works.len().saturating_sub(1);
        all
    }

    /// What waits in host memory.
    fn offloaded(&self, offload: Offload) -> usize {
        (offload.inputs * self.inputs as f64) as usize
            + (offload.hidden * self.hidden as f64) as usize
    }

    fn plan(&self, offload: Offload, tables: Tables) -> MemoryPlan {
        let offloaded = self.offloaded(offload);
        // Inputs are gone after the last block, and nothing is packed any more.
        let hidden = (offload.hidden * self.hidden as f64) as usize;
        let walking = offloaded + self.host + tables.walking;
        let writing = hidden + STAGING + tables.writing;
        let moving = if offloaded > 0 { self.moving } else { 0 };
        MemoryPlan {
            offload,
            device_bytes: (self.fixed + self.inputs + self.hidden - offloaded + moving) as u64,
            host_bytes: walking.max(writing) as u64,
        }
    }
}

/// Peak of a CPU run. While blocks are walked, it holds hidden states and one stage's inputs for all
/// tokens, the blocks' weights (one read ahead), and the largest linear's solve; after the last one,
/// hidden states still, and the tables that are written.
pub fn plan_cpu(block: BlockSizes, work: Workload, tables: Tables) -> u64 {
    let Workload { tokens, seq_len, extras, .. } = work;
    let streams = work.streams();
    // The tokenizer, the program and the text take some tens of megabytes.
    let fixed = (128 << 20) + work.shared_bytes(block);
    let states = states_of(block, work);
    // One chunk's gate and up; with a reference states of both streams and their difference.
    let lacking = if extras.reference { 3 * block.hidden } else { 0 };
    let chunk = Device::CPU_CHUNK_TOKENS.max(seq_len).min(tokens);
    let rows = if block.per_token > 0 { 2 * block.hidden } else { 0 };
    let flight = chunk * (2 * block.intermediate + lacking + rows);
    // Weights in solve order, values twice, codes; Gram, Hessian and U in f32, the factor in f64.
    // Shifts and shifted weights come when the factor's room is free again.
    let square = if tokens > 0 { 20 * block.widest * block.widest } else { 0 };
    // With experts also the Gram of all tokens and its factor, and routes.
    let all_tokens = if block.per_token > 0 { 8 * block.hidden * block.hidden } else { 0 };
    let attended = work.attended_bytes(block, 4);
    let solve = square + 13 * block.largest + all_tokens + attended + work.route_bytes(block);
    let walking = 4 * ((1 + streams) * block.weights + states + flight) + solve + tables.walking;
    let writing = 4 * work.states() * block.hidden + tables.writing;
    (fixed + walking.max(writing)) as u64
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
