//! Every GPU operation against the CPU, on fresh random inputs and ragged sizes.
//!
//! Inputs are values that fp16 holds exactly, so that only the arithmetic of the operation differs.
//! Each check prints its error as a fraction of its tolerance. Without a GPU the tests say why they
//! are skipped. `timings` is measured, not checked: run it with `--ignored --nocapture`.

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use gptq_compute::cuda::Cuda;
use gptq_compute::{
    Activation, AttentionRule, AttentionShape, Device, Error, FloatType, HostMatrix, RopeTable,
    Tensor,
};
use gpus::gpu;
use half::bf16;
use ndarray::{Array2, s};
use support::{ONE_ROUNDING, Random, SOME_ROUNDINGS, SUMS, both, bytes_of, check, round_to_half};

/// Neither side of a comparison may be NaN: an error that is NaN exceeds nothing.
#[test]
fn a_comparison_with_nan_fails() {
    let (one, nan) = (Array2::<f32>::ones((2, 2)), Array2::from_elem((2, 2), f32::NAN));
    check("ones", &Tensor::from_host(one.clone()), &one, SUMS);
    for (got, want) in [(&nan, &one), (&one, &nan), (&nan, &nan)] {
        let compared = || check("NaN", &Tensor::from_host(got.clone()), want, SUMS);
        assert!(std::panic::catch_unwind(compared).is_err());
    }
}

#[test]
fn uploads_are_exact_or_refused() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (129, 1001), (2048, 4096)] {
        let values = random.halves(rows, cols, 3.0);
        for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
            let bytes = bytes_of(&values, dtype);
            let matrix = HostMatrix::new(&bytes, dtype, rows, cols);
            let exact = Device::Cpu.upload(matrix).unwrap().to_host().unwrap();
            let there = gpu.upload(matrix).unwrap().to_host().unwrap();
            assert_eq!(there, round_to_half(&exact), "{rows}×{cols} {dtype:?}");
            let ids: Vec<u32> = (0..5).map(|i| (i * 7919 % rows) as u32).collect();
            let rows = gpu.gather_rows(matrix, &ids).unwrap().to_host().unwrap();
            assert_eq!(rows, exact.select(ndarray::Axis(0), &ids.map_usize()), "{dtype:?}");
        }
    }
    let mut bytes = bytes_of(&Array2::<f32>::ones((5, 5)), FloatType::BF16);
    bytes[48..].copy_from_slice(&bf16::from_f32(1e20).to_le_bytes());
    let too_large = HostMatrix::new(&bytes, FloatType::BF16, 5, 5);
    assert!(matches!(gpu.upload(too_large), Err(Error::HalfOverflow { count: 1 })));
    // Embeddings stay in f32, where the same value fits.
    assert!(gpu.gather_rows(too_large, &[4]).is_ok());
}

trait MapUsize {
    fn map_usize(&self) -> Vec<usize>;
}

impl MapUsize for Vec<u32> {
    fn map_usize(&self) -> Vec<usize> {
        self.iter().map(|&v| v as usize).collect()
    }
}

#[test]
fn norms_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 8), (37, 576), (5, 8192), (3, 1001), (130, 2048)] {
        let x = random.halves(rows, cols, 2.0);
        let gain: Vec<f32> = random.halves(1, cols, 1.0).into_raw_vec_and_offset().0;
        let want = Device::Cpu.rms_norm(&Tensor::from_host(x.clone()), &gain, 1e-5).unwrap();
        let hidden = gpu.upload_f32(x.clone()).unwrap();
        for (kind, input) in [("f32", hidden), ("f16", both(&gpu, &x).1)] {
            let got = gpu.rms_norm(&input, &gain, 1e-5).unwrap();
            check(&format!("rms_norm {kind} {rows}×{cols}"), &got, want.as_host(), ONE_ROUNDING);
        }
    }
}

#[test]
fn norms_of_heads_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, heads, head_dim) in [(1, 1, 8), (37, 9, 64), (130, 5, 128), (3, 2, 80), (4, 3, 30)] {
        let (x, x_there) = both(&gpu, &random.halves(rows, heads * head_dim, 2.0));
        let gain: Vec<f32> = random.halves(1, head_dim, 1.0).into_raw_vec_and_offset().0;
        let want = Device::Cpu.rms_norm(&x, &gain, 1e-6).unwrap();
        let got = gpu.rms_norm(&x_there, &gain, 1e-6).unwrap();
        let what = format!("rms_norm of {heads} heads of {head_dim}, {rows} rows");
        check(&what, &got, want.as_host(), ONE_ROUNDING);
    }
    let (_, x) = both(&gpu, &random.halves(3, 20, 1.0));
    assert!(matches!(gpu.rms_norm(&x, &[1.0; 8], 1e-6), Err(Error::ShapeMismatch { .. })));
}

#[test]
fn biases_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (37, 576), (129, 1001), (2, 28_672)] {
        let values = random.halves(rows, cols, 2.0);
        let bias: Vec<f32> = random.halves(1, cols, 4.0).into_raw_vec_and_offset().0;
        let (mut want, half) = both(&gpu, &values);
        Device::Cpu.add_bias(&mut want, &bias).unwrap();
        let full = gpu.upload_f32(values.clone()).unwrap();
        for (kind, mut got) in [("f16", half), ("f32", full)] {
            let before = got.clone();
            gpu.add_bias(&mut got, &bias).unwrap();
            check(&format!("add_bias {kind} {rows}×{cols}"), &got, want.as_host(), ONE_ROUNDING);
            if kind == "f32" {
                assert_eq!(got.to_host().unwrap(), *want.as_host(), "one addition rounds the same");
            }
            assert_eq!(before.to_host().unwrap(), values, "a clone was written");
        }
    }
    let (_, mut x) = both(&gpu, &random.halves(3, 20, 1.0));
    assert!(matches!(gpu.add_bias(&mut x, &[1.0; 8]), Err(Error::ShapeMismatch { .. })));
}

#[test]
fn products_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (m, n, k) in [(1, 8, 8), (37, 49, 576), (130, 576, 1536), (257, 1000, 129)] {
        let (x, x_there) = both(&gpu, &random.halves(m, k, 1.0));
        let (w, w_there) = both(&gpu, &random.halves(n, k, 0.1));
        let want = Device::Cpu.linear(&x, &w).unwrap();
        let got = gpu.linear(&x_there, &w_there).unwrap();
        check(&format!("linear {m}×{k}·{k}×{n}"), &got, want.as_host(), ONE_ROUNDING);

        let hidden = random.halves(m, n, 30.0);
        let mut want = Tensor::from_host(hidden.clone());
        Device::Cpu.linear_add(&x, &w, &mut want).unwrap();
        let mut got = gpu.upload_f32(hidden).unwrap();
        let before = got.clone();
        gpu.linear_add(&x_there, &w_there, &mut got).unwrap();
        check(&format!("linear_add {m}×{k}·{k}×{n}"), &got, want.as_host(), SUMS);
        assert_ne!(before.to_host().unwrap(), got.to_host().unwrap(), "a clone was written");
    }
}

#[test]
fn rotations_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (head_dim, heads, seq_len, windows) in [(64, 9, 37, 2), (128, 8, 300, 1), (16, 3, 1, 5)] {
        let half = head_dim / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
        let table = RopeTable::new(&frequencies, 512);
        let (mut want, mut got) =
            both(&gpu, &random.halves(windows * seq_len, heads * head_dim, 2.0));
        for (device, x) in [(&Device::Cpu, &mut want), (&gpu, &mut got)] {
            device.rope(x, &table, seq_len).unwrap();
        }
        check(&format!("rope {head_dim}×{heads}, {seq_len}"), &got, want.as_host(), ONE_ROUNDING);
    }
}

#[test]
fn attention_matches() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [16, 32, 64, 80, 96, 128] {
        let rule = AttentionRule::llama(head_dim);
        for seq_len in [1, 5, 63, 64, 65, 127, 128, 129, 200, 513] {
            let (heads, kv_heads, windows) = if seq_len % 2 == 0 { (4, 4, 1) } else { (6, 2, 2) };
            let shape = AttentionShape { heads, kv_heads, head_dim, seq_len };
            let (q, q_there) = both(&gpu, &random.halves(windows * seq_len, heads * head_dim, 3.0));
            let keys = |r: &mut Random| r.halves(windows * seq_len, kv_heads * head_dim, 2.0);
            let (k, k_there) = both(&gpu, &keys(&mut random));
            let (v, v_there) = both(&gpu, &keys(&mut random));
            let want = Device::Cpu.attention(&q, &k, &v, shape, &rule).unwrap();
            let got = gpu.attention(&q_there, &k_there, &v_there, shape, &rule).unwrap();
            let what = format!("attention {head_dim}×{heads}/{kv_heads}, {seq_len}");
            check(&what, &got, want.as_host(), SOME_ROUNDINGS);
            let again = gpu.attention(&q_there, &k_there, &v_there, shape, &rule).unwrap();
            assert_eq!(got.to_host().unwrap(), again.to_host().unwrap(), "{what} changes");
        }
    }
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 258, seq_len: 4 };
    let (_, x) = both(&gpu, &random.halves(4, 258, 1.0));
    assert!(matches!(
        gpu.attention(&x, &x, &x, shape, &AttentionRule::llama(258)),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn activations_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (37, 1536), (1, 28_672)] {
        let (gate, gate_there) = both(&gpu, &random.halves(rows, cols, 4.0));
        let (up, up_there) = both(&gpu, &random.halves(rows, cols, 2.0));
        let want = Device::Cpu.gated(gate, &up, Activation::Silu).unwrap();
        let got = gpu.gated(gate_there, &up_there, Activation::Silu).unwrap();
        check(&format!("silu_mul {rows}×{cols}"), &got, want.as_host(), ONE_ROUNDING);
    }
}

#[test]
fn grams_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (n, chunks) in
        [(8, vec![1]), (576, vec![37, 64]), (5000, vec![301, 18]), (200, vec![33_000])]
    {
        let (mut want, mut got) = (Device::Cpu.gram(n).unwrap(), gpu.gram(n).unwrap());
        for tokens in chunks {
            let (x, x_there) = both(&gpu, &random.halves(tokens, n, 1.0));
            Device::Cpu.gram_add(&mut want, &x).unwrap();
            gpu.gram_add(&mut got, &x_there).unwrap();
        }
        let exact = want.to_host().unwrap();
        check(&format!("gram {n}"), &gpu.upload_f32(got.to_host().unwrap()).unwrap(), &exact, SUMS);
        let diagonal = got.diagonal().unwrap();
        assert_eq!(diagonal, got.to_host().unwrap().diag().to_vec());
        let (w, w_there) = both(&gpu, &random.halves(7, n, 0.1));
        let (a, b) = (want.quadratic_form(&w).unwrap(), got.quadratic_form(&w_there).unwrap());
        println!("quadratic_form {n}: {:.3} of its tolerance", (a / b - 1.0).abs() / 1e-4);
        assert!((a / b - 1.0).abs() < 1e-4, "quadratic_form {n}: {a} and {b}");
    }
}

#[test]
fn losses_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    // The last one needs two chunks of logits.
    for (rows, hidden, vocab) in [(1, 64, 7), (37, 576, 1001), (1500, 64, 49_152)] {
        let (h, h_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (g, g_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (w, w_there) = both(&gpu, &random.halves(vocab, hidden, 0.3));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
        let column = |v: Vec<f32>| Array2::from_shape_vec((rows, 1), v).unwrap();
        let there = |v: Vec<f32>| gpu.upload_f32(column(v)).unwrap();
        let want = Device::Cpu.token_nll(&h, &w, &targets, None).unwrap();
        let got = gpu.token_nll(&h_there, &w_there, &targets, None).unwrap();
        check(&format!("token_nll {rows}×{vocab}"), &there(got), &column(want), SUMS);
        let want = Device::Cpu.token_kl((&h, &w), (&g, &w), None).unwrap();
        let got = gpu.token_kl((&h_there, &w_there), (&g_there, &w_there), None).unwrap();
        check(&format!("token_kl {rows}×{vocab}"), &there(got), &column(want), SUMS);
    }
}

#[test]
fn a_value_that_is_not_finite_is_found_anywhere() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (100, 1000)] {
        let clean = random.halves(rows, cols, 1.0);
        assert!(gpu.all_finite(&gpu.upload_f32(clean.clone()).unwrap()).unwrap());
        assert!(gpu.all_finite(&both(&gpu, &clean).1).unwrap());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[[rows - 1, random.below(cols)]] = bad;
            let x = gpu.upload_f32(x).unwrap();
            assert!(!gpu.all_finite(&x).unwrap());
            // A product carries it into fp16.
            let ones = gpu.upload_f32(Array2::ones((3, cols))).unwrap();
            assert!(!gpu.all_finite(&gpu.linear(&x, &ones).unwrap()).unwrap());
        }
    }
}

#[test]
fn rows_are_selected_and_offloaded_tensors_return() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let x = random.halves(61, 37, 1.0);
    let ids = [60_u32, 0, 7, 7, 33];
    let want = x.select(ndarray::Axis(0), &ids.to_vec().map_usize());
    for there in [gpu.upload_f32(x.clone()).unwrap(), both(&gpu, &x).1] {
        assert_eq!(gpu.select_rows(&there, &ids).unwrap().to_host().unwrap(), want);
    }
    let tensors: Vec<_> = (1..9).map(|i| random.halves(i * 100, 577, 1.0)).collect();
    let offloaded: Vec<_> =
        tensors.iter().map(|t| gpu.offload(gpu.upload_f32(t.clone()).unwrap()).unwrap()).collect();
    for (mut offloaded, want) in offloaded.into_iter().zip(&tensors) {
        let back = gpu.prefetch(&mut offloaded).unwrap();
        let again = gpu.prefetch(&mut offloaded).unwrap();
        drop(offloaded);
        let mut half = gpu.offload(both(&gpu, want).1).unwrap();
        for back in [back, again] {
            assert_eq!(back.wait().unwrap().to_host().unwrap(), *want);
        }
        let back = gpu.prefetch(&mut half).unwrap();
        assert_eq!(back.wait().unwrap().to_host().unwrap(), *want);
        drop(gpu.prefetch(&mut half).unwrap());
    }
}

#[test]
fn shifted_targets_match_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    // Below, at and beside a panel of 2048; ragged, and an odd number of columns.
    for (tokens, n, rows) in [(300, 64, 5), (517, 577, 70), (700, 2048, 64), (900, 2500, 33)] {
        let x = random.halves(tokens, n, 1.0);
        let near = round_to_half(&(&x + &random.halves(tokens, n, 0.05)));
        let states = random.halves(tokens, rows, 2.0);
        let far = &states + &random.halves(tokens, rows, 0.1);
        let w = random.halves(rows, n, 0.3);
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, random.below(i + 1));
        }
        // A factor with entries of very different sizes above its diagonal.
        let mut upper = random.halves(n, n, 0.5 / (n as f32).sqrt());
        for ((i, j), value) in upper.indexed_iter_mut() {
            *value = if i > j { 0.0 } else { *value + if i == j { 1.0 } else { 0.0 } };
        }
        let runs = [Device::Cpu, gpu.clone()].map(|device| {
            let part = |a: &Array2<f32>, rows: &std::ops::Range<usize>| {
                device.upload_f32(a.slice(s![rows.clone(), ..]).to_owned()).unwrap()
            };
            let mut drift = device.zeros(n, n).unwrap();
            let mut lacking = device.zeros(rows, n).unwrap();
            for range in [0..tokens / 3, tokens / 3..tokens] {
                let [x, near, states, far] = [&x, &near, &states, &far].map(|a| part(a, &range));
                let moved = device.difference(&near, &x).unwrap();
                device.cross_add(&mut drift, &moved, &x).unwrap();
                let moved = device.difference(&far, &states).unwrap();
                device.cross_add(&mut lacking, &moved, &x).unwrap();
            }
            let upper = device.upload_f32(upper.clone()).unwrap();
            let w = device.upload_f32(w.clone()).unwrap();
            let map = device.over_hessian(&drift, &upper, &order).unwrap();
            let shift = device.over_hessian(&lacking, &upper, &order).unwrap();
            let by = device.shifted_by(&w, &map, 0.01).unwrap();
            let plain = device.shifted(&w, &shift, 0.01).unwrap();
            [map, shift, by, plain].map(|t| t.to_host().unwrap())
        });
        let [want, got] = runs;
        let names = ["map", "shift", "shifted by a map", "shifted"];
        for ((name, want), got) in names.into_iter().zip(want).zip(got) {
            let what = format!("{name} {tokens}×{n}×{rows}");
            check(&what, &Tensor::from_host(got), &want, SOME_ROUNDINGS);
        }
    }
}

#[test]
fn running_out_of_memory_says_what_to_lower() {
    let Some(gpu) = gpu() else { return };
    let Device::Cuda(card) = &gpu else { panic!("not a GPU: {}", gpu.name()) };
    let own = Cuda::new(0).unwrap();
    own.set_memory_budget(1 << 20);
    let budgeted = Device::Cuda(own.clone());
    let kept = budgeted.gram(256).unwrap();
    let error = budgeted.gram(512).unwrap_err();
    assert!(error.to_string().contains("Out of GPU memory during gram"), "{error}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("fewer or shorter windows"), "{hint}");
    assert_eq!(own.memory().unwrap().held, 256 << 10);
    drop(kept);
    assert_eq!(own.memory().unwrap().held, 0);
    assert_eq!(own.memory().unwrap().peak, 256 << 10);
    // More than any card has: the driver refuses, and the card stays usable.
    assert!(matches!(gpu.gram(1 << 20), Err(Error::OutOfMemory { .. })));
    card.synchronize("the test").unwrap();
    assert!(matches!(Device::cuda(99), Err(Error::NoSuchDevice { ordinal: 99, .. })));
}

#[test]
fn operands_of_two_devices_are_an_error() {
    let Some(gpu) = gpu() else { return };
    let here = Tensor::from_host(Array2::ones((4, 4)));
    let there = gpu.upload_f32(Array2::ones((4, 4))).unwrap();
    assert!(matches!(gpu.linear(&here, &there), Err(Error::DeviceMismatch { op: "linear" })));
}
