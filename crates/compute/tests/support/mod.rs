//! What the GPU tests share: random values and comparisons.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

#[path = "../../../../tests/util/split_mix.rs"]
mod split_mix;

use std::time::{SystemTime, UNIX_EPOCH};

use gptq_compute::{Device, FloatType, HostMatrix, PackedCodes, Tensor};
use half::{bf16, f16};
use ndarray::Array2;

/// Relative errors of results rounded to fp16 once (2⁻¹¹ at most, 2⁻¹²·√(4/3) on average), and of
/// results that also hold rounded intermediates.
pub const ONE_ROUNDING: f64 = 5e-4;
pub const SOME_ROUNDINGS: f64 = 1.5e-3;
/// Sums in f32 of exact products; tensor cores truncate where the CPU rounds.
pub const SUMS: f64 = 1e-4;

/// A small generator (`SplitMix64`), seeded by the clock; the seed is printed.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = now.as_nanos() as u64;
        println!("seed {seed}");
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        split_mix::split_mix(&mut self.0)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Roughly normal values of this standard deviation, each exact in fp16.
    pub fn halves(&mut self, rows: usize, cols: usize, deviation: f32) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, cols), || {
            // The sum of four uniform values has a third of a unit's variance.
            let bits = self.next();
            let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0).sum();
            f16::from_f32((sum - 2.0) * 1.732 * deviation).to_f32()
        })
    }
}

/// A quantized weight with groups of columns in an order of their own.
pub struct CodedWeight {
    pub bits: u8,
    pub shape: (usize, usize),
    pub codes: Array2<u8>,
    pub zero: u8,
    /// `[groups, rows]`, of either sign.
    pub scales: Vec<f16>,
    pub g_idx: Vec<u32>,
    words: Vec<u32>,
}

impl CodedWeight {
    /// Groups of `group` columns of a random order; the last may be smaller.
    pub fn random(random: &mut Random, bits: u8, shape: (usize, usize), group: usize) -> Self {
        let (rows, cols) = shape;
        let codes = Array2::from_shape_simple_fn(shape, || (random.next() % (1 << bits)) as u8);
        let scale = || f16::from_f32(random.halves(1, 1, 0.1)[[0, 0]] + 0.01);
        let scales = std::iter::repeat_with(scale).take(rows * cols.div_ceil(group)).collect();
        let mut g_idx: Vec<u32> = (0..cols).map(|column| (column / group) as u32).collect();
        for i in (1..cols).rev() {
            g_idx.swap(i, random.below(i + 1));
        }
        let width = usize::from(bits);
        let mut words = vec![0_u32; cols / 32 * width * rows];
        for ((row, column), &code) in codes.indexed_iter() {
            for bit in 0..width {
                let at = column * width + bit;
                words[at / 32 * rows + row] |= u32::from(code >> bit & 1) << (at % 32);
            }
        }
        let zero = 1 << (bits - 1);
        Self { bits, shape, codes, zero, scales, g_idx, words }
    }

    pub fn packed(&self) -> PackedCodes<'_> {
        let &Self { bits, shape: (rows, cols), zero, .. } = self;
        let (words, scales, g_idx) = (&self.words, &self.scales, &self.g_idx);
        PackedCodes { bits, rows, cols, words, zero, scales, g_idx }
    }

    /// What it means.
    pub fn values(&self) -> Array2<f32> {
        self.values_of(&self.scales)
    }

    /// What it means with other scales.
    pub fn values_of(&self, scales: &[f16]) -> Array2<f32> {
        Array2::from_shape_fn(self.shape, |(row, column)| {
            let scale = scales[self.g_idx[column] as usize * self.shape.0 + row].to_f32();
            scale * (f32::from(self.codes[[row, column]]) - f32::from(self.zero))
        })
    }
}

pub fn round_to_half(values: &Array2<f32>) -> Array2<f32> {
    values.mapv(|v| f16::from_f32(v).to_f32())
}

/// The bytes of a file that holds `values` as `dtype`.
pub fn bytes_of(values: &Array2<f32>, dtype: FloatType) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size());
    for &v in values {
        match dtype {
            FloatType::F32 => bytes.extend(v.to_le_bytes()),
            FloatType::F16 => bytes.extend(f16::from_f32(v).to_le_bytes()),
            FloatType::BF16 => bytes.extend(bf16::from_f32(v).to_le_bytes()),
        }
    }
    bytes
}

/// Values on both devices: hidden states in f32, everything else as a checkpoint's fp16.
pub fn both(gpu: &Device, values: &Array2<f32>) -> (Tensor, Tensor) {
    let bytes = bytes_of(values, FloatType::F16);
    let matrix = HostMatrix::new(&bytes, FloatType::F16, values.nrows(), values.ncols());
    (Device::Cpu.upload(matrix).unwrap(), gpu.upload(matrix).unwrap())
}

/// Compares with the CPU's result: the root of the summed squared error, and a fifth of the largest
/// error, both relative to the result, must stay within `tolerance`. Prints which fraction they take.
#[track_caller]
pub fn check(what: &str, got: &Tensor, want: &Array2<f32>, tolerance: f64) {
    let got = got.to_host().unwrap();
    assert_eq!(got.dim(), want.dim(), "{what}");
    let (mut error, mut norm, mut worst, mut largest) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    for (&a, &b) in got.iter().zip(want) {
        let (a, b) = (f64::from(a), f64::from(b));
        assert!(a.is_finite() && b.is_finite(), "{what}: {a} for {b}");
        error += (a - b) * (a - b);
        norm += b * b;
        worst = worst.max((a - b).abs());
        largest = largest.max(b.abs());
    }
    let relative = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
    let peak = if worst == 0.0 { 0.0 } else { worst / largest / 5.0 };
    let fraction = relative.max(peak) / tolerance;
    println!("{what}: {fraction:.3} of its tolerance (error {relative:.2e}, worst {worst:.2e})");
    assert!(fraction < 1.0, "{what}: error {relative:e}, worst {worst:e} of {largest:e}");
}
