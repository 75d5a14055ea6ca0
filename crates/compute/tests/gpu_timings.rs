//! Rates of the GPU operations at the sizes of a 70B block; nothing is asserted.
//!
//! Run with `--ignored --nocapture` on an idle card.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use std::time::Instant;

use gptq_compute::cuda::Timer;
use gptq_compute::{
    Activation, Adam, AttentionRule, AttentionShape, Device, FloatType, HostMatrix, RopeTable,
    StageTimer, Tensor,
};
use gpus::gpu;
use support::{CodedWeight, Random, bytes_of};

const HIDDEN: usize = 8192;
const INTERMEDIATE: usize = 28_672;
const SEQ_LEN: usize = 4096;
const TOKENS: usize = 4 * SEQ_LEN;

/// Median of five runs after a warm-up, printed with the rate of `work` (TFLOP or TB).
fn time(device: &Device, what: &str, work: f64, unit: &str, mut run: impl FnMut()) {
    let Device::Cuda(cuda) = device else { return };
    run();
    let mut seconds: Vec<f64> = (0..5)
        .map(|_| {
            let timer = Timer::start(cuda).unwrap();
            run();
            timer.stop().unwrap().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    println!("{what:32} {:9.3} ms {:8.2} {unit}/s", seconds[2] * 1e3, work / seconds[2] / 1e12);
}

fn tensor(device: &Device, random: &mut Random, rows: usize, cols: usize) -> Tensor {
    // A thousand random rows, again and again: no two tiles of a product meet the same pair.
    let some = rows.min(1009);
    let bytes = bytes_of(&random.halves(some, cols, 1.0), FloatType::F16);
    let mut bytes = bytes.repeat(rows.div_ceil(some));
    bytes.truncate(rows * cols * 2);
    device.upload(HostMatrix::new(&bytes, FloatType::F16, rows, cols)).unwrap()
}

#[test]
#[ignore = "measures; run it alone"]
fn timings() {
    let Some(gpu) = gpu() else { return };
    println!("{}", gpu.name());
    let mut random = Random::new();
    let random = &mut random;
    let x = tensor(&gpu, random, TOKENS, HIDDEN);
    let wide = tensor(&gpu, random, TOKENS, INTERMEDIATE);
    let weight = tensor(&gpu, random, INTERMEDIATE, HIDDEN);
    let back = tensor(&gpu, random, HIDDEN, INTERMEDIATE);
    let values = (TOKENS * HIDDEN) as f64;
    let product = 2.0 * values * INTERMEDIATE as f64;

    time(&gpu, "linear 8192→28672", product, "TFLOP", || {
        gpu.linear(&x, &weight).unwrap();
    });
    let mut hidden = gpu.upload_f32(ndarray::Array2::zeros((TOKENS, HIDDEN))).unwrap();
    time(&gpu, "linear_add 28672→8192, f32", product, "TFLOP", || {
        gpu.linear_add(&wide, &back, &mut hidden).unwrap();
    });
    for (n, x) in [(HIDDEN, &x), (INTERMEDIATE, &wide)] {
        let mut gram = gpu.gram(n).unwrap();
        let full = 2.0 * TOKENS as f64 * (n * n) as f64;
        time(&gpu, &format!("gram {n}, of the full product"), full, "TFLOP", || {
            gpu.gram_add(&mut gram, x).unwrap();
        });
    }
    for (head_dim, heads, kv_heads) in [(128, 64, 8), (64, 32, 8)] {
        let shape = AttentionShape { heads, kv_heads, head_dim, seq_len: SEQ_LEN };
        let q = tensor(&gpu, random, TOKENS, heads * head_dim);
        let k = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        let v = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        let work = 2.0 * (TOKENS * SEQ_LEN * heads * head_dim) as f64;
        time(&gpu, &format!("attention {heads}×{head_dim}, causal"), work, "TFLOP", || {
            gpu.attention(&q, &k, &v, shape, &AttentionRule::llama(head_dim)).unwrap();
        });
    }
    let (window, softcap) = (Some(SEQ_LEN / 4), Some(50.0));
    for (head_dim, heads, kv_heads, window, softcap) in
        [(128, 64, 8, window, None), (128, 64, 8, None, softcap), (256, 16, 8, None, softcap)]
    {
        let shape = AttentionShape { heads, kv_heads, head_dim, seq_len: SEQ_LEN };
        let rule = AttentionRule { window, softcap, ..AttentionRule::llama(head_dim) };
        let q = tensor(&gpu, random, TOKENS, heads * head_dim);
        let k = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        let v = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        // Keys that a query sees, on average.
        let most = window.unwrap_or(SEQ_LEN);
        let seen = (most * (SEQ_LEN - most) + most * most / 2) as f64 / SEQ_LEN as f64;
        let work = 4.0 * (TOKENS * heads * head_dim) as f64 * seen;
        let what = format!("attention {heads}×{head_dim}, window {window:?}, cap {softcap:?}");
        time(&gpu, &what, work, "TFLOP", || {
            gpu.attention(&q, &k, &v, shape, &rule).unwrap();
        });
    }
    let gain = vec![1.0; HIDDEN];
    time(&gpu, "rms_norm", 6.0 * values, "TB", || {
        gpu.rms_norm(&hidden, &gain, 1e-5).unwrap();
    });
    let heads = vec![1.0; 128];
    time(&gpu, "rms_norm of heads of 128", 4.0 * values, "TB", || {
        gpu.rms_norm(&x, &heads, 1e-5).unwrap();
    });
    let mut q = x.clone();
    time(&gpu, "add_bias", 4.0 * values, "TB", || gpu.add_bias(&mut q, &gain).unwrap());
    let frequencies: Vec<f32> = (0..64).map(|i| 1e4_f32.powf(-(i as f32) / 64.0)).collect();
    let table = RopeTable::new(&frequencies, SEQ_LEN);
    time(&gpu, "rope", 4.0 * values, "TB", || gpu.rope(&mut q, &table, SEQ_LEN).unwrap());
    let up = wide.clone();
    let mut gate = Some(gpu.select_rows(&wide, &(0..TOKENS as u32).collect::<Vec<_>>()).unwrap());
    time(&gpu, "silu_mul", 6.0 * (TOKENS * INTERMEDIATE) as f64, "TB", || {
        gate = gate.take().map(|gate| gpu.gated(gate, &up, Activation::Silu).unwrap());
    });
    time(&gpu, "all_finite", 2.0 * values, "TB", || assert!(gpu.all_finite(&x).unwrap()));
    let head = tensor(&gpu, random, 32_000, HIDDEN);
    let targets = vec![7; TOKENS];
    let work = 2.0 * values * 32_000.0;
    time(&gpu, "token_nll, 32,000 words", work, "TFLOP", || {
        gpu.token_nll(&x, &head, &targets, None).unwrap();
    });
    copies(&gpu, random);
    upload_beside_work(&gpu, random, || {
        gpu.linear(&x, &weight).unwrap();
    });
}

/// Gradients of a block's operations.
#[test]
#[ignore = "measures; run it alone"]
fn backward_timings() {
    let Some(gpu) = gpu() else { return };
    println!("{}", gpu.name());
    let mut random = Random::new();
    let random = &mut random;
    let narrow = tensor(&gpu, random, TOKENS, HIDDEN);
    let wide = tensor(&gpu, random, TOKENS, INTERMEDIATE);
    let values = (TOKENS * HIDDEN) as f64;
    let product = 2.0 * values * INTERMEDIATE as f64;

    let coded = CodedWeight::random(random, 4, (HIDDEN, INTERMEDIATE), 128);
    let codes = gpu.scaled_codes(coded.packed()).unwrap();
    let groups = codes.groups();
    let mut factors = gpu.zeros(HIDDEN, groups).unwrap();
    let weights = (HIDDEN * INTERMEDIATE) as f64;
    time(&gpu, "rescaled 8192×28672, 4 bits", 2.5 * weights, "TB", || {
        gpu.rescaled(&codes, &factors).unwrap();
    });
    let weight = gpu.rescaled(&codes, &factors).unwrap();
    time(&gpu, "linear_backward 8192→28672", product, "TFLOP", || {
        gpu.linear_backward(&narrow, &weight).unwrap();
    });
    let mut sum = gpu.zeros(HIDDEN, groups).unwrap();
    time(&gpu, "scale_gradient 8192×28672", product, "TFLOP", || {
        gpu.scale_gradient(&narrow, &wide, &codes, &weight, &mut sum).unwrap();
    });
    let [mut mean, mut square] = [(); 2].map(|()| gpu.zeros(HIDDEN, groups).unwrap());
    let adam = Adam {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        step: 1,
        gradient_factor: 1.0,
    };
    time(&gpu, "adam_step", 28.0 * (HIDDEN * groups) as f64, "TB", || {
        gpu.adam_step(&sum, [&mut mean, &mut square], &mut factors, &adam).unwrap();
    });
    let mut hidden = gpu.upload_f32(ndarray::Array2::zeros((TOKENS, HIDDEN))).unwrap();
    let x = gpu.upload_f32(ndarray::Array2::ones((TOKENS, HIDDEN))).unwrap();
    time(&gpu, "rms_norm_backward_add", 14.0 * values, "TB", || {
        gpu.rms_norm_backward_add(&x, &[1.0; HIDDEN], 1e-5, &narrow, &mut hidden).unwrap();
    });
    time(&gpu, "gated_backward", 10.0 * (TOKENS * INTERMEDIATE) as f64, "TB", || {
        gpu.gated_backward(&wide, &wide, &wide, Activation::Silu).unwrap();
    });
    let frequencies: Vec<f32> = (0..64).map(|i| 1e4_f32.powf(-(i as f32) / 64.0)).collect();
    let table = RopeTable::new(&frequencies, SEQ_LEN);
    let mut q = narrow.clone();
    time(&gpu, "rope_backward", 4.0 * values, "TB", || {
        gpu.rope_backward(&mut q, &table, SEQ_LEN).unwrap();
    });
    for (head_dim, heads, kv_heads, seq_len) in [
        (128, 64, 8, SEQ_LEN),
        (128, 64, 8, SEQ_LEN / 2),
        (64, 32, 8, SEQ_LEN),
        (256, 16, 8, SEQ_LEN),
    ] {
        let shape = AttentionShape { heads, kv_heads, head_dim, seq_len };
        let rule = AttentionRule::llama(head_dim);
        let q = tensor(&gpu, random, TOKENS, heads * head_dim);
        let k = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        let v = tensor(&gpu, random, TOKENS, kv_heads * head_dim);
        let out = gpu.attention(&q, &k, &v, shape, &rule).unwrap();
        // What the kernels do: eight products of the half of all scores.
        let work = 8.0 * (TOKENS * seq_len * heads * head_dim) as f64;
        let what = format!("attention_backward {heads}×{head_dim}, {seq_len}");
        time(&gpu, &what, work, "TFLOP", || {
            gpu.attention_backward([&q, &k, &v], &out, &q, shape, &rule).unwrap();
        });
    }
    let head = tensor(&gpu, random, 32_000, HIDDEN);
    let other = gpu.linear_backward(&narrow, &tensor(&gpu, random, HIDDEN, HIDDEN)).unwrap();
    time(&gpu, "kl_backward, 32,000 words", 6.0 * values * 32_000.0, "TFLOP", || {
        gpu.kl_backward((&other, &head), (&narrow, &head), None, 1024.0).unwrap();
    });
}

/// An upload must neither wait for queued work nor hold it up.
fn upload_beside_work(gpu: &Device, random: &mut Random, mut work: impl FnMut()) {
    let bytes = bytes_of(&random.halves(4096, 4096, 1.0), FloatType::F16);
    let matrix = HostMatrix::new(&bytes, FloatType::F16, 4096, 4096);
    gpu.synchronize("warming up").unwrap();
    let mut timer = StageTimer::start(gpu).unwrap();
    (0..10).for_each(|_| work());
    timer.mark("ten products").unwrap();
    let clock = Instant::now();
    gpu.upload(matrix).unwrap();
    let waited = clock.elapsed().as_secs_f64();
    (0..10).for_each(|_| work());
    timer.mark("ten more, after an upload").unwrap();
    println!("upload of 34 MB beside queued work: {:.1} ms on the host", waited * 1e3);
    for (name, time) in timer.finish().unwrap() {
        println!("{name:32} {:9.3} ms", time.as_secs_f64() * 1e3);
    }
}

/// Copies end on the host, so the host's clock measures them.
fn copies(gpu: &Device, random: &mut Random) {
    let bytes = bytes_of(&random.halves(HIDDEN, 4096, 1.0), FloatType::BF16);
    let matrix = HostMatrix::new(&bytes, FloatType::BF16, HIDDEN, 4096);
    let size = bytes.len() as f64;
    let mut there = gpu.upload(matrix).unwrap();
    let clock = Instant::now();
    for _ in 0..4 {
        there = gpu.upload(matrix).unwrap();
    }
    println!(
        "upload bf16                   {:8.1} GB/s",
        4.0 * size / clock.elapsed().as_secs_f64() / 1e9
    );
    for round in ["first", "again"] {
        let clock = Instant::now();
        let mut offloaded = gpu.offload(there).unwrap();
        let queued_in = clock.elapsed().as_secs_f64();
        gpu.synchronize("parking").unwrap();
        let out = clock.elapsed().as_secs_f64();
        there = gpu.prefetch(&mut offloaded).unwrap().wait().unwrap();
        gpu.synchronize("fetching").unwrap();
        let back = clock.elapsed().as_secs_f64() - out;
        println!(
            "park {round}: queued in {:.1} ms, {:.1} GB/s out, {:.1} GB/s back",
            queued_in * 1e3,
            size / out / 1e9,
            size / back / 1e9
        );
    }
    let clock = Instant::now();
    there.to_host().unwrap();
    println!(
        "to_host, widened              {:8.1} GB/s",
        size / clock.elapsed().as_secs_f64() / 1e9
    );
}
