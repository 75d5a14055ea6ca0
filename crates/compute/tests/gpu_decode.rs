//! Weights that stay on a GPU, caches and steps, against f64 and the CPU, on fresh random inputs and ragged
//! sizes.
//!
//! Each check prints its error as a fraction of its tolerance. Without a GPU the tests say why they are
//! skipped.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use gptq_compute::{
    Activation, AttentionRule, CacheShape, CodedMatrix, Device, FloatType, HostMatrix, KvCache,
    Resident, RopeTable, Span, StepBlock, StepModel, Tensor,
};
use gpus::gpu;
use half::f16;
use ndarray::{Array2, s};
use support::{Random, bytes_of, check};

/// f32 sums of exact products by tensor cores, which truncate.
const SUMS: f64 = 1e-4;
/// The same of weights that are rounded to fp16 first, into an fp16 result.
const ROUNDED: f64 = 1e-3;
/// Many operations one after the other, on activations in fp16.
const A_BLOCK: f64 = 1e-3;

/// A quantized weight and what it means.
struct Coded {
    bits: u8,
    codes: Vec<u8>,
    zeros: Vec<u8>,
    scales: Vec<f16>,
    group_of: Vec<u32>,
    exact: Array2<f64>,
}

impl Coded {
    fn new(
        random: &mut Random,
        bits: u8,
        (rows, cols): (usize, usize),
        groups: usize,
        group: impl Fn(usize) -> u32,
        symmetric: bool,
    ) -> Self {
        let codes: Vec<u8> = (0..rows * cols).map(|_| random.below(1 << bits) as u8).collect();
        let zeros: Vec<u8> = (0..groups * rows)
            .map(|_| if symmetric { 1 << (bits - 1) } else { random.below(1 << bits) as u8 })
            .collect();
        let scales: Vec<f16> = (0..groups * rows)
            .map(|_| f16::from_f32((1 + random.below(1000)) as f32 / 1e5))
            .collect();
        let group_of: Vec<u32> = (0..cols).map(group).collect();
        let exact = Array2::from_shape_fn((rows, cols), |(row, column)| {
            let cell = group_of[column] as usize * rows + row;
            (f64::from(codes[row * cols + column]) - f64::from(zeros[cell]))
                * f64::from(scales[cell])
        });
        Self { bits, codes, zeros, scales, group_of, exact }
    }

    fn kept(&self, device: &Device) -> Resident {
        device
            .keep_coded(CodedMatrix {
                bits: self.bits,
                rows: self.exact.nrows(),
                cols: self.exact.ncols(),
                codes: &self.codes,
                zeros: &self.zeros,
                scales: &self.scales,
                group_of: &self.group_of,
            })
            .unwrap()
    }
}

/// Products of one token to many with a weight, in f32 and fp16 and added to something.
fn check_products(
    what: &str,
    gpu: &Device,
    kept: &Resident,
    exact: &Array2<f64>,
    random: &mut Random,
) {
    let (rows, cols) = exact.dim();
    for tokens in [1, 2, 3, 8, 9, 16, 17, 40] {
        let x = random.halves(tokens, cols, 1.0);
        let want = x.mapv(f64::from).dot(&exact.t()).mapv(|v| v as f32);
        let bytes = bytes_of(&x, FloatType::F16);
        let there = gpu.upload(HostMatrix::new(&bytes, FloatType::F16, tokens, cols)).unwrap();
        let what = format!("{what} {rows}×{cols}, {tokens} tokens");
        let sums = if tokens <= 16 { SUMS } else { ROUNDED };
        let logits = gpu.resident_logits(&there, kept).unwrap();
        check(&what, &logits, &want, sums);
        check(&what, &gpu.resident_linear(&there, kept).unwrap(), &want, ROUNDED);
        let before = random.halves(tokens, rows, 1.0);
        let mut sum = gpu.upload_f32(before.clone()).unwrap();
        gpu.resident_linear_add(&there, kept, &mut sum).unwrap();
        check(&what, &sum, &(&want + &before), sums);
        let again = gpu.resident_logits(&there, kept).unwrap().to_host().unwrap();
        assert_eq!(again, logits.to_host().unwrap(), "{what} changes");
    }
}

#[test]
fn codes_of_every_width_and_grouping_match_f64() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for bits in [2, 3, 4, 8] {
        for symmetric in [true, false] {
            type Grouping<'a> = (usize, usize, usize, &'a dyn Fn(usize) -> u32);
            let groupings: [Grouping<'_>; 8] = [
                (48, 256, 1, &|_| 0),
                (70, 1024, 8, &|column| column as u32 / 128),
                (64, 576, 5, &|column| column as u32 / 128),
                (33, 320, 10, &|column| column as u32 / 32),
                (16, 2048, 32, &|column| column as u32 / 64),
                (130, 384, 3, &|column| (column * 7 % 3) as u32),
                (40, 96, 2, &|column| u32::from(column == 40)),
                (96, 64, 4, &|column| column as u32 / 16),
            ];
            for (rows, cols, groups, group) in groupings {
                let weight = Coded::new(&mut random, bits, (rows, cols), groups, group, symmetric);
                let kept = weight.kept(&gpu);
                let what = format!("{bits} bits, {groups} groups, symmetric {symmetric}");
                check_products(&what, &gpu, &kept, &weight.exact, &mut random);
                let copy = gpu.copy_resident(&kept).unwrap();
                check_products("copied", &gpu, &copy, &weight.exact, &mut random);
            }
        }
    }
}

/// As wide as a model: every warp has several steps, every multiprocessor several units.
#[test]
fn wide_weights_match_f64() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for bits in [2, 3, 4, 8] {
        for act_order in [false, true] {
            let (rows, cols) = (5120 + 8, 3072);
            let group = |column: usize| {
                if act_order { (column * 5 % 24) as u32 } else { column as u32 / 128 }
            };
            let weight = Coded::new(&mut random, bits, (rows, cols), 24, group, !act_order);
            let kept = weight.kept(&gpu);
            for tokens in [1, 5, 16] {
                let x = random.halves(tokens, cols, 1.0);
                let want = x.mapv(f64::from).dot(&weight.exact.t()).mapv(|v| v as f32);
                let there = gpu.upload_f32(x).unwrap();
                let got = gpu.resident_logits(&there, &kept).unwrap();
                check(&format!("wide, {bits} bits, {tokens} tokens"), &got, &want, SUMS);
            }
        }
    }
}

/// As long as a model: four tokens' inputs are more than a multiprocessor holds.
#[test]
fn long_weights_match_f64() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for bits in [2, 3, 4, 8] {
        let (rows, cols) = (264, 28_672);
        let weight =
            Coded::new(&mut random, bits, (rows, cols), 224, |column| column as u32 / 128, true);
        let kept = weight.kept(&gpu);
        for tokens in [1, 2, 4, 7, 16] {
            let x = random.halves(tokens, cols, 1.0);
            let want = x.mapv(f64::from).dot(&weight.exact.t()).mapv(|v| v as f32);
            let got = gpu.resident_logits(&gpu.upload_f32(x).unwrap(), &kept).unwrap();
            check(&format!("long, {bits} bits, {tokens} tokens"), &got, &want, SUMS);
        }
    }
}

#[test]
fn dense_weights_match_f64() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (70, 45), (300, 576), (4099, 1024)] {
        let values = random.halves(rows, cols, 0.05);
        for dtype in [FloatType::F16, FloatType::F32] {
            let bytes = bytes_of(&values, dtype);
            let kept = gpu.keep(HostMatrix::new(&bytes, dtype, rows, cols)).unwrap();
            check_products("dense", &gpu, &kept, &values.mapv(f64::from), &mut random);
        }
    }
}

fn table(head_dim: usize, positions: usize) -> RopeTable {
    let half = head_dim / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
    RopeTable::new(&frequencies, positions)
}

#[test]
fn attention_over_a_cache_matches() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (heads, kv_heads, head_dim) in [(4, 4, 16), (9, 3, 64), (8, 1, 128), (6, 2, 80)] {
        let shape = CacheShape { slots: 3, capacity: 700, heads, kv_heads, head_dim };
        let rope = table(head_dim, shape.capacity);
        let rule = AttentionRule::llama(head_dim);
        let devices = [Device::Cpu, gpu.clone()];
        let mut caches = devices.each_ref().map(|device| device.kv_cache(shape).unwrap());
        let mut lengths = [0; 3];
        for lens in [[0, 130, 7], [300, 1, 200], [1, 64, 1], [65, 0, 3]] {
            let spans: Vec<_> = (0..3)
                .filter(|&slot| lens[slot] > 0)
                .map(|slot| Span { slot, start: lengths[slot], len: lens[slot] })
                .collect();
            let rows: usize = lens.iter().sum();
            let mut operand = |heads: usize| random.halves(rows, heads * head_dim, 2.0);
            let host = [operand(heads), operand(kv_heads), operand(kv_heads)];
            let made: Vec<Tensor> = devices
                .iter()
                .zip(&mut caches)
                .map(|(device, cache)| {
                    let up = |values: &Array2<f32>| {
                        let bytes = bytes_of(values, FloatType::F16);
                        let (rows, cols) = values.dim();
                        device.upload(HostMatrix::new(&bytes, FloatType::F16, rows, cols)).unwrap()
                    };
                    let [mut q, mut k, v] = host.each_ref().map(up);
                    device.rope_spans(&mut q, &rope, &spans).unwrap();
                    device.rope_spans(&mut k, &rope, &spans).unwrap();
                    device.cached_attention(&q, &k, &v, cache, &spans, &rule).unwrap()
                })
                .collect();
            let what = format!("cached attention {head_dim}×{heads}/{kv_heads}, {lens:?}");
            check(&what, &made[1], made[0].as_host(), 2e-3);
            for (length, len) in lengths.iter_mut().zip(lens) {
                *length += len;
            }
        }
    }
}

/// Two blocks of random weights with every optional part, or with none.
struct Small {
    linears: Vec<[Coded; 7]>,
    biases: Vec<Vec<f32>>,
    norms: Vec<[Vec<f32>; 4]>,
    full: bool,
}

const WIDTH: usize = 384;
const INNER: usize = 640;

impl Small {
    fn new(random: &mut Random, shape: CacheShape, bits: u8, full: bool) -> Self {
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let sides = [
            (q, WIDTH),
            (kv, WIDTH),
            (kv, WIDTH),
            (WIDTH, q),
            (INNER, WIDTH),
            (INNER, WIDTH),
            (WIDTH, INNER),
        ];
        let mut vector = |len: usize, around: f32| -> Vec<f32> {
            random.halves(1, len, 0.2).iter().map(|v| v + around).collect()
        };
        let biases = sides.iter().map(|side| vector(side.0, 0.0)).collect();
        let norms = (0..2)
            .map(|_| [WIDTH, WIDTH, shape.head_dim, shape.head_dim].map(|len| vector(len, 1.0)))
            .collect();
        let mut linear = |i: usize, side: (usize, usize)| {
            let groups = side.1.div_ceil(64);
            // Act-order, and k's order is not that of q and v.
            let group = move |column: usize| {
                if full {
                    (column * (if i == 1 { 5 } else { 7 }) % groups) as u32
                } else {
                    column as u32 / 64
                }
            };
            let mut coded = Coded::new(random, bits, side, groups, group, !full);
            for scale in &mut coded.scales {
                *scale = f16::from_f32(scale.to_f32() * 2.0 / f32::from(1_u16 << bits));
            }
            coded
        };
        let linears = (0..2).map(|_| std::array::from_fn(|i| linear(i, sides[i]))).collect();
        Self { linears, biases, norms, full }
    }

    fn kept(&self, device: &Device) -> Vec<[Resident; 7]> {
        self.linears
            .iter()
            .map(|block| block.each_ref().map(|linear| linear.kept(device)))
            .collect()
    }

    fn blocks<'a>(
        &'a self,
        kept: &'a [[Resident; 7]],
        caches: &'a [KvCache],
    ) -> Vec<StepBlock<'a>> {
        let blocks = kept.iter().zip(&self.norms).zip(caches);
        blocks
            .map(|((linears, [input, post, q, k]), cache)| StepBlock {
                linears: linears.each_ref(),
                biases: std::array::from_fn(|i| self.full.then_some(&self.biases[i][..])),
                head_norms: self.full.then_some([&q[..], &k[..]]),
                norms: [input, post],
                cache,
            })
            .collect()
    }

    /// The same by single operations.
    fn forward(
        &self,
        device: &Device,
        kept: &[[Resident; 7]],
        caches: &mut [KvCache],
        hidden: Array2<f32>,
        (rope, spans): (&RopeTable, &[Span]),
    ) -> Tensor {
        let mut hidden = device.upload_f32(hidden).unwrap();
        for ((linears, [input, post, q_gain, k_gain]), cache) in
            kept.iter().zip(&self.norms).zip(caches)
        {
            let project = |x: &Tensor, i: usize| {
                let mut out = device.resident_linear(x, &linears[i]).unwrap();
                if self.full {
                    device.add_bias(&mut out, &self.biases[i]).unwrap();
                }
                out
            };
            let x = device.rms_norm(&hidden, input, EPS).unwrap();
            let [mut q, mut k, v] = [0, 1, 2].map(|i| project(&x, i));
            if self.full {
                q = device.rms_norm(&q, q_gain, EPS).unwrap();
                k = device.rms_norm(&k, k_gain, EPS).unwrap();
            }
            device.rope_spans(&mut q, rope, spans).unwrap();
            device.rope_spans(&mut k, rope, spans).unwrap();
            let x = device
                .cached_attention(&q, &k, &v, cache, spans, &AttentionRule::llama(q_gain.len()))
                .unwrap();
            device.resident_linear_add(&x, &linears[3], &mut hidden).unwrap();
            if self.full {
                device.add_bias(&mut hidden, &self.biases[3]).unwrap();
            }
            let x = device.rms_norm(&hidden, post, EPS).unwrap();
            let x = device.gated(project(&x, 4), &project(&x, 5), Activation::Silu).unwrap();
            device.resident_linear_add(&x, &linears[6], &mut hidden).unwrap();
            if self.full {
                device.add_bias(&mut hidden, &self.biases[6]).unwrap();
            }
        }
        device.rms_norm(&hidden, &self.norms[0][0], EPS).unwrap()
    }
}

const EPS: f32 = 1e-5;

/// Steps of several sequences, the first ones launch by launch and the others as graphs, against the
/// CPU's single operations.
#[test]
fn steps_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    // Of the longest cache a block of threads takes two runs of keys after one another.
    for (bits, full, heads, kv_heads, head_dim, capacity) in [
        (4, false, 6, 6, 64, 600),
        (3, true, 6, 2, 64, 600),
        (2, true, 8, 1, 16, 9000),
        (8, false, 5, 1, 128, 600),
    ] {
        let shape = CacheShape { slots: 17, capacity, heads, kv_heads, head_dim };
        let rope = table(head_dim, shape.capacity);
        let small = Small::new(&mut random, shape, bits, full);
        let cpu = Device::Cpu;
        let (here, there) = (small.kept(&cpu), small.kept(&gpu));
        let cache = |device: &Device| -> Vec<KvCache> {
            (0..2).map(|_| device.kv_cache(shape).unwrap()).collect()
        };
        let (mut here_caches, mut there_caches) = (cache(&cpu), cache(&gpu));
        let model = StepModel {
            blocks: small.blocks(&there, &there_caches),
            width: WIDTH,
            norm: Some(&small.norms[0][0]),
            eps: EPS,
            rope: &rope,
        };
        let mut program = gpu.steps(&model, shape).unwrap().unwrap();
        // Prompts of different lengths, one of them longer than a split of keys.
        let mut lengths: Vec<usize> = (0..shape.slots).map(|slot| slot * 3).collect();
        lengths[1] = 300;
        for (slot, &len) in lengths.iter().enumerate() {
            let spans = [Span { slot, start: 0, len }];
            let prompt = random.halves(len, WIDTH, 1.0);
            if prompt.is_empty() {
                continue;
            }
            small.forward(&cpu, &here, &mut here_caches, prompt.clone(), (&rope, &spans));
            small.forward(&gpu, &there, &mut there_caches, prompt, (&rope, &spans));
        }
        for tokens in [1, 2, 5, 16, 16, 5, 1, 16, 2, 1] {
            let first = random.below(shape.slots - tokens + 1);
            let spans: Vec<_> = (first..first + tokens)
                .map(|slot| Span { slot, start: lengths[slot], len: 1 })
                .collect();
            let hidden = random.halves(tokens, WIDTH, 1.0);
            let want =
                small.forward(&cpu, &here, &mut here_caches, hidden.clone(), (&rope, &spans));
            let got = program.run(&gpu.upload_f32(hidden).unwrap(), &spans).unwrap();
            check(&format!("{bits} bits, a step of {tokens}"), &got, want.as_host(), A_BLOCK);
            spans.iter().for_each(|span| lengths[span.slot] += 1);
        }
        // A token's result does not depend on the others, of which there may be so many.
        for (few, all) in [(2, 4), (5, 8), (9, 16)] {
            let mut slots: Vec<_> = (0..all).collect();
            // The long sequence is among those that come with them.
            slots.swap(1, few);
            let span = |&slot: &usize| Span { slot, start: lengths[slot], len: 1 };
            let spans: Vec<_> = slots.iter().map(span).collect();
            let hidden = random.halves(all, WIDTH, 1.0);
            let among = program.run(&gpu.upload_f32(hidden.clone()).unwrap(), &spans).unwrap();
            let first = gpu.upload_f32(hidden.slice(s![..few, ..]).to_owned()).unwrap();
            let alone = program.run(&first, &spans[..few]).unwrap().to_host().unwrap();
            let among = among.to_host().unwrap().slice(s![..few, ..]).to_owned();
            assert_eq!(alone, among, "{bits} bits: {few} tokens among {all}");
        }
        let long = [Span { slot: 0, start: shape.capacity, len: 1 }];
        let one = gpu.upload_f32(random.halves(1, WIDTH, 1.0)).unwrap();
        assert!(program.run(&one, &long).is_err(), "beyond the cache");
    }
}
