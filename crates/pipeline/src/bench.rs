//! Synthetic measurements of the operations that a run spends its time in.
//!
//! Random data, one warm-up, the median of several runs. On the CPU the yardstick of a matrix
//! product is matrixmultiply alone: one thread's rate on the same shape, times the threads.

use std::time::Instant;

use gptq_compute::{Device, Tensor};
use gptq_quant::{QuantSpec, Recipe, factor, solve};
use ndarray::Array2;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::python_random::PythonRandom;

/// Runs of each measurement; the median is reported.
const RUNS: usize = 5;

/// Shapes of a named model's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Width {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
}

const WIDTHS: [Width; 5] = [
    Width { name: "tiny", hidden: 256, intermediate: 768 },
    Width { name: "smollm2", hidden: 576, intermediate: 1536 },
    Width { name: "7b", hidden: 4096, intermediate: 11008 },
    Width { name: "13b", hidden: 5120, intermediate: 13824 },
    Width { name: "70b", hidden: 8192, intermediate: 28672 },
];

impl std::str::FromStr for Width {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        WIDTHS.into_iter().find(|w| w.name == text).ok_or_else(|| {
            let names: Vec<&str> = WIDTHS.iter().map(|w| w.name).collect();
            format!("use one of {}", names.join(", "))
        })
    }
}

/// One operation's measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What was run.
    pub operation: String,
    /// Its shape.
    pub shape: String,
    /// Median seconds.
    pub seconds: f64,
    /// Operations counted, one multiply-add being two.
    pub operations: f64,
    /// Operations a second of the yardstick, where there is one.
    pub yardstick: Option<f64>,
}

impl Measurement {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations / self.seconds
    }

    /// Rate over the yardstick's.
    pub fn fraction(&self) -> Option<f64> {
        self.yardstick.map(|y| self.rate() / y)
    }
}

/// Measures every stage of a block of this width with `tokens` rows of activations.
pub fn bench(device: &Device, width: Width, tokens: usize) -> Result<Vec<Measurement>> {
    let (h, i) = (width.hidden, width.intermediate);
    let mut all = Vec::new();
    for (name, n, m) in [("linear (q)", h, h), ("linear (gate)", h, i), ("linear (down)", i, h)] {
        all.push(linear(device, name, tokens, n, m)?);
    }
    for n in [h, i] {
        let x = device.upload_f32(random(tokens, n))?;
        let mut gram = device.gram(n)?;
        let seconds = median(|| Ok(device.gram_add(&mut gram, &x)?))?;
        let operations = tokens as f64 * (n * n) as f64;
        all.push(measurement("gram (triangle)", format!("{tokens}×{n}"), seconds, operations));
    }
    solver(device, h, h, &mut all)?;
    Ok(all)
}

fn linear(
    device: &Device,
    name: &str,
    tokens: usize,
    in_features: usize,
    out_features: usize,
) -> Result<Measurement> {
    let (x, w) = (random(tokens, in_features), random(out_features, in_features));
    let operations = 2.0 * tokens as f64 * in_features as f64 * out_features as f64;
    let alone = median(|| {
        std::hint::black_box(x.dot(&w.t()));
        Ok(())
    })?;
    let (x, w) = (device.upload_f32(x)?, device.upload_f32(w)?);
    let seconds = median(|| {
        std::hint::black_box(device.linear(&x, &w)?);
        Ok(())
    })?;
    let shape = format!("{tokens}×{in_features}×{out_features}");
    let threads = rayon::current_num_threads() as f64;
    Ok(Measurement {
        yardstick: Some(operations / alone * threads),
        ..measurement(name, shape, seconds, operations)
    })
}

fn solver(device: &Device, n: usize, rows: usize, all: &mut Vec<Measurement>) -> Result<()> {
    let spec = QuantSpec {
        bits: 4,
        group_size: Some(128),
        act_order: true,
        damp: 0.01,
        recipe: Recipe::AutoGptq,
    };
    let mut gram = device.gram(n)?;
    device.gram_add(&mut gram, &device.upload_f32(random(2 * n, n))?)?;
    let failed = |source| Error::Solve { linear: "benchmark".to_owned(), source };
    let mut factored = None;
    let seconds = median(|| {
        factored = Some(factor(device, &gram, 1.0, &spec).map_err(failed)?);
        Ok(())
    })?;
    let cube = (n * n * n) as f64;
    all.push(measurement("factor (f64)", format!("{n}×{n}"), seconds, 2.0 / 3.0 * cube));
    let Some(factored) = factored else { return Ok(()) };
    let weight: Tensor = device.upload_f32(random(rows, n))?;
    let seconds = median(|| {
        std::hint::black_box(solve(device, &weight, &factored, &spec).map_err(failed)?);
        Ok(())
    })?;
    let operations = rows as f64 * (n * n) as f64;
    all.push(measurement("solve (4-bit 128g)", format!("{rows}×{n}"), seconds, operations));
    Ok(())
}

fn measurement(operation: &str, shape: String, seconds: f64, operations: f64) -> Measurement {
    Measurement { operation: operation.to_owned(), shape, seconds, operations, yardstick: None }
}

/// Median seconds of [`RUNS`] runs after a warm-up.
fn median(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut seconds = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}

/// Reproducible values in −1..1.
fn random(rows: usize, cols: usize) -> Array2<f32> {
    let mut rng = PythonRandom::new((rows * 31 + cols) as u64);
    Array2::from_shape_simple_fn((rows, cols), || {
        (rng.up_to(1 << 24) as f64 / f64::from(1 << 23) - 1.0) as f32
    })
}
