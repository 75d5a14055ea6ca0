//! What a branch will cost, from config.json alone: file size to the byte, memory, arithmetic.

use std::collections::BTreeMap;

use gptq_checkpoint::{Layout, ModelConfig, plan_files};
use gptq_quant::QuantSpec;
use serde::Serialize;

use crate::error::Result;
use crate::quantise::quantize_config;

/// Cost of one branch.
#[derive(Clone, Debug, Serialize)]
pub struct BranchPlan {
    /// Bytes of all weight files; exact.
    pub file_bytes: u64,
    /// Host memory of a CPU run at its highest point.
    pub host_bytes: u64,
    /// Arithmetic of the run.
    pub work: Work,
}

/// Floating-point operations of a calibrated run, one multiply-add being two.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Work {
    /// One forward of every block over every window.
    pub forward: f64,
    /// Gram matrices, upper triangles only.
    pub gram: f64,
    /// Cholesky factors and triangular inverses.
    pub factor: f64,
    /// The solver's updates.
    pub solve: f64,
}

impl Work {
    /// The sum.
    pub fn total(&self) -> f64 {
        self.forward + self.gram + self.factor + self.solve
    }
}

/// Plans a branch; `metadata` is what the `modern` layout would carry beside its own keys.
pub fn plan_branch(
    model: &ModelConfig,
    spec: &QuantSpec,
    layout: Layout,
    metadata: &BTreeMap<String, String>,
    (windows, seq_len): (usize, usize),
) -> Result<BranchPlan> {
    let files = plan_files(model, &quantize_config(spec)?, layout, metadata, None)?;
    let calibrates = spec.recipe.calibrates();
    Ok(BranchPlan {
        file_bytes: files.total_bytes,
        host_bytes: host_bytes(model, if calibrates { windows * seq_len } else { 0 }),
        work: if calibrates { work(model, windows, seq_len) } else { Work::default() },
    })
}

/// Peak of a CPU run: hidden states and one stage's inputs for all tokens, one block's weights, and
/// the largest linear's Gram, damped Hessian (both f32) and f64 factor.
fn host_bytes(model: &ModelConfig, tokens: usize) -> u64 {
    let linears = model.block_linears();
    let block: usize = linears.iter().map(|l| l.in_features * l.out_features).sum();
    let widest = linears.iter().map(|l| l.in_features).max().unwrap_or(0);
    let largest = linears.iter().map(|l| l.in_features * l.out_features).max().unwrap_or(0);
    let states = tokens * (model.hidden_size + widest);
    // While a linear is solved: its weights in solve order, the values made, codes (one byte each).
    let solve = if tokens > 0 { widest * widest } else { 0 };
    4 * (block + states + 3 * largest) as u64 + 16 * solve as u64
}

/// Operations of a run over `windows` windows of `seq_len` tokens.
fn work(model: &ModelConfig, windows: usize, seq_len: usize) -> Work {
    let tokens = (windows * seq_len) as f64;
    let mut work = Work::default();
    // Causal attention: scores and contexts, half of the square each.
    let width = (model.num_attention_heads * model.head_dim) as f64;
    work.forward = 2.0 * tokens * seq_len as f64 * width;
    for (i, linear) in model.block_linears().iter().enumerate() {
        let (n, rows) = (linear.in_features as f64, linear.out_features as f64);
        work.forward += 2.0 * tokens * n * rows;
        work.solve += rows * n * n;
        // k and v share q's inputs, and up shares gate's.
        if !matches!(i, 1 | 2 | 5) {
            work.gram += tokens * n * n;
            work.factor += 2.0 / 3.0 * n * n * n;
        }
    }
    let blocks = model.num_hidden_layers as f64;
    Work {
        forward: work.forward * blocks,
        gram: work.gram * blocks,
        factor: work.factor * blocks,
        solve: work.solve * blocks,
    }
}
