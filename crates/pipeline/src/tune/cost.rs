//! What tuning takes: memory, and arithmetic.

use gptq_checkpoint::ModelConfig;
use gptq_compute::Device;
use gptq_model::Model;
use gptq_quant::QuantSpec;

use super::split::Split;
use crate::error::{Error, Result};
use crate::host_memory::ensure;
use crate::job::QuantizeJob;
use crate::memory::{BlockSizes, MemoryPlan, STAGING, USABLE, device_budget};
use crate::operations::{Extras, Operations};

/// Logits of both models and what becomes of them, some rows at a time, on a GPU.
const LOGITS: usize = 3 << 28;
/// Gradients of weights that a GPU holds at a time.
const GRADIENTS: usize = 128 << 20;
/// Rows of logits that the CPU has at a time.
const CPU_ROWS: usize = 512;

/// Bytes that tuning holds at its peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TuneBytes {
    /// On the device, come what may: codes, scales and their moments, both heads, a block at work.
    fixed: usize,
    /// Of it, the heads.
    heads: usize,
    /// States between blocks of a chunk, which may wait in host memory beside a GPU.
    between: usize,
    /// In host memory beside a GPU: the unquantized model's states, the best scales.
    host: usize,
}

impl TuneBytes {
    /// Of a branch on a GPU, or on the CPU; `None` where it tunes nothing.
    pub(crate) fn of(
        model: &ModelConfig,
        spec: &QuantSpec,
        (windows, seq_len): (usize, usize),
        gpu: bool,
    ) -> Option<Self> {
        let split = planned(spec, windows)?;
        Some(Self::of_split(model, spec, (&split, seq_len), gpu))
    }

    /// The same of windows that are known.
    fn of_split(
        model: &ModelConfig,
        spec: &QuantSpec,
        (split, seq_len): (&Split, usize),
        gpu: bool,
    ) -> Self {
        let block = BlockSizes::of(model);
        let (mut weights, mut scales, mut columns) = (0, 0, 0);
        for (_, linear) in model.linears() {
            let (rows, cols) = linear.sides();
            weights += rows * cols;
            scales += rows * cols.div_ceil(spec.group_columns(cols));
            columns += cols;
        }
        let (hidden, vocab) = (model.hidden_size, model.vocab_size);
        // A code packed, with zeros, or a byte; groups of columns and columns of groups; fp16 scales. Log
        // factors, their moments and gradients are f32.
        let bits = usize::from(spec.bits);
        let codes = if gpu { (weights + scales) / 8 * bits } else { weights };
        let codes = codes + 12 * columns + 2 * scales + 16 * scales;
        let value = if gpu { 2 } else { 4 };
        let tables = 1 + usize::from(spec.choices.head > 0.0);
        let heads = tables * value * vocab * hidden;
        let most = if gpu { Device::GPU_CHUNK_TOKENS } else { Device::CPU_CHUNK_TOKENS };
        let together = (most / seq_len.max(1)).clamp(1, split.largest());
        let chunk = together * seq_len;
        // On the way back through the MLP: gate, up, what comes to their product, and both their gradients;
        // the attention's inputs, queries, keys, values and contexts; in f32 the block's states, those after
        // its attention, their gradient and that of the normed ones.
        let heads_width = model.num_attention_heads * model.head_dim;
        let kv_width = model.num_key_value_heads * model.head_dim;
        let activations = 5 * block.intermediate + 4 * hidden + 3 * heads_width + 4 * kv_width;
        let flight = chunk * (value * activations + 4 * 5 * hidden);
        let logits = if gpu { LOGITS } else { 4 * 3 * CPU_ROWS.min(chunk) * vocab };
        // A gradient by a weight is summed over groups some rows at a time.
        let band = if gpu { GRADIENTS } else { 4 * block.largest };
        let working = value * block.weights + band + flight + logits;
        let reference = value * (split.trained() + split.held_out()) * seq_len * hidden;
        Self {
            fixed: codes + heads + working,
            heads,
            between: 4 * model.num_hidden_layers * chunk * hidden,
            // The values of a head are fp16 before they are on the device.
            host: reference + 2 * scales + 2 * 2 * vocab * hidden,
        }
    }

    /// Share of the states between blocks that waits in host memory of a device with so much room.
    fn offloaded(&self, room: usize) -> f64 {
        let left = room.saturating_sub(self.fixed);
        1.0 - (left as f64 / self.between.max(1) as f64).min(1.0)
    }

    /// The plan of a run that tunes after it has walked as `walk` says, on a GPU of `budget` bytes where other
    /// branches hold `others`.
    pub(crate) fn after(&self, walk: MemoryPlan, budget: u64, others: usize) -> MemoryPlan {
        let room = ((budget as f64 * USABLE) as usize).saturating_sub(others);
        let offloaded = self.offloaded(room);
        let waiting = (offloaded * self.between as f64).ceil() as usize;
        let device = self.fixed + self.between - waiting + others;
        let host = self.host + waiting + STAGING;
        MemoryPlan {
            device_bytes: walk.device_bytes.max(device as u64),
            host_bytes: walk.host_bytes.max(host as u64),
            ..walk
        }
    }

    /// Host memory of a CPU run that tunes.
    pub(crate) fn of_cpu(&self) -> u64 {
        // The program and the text, as for the walk.
        ((128 << 20) + self.fixed + self.between + self.host) as u64
    }
}

/// Refuses a job whose quantized model its device cannot hold for tuning, before hours are spent on it.
pub(super) fn check(job: &QuantizeJob<'_>, split: &Split) -> Result<()> {
    let budget = device_budget(&job.device)?;
    let tokens = (split, job.seq_len());
    let bytes = TuneBytes::of_split(job.source.config(), &job.spec, tokens, budget.is_some());
    let Some(budget) = budget else {
        let advice = "use the recipe best, or calibrate on fewer or shorter windows";
        return ensure("Tuning the scales of the whole model", bytes.of_cpu(), advice);
    };
    let available = (budget as f64 * USABLE) as u64;
    let needed = bytes.fixed as u64;
    if needed > available { Err(Error::TuneMemory { needed, available }) } else { Ok(()) }
}

/// Share of the states between blocks that this job keeps in host memory; the heads are on the device.
pub(super) fn offloaded(model: &Model<'_>, job: &QuantizeJob<'_>, split: &Split) -> Result<f64> {
    let Some(memory) = model.device().memory()? else { return Ok(0.0) };
    let bytes = TuneBytes::of_split(model.config(), &job.spec, (split, job.seq_len()), true);
    let budget = memory.budget.min(memory.free + memory.held);
    // Whatever else is there belongs to branches that wait for their turn.
    let others = memory.held.saturating_sub(bytes.heads);
    let room = ((budget as f64 * USABLE) as usize).saturating_sub(others);
    Ok(bytes.offloaded(room))
}

/// Operations of tuning a branch: a step goes forward twice, and back by states and by weights, each like a
/// forward; judging goes forward once. 0 where nothing is tuned.
pub(crate) fn operations(
    model: &ModelConfig,
    spec: &QuantSpec,
    (windows, seq_len): (usize, usize),
) -> f64 {
    let Some((trained, judged)) = passes(spec, windows) else { return 0.0 };
    let forward = Operations::of_model(model, (1, seq_len), Extras::default()).forward;
    let head = 2.0 * seq_len as f64 * (model.vocab_size * model.hidden_size) as f64;
    trained * (4.0 * forward + 3.0 * head) + judged * (forward + 2.0 * head)
}

/// Those of one block, a window of which takes `forward`; 0 where nothing is tuned.
pub(super) fn of_block(forward: f64, spec: &QuantSpec, windows: usize) -> f64 {
    passes(spec, windows).map_or(0.0, |(trained, judged)| (4.0 * trained + judged) * forward)
}

/// What a run on so many windows will train on and judge by; `None` where nothing is tuned.
fn planned(spec: &QuantSpec, windows: usize) -> Option<Split> {
    Split::planned(windows).filter(|_| spec.recipe.calibrates() && spec.choices.tune > 0)
}

/// How many windows it will hold out.
pub(crate) fn planned_held_out(spec: &QuantSpec, windows: usize) -> usize {
    planned(spec, windows).map_or(0, |split| split.held_out())
}

/// Windows that are trained on and judged by, each as often as it is; `None` where nothing is tuned.
fn passes(spec: &QuantSpec, windows: usize) -> Option<(f64, f64)> {
    let split = planned(spec, windows)?;
    let (steps, epoch) = (f64::from(spec.choices.tune), f64::from(split.epoch()));
    let trained = steps * split.trained() as f64 / epoch;
    let judged = (1.0 + (steps / epoch).ceil()) * split.held_out() as f64;
    Some((trained, judged))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use gptq_quant::Recipe;

    use super::*;
    use crate::memory::Offload;

    fn llama_70b() -> ModelConfig {
        let text = r#"{"model_type":"llama","hidden_size":8192,"intermediate_size":28672,
            "num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,
            "vocab_size":32000,"max_position_embeddings":4096}"#;
        ModelConfig::parse(text, Path::new("config.json")).unwrap()
    }

    fn spec(recipe: Recipe) -> QuantSpec {
        QuantSpec::new(4, Some(128), true, 0.03, recipe)
    }

    #[test]
    fn a_70b_is_tuned_on_a_card_of_80_gb_but_not_of_48() {
        let model = llama_70b();
        let tokens = (128, 4096);
        assert_eq!(TuneBytes::of(&model, &spec(Recipe::Best), tokens, true), None);
        let bytes = TuneBytes::of(&model, &spec(Recipe::Tuned), tokens, true).unwrap();
        // 34 GB of codes and 10 of scales, their moments and gradients; 43 GB of states between the blocks.
        assert!((46 << 30..62 << 30).contains(&bytes.fixed), "{bytes:?}");
        assert_eq!(bytes.between, 80 * 16_384 * 8192 * 4);
        let none = MemoryPlan { offload: Offload::default(), device_bytes: 1, host_bytes: 1 };
        let at = |gib: u64| bytes.after(none, gib << 30, 0);
        assert!(at(80).device_bytes <= 80 << 30 && at(48).device_bytes > 48 << 30);
        // What the card does not hold waits in host memory.
        assert!(at(80).host_bytes > at(180).host_bytes);
        assert!(at(180).device_bytes as usize == bytes.fixed + bytes.between);
    }

    #[test]
    fn arithmetic_grows_with_steps_and_is_none_without() {
        let model = llama_70b();
        let tokens = (128, 2048);
        let mut spec = spec(Recipe::Tuned);
        let of = |spec: &QuantSpec| operations(&model, spec, tokens);
        let whole = of(&spec);
        // Four forwards of 8 × 2048 tokens a step, 2.3 PFLOP each.
        assert!((whole / 64.0 / 4.0 / 2.3e15 - 1.0).abs() < 0.15, "{whole:e}");
        spec.choices.tune = 128;
        assert!((of(&spec) / whole - 2.0).abs() < 0.05);
        spec.choices.tune = 0;
        assert_eq!(of(&spec), 0.0);
    }
}
