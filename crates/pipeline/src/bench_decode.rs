//! How fast a device makes text: a few tokens' products with weights as files hold them, beside a plain
//! reading of memory, and steps of a whole synthetic model.
//!
//! Every measurement reads more than caches hold, so that it shows memory's speed and not theirs.

use std::time::Instant;

use gptq_checkpoint::RopeKind;
use gptq_compute::cuda::{MemoryInfo, read_rate as read_rate_of_card};
use gptq_compute::{
    CacheShape, CodedMatrix, Device, FloatType, HostMatrix, KvCache, Resident, RopeTable, Span,
    StepModel,
};
use gptq_model::{Block, LinearId, Ropes};
use gptq_quant::split_mix;
use half::f16;
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use crate::bench::Width;
use crate::error::{Error, Result};

/// What is read at a time, at least; of the smallest width less, which nobody measures a machine by.
const BYTES: usize = 256 << 20;
const FEW_BYTES: usize = 2 << 20;
/// As much of a GPU, whose caches are larger.
const CARD_BYTES: usize = 4 << 30;
/// Of each measurement the best of so many is taken.
const RUNS: usize = 3;
/// Tokens of a sequence before the steps that are measured.
const CONTEXTS: [usize; 2] = [128, 4096];
/// Steps of a run, and as many of a GPU, after two that make its program ready.
const STEPS: usize = 4;
const CARD_STEPS: usize = 32;
/// Tokens of a product: on a GPU, whose kernels take so many at the price of one, also more.
const TOKENS: &[usize] = &[1];
const CARD_TOKENS: &[usize] = &[1, 2, 4, 8, 16];
/// Columns of a group.
const GROUP: usize = 128;
/// The linears of a block that are made together.
const STAGES: [(&str, &[LinearId]); 4] = [
    ("q, k, v", &[LinearId::Q, LinearId::K, LinearId::V]),
    ("o", &[LinearId::O]),
    ("gate, up", &[LinearId::Gate, LinearId::Up]),
    ("down", &[LinearId::Down]),
];

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Form {
    /// Bits of a value: 16 for fp16, otherwise of a code.
    pub bits: u8,
    /// Whether the columns of a group lie apart.
    pub act_order: bool,
}

const FORMS: [Form; 7] = [
    Form { bits: 16, act_order: false },
    Form { bits: 8, act_order: false },
    Form { bits: 4, act_order: false },
    Form { bits: 4, act_order: true },
    Form { bits: 3, act_order: false },
    Form { bits: 3, act_order: true },
    Form { bits: 2, act_order: false },
];

/// A few tokens' product with a weight.
#[derive(Clone, Debug, Serialize)]
pub struct Reading {
    /// The linears that read the same tokens, and are one launch on a GPU.
    pub linears: &'static str,
    /// Output features of all of them, and input features.
    pub shape: [usize; 2],
    /// Tokens.
    pub tokens: usize,
    /// How the weight is stored.
    #[serde(flatten)]
    pub form: Form,
    /// Seconds of a product.
    pub seconds: f64,
    /// Bytes of the weight that are read a second.
    pub rate: f64,
    /// The rate over that of reading memory.
    pub fraction: f64,
}

/// Steps of a whole model.
#[derive(Clone, Debug, Serialize)]
pub struct Stepping {
    /// How its linears are stored; embedding and head are fp16.
    #[serde(flatten)]
    pub form: Form,
    /// Tokens before the step.
    pub context: usize,
    /// Blocks of the model.
    pub blocks: usize,
    /// Blocks that were run; the time of the others is theirs.
    pub measured_blocks: usize,
    /// Steps a second.
    pub tokens_per_second: f64,
}

/// What `gptq bench --decode` measures.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeBench {
    /// Bytes of memory that the device reads a second.
    pub read_rate: f64,
    /// Every shape of a block in every form.
    pub products: Vec<Reading>,
    /// The whole model in every form, after a short and a long text.
    pub steps: Vec<Stepping>,
}

/// Measures the products and steps of a model of this width.
///
/// # Errors
/// Those of the device, and a width with experts.
pub fn bench_decode(device: &Device, width: Width) -> Result<DecodeBench> {
    if width.has_experts() {
        return Err(Error::DecodeExperts { width: width.name });
    }
    let reach = match (width.name, device) {
        ("tiny", _) => FEW_BYTES,
        (_, Device::Cpu) => BYTES,
        (_, Device::Cuda(_)) => CARD_BYTES.min(free(device)? / 2),
    };
    let (read_rate, tokens) = match device {
        Device::Cpu => (read_rate(reach), TOKENS),
        Device::Cuda(cuda) => (read_rate_of_card(cuda, reach.max(1 << 20))?, CARD_TOKENS),
    };
    let (mut products, mut steps) = (Vec::new(), Vec::new());
    for form in FORMS {
        for stage in STAGES {
            products.extend(product(device, form, (width, stage), tokens, (reach, read_rate))?);
        }
        steps.extend(stepping(device, form, width, reach)?);
    }
    Ok(DecodeBench { read_rate, products, steps })
}

/// Bytes of a device's own memory that are to be had.
fn free(device: &Device) -> Result<usize> {
    let free = |memory: MemoryInfo| memory.free.min(memory.budget.saturating_sub(memory.held));
    Ok(device.memory()?.map_or(usize::MAX, free))
}

/// The least seconds of some runs.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}

/// Bytes a second of adding up a buffer.
fn read_rate(reach: usize) -> f64 {
    let words = vec![1_u64; reach / size_of::<u64>()];
    let mut least = f64::INFINITY;
    for _ in 0..=RUNS {
        let start = Instant::now();
        let sum: u64 = words.par_chunks(1 << 16).map(|part| part.iter().sum::<u64>()).sum();
        assert_eq!(sum, words.len() as u64, "the buffer was read");
        least = least.min(start.elapsed().as_secs_f64());
    }
    reach as f64 / least
}

fn product(
    device: &Device,
    form: Form,
    (width, (linears, ids)): (Width, (&'static str, &[LinearId])),
    tokens: &[usize],
    (reach, read_rate): (usize, f64),
) -> Result<Vec<Reading>> {
    let sides: Vec<_> = ids.iter().map(|&id| width.linear(id)).collect();
    let first = sides.iter().map(|&(rows, cols)| random(device, form, rows, cols));
    let first: Vec<Resident> = first.collect::<Result<_>>()?;
    let bytes: usize = first.iter().map(Resident::bytes).sum();
    let (rows, cols) = (sides.iter().map(|side| side.0).sum(), sides[0].1);
    let mut sets = vec![first];
    for _ in 1..reach.div_ceil(bytes) {
        let copies = sets[0].iter().map(|weight| device.copy_resident(weight));
        sets.push(copies.collect::<gptq_compute::Result<_>>()?);
    }
    let mut found = Vec::new();
    for &tokens in tokens {
        let x = device.upload_f32(Array2::from_elem((tokens, cols), 0.5))?;
        let seconds = device.product_seconds(&x, &sets)?;
        let rate = bytes as f64 / seconds;
        let (shape, fraction) = ([rows, cols], rate / read_rate);
        found.push(Reading { linears, shape, tokens, form, seconds, rate, fraction });
    }
    Ok(found)
}

/// Blocks in memory of their own, and what a step needs besides.
struct Stack {
    blocks: Vec<Block<Resident>>,
    norm: Vec<f32>,
    ropes: Ropes,
}

impl Stack {
    /// Seconds of a step after `context` tokens.
    fn step_seconds(&self, device: &Device, shape: CacheShape, context: usize) -> Result<f64> {
        let caches = self.blocks.iter().map(|_| device.kv_cache(shape));
        let mut caches: Vec<KvCache> = caches.collect::<gptq_compute::Result<_>>()?;
        let model = StepModel {
            blocks: self
                .blocks
                .iter()
                .zip(&caches)
                .filter_map(|(b, cache)| b.step(cache))
                .collect(),
            width: self.norm.len(),
            norm: Some(&self.norm),
            eps: 1e-5,
            rope: self.ropes.of_kind(RopeKind::Global),
        };
        let mut program = device.steps(&model, shape)?;
        let first = device.upload_f32(Array2::from_elem((1, self.norm.len()), 0.5))?;
        let mut step = |start: usize| -> Result<()> {
            let span = Span { slot: 0, start, len: 1 };
            match &mut program {
                Some(program) => drop(program.run(&first, &[span])?),
                None => {
                    let mut hidden = first.clone();
                    for (block, cache) in self.blocks.iter().zip(&mut caches) {
                        block.forward_spans(device, &mut hidden, &self.ropes, &[span], cache)?;
                    }
                }
            }
            Ok(())
        };
        let steps = shape.capacity - context;
        if matches!(device, Device::Cuda(_)) {
            step(context)?;
            step(context)?;
        }
        let seconds = best(|| {
            (context..shape.capacity).try_for_each(&mut step)?;
            Ok(device.synchronize("steps")?)
        })?;
        Ok(seconds / steps as f64)
    }
}

fn stepping(device: &Device, form: Form, width: Width, reach: usize) -> Result<Vec<Stepping>> {
    let (blocks, vocabulary) = width.depth();
    let head = random(device, FORMS[0], vocabulary, width.hidden())?;
    let first = block(device, form, width)?;
    let of_block: usize = first.linears().iter().map(|linear| linear.weight.bytes()).sum();
    let fitting = match device {
        Device::Cpu => reach.div_ceil(of_block),
        // What is free takes the caches, too.
        Device::Cuda(_) => free(device)? / 10 * 9 / of_block,
    };
    let measured_blocks = fitting.clamp(1, blocks);
    let mut stack = vec![first];
    for _ in 1..measured_blocks {
        stack.push(copy(device, &stack[0], width)?);
    }
    let (longest, steps) = match device {
        Device::Cpu => (CONTEXTS[1] + STEPS, STEPS),
        Device::Cuda(_) => (CONTEXTS[1] + CARD_STEPS, CARD_STEPS),
    };
    let frequencies: Vec<f32> = (0..width.head_dim() / 2).map(|i| 0.9_f32.powi(i as i32)).collect();
    let ropes = Ropes::shared(RopeTable::new(&frequencies, longest));
    let stack = Stack { blocks: stack, norm: vec![1.0; width.hidden()], ropes };
    let hidden = device.upload_f32(Array2::from_elem((1, width.hidden()), 0.5))?;
    let mut found = Vec::new();
    for context in CONTEXTS {
        let shape = CacheShape {
            slots: 1,
            capacity: context + steps,
            heads: width.heads(),
            kv_heads: width.kv_heads(),
            head_dim: width.head_dim(),
        };
        let in_blocks = stack.step_seconds(device, shape, context)?;
        let in_head = best(|| {
            let logits = device.resident_logits(&hidden, &head)?.to_host()?;
            assert_eq!(logits.ncols(), vocabulary, "logits");
            Ok(())
        })?;
        let seconds = in_blocks * blocks as f64 / measured_blocks as f64 + in_head;
        let tokens_per_second = 1.0 / seconds;
        found.push(Stepping { form, context, blocks, measured_blocks, tokens_per_second });
    }
    Ok(found)
}

/// A block in memory of its own.
fn copy(device: &Device, from: &Block<Resident>, width: Width) -> Result<Block<Resident>> {
    let linears = from.linears().iter().map(|linear| Ok(device.copy_resident(&linear.weight)?));
    Ok(width.block(linears.collect::<Result<_>>()?, None))
}

/// A block of random weights, so small that states stay finite.
fn block(device: &Device, form: Form, width: Width) -> Result<Block<Resident>> {
    let linears = width.sides();
    let linears = linears.iter().map(|&(rows, cols)| random(device, form, rows, cols));
    Ok(width.block(linears.collect::<Result<_>>()?, None))
}

/// A weight of random values around 0.
fn random(device: &Device, form: Form, rows: usize, cols: usize) -> Result<Resident> {
    if form.bits == 16 {
        let mut values = vec![f16::ZERO; rows * cols];
        fill(&mut values, cols, |bits| f16::from_f32((bits >> 40) as f32 / 1e9 - 8e-3));
        let matrix = HostMatrix::new(bytemuck::cast_slice(&values), FloatType::F16, rows, cols);
        return Ok(device.keep(matrix)?);
    }
    let most = (1_u16 << form.bits) - 1;
    let mut codes = vec![0; rows * cols];
    fill(&mut codes, cols, |bits| bits as u8 & most as u8);
    let groups = cols.div_ceil(GROUP);
    let zeros = vec![most.div_ceil(2) as u8; groups * rows];
    let scales = vec![f16::from_f32(0.02 / f32::from(most)); groups * rows];
    // Neighbors are apart as far as they can be.
    let group = |column: usize| if form.act_order { column % groups } else { column / GROUP };
    let group_of: Vec<u32> = (0..cols).map(|column| group(column) as u32).collect();
    Ok(device.keep_coded(CodedMatrix {
        bits: form.bits,
        rows,
        cols,
        codes: &codes,
        zeros: &zeros,
        scales: &scales,
        group_of: &group_of,
    })?)
}

/// Random values, a row by a thread.
fn fill<T: Send>(values: &mut [T], cols: usize, value: impl Fn(u64) -> T + Sync) {
    values.par_chunks_mut(cols.max(1)).enumerate().for_each(|(row, values)| {
        let mut state = row as u64;
        values.iter_mut().for_each(|v| *v = value(split_mix(&mut state)));
    });
}
