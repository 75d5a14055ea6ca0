//! How much memory a run needs, and what is kept where so that it fits.
//!
//! Bytes are counted from the model's shape. On a GPU three layouts are tried, fastest first:
//! everything on the card; inputs of o and down parked in host memory; hidden states parked too.

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use serde::Serialize;

use crate::states::chunk_tokens;

/// Which tensors wait in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Parking {
    /// None: everything stays on the device.
    Nothing,
    /// Inputs of o and of down.
    Activations,
    /// Those, and the hidden states.
    Everything,
}

impl Parking {
    pub(crate) fn activations(self) -> bool {
        self != Self::Nothing
    }

    pub(crate) fn hidden(self) -> bool {
        self == Self::Everything
    }
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
    /// The unquantised model's states are walked too, for the asymmetric term.
    pub reference: bool,
}

/// Plans a calibrated run on a GPU of `budget` bytes.
pub fn plan_gpu(block: BlockSizes, work: Workload, budget: u64) -> MemoryPlan {
    let plans = [Parking::Nothing, Parking::Activations, Parking::Everything]
        .map(|parking| gpu_bytes(block, work, parking));
    let usable = (budget as f64 * USABLE) as u64;
    let fitting = plans.into_iter().find(|plan| plan.device_bytes <= usable);
    // Where nothing fits, the smallest is tried: its out-of-memory error says what to lower.
    fitting.unwrap_or(plans[2])
}

/// What a run on this device should park: nothing on the CPU.
pub fn parking(
    device: &Device,
    block: BlockSizes,
    work: Workload,
) -> gptq_compute::Result<Parking> {
    Ok(match device.memory()? {
        None => Parking::Nothing,
        Some(memory) => {
            let budget = memory.budget.min(memory.free + memory.held);
            plan_gpu(block, work, budget as u64).parking
        }
    })
}

/// Peaks on a GPU: fp16 weights and activations, f32 hidden states and matrices.
fn gpu_bytes(block: BlockSizes, work: Workload, parking: Parking) -> MemoryPlan {
    let Workload { tokens, reference } = work;
    let streams = 1 + usize::from(reference);
    let chunk = 16_384.min(tokens.max(1));
    // The block computed, the one read ahead, and the first as it was before.
    let blocks = (1 + streams) * 2 * block.weights;
    let hidden = 4 * tokens * block.hidden * streams;
    // The unquantised model's are used at once.
    let inputs = 2 * tokens * block.widest;
    // A chunk in flight: gate, up and their product, hidden states coming and going; with a
    // reference, its inputs and both in solve order.
    let drift = if reference { 4 * 2 * block.widest } else { 0 };
    let flight = chunk * (3 * 2 * block.intermediate + 3 * 4 * block.hidden + drift);
    // The Gram, U, and a quarter of it for the factor's workspace; then the solve (see
    // `gptq_compute`): f32 weights, new fp16 weights, codes twice, a window of errors. With a
    // reference the drift is gathered beside U, and takes one more while it is made a correction.
    let square = block.widest * block.widest;
    let solve = 8 * block.largest + 4 * 1024 * block.rows;
    let squares = match reference {
        false => (4 * square + flight).max(9 * square + solve),
        true => (8 * square + flight).max(12 * square).max(9 * square).max(8 * square + solve),
    };
    let parked = match parking {
        Parking::Nothing => 0,
        Parking::Activations => inputs,
        Parking::Everything => inputs + hidden,
    };
    let kept = inputs + hidden - parked;
    MemoryPlan {
        parking,
        device_bytes: (blocks + kept + squares) as u64,
        // Uploads go through pinned buffers; packed results wait for the writer.
        host_bytes: (parked + 2 * block.weights) as u64 + (1 << 30),
    }
}

/// Peak of a CPU run: hidden states and one stage's inputs for all tokens, the blocks' weights (one
/// read ahead), and the largest linear's solve.
pub fn plan_cpu(block: BlockSizes, work: Workload) -> u64 {
    let Workload { tokens, reference } = work;
    let streams = 1 + usize::from(reference);
    // An embedding that is not fp16 in the source is rounded once, and the tokeniser, the program
    // and the text take some tens of megabytes.
    let fixed = 128 << 20;
    let states = tokens * (streams * block.hidden + block.widest);
    // One chunk's gate and up; with a reference its inputs, both in solve order, and a second
    // block's products.
    let drift = if reference { 3 * block.widest } else { 0 };
    let flight = chunk_tokens(&Device::Cpu).min(tokens) * (2 * block.intermediate + drift);
    // Weights in solve order, values twice, codes; Gram, Hessian and U in f32, the factor in f64,
    // or U, the drift and its product.
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
        let work = |reference| Workload { tokens: 128 * 4096, reference };
        let plan = |gib: u64| plan_gpu(block, work(false), gib << 30);
        assert_eq!(plan(79).parking, Parking::Nothing);
        assert_eq!(plan(48).parking, Parking::Activations);
        assert_eq!(plan(24).parking, Parking::Everything);
        assert!(plan(24).device_bytes <= 24 << 30);
        // Host memory holds what the card does not: 17 GB of states and 30 GB of inputs.
        assert!(plan(24).host_bytes > 47_000_000_000);
        assert!(plan(79).host_bytes < 4_000_000_000);
        // A second stream of states is 17 GB more.
        let plan = |gib: u64| plan_gpu(block, work(true), gib << 30);
        assert_eq!(plan(79).parking, Parking::Activations);
        assert_eq!(plan(24).parking, Parking::Everything);
        assert!(plan(24).device_bytes <= 24 << 30);
    }
}
