//! How fast this machine makes text: one token's products with weights as files hold them, beside a
//! plain reading of memory, and steps of a whole synthetic model.
//!
//! Every measurement reads more than caches hold, so that it shows memory's speed and not theirs.

use std::time::Instant;

use gptq_compute::{
    CacheShape, CodedMatrix, Device, FloatType, HostMatrix, Resident, RopeTable, Span, Tensor,
};
use gptq_model::{Block, BlockParts, LinearId};
use gptq_quant::split_mix;
use half::f16;
use ndarray::Array2;
use rayon::prelude::*;
use serde::Serialize;

use crate::bench::Width;
use crate::error::Result;

/// What is read at a time, at least; of the smallest width less, which nobody measures a machine by.
const BYTES: usize = 256 << 20;
const FEW_BYTES: usize = 2 << 20;
/// Of each measurement the best of so many is taken.
const RUNS: usize = 3;
/// Tokens of a sequence before the steps that are measured.
const CONTEXTS: [usize; 2] = [128, 4096];
/// Steps of a run.
const STEPS: usize = 4;
/// Columns of a group.
const GROUP: usize = 128;

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

/// One token's product with a weight.
#[derive(Clone, Debug, Serialize)]
pub struct Reading {
    /// Output and input features.
    pub shape: [usize; 2],
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
    /// Bytes of memory that all threads together read a second.
    pub read_rate: f64,
    /// Every shape of a block in every form.
    pub products: Vec<Reading>,
    /// The whole model in every form, after a short and a long text.
    pub steps: Vec<Stepping>,
}

/// Measures the products and steps of a model of this width, on the CPU.
///
/// # Errors
/// Those of the device.
pub fn bench_decode(device: &Device, width: Width) -> Result<DecodeBench> {
    let reach = if width.name == "tiny" { FEW_BYTES } else { BYTES };
    let read_rate = read_rate(reach);
    let mut shapes = width.linears().to_vec();
    shapes.sort_unstable();
    shapes.dedup();
    let (mut products, mut steps) = (Vec::new(), Vec::new());
    for form in FORMS {
        for &(rows, cols) in &shapes {
            products.push(product(device, form, (rows, cols), (reach, read_rate))?);
        }
        steps.extend(stepping(device, form, width, reach)?);
    }
    Ok(DecodeBench { read_rate, products, steps })
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
    (rows, cols): (usize, usize),
    (reach, read_rate): (usize, f64),
) -> Result<Reading> {
    let weight = random(device, form, rows, cols)?;
    let bytes = weight.bytes();
    let copies = vec![weight; reach.div_ceil(bytes)];
    let x = device.upload_f32(Array2::from_elem((1, cols), 0.5))?;
    let seconds = best(|| {
        for copy in &copies {
            device.resident_linear(&x, copy)?;
        }
        Ok(())
    })? / copies.len() as f64;
    let rate = bytes as f64 / seconds;
    Ok(Reading { shape: [rows, cols], form, seconds, rate, fraction: rate / read_rate })
}

fn stepping(device: &Device, form: Form, width: Width, reach: usize) -> Result<Vec<Stepping>> {
    let (blocks, vocabulary) = width.depth();
    let first = block(device, form, width)?;
    let of_block: usize =
        width.linears().iter().map(|&(rows, cols)| rows * cols * usize::from(form.bits) / 8).sum();
    let measured_blocks = reach.div_ceil(of_block).min(blocks);
    let stack = vec![first; measured_blocks];
    let head = random(device, FORMS[0], vocabulary, width.hidden())?;
    let mut found = Vec::new();
    for context in CONTEXTS {
        let shape = CacheShape {
            slots: 1,
            capacity: context + STEPS,
            heads: width.heads(),
            kv_heads: width.kv_heads(),
            head_dim: width.head_dim(),
        };
        let caches = stack.iter().map(|_| device.kv_cache(shape));
        let mut caches = caches.collect::<gptq_compute::Result<Vec<_>>>()?;
        let frequencies: Vec<f32> =
            (0..width.head_dim() / 2).map(|i| 0.9_f32.powi(i as i32)).collect();
        let rope = RopeTable::new(&frequencies, context + STEPS);
        let mut hidden = device.upload_f32(Array2::from_elem((1, width.hidden()), 0.5))?;
        let in_blocks = best(|| {
            for step in 0..STEPS {
                let span = Span { slot: 0, start: context + step, len: 1 };
                for (block, cache) in stack.iter().zip(&mut caches) {
                    block.forward_spans(device, &mut hidden, &rope, &[span], cache)?;
                }
            }
            Ok(())
        })? / STEPS as f64;
        let in_head = best(|| {
            let logits: Tensor = device.resident_linear(&hidden, &head)?;
            assert_eq!(logits.cols(), vocabulary, "logits");
            Ok(())
        })?;
        let seconds = in_blocks * blocks as f64 / measured_blocks as f64 + in_head;
        let tokens_per_second = 1.0 / seconds;
        found.push(Stepping { form, context, blocks, measured_blocks, tokens_per_second });
    }
    Ok(found)
}

/// A block of random weights, so small that states stay finite.
fn block(device: &Device, form: Form, width: Width) -> Result<Block<Resident>> {
    let linears = LinearId::ALL.iter().zip(width.linears());
    let linears = linears.map(|(_, (rows, cols))| random(device, form, rows, cols));
    Ok(Block::new(BlockParts {
        index: 0,
        linears: linears.collect::<Result<_>>()?,
        biases: [const { None }; 7],
        head_norms: None,
        input_norm: vec![1.0; width.hidden()],
        post_attention_norm: vec![1.0; width.hidden()],
        norm_eps: 1e-5,
        heads: width.heads(),
        kv_heads: width.kv_heads(),
        head_dim: width.head_dim(),
    }))
}

/// A weight of random values around 0.
fn random(device: &Device, form: Form, rows: usize, cols: usize) -> Result<Resident> {
    let mut state = 7;
    if form.bits == 16 {
        let mut value = || f16::from_f32((split_mix(&mut state) >> 40) as f32 / 1e9 - 8e-3);
        let values: Vec<f16> = (0..rows * cols).map(|_| value()).collect();
        let matrix = HostMatrix::new(bytemuck::cast_slice(&values), FloatType::F16, rows, cols);
        return Ok(device.keep(matrix)?);
    }
    let most = (1_u16 << form.bits) - 1;
    let codes: Vec<u8> =
        (0..rows * cols).map(|_| (split_mix(&mut state) % (u64::from(most) + 1)) as u8).collect();
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
