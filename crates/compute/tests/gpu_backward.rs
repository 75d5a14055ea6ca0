//! Gradients on a GPU against the CPU's, which `backward.rs` holds against central differences in f64.
//!
//! Inputs are values that fp16 holds exactly, so that only the arithmetic of the operation differs. Each check prints
//! its error as a fraction of its tolerance. Without a GPU the tests say why they are skipped.

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use gptq_compute::{
    Activation, Adam, AttentionRule, AttentionShape, Device, Error, RopeLayout, RopeTable, Tensor,
};
use gpus::gpu;
use ndarray::{Array2, s};
use support::{
    CodedWeight, ONE_ROUNDING, Random, SOME_ROUNDINGS, SUMS, both, check, round_to_half,
};

#[test]
fn linear_gradients_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (tokens, rows, cols) in [(1, 8, 8), (37, 49, 576), (130, 1536, 576), (257, 129, 1000)] {
        let (dy, dy_there) = both(&gpu, &random.halves(tokens, rows, 1.0));
        let (w, w_there) = both(&gpu, &random.halves(rows, cols, 0.1));
        let what = format!("linear_backward {tokens}×{rows}·{rows}×{cols}");
        let want = Device::Cpu.linear_backward(&dy, &w).unwrap();
        let got = gpu.linear_backward(&dy_there, &w_there).unwrap();
        check(&what, &got, want.as_host(), ONE_ROUNDING);

        let before = random.halves(tokens, cols, 30.0);
        let (mut want, mut half) = both(&gpu, &before);
        Device::Cpu.linear_backward_add(&dy, &w, &mut want).unwrap();
        gpu.linear_backward_add(&dy_there, &w_there, &mut half).unwrap();
        check(&format!("{what}, added to fp16"), &half, want.as_host(), ONE_ROUNDING);
        let mut full = gpu.upload_f32(before).unwrap();
        gpu.linear_backward_add(&dy_there, &w_there, &mut full).unwrap();
        check(&format!("{what}, added to f32"), &full, want.as_host(), SUMS);
    }
    // What fp16 does not hold is found.
    let huge = gpu.upload_f32(Array2::from_elem((4, 8), 60_000.0)).unwrap();
    let ones = gpu.upload_f32(Array2::ones((8, 8))).unwrap();
    assert!(!gpu.all_finite(&gpu.linear_backward(&huge, &ones).unwrap()).unwrap());
}

#[test]
fn norm_gradients_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols, run) in
        [(1, 8, 8), (37, 576, 576), (5, 8192, 8192), (3, 1001, 1001), (137, 576, 64), (5, 90, 30)]
    {
        let (x, dy) = (random.halves(rows, cols, 2.0), random.halves(rows, cols, 1.0));
        let before = random.halves(rows, cols, 1.0);
        let gain: Vec<f32> = random.halves(1, run, 1.0).into_raw_vec_and_offset().0;
        let [x_here, dy_here] = [&x, &dy].map(|a| Tensor::from_host(a.clone()));
        let want = Device::Cpu.rms_norm_backward(&x_here, &gain, 1e-5, &dy_here).unwrap();
        let mut sum = Tensor::from_host(before.clone());
        Device::Cpu.rms_norm_backward_add(&x_here, &gain, 1e-5, &dy_here, &mut sum).unwrap();
        let kinds = |a: &Array2<f32>| {
            [("f32", gpu.upload_f32(a.clone()).unwrap()), ("f16", both(&gpu, a).1)]
        };
        for (x_kind, x) in kinds(&x) {
            for (dy_kind, dy) in kinds(&dy) {
                let what = format!("rms_norm_backward {x_kind} {dy_kind} {rows}×{cols} by {run}");
                let got = gpu.rms_norm_backward(&x, &gain, 1e-5, &dy).unwrap();
                check(&what, &got, want.as_host(), ONE_ROUNDING);
                let mut got = gpu.upload_f32(before.clone()).unwrap();
                gpu.rms_norm_backward_add(&x, &gain, 1e-5, &dy, &mut got).unwrap();
                check(&format!("{what}, added"), &got, sum.as_host(), SUMS);
            }
        }
    }
    let (_, half) = both(&gpu, &random.halves(3, 8, 1.0));
    let refused = gpu.rms_norm_backward_add(&half, &[1.0; 8], 1e-5, &half, &mut half.clone());
    assert!(matches!(refused, Err(Error::WrongType { .. })));
}

#[test]
fn gated_gradients_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (37, 1536), (1, 28_672)] {
        // One value alone stays where its slope is not too small for fp16.
        let deviation = if rows * cols == 1 { 1.0 } else { 4.0 };
        let (gate, gate_there) = both(&gpu, &random.halves(rows, cols, deviation));
        let (up, up_there) = both(&gpu, &random.halves(rows, cols, 2.0));
        let (dy, dy_there) = both(&gpu, &random.halves(rows, cols, 1.0));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let want = Device::Cpu.gated_backward(&gate, &up, &dy, activation).unwrap();
            let got = gpu.gated_backward(&gate_there, &up_there, &dy_there, activation).unwrap();
            let what = format!("gated_backward {activation:?} {rows}×{cols}");
            check(&format!("{what}, gate"), &got.0, want.0.as_host(), ONE_ROUNDING);
            check(&format!("{what}, up"), &got.1, want.1.as_host(), ONE_ROUNDING);
            // The inputs are as they were.
            assert_eq!(gate_there.to_host().unwrap(), *gate.as_host());
        }
    }
}

#[test]
fn rotations_back_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (layout, head_dim, half, factor) in [
        (RopeLayout::Half, 64, 32, 1.0),
        (RopeLayout::Half, 80, 16, 1.25),
        (RopeLayout::Interleaved, 64, 32, 0.75),
    ] {
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
        let table = RopeTable::with(&frequencies, 64, head_dim, layout, factor);
        let (mut want, mut got) = both(&gpu, &random.halves(2 * 37, 3 * head_dim, 2.0));
        for (device, x) in [(&Device::Cpu, &mut want), (&gpu, &mut got)] {
            device.rope_backward(x, &table, 37).unwrap();
        }
        check(&format!("rope_backward {layout:?} {head_dim}"), &got, want.as_host(), ONE_ROUNDING);
    }
}

#[test]
fn attention_gradients_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [6, 16, 32, 50, 64, 80, 96, 112, 128, 160, 192, 250, 256] {
        let plain = AttentionRule::llama(head_dim);
        for (seq_len, rule) in [
            (1, plain),
            (31, plain),
            (64, AttentionRule { softcap: Some(2.5), ..plain }),
            (65, plain),
            (200, AttentionRule { window: Some(1), ..plain }),
            (257, AttentionRule { window: Some(70), scale: 0.1, ..plain }),
            (513, plain),
        ] {
            let (heads, kv_heads, windows) = if seq_len % 2 == 0 { (4, 4, 1) } else { (6, 2, 2) };
            let shape = AttentionShape { heads, kv_heads, head_dim, seq_len };
            let mut values = |heads: usize, deviation: f32| {
                both(&gpu, &random.halves(windows * seq_len, heads * head_dim, deviation))
            };
            let (q, q_there) = values(heads, 2.0);
            let (k, k_there) = values(kv_heads, 1.0);
            let (v, v_there) = values(kv_heads, 1.0);
            let (dout, dout_there) = values(heads, 1.0);
            let out = Device::Cpu.attention(&q, &k, &v, shape, &rule).unwrap();
            let want = Device::Cpu.attention_backward([&q, &k, &v], &out, &dout, shape, &rule);
            let there = [&q_there, &k_there, &v_there];
            let out = gpu.attention(there[0], there[1], there[2], shape, &rule).unwrap();
            let back = || gpu.attention_backward(there, &out, &dout_there, shape, &rule).unwrap();
            let (got, again) = (back(), back());
            for (((name, got), again), want) in
                ["q", "k", "v"].into_iter().zip(&got).zip(&again).zip(&want.unwrap())
            {
                let what = format!("attention_backward by {name}, {head_dim}, {seq_len}, {rule:?}");
                // Of one key, scores have no gradient but what rounding of out leaves.
                let none = name != "v" && (seq_len == 1 || rule.window == Some(1));
                if none {
                    let worst = got.to_host().unwrap().iter().fold(0.0_f32, |a, v| a.max(v.abs()));
                    assert!(worst < 0.1, "{what}: {worst}");
                } else {
                    check(&what, got, want.as_host(), SOME_ROUNDINGS);
                }
                assert_eq!(got.to_host().unwrap(), again.to_host().unwrap(), "{what} changes");
            }
        }
    }
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 258, seq_len: 4 };
    let (_, x) = both(&gpu, &random.halves(4, 258, 1.0));
    let refused = gpu.attention_backward([&x, &x, &x], &x, &x, shape, &AttentionRule::llama(258));
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
}

#[test]
fn divergences_and_their_gradients_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    // The last one needs two chunks of logits.
    for (rows, hidden, vocab, softcap) in
        [(1, 64, 7, None), (37, 576, 1001, Some(3.0)), (1500, 64, 49_152, None)]
    {
        let (p, p_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (q, q_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (w, w_there) = both(&gpu, &random.halves(vocab, hidden, 0.3));
        let column = |v: Vec<f32>| Array2::from_shape_vec((rows, 1), v).unwrap();
        let scale = 1024.0;
        let (want, dx) = Device::Cpu.kl_backward((&p, &w), (&q, &w), softcap, scale).unwrap();
        let back =
            || gpu.kl_backward((&p_there, &w_there), (&q_there, &w_there), softcap, scale).unwrap();
        let ((kl, dx_there), again) = (back(), back());
        let what = format!("kl_backward {rows}×{vocab}");
        assert_eq!(kl, again.0, "{what} changes");
        let there = gpu.upload_f32(column(kl)).unwrap();
        check(&what, &there, &column(want), SUMS);
        check(&format!("{what}, by hidden states"), &dx_there, dx.as_host(), SOME_ROUNDINGS);
        assert_eq!(dx_there.to_host().unwrap(), again.1.to_host().unwrap(), "{what} changes");
    }
}

#[test]
fn weights_under_trained_scales_are_the_files() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (bits, rows, cols, group) in
        [(4, 288, 576, 128), (3, 32, 64, 64), (2, 96, 1536, 32), (8, 64, 32, 5), (4, 64, 9216, 64)]
    {
        let coded = CodedWeight::random(&mut random, bits, (rows, cols), group);
        let groups = cols.div_ceil(group);
        let here = Device::Cpu.scaled_codes(coded.packed()).unwrap();
        let there = gpu.scaled_codes(coded.packed()).unwrap();
        assert_eq!((there.shape(), there.groups()), ((rows, cols), groups));
        let zeros = gpu.zeros(rows, groups).unwrap();
        assert_eq!(gpu.file_scales(&there, &zeros).unwrap(), coded.scales);
        let m = random.halves(rows, groups, 0.05);
        let (m_here, m_there) = (Tensor::from_host(m.clone()), gpu.upload_f32(m).unwrap());
        let want = Device::Cpu.file_scales(&here, &m_here).unwrap();
        let scales = gpu.file_scales(&there, &m_there).unwrap();
        for (a, b) in scales.iter().zip(&want) {
            // Exponentials may differ by a rounding, and so a scale by its last bit.
            assert!(a.to_bits().abs_diff(b.to_bits()) <= 1, "{a} for {b}");
        }
        let w = gpu.rescaled(&there, &m_there).unwrap();
        assert_eq!(w.to_host().unwrap(), round_to_half(&coded.values_of(&scales)));

        let tokens = 301;
        let (x, x_there) = both(&gpu, &random.halves(tokens, cols, 1.0));
        let (dy, dy_there) = both(&gpu, &random.halves(tokens, rows, 1.0));
        let w_here = Tensor::from_host(w.to_host().unwrap());
        let before = random.halves(rows, groups, 1.0);
        let mut want = Tensor::from_host(before.clone());
        Device::Cpu.scale_gradient(&dy, &x, &here, &w_here, &mut want).unwrap();
        let sum = || {
            let mut sum = gpu.upload_f32(before.clone()).unwrap();
            gpu.scale_gradient(&dy_there, &x_there, &there, &w, &mut sum).unwrap();
            sum
        };
        let (got, again) = (sum(), sum());
        let what = format!("scale_gradient {bits} bits, {rows}×{cols} by {group}");
        check(&what, &got, want.as_host(), SUMS);
        assert_eq!(got.to_host().unwrap(), again.to_host().unwrap(), "{what} changes");
    }
}

/// More rows than weight gradients are held of at a time, and more tokens than one product sums.
#[test]
fn scale_gradients_of_bands_and_chunks_add_up() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (rows, cols, tokens) = (1312, 32_768, 40);
    let coded = CodedWeight::random(&mut random, 4, (rows, cols), 4096);
    let there = gpu.scaled_codes(coded.packed()).unwrap();
    let zeros = gpu.zeros(rows, 8).unwrap();
    let w = gpu.rescaled(&there, &zeros).unwrap();
    let (x, dy) = (random.halves(tokens, cols, 1.0), random.halves(tokens, rows, 1.0));
    let here = Device::Cpu.scaled_codes(coded.packed()).unwrap();
    let mut want = Device::Cpu.zeros(rows, 8).unwrap();
    let w_here = Tensor::from_host(w.to_host().unwrap());
    let [x_here, dy_here] = [&x, &dy].map(|a| Tensor::from_host(a.clone()));
    Device::Cpu.scale_gradient(&dy_here, &x_here, &here, &w_here, &mut want).unwrap();
    let mut got = gpu.zeros(rows, 8).unwrap();
    let (x, dy) = (both(&gpu, &x).1, both(&gpu, &dy).1);
    gpu.scale_gradient(&dy, &x, &there, &w, &mut got).unwrap();
    check("scale_gradient of two bands", &got, want.as_host(), SUMS);

    let (rows, cols, tokens) = (32, 64, 20_000);
    let coded = CodedWeight::random(&mut random, 4, (rows, cols), 32);
    let there = gpu.scaled_codes(coded.packed()).unwrap();
    let w = gpu.rescaled(&there, &gpu.zeros(rows, 2).unwrap()).unwrap();
    let (x, dy) = (random.halves(tokens, cols, 1.0), random.halves(tokens, rows, 1.0));
    let (mut whole, mut parts) = (gpu.zeros(rows, 2).unwrap(), gpu.zeros(rows, 2).unwrap());
    gpu.scale_gradient(&both(&gpu, &dy).1, &both(&gpu, &x).1, &there, &w, &mut whole).unwrap();
    for part in [0..7001, 7001..tokens] {
        let part = |a: &Array2<f32>| both(&gpu, &a.slice(s![part.clone(), ..]).to_owned()).1;
        gpu.scale_gradient(&part(&dy), &part(&x), &there, &w, &mut parts).unwrap();
    }
    check("scale_gradient of two chunks", &whole, &parts.to_host().unwrap(), SUMS);
}

#[test]
fn steps_of_adam_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let (rows, cols) = (513, 37);
    let start = random.halves(rows, cols, 1.0);
    let state = |device: &Device| {
        let zeros = || device.zeros(rows, cols).unwrap();
        (zeros(), zeros(), device.upload_f32(start.clone()).unwrap())
    };
    let (mut here, mut there) = (state(&Device::Cpu), state(&gpu));
    for step in 1..=4 {
        let g = random.halves(rows, cols, 50.0);
        let adam = Adam {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            step,
            gradient_factor: 1.0 / 1024.0,
        };
        for (device, (m, v, x)) in [(&Device::Cpu, &mut here), (&gpu, &mut there)] {
            let g = device.upload_f32(g.clone()).unwrap();
            device.adam_step(&g, [m, v], x, &adam).unwrap();
        }
        check(&format!("adam_step {step}"), &there.2, here.2.as_host(), SUMS);
        check(&format!("adam_step {step}, squares"), &there.1, here.1.as_host(), SUMS);
    }
}
