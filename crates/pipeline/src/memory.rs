//! How much memory a run needs, and what is kept where so that it fits.
//!
//! Bytes are counted from the model's shape. Where a GPU cannot hold everything, inputs of o and
//! down wait in host memory, as many of them as must, and then hidden states too.

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use gptq_compute::cuda::CHUNK_TOKENS;
use serde::Serialize;

use crate::states::chunk_tokens;

/// Shares of what is kept between stages that wait in host memory, from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parking {
    /// Of the inputs of o and of down.
    pub inputs: f64,
    /// Of the hidden states.
    pub hidden: f64,
}

/// Predicted peaks of a run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryPlan {
    /// What waits in host memory.
    pub parking: Parking,
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
        }
    }

    /// Sizes of a model's blocks.
    pub fn of(model: &ModelConfig) -> Self {
        let linears = model.block_linears().map(|l| (l.out_features, l.in_features));
        Self::new(model.hidden_size, model.intermediate_size, &linears)
    }
}

/// Part of a card that a run may fill: the rest is for the context, kernels and fragments.
const USABLE: f64 = 0.94;

/// What is held in one walk over a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of all windows; 0 when there is no calibration.
    pub tokens: usize,
    /// Tokens of the longest window.
    pub seq_len: usize,
    /// The unquantised model's states are walked too, for the asymmetric term.
    pub reference: bool,
    /// Weights are solved from values wider than those that a GPU's forward uses.
    pub exact: bool,
}

/// Plans a calibrated run on a GPU of `budget` bytes. Where nothing fits, the smallest plan is
/// tried: its out-of-memory error says what to lower.
pub fn plan_gpu(block: BlockSizes, work: Workload, budget: u64) -> MemoryPlan {
    let usable = (budget as f64 * USABLE) as usize;
    let need = GpuBytes::new(block, work);
    let over = (need.fixed + need.inputs + need.hidden).saturating_sub(usable);
    if over == 0 {
        return need.plan(Parking::default());
    }
    // A parked share has chunks on their way as well.
    let over = over + need.moving;
    let share = |bytes: usize, of: usize| (bytes as f64 / of.max(1) as f64).min(1.0);
    let inputs = share(over, need.inputs);
    let hidden = share(over.saturating_sub(need.inputs), need.hidden);
    need.plan(Parking { inputs, hidden })
}

/// What a run on this device should park: nothing on the CPU.
pub fn parking(
    device: &Device,
    block: BlockSizes,
    work: Workload,
) -> gptq_compute::Result<Parking> {
    Ok(match device.memory()? {
        None => Parking::default(),
        Some(memory) => {
            let budget = memory.budget.min(memory.free + memory.held);
            plan_gpu(block, work, budget as u64).parking
        }
    })
}

/// Bytes on a GPU: fp16 weights and activations, f32 hidden states and matrices.
struct GpuBytes {
    /// What cannot be parked.
    fixed: usize,
    /// Inputs of o or down, for all tokens.
    inputs: usize,
    /// Hidden states.
    hidden: usize,
    /// Chunks on their way to and from host memory.
    moving: usize,
    /// Host memory beside what is parked.
    host: usize,
}

impl GpuBytes {
    fn new(block: BlockSizes, work: Workload) -> Self {
        let Workload { tokens, seq_len, reference, exact } = work;
        let streams = 1 + usize::from(reference);
        // A window longer than a chunk is one of its own.
        let chunk = CHUNK_TOKENS.max(seq_len).min(tokens.max(1));
        // The block computed, the one read ahead, and the first as it was before.
        let blocks = (1 + streams) * 2 * block.weights;
        // A chunk in flight: gate, up and their product, hidden states coming and going; with a
        // reference, states of both streams and their difference.
        let lacking = if reference { 10 * block.hidden } else { 0 };
        let flight = chunk * (3 * 2 * block.intermediate + 3 * 4 * block.hidden + lacking);
        // The Gram, U, and a quarter of it for the factor's workspace; then the solve (see
        // `gptq_compute`): f32 weights, new fp16 weights, codes twice, a window of errors. A shift
        // is gathered beside U, and the shifted weights are solved from f32.
        let square = block.widest * block.widest;
        let shift = if reference { 4 * block.largest } else { 0 };
        let wide = if exact { 4 * block.largest } else { 0 };
        let solve = 8 * block.largest + 4 * 1024 * block.rows + wide;
        let gathering = 4 * square + flight + shift;
        let solving = (9 * square + solve).max(4 * square + solve + 3 * shift);
        Self {
            fixed: blocks + gathering.max(solving),
            // The unquantised model's are used at once.
            inputs: 2 * tokens * block.widest,
            hidden: 4 * tokens * block.hidden * streams,
            moving: 3 * chunk * (2 * block.widest + 4 * block.hidden),
            // Uploads go through pinned buffers; packed results wait for the writer; a block whose
            // rotations are folded is turned in f32, and one more waits to be solved from it.
            host: (2 + 4 + if exact { 4 } else { 0 }) * block.weights + (1 << 30),
        }
    }

    fn plan(&self, parking: Parking) -> MemoryPlan {
        let parked = (parking.inputs * self.inputs as f64) as usize
            + (parking.hidden * self.hidden as f64) as usize;
        let moving = if parked > 0 { self.moving } else { 0 };
        MemoryPlan {
            parking,
            device_bytes: (self.fixed + self.inputs + self.hidden - parked + moving) as u64,
            host_bytes: (parked + self.host) as u64,
        }
    }
}

/// Peak of a CPU run: hidden states and one stage's inputs for all tokens, the blocks' weights (one
/// read ahead), and the largest linear's solve.
pub fn plan_cpu(block: BlockSizes, work: Workload) -> u64 {
    let Workload { tokens, seq_len, reference, .. } = work;
    let streams = 1 + usize::from(reference);
    // An embedding that is not fp16 in the source is rounded once, and the tokeniser, the program
    // and the text take some tens of megabytes.
    let fixed = 128 << 20;
    let states = tokens * (streams * block.hidden + block.widest);
    // One chunk's gate and up; with a reference states of both streams and their difference.
    let lacking = if reference { 3 * block.hidden } else { 0 };
    let chunk = chunk_tokens(&Device::Cpu).max(seq_len).min(tokens);
    let flight = chunk * (2 * block.intermediate + lacking);
    // Weights in solve order, values twice, codes; Gram, Hessian and U in f32, the factor in f64.
    // Shifts and shifted weights come when the factor's room is free again.
    let square = if tokens > 0 { 20 * block.widest * block.widest } else { 0 };
    let solve = square + 13 * block.largest;
    (fixed + 4 * ((1 + streams) * block.weights + states + flight) + solve) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_70b() -> ModelConfig {
        let text = r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
            "num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,
            "vocab_size":32000,"max_position_embeddings":4096}"#;
        ModelConfig::parse(text, std::path::Path::new("config.json")).unwrap()
    }

    #[test]
    fn a_larger_card_parks_less() {
        let block = BlockSizes::of(&llama_70b());
        let work =
            |reference| Workload { tokens: 128 * 4096, seq_len: 4096, reference, exact: false };
        let plan = |gib: u64| plan_gpu(block, work(false), gib << 30);
        assert_eq!(plan(79).parking, Parking::default());
        let some = plan(48).parking;
        assert!(some.inputs > 0.1 && some.inputs < 0.9 && some.hidden == 0.0, "{some:?}");
        let most = plan(24).parking;
        assert!(most.inputs == 1.0 && most.hidden > 0.5, "{most:?}");
        assert!(plan(48).device_bytes <= 48 << 30);
        assert!(plan(24).device_bytes <= 24 << 30);
        // Host memory holds what the card does not: 30 GB of inputs and most of 17 GB of states.
        assert!(plan(24).host_bytes > 40_000_000_000);
        assert!(plan(79).host_bytes < 7_000_000_000);
        // A second stream of states is 17 GB more.
        let plan = |gib: u64| plan_gpu(block, work(true), gib << 30);
        assert!(plan(79).parking.inputs < 0.6 && plan(79).parking.hidden == 0.0);
        assert!(plan(24).device_bytes <= 24 << 30);
        // Solving from f32 takes the widest linear in f32 there, and a block in f32 here.
        let exact = plan_gpu(block, Workload { exact: true, ..work(false) }, 79 << 30);
        let rounded = plan_gpu(block, work(false), 79 << 30);
        assert_eq!(exact.device_bytes - rounded.device_bytes, 4 * 28672 * 8192);
        assert_eq!(exact.host_bytes - rounded.host_bytes, 4 * 855_638_016);
    }

    /// A window is never cut, so a chunk of one that is longer than a chunk takes more.
    #[test]
    fn long_windows_take_larger_chunks() {
        let block = BlockSizes::of(&llama_70b());
        let tokens = 4 * 131_072;
        let work = |seq_len| Workload { tokens, seq_len, reference: false, exact: false };
        let device = |seq_len| plan_gpu(block, work(seq_len), 1 << 40).device_bytes;
        let host = |seq_len| plan_cpu(block, work(seq_len));
        assert_eq!(device(16_384), device(4096));
        assert_eq!(host(4096), host(512));
        // Gate, up and their product, and hidden states thrice, of the tokens beyond.
        let more = (131_072 - 16_384) * (3 * 2 * 28_672 + 3 * 4 * 8192);
        assert!(device(131_072) - device(4096) <= more && device(131_072) > device(4096));
        let moving = |seq_len| GpuBytes::new(block, work(seq_len)).moving;
        assert_eq!(moving(131_072), 8 * moving(4096));
        assert_eq!(host(131_072) - host(4096), 4 * 2 * 28_672 * (131_072 - 4096));
    }
}
