//! Synthetic measurements: matrix products, and a whole block calibrated as a run would.
//!
//! Random data, warm-ups, medians of blocks. A matrix product on the CPU is held against
//! matrixmultiply alone: one thread's rate on the same shape, times the threads. Stages of a block on
//! a GPU are held against what one H100 80GB reaches on the stage's operations (see `floor_rate`).

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use gptq_checkpoint::{CONFIG_FILE, Experts, ModelConfig, Rope, RopeScaling};
use gptq_compute::{Agreement, Device, FloatType, HostMatrix, Ranks, RopeTable};
use gptq_model::{Block, LinearId, Mixture, Ropes};
use gptq_quant::{QuantSpec, split_mix};
use gptq_text::calibration::MOST_TOKENS;
use half::f16;
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use crate::agreement::words_of_block;
use crate::calibrate::{Calibrator, Streams};
use crate::chunk_store::ChunkStore;
use crate::error::{Error, Result};
use crate::host_memory::ensure;
use crate::memory::{BlockSizes, Offload, Workload, offload};
use crate::operations::{Extras, Operations};
use crate::row_shards::largest;
use crate::states::States;
use crate::tune::{bench_tuning, check_tuning};
pub use crate::width::{Width, WidthExperts};
use crate::work::{StageSeconds, Work};

/// Runs of each measurement, at least.
pub(crate) const RUNS: usize = 3;
/// Two matrix products are compared for so long.
const ENOUGH: Duration = Duration::from_secs(1);

/// One operation's measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What was run.
    pub operation: String,
    /// Its shape.
    pub shape: String,
    /// Seconds: the least of a product, those of the median run of a stage.
    pub seconds: f64,
    /// Operations counted, one multiply-add being two.
    pub operations: f64,
    /// Operations a second.
    pub rate: f64,
    /// The rate over the yardstick's, where there is one.
    pub fraction: Option<f64>,
}

impl Measurement {
    pub(crate) fn new(
        operation: &str,
        shape: String,
        seconds: f64,
        operations: f64,
        yardstick: Option<f64>,
    ) -> Self {
        let rate = operations / seconds;
        let fraction = yardstick.map(|y| rate / y);
        Self { operation: operation.to_owned(), shape, seconds, operations, rate, fraction }
    }
}

/// A block calibrated on synthetic data.
#[derive(Clone, Debug, Serialize)]
pub struct BlockBench {
    /// Shape of the block.
    pub width: Width,
    /// Windows and tokens of each.
    pub windows: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Devices that shared the work.
    pub ranks: usize,
    /// What waited in host memory.
    pub offload: Offload,
    /// Median wall-clock seconds of a block, of the slowest rank.
    pub seconds: f64,
    /// Peak of device memory in bytes; `null` on the CPU.
    pub peak_device_bytes: Option<usize>,
    /// The stages of the median run, the slowest rank's of each.
    pub stages: Vec<Measurement>,
}

/// Products of the block's three shapes on the CPU, against matrixmultiply alone.
///
/// # Errors
/// Tokens whose matrices do not fit in memory.
pub fn bench_products(width: Width, tokens: usize) -> Result<Vec<Measurement>> {
    check_tokens(1, tokens)?;
    // The inputs twice, as the library alone and the device take them, and the outputs of both.
    let widest = width.hidden().max(width.intermediate);
    let needed = 4 * (tokens * (2 * width.hidden() + 2 * widest)) as u64;
    ensure(&format!("A product of {tokens} tokens"), needed, "use a smaller --seq-len")?;
    let device = Device::Cpu;
    let mut all = Vec::new();
    for (name, id) in [("q", LinearId::Q), ("gate", LinearId::Gate), ("down", LinearId::Down)] {
        let (rows, cols) = width.linear(id);
        let (x, w) = (uniform(tokens, cols, 1), uniform(rows, cols, 2));
        let operations = 2.0 * tokens as f64 * cols as f64 * rows as f64;
        let (ours, weight) = (device.upload_f32(x.clone())?, device.upload_f32(w.clone())?);
        let [alone, seconds] = in_turns([
            &mut || {
                std::hint::black_box(x.dot(&w.t()));
                Ok(())
            },
            &mut || {
                std::hint::black_box(device.linear(&ours, &weight)?);
                Ok(())
            },
        ])?;
        let yardstick = operations / alone * rayon::current_num_threads() as f64;
        let shape = format!("{tokens}×{cols}×{rows}");
        all.push(Measurement::new(
            &format!("linear ({name})"),
            shape,
            seconds,
            operations,
            Some(yardstick),
        ));
    }
    Ok(all)
}

/// Calibrates a synthetic block, on every one of `ranks`. Rotations, which a thread of its own folds
/// into weights while the block before is computed, are no part of it.
///
/// # Errors
/// Windows whose states do not fit in memory, and what goes wrong with a block.
pub fn bench_block(
    device: &Device,
    ranks: &Ranks,
    width: Width,
    (windows, seq_len): (usize, usize),
    spec: &QuantSpec,
) -> Result<BlockBench> {
    check_tokens(windows, seq_len)?;
    check_tuning(spec, ranks, width, windows)?;
    let extras = Extras { learned: false, ..Extras::of(&spec.choices) };
    let config = ModelConfig::parse(&width.config_text(), Path::new(CONFIG_FILE))?;
    let experts = config.experts(0);
    ranks.agree(|| {
        Ok::<_, Error>(
            Agreement::new(words_of_block(width.hidden(), &width.sides()))
                .with("the command", "bench")
                .with("width", width.name)
                .with("windows", format!("{windows} × {seq_len} tokens"))
                .with("recipe", spec.recipe.name())
                .with("choices", spec.choices),
        )
    })?;
    let sizes = BlockSizes::new(width.hidden(), width.intermediate, &width.sides());
    let sizes = experts.map_or(sizes, |experts| sizes.with_experts(experts, &width.linears()));
    let own = ranks.share(windows, 1);
    let tokens = own.len() * seq_len;
    let work = Workload { tokens, held_out: 0, seq_len, extras, exact: false, shared_grams: 0 };
    let offload = offload(device, sizes, &[work])?;
    let rope = Rope { theta: 10_000.0, dims: width.head_dim(), scaling: RopeScaling::None };
    let ropes = Ropes::shared(RopeTable::new(&rope.frequencies(seq_len), seq_len));
    let calibrator =
        Calibrator { device, ropes: &ropes, spec, ranks, windows, offload, shared: None };
    let mut runs: Vec<(f64, StageSeconds)> = Vec::new();
    // The first run compiles, allocates and fills caches.
    for run in 0..=RUNS {
        let mut block = synthetic_block(device, width, experts)?;
        let states = || synthetic_states(device, width, (own.clone(), seq_len), offload);
        let reference = extras.reference.then(states).transpose()?;
        let mut streams = Streams { quantized: states()?, reference, held_out: None };
        device.synchronize("preparing the benchmark")?;
        ranks.exchange(Vec::new())?;
        let start = Instant::now();
        let done = calibrator.block(&mut block, &mut streams, &mut |_, stored| {
            std::hint::black_box(stored);
            Ok(())
        })?;
        device.synchronize("the benchmark")?;
        if run > 0 {
            runs.push(slowest(ranks, start.elapsed().as_secs_f64(), done.stages)?);
        }
    }
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (seconds, stages) = runs.swap_remove(RUNS / 2);
    let cards = ranks.size() as f64;
    let gpu = matches!(device, Device::Cuda(_));
    let counted = Operations::of_block(&width.kind(), (windows, seq_len), extras);
    let mut stages: Vec<Measurement> = stages
        .into_iter()
        .map(|(work, seconds)| {
            let operations = counted.of(work);
            let floor = if gpu { floor_rate(work).map(|r| r * cards) } else { None };
            Measurement::new(work.name(), String::new(), seconds, operations, floor)
        })
        .collect();
    let tune = bench_tuning(&calibrator, width, (windows, seq_len))?;
    let seconds = seconds + tune.as_ref().map_or(0.0, |tune| tune.seconds);
    stages.extend(tune);
    Ok(BlockBench {
        width,
        windows,
        seq_len,
        ranks: ranks.size(),
        offload,
        seconds,
        peak_device_bytes: device.memory()?.map(|m| m.peak),
        stages,
    })
}

/// Sizes are computed from the number of tokens, and must not overflow.
fn check_tokens(windows: usize, seq_len: usize) -> Result<()> {
    match windows.checked_mul(seq_len) {
        Some(tokens) if tokens <= MOST_TOKENS => Ok(()),
        _ => Err(Error::TooManyTokens { windows, seq_len }),
    }
}

/// Seconds of a run on the slowest rank: of the whole, and of each stage.
fn slowest(ranks: &Ranks, seconds: f64, stages: StageSeconds) -> Result<(f64, StageSeconds)> {
    // A rank without windows or rows lacks some.
    let of = |stage| stages.get(&stage).copied().unwrap_or(0.0);
    let most = largest(ranks, std::iter::once(seconds).chain(Work::ALL.map(of)).collect())?;
    let stages = Work::ALL.into_iter().zip(most[1..].iter().copied());
    Ok((most[0], stages.filter(|&(_, seconds)| seconds > 0.0).collect()))
}

/// Operations a second that one H100 80GB (SXM, CUDA 13.0) was measured to reach: cuBLAS fp16
/// products and causal attention in the proportion of a 70B block; triangular Grams by fp16
/// products; cuSOLVER's potrf and a triangular inverse at its rate; fp32 trailing updates, with
/// 0.15 s a block for the columns inside blocks of 128.
fn floor_rate(work: Work) -> Option<f64> {
    match work {
        Work::Forward | Work::Reference => Some(0.935e15 / 1.26),
        Work::Gram => Some(0.54e15 / 0.78),
        Work::Factor => Some(16.8e12 / 0.45),
        Work::Solve => Some(12.0e12 / 0.38),
        Work::Exchange | Work::Pack | Work::Shift | Work::Tune => None,
    }
}

pub(crate) fn synthetic_block(
    device: &Device,
    width: Width,
    experts: Option<&Experts>,
) -> Result<Block> {
    // Outputs keep the size of inputs: standard deviation 1/√in.
    let weight = |seed: usize, rows: usize, cols: usize| {
        let values = halves(rows, cols, seed as u64, (3.0 / cols as f32).sqrt());
        let bytes = bytemuck::cast_slice(&values);
        device.upload(HostMatrix::new(bytes, FloatType::F16, rows, cols))
    };
    let mut linears = Vec::new();
    for (seed, (rows, cols)) in width.sides().into_iter().enumerate() {
        linears.push(weight(seed, rows, cols)?);
    }
    let mixture = |experts: &Experts| {
        let router = weight(linears.len(), experts.count, width.hidden())?;
        Ok::<_, Error>(Mixture {
            experts: experts.clone(),
            router,
            correction: None,
            shared_gate: None,
        })
    };
    let mixture = experts.map(mixture).transpose()?;
    Ok(width.block(linears, mixture))
}

/// Hidden states as random rows of a random table, as embeddings are.
pub(crate) fn synthetic_states(
    device: &Device,
    width: Width,
    (windows, seq_len): (Range<usize>, usize),
    offload: Offload,
) -> Result<States> {
    const ROWS: usize = 1024;
    let values = halves(ROWS, width.hidden(), 99, 1.0);
    let table =
        HostMatrix::new(bytemuck::cast_slice(&values), FloatType::F16, ROWS, width.hidden());
    let most = (device.chunk_tokens() / seq_len).max(1);
    let chunks = windows.len().div_ceil(most);
    let mut hidden = ChunkStore::new(device, chunks, offload.hidden);
    for chunk in 0..chunks {
        let first = windows.start + chunk * most;
        let tokens = most.min(windows.end - first) * seq_len;
        let ids: Vec<u32> = (0..tokens)
            .map(|t| (split_mix(&mut ((first * seq_len + t) as u64)) % ROWS as u64) as u32)
            .collect();
        hidden.put(chunk, device.gather_rows(table, &ids)?)?;
    }
    Ok(States { hidden, seq_lens: vec![seq_len; chunks] })
}

/// Least seconds of two ways after a warm-up, run in turns so that a machine's moods meet both:
/// [`RUNS`] of each at least, more of what is over in milliseconds. Not the median: a neighbor that
/// takes one of two cores away halves what both threads do, and leaves one thread alone.
fn in_turns(mut ways: [&mut dyn FnMut() -> Result<()>; 2]) -> Result<[f64; 2]> {
    let mut least = [f64::INFINITY; 2];
    let begin = Instant::now();
    let mut rounds = 0;
    while rounds <= RUNS || begin.elapsed() < ENOUGH {
        for (way, least) in ways.iter_mut().zip(&mut least) {
            let start = Instant::now();
            way()?;
            if rounds > 0 {
                *least = least.min(start.elapsed().as_secs_f64());
            }
        }
        rounds += 1;
    }
    Ok(least)
}

/// A reproducible value in −1..1.
fn noise(mut index: u64) -> f32 {
    (split_mix(&mut index) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn uniform(rows: usize, cols: usize, seed: u64) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(i, j)| noise((seed << 40) + (i * cols + j) as u64))
}

/// fp16 values in −scale..scale, row-major.
pub(crate) fn halves(rows: usize, cols: usize, seed: u64, scale: f32) -> Vec<f16> {
    (0..rows * cols)
        .into_par_iter()
        .map(|i| f16::from_f32(noise((seed << 40) + i as u64) * scale))
        .collect()
}
