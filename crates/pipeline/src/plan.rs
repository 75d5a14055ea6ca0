//! What a branch will cost, from config.json alone: file size to the byte, memory, arithmetic.

use std::collections::BTreeMap;

use gptq_checkpoint::{Layout, ModelConfig, plan_files};
use gptq_compute::FloatType;
use gptq_quant::{QuantSpec, Rotate};
use gptq_records::source_dtype::SourceDtype;
use serde::Serialize;

use crate::error::Result;
use crate::learn_rotation::{self, LearnBytes};
use crate::memory::{BlockSizes, MemoryPlan, Tables, Workload, plan_cpu, plan_gpu};
pub use crate::memory_text::TextMemory;
use crate::operations::{Extras, Operations};
use crate::tune::{TuneBytes, operations, planned_held_out};
use crate::write::quantize_config;

/// Tokens of the text that is planned for, unless the model was made for fewer.
const TEXT_TOKENS: usize = 4096;

/// Cost of one branch.
#[derive(Clone, Debug, Serialize)]
pub struct BranchPlan {
    /// Bytes of all weight files; exact.
    pub file_bytes: u64,
    /// Host memory of a CPU run at its highest point.
    pub cpu_bytes: u64,
    /// Memory of a run on a GPU of the given size.
    pub gpu: MemoryPlan,
    /// Memory of a GPU that makes text from the branch.
    pub text: TextMemory,
    /// Arithmetic of the run.
    pub work: Operations,
}

/// What a branch is made with and on.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Calibration windows.
    pub windows: usize,
    /// Tokens of each.
    pub seq_len: usize,
    /// First Grams that its sweep keeps
    /// ([`SweepConfig::shared_grams`](crate::sweep::config::SweepConfig::shared_grams)).
    pub shared_grams: usize,
    /// Branches that a device makes at the same time, as this one; the memory is that of all.
    pub together: usize,
    /// Bytes of the card.
    pub gpu_memory: u64,
}

/// Plans a branch; `metadata` is what the `modern` layout carries beside its own keys
/// ([`planned_metadata`](crate::write::planned_metadata)).
pub fn plan_branch(
    model: &ModelConfig,
    spec: &QuantSpec,
    source_dtype: SourceDtype,
    layout: Layout,
    metadata: &BTreeMap<String, String>,
    setting: Setting,
) -> Result<BranchPlan> {
    let Setting { windows, seq_len, shared_grams, together, gpu_memory } = setting;
    let files = plan_files(model, &quantize_config(spec)?, layout, metadata, None)?;
    let calibrates = spec.recipe.calibrates();
    let block = BlockSizes::of(model);
    let tokens = if calibrates { windows * seq_len } else { 0 };
    let exact = source_dtype == SourceDtype::Fp32;
    let extras = Extras::of(&spec.choices);
    let held_out = planned_held_out(spec, windows);
    let held =
        Workload { tokens, held_out: held_out * seq_len, seq_len, extras, exact, shared_grams };
    // Weights that stay as wide as they are stored are read where the file is mapped.
    let tables = Tables::of(model, spec, stored(model), !exact);
    let walk = plan_gpu(block, &vec![held; together], tables, gpu_memory);
    let walk_of_cpu = plan_cpu(block, held, tables);
    let learns = calibrates && spec.choices.rotate == Rotate::Learned;
    let learning = learns.then(|| LearnBytes::of(model));
    let walk = learning.map_or(walk, |bytes| bytes.before(model, walk, gpu_memory));
    let walk_of_cpu = learning.map_or(walk_of_cpu, |bytes| walk_of_cpu.max(bytes.of_cpu()));
    let tuning = |gpu| TuneBytes::of(model, spec, (windows, seq_len), gpu);
    let gpu = match tuning(true) {
        Some(bytes) => bytes.after(walk, gpu_memory, held.waiting(block, together)),
        None => walk,
    };
    let cpu_bytes = tuning(false).map_or(0, |bytes| bytes.of_cpu()).max(walk_of_cpu);
    Ok(BranchPlan {
        file_bytes: files.total_bytes,
        cpu_bytes: cpu_bytes * together.max(1) as u64,
        gpu,
        text: TextMemory::of(model, spec.bits, spec.group_size, TEXT_TOKENS.min(model.positions())),
        work: match calibrates {
            true => {
                let walk = Operations::of_model(model, (windows, seq_len), extras);
                // The unquantized model walks what is held out, too.
                let reference = Extras { reference: held_out > 0, ..Extras::default() };
                let judged = Operations::of_model(model, (held_out, seq_len), reference);
                Operations {
                    tune: operations(model, spec, (windows, seq_len)),
                    learn: walk.learn
                        + if learns { learn_rotation::operations(model) } else { 0.0 },
                    reference: walk.reference + judged.reference,
                    ..walk
                }
            }
            false => Operations::default(),
        },
    })
}

/// The type that the configuration says the weights are stored in; without a word of it
/// transformers takes f32.
fn stored(model: &ModelConfig) -> FloatType {
    match model.stored_dtype() {
        Some("float16") => FloatType::F16,
        Some("bfloat16") => FloatType::BF16,
        _ => FloatType::F32,
    }
}
