//! The GPU operations that blocks of other families than Llama need, against the CPU, on fresh random inputs and
//! ragged sizes. Inputs are values that fp16 holds exactly, as in `gpu.rs`.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use gptq_compute::{
    Activation, AttentionRule, AttentionShape, CacheShape, Device, Error, RopeLayout, RopeTable,
    Span, StepModel, Tensor,
};
use gpus::gpu;
use ndarray::{Array2, s};
use support::{ONE_ROUNDING, Random, SOME_ROUNDINGS, SUMS, both, check};

/// Rules of every kind for heads of this size, each beside how it is called.
fn rules(head_dim: usize) -> [(&'static str, AttentionRule); 7] {
    let plain = AttentionRule::llama(head_dim);
    [
        ("plain", plain),
        ("scaled", AttentionRule { scale: 0.05, ..plain }),
        ("capped", AttentionRule { softcap: Some(3.0), ..plain }),
        ("itself", AttentionRule { window: Some(1), ..plain }),
        ("a few", AttentionRule { window: Some(7), ..plain }),
        ("many", AttentionRule { window: Some(100), softcap: Some(50.0), scale: 0.1 }),
        ("all", AttentionRule { window: Some(100_000), ..plain }),
    ]
}

#[test]
fn attention_by_rules_matches() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [2, 8, 16, 30, 64, 72, 80, 96, 112, 128, 130, 152, 192, 250, 256] {
        for seq_len in [1, 5, 64, 65, 129, 300] {
            let (heads, kv_heads, windows) = if seq_len % 2 == 0 { (4, 4, 1) } else { (6, 2, 2) };
            let shape = AttentionShape { heads, kv_heads, head_dim, seq_len };
            let (q, q_there) = both(&gpu, &random.halves(windows * seq_len, heads * head_dim, 3.0));
            let keys = |r: &mut Random| r.halves(windows * seq_len, kv_heads * head_dim, 2.0);
            let (k, k_there) = both(&gpu, &keys(&mut random));
            let (v, v_there) = both(&gpu, &keys(&mut random));
            for (name, rule) in rules(head_dim) {
                let there = || gpu.attention(&q_there, &k_there, &v_there, shape, &rule).unwrap();
                let want = Device::Cpu.attention(&q, &k, &v, shape, &rule).unwrap();
                let got = there();
                let what = format!("attention, {name}, {head_dim}×{heads}/{kv_heads}, {seq_len}");
                check(&what, &got, want.as_host(), SOME_ROUNDINGS);
                assert_eq!(got.to_host().unwrap(), there().to_host().unwrap(), "{what} changes");
            }
        }
    }
}

/// Windows that hide nothing change nothing, to the bit.
#[test]
fn a_window_over_everything_is_none() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for head_dim in [64, 112, 128, 256] {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim, seq_len: 150 };
        // Small enough that every key has a part, also the one that a window hides.
        let (_, q) = both(&gpu, &random.halves(300, 2 * head_dim, 0.1));
        let (_, k) = both(&gpu, &random.halves(300, head_dim, 2.0));
        let (_, v) = both(&gpu, &random.halves(300, head_dim, 2.0));
        let plain = AttentionRule::llama(head_dim);
        let with = |window| {
            let rule = AttentionRule { window, ..plain };
            gpu.attention(&q, &k, &v, shape, &rule).unwrap().to_host().unwrap()
        };
        assert_eq!(with(None), with(Some(150)), "{head_dim}");
        assert_ne!(with(None), with(Some(149)), "{head_dim}");
    }
}

#[test]
fn rules_over_a_cache_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (heads, kv_heads, head_dim) in
        [(4, 4, 18), (9, 3, 64), (6, 2, 112), (8, 1, 128), (4, 2, 256)]
    {
        for (name, rule) in rules(head_dim) {
            let shape = CacheShape { slots: 3, capacity: 700, heads, kv_heads, head_dim };
            let devices = [Device::Cpu, gpu.clone()];
            let mut caches = devices.each_ref().map(|device| device.kv_cache(shape).unwrap());
            let mut lengths = [0; 3];
            for lens in [[0, 130, 7], [300, 1, 200], [1, 64, 1], [65, 0, 3]] {
                let spans: Vec<_> = (0..3)
                    .filter(|&slot| lens[slot] > 0)
                    .map(|slot| Span { slot, start: lengths[slot], len: lens[slot] })
                    .collect();
                let rows: usize = lens.iter().sum();
                let mut operand =
                    |heads: usize| both(&gpu, &random.halves(rows, heads * head_dim, 2.0));
                let ((q, q_there), (k, k_there), (v, v_there)) =
                    (operand(heads), operand(kv_heads), operand(kv_heads));
                let [here, there] = &mut caches;
                let want = devices[0].cached_attention(&q, &k, &v, here, &spans, &rule).unwrap();
                let got = gpu.cached_attention(&q_there, &k_there, &v_there, there, &spans, &rule);
                let what = format!("cached, {name}, {head_dim}×{heads}/{kv_heads}, {lens:?}");
                check(&what, &got.unwrap(), want.as_host(), SOME_ROUNDINGS);
                for (length, len) in lengths.iter_mut().zip(lens) {
                    *length += len;
                }
            }
        }
    }
}

#[test]
fn rotations_of_every_layout_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for (head_dim, half, heads, seq_len, windows) in
            [(64, 32, 9, 37, 2), (128, 32, 8, 300, 1), (16, 3, 3, 1, 5), (80, 20, 2, 60, 3)]
        {
            let frequencies: Vec<f32> =
                (0..half).map(|i| 1e4_f32.powf(-(i as f32) / half as f32)).collect();
            let table = RopeTable::with(&frequencies, 512, head_dim, layout, 1.19);
            let (mut want, mut got) =
                both(&gpu, &random.halves(windows * seq_len, heads * head_dim, 2.0));
            let (mut want_spans, mut got_spans) = (want.clone(), got.clone());
            for (device, x) in [(&Device::Cpu, &mut want), (&gpu, &mut got)] {
                device.rope(x, &table, seq_len).unwrap();
            }
            let what = format!("rope {layout:?}, {half} of {head_dim}×{heads}, {seq_len}");
            check(&what, &got, want.as_host(), ONE_ROUNDING);
            let spans: Vec<_> =
                (0..windows).map(|slot| Span { slot, start: 7 * slot + 3, len: seq_len }).collect();
            for (device, x) in [(&Device::Cpu, &mut want_spans), (&gpu, &mut got_spans)] {
                device.rope_spans(x, &table, &spans).unwrap();
            }
            check(&format!("{what}, spans"), &got_spans, want_spans.as_host(), ONE_ROUNDING);
        }
    }
}

#[test]
fn layer_norms_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, runs, features) in
        [(1, 1, 8), (37, 1, 576), (5, 1, 8192), (3, 1, 1001), (130, 5, 128), (4, 3, 30)]
    {
        for gains in [1, runs] {
            let x = random.halves(rows, runs * features, 2.0) + 1.0;
            let x = support::round_to_half(&x);
            let gain = random.halves(1, gains * features, 1.0).into_raw_vec_and_offset().0;
            let here = Tensor::from_host(x.clone());
            let want = Device::Cpu.layer_norm(&here, &gain, features, 1e-5).unwrap();
            let hidden = gpu.upload_f32(x.clone()).unwrap();
            for (kind, input) in [("f32", hidden), ("f16", both(&gpu, &x).1)] {
                let got = gpu.layer_norm(&input, &gain, features, 1e-5).unwrap();
                let what = format!("layer_norm {kind} {rows}×{runs}×{features}, {gains} gains");
                check(&what, &got, want.as_host(), ONE_ROUNDING);
            }
        }
    }
    let (_, x) = both(&gpu, &random.halves(3, 24, 1.0));
    for (gain, features) in [(16, 8), (8, 7), (24, 0)] {
        let refused = gpu.layer_norm(&x, &vec![1.0; gain], features, 1e-6);
        assert!(matches!(refused, Err(Error::ShapeMismatch { .. })), "{gain}, {features}");
    }
}

#[test]
fn gelu_matches() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols, deviation) in [(1, 1, 4.0), (3, 7, 4.0), (37, 1536, 2.0), (1, 28_672, 30.0)] {
        let (gate, gate_there) = both(&gpu, &random.halves(rows, cols, deviation));
        let (up, up_there) = both(&gpu, &random.halves(rows, cols, 2.0));
        let want = Device::Cpu.gated(gate, &up, Activation::GeluTanh).unwrap();
        let got = gpu.gated(gate_there, &up_there, Activation::GeluTanh).unwrap();
        check(&format!("gelu {rows}×{cols}"), &got, want.as_host(), ONE_ROUNDING);
    }
}

/// `x` in both types that a GPU has.
fn both_types(gpu: &Device, x: &Array2<f32>) -> [(&'static str, Tensor); 2] {
    [("f32", gpu.upload_f32(x.clone()).unwrap()), ("f16", both(gpu, x).1)]
}

#[test]
fn columns_are_copied_and_joined() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols, ranges) in
        [(1, 9, [0..4, 4..9]), (129, 384, [0..128, 128..384]), (7, 90, [3..3, 1..89])]
    {
        let x = random.halves(rows, cols, 1.0);
        for (kind, there) in both_types(&gpu, &x) {
            for range in ranges.clone() {
                let got = gpu.columns(&there, range.clone()).unwrap().to_host().unwrap();
                assert_eq!(got, x.slice(s![.., range.clone()]), "{kind} {rows}×{cols} {range:?}");
            }
            let cut = ranges[0].end;
            let parts = [0..cut, cut..cut, cut..cols].map(|r| gpu.columns(&there, r).unwrap());
            let joined = gpu.joined(&parts.each_ref()).unwrap().to_host().unwrap();
            assert_eq!(joined, x, "{kind} {rows}×{cols} at {cut}");
        }
    }
}

#[test]
fn scaled_sums_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 7), (37, 576), (129, 1001)] {
        let (x, residual) = (random.halves(rows, cols, 2.0), random.halves(rows, cols, 30.0));
        let named: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).rev().collect();
        let weights = random.halves(1, named.len(), 0.5).into_raw_vec_and_offset().0;
        let part = x.slice(s![..named.len(), ..]).to_owned();
        let here = |values: &Array2<f32>| Tensor::from_host(values.clone());
        let (mut added, mut mixed) = (here(&residual), here(&residual));
        Device::Cpu.add_scaled(&mut added, &here(&x), 0.22).unwrap();
        Device::Cpu.add_rows(&mut mixed, &named, &weights, &here(&part)).unwrap();
        for ((kind, x_there), (_, part_there)) in
            both_types(&gpu, &x).into_iter().zip(both_types(&gpu, &part))
        {
            let before = gpu.upload_f32(residual.clone()).unwrap();
            let (mut got, mut got_mixed) = (before.clone(), before.clone());
            gpu.add_scaled(&mut got, &x_there, 0.22).unwrap();
            check(&format!("add_scaled {kind} {rows}×{cols}"), &got, added.as_host(), SUMS);
            gpu.add_rows(&mut got_mixed, &named, &weights, &part_there).unwrap();
            check(&format!("add_rows {kind} {rows}×{cols}"), &got_mixed, mixed.as_host(), SUMS);
            assert_eq!(before.to_host().unwrap(), residual, "a clone was written");

            let mut scaled = x_there.clone();
            gpu.scale(&mut scaled, 0.37).unwrap();
            let tolerance = if kind == "f32" { SUMS } else { ONE_ROUNDING };
            check(&format!("scale {kind} {rows}×{cols}"), &scaled, &(&x * 0.37), tolerance);
            assert_eq!(x_there.to_host().unwrap(), x, "a clone was written");
        }
    }
    let [(_, x), (_, mut half)] = both_types(&gpu, &random.halves(2, 3, 1.0));
    assert!(matches!(gpu.add_scaled(&mut half, &x, 1.0), Err(Error::WrongType { .. })));
}

#[test]
fn capped_logits_and_their_losses_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let cap = 10.0;
    // The last one needs two chunks of logits.
    for (rows, hidden, vocab) in [(1, 64, 7), (37, 576, 1001), (1500, 64, 49_152)] {
        let (h, h_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (g, g_there) = both(&gpu, &random.halves(rows, hidden, 1.0));
        let (w, w_there) = both(&gpu, &random.halves(vocab, hidden, 0.8));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
        let column = |v: Vec<f32>| Array2::from_shape_vec((rows, 1), v).unwrap();
        let there = |v: Vec<f32>| gpu.upload_f32(column(v)).unwrap();
        let want = Device::Cpu.token_nll(&h, &w, &targets, Some(cap)).unwrap();
        let got = gpu.token_nll(&h_there, &w_there, &targets, Some(cap)).unwrap();
        check(&format!("capped nll {rows}×{vocab}"), &there(got), &column(want), SUMS);
        let want = Device::Cpu.token_kl((&h, &w), (&g, &w), Some(cap)).unwrap();
        let got = gpu.token_kl((&h_there, &w_there), (&g_there, &w_there), Some(cap)).unwrap();
        check(&format!("capped kl {rows}×{vocab}"), &there(got), &column(want), SUMS);
    }
    let logits = random.halves(30, 1001, 20.0);
    let mut want = Tensor::from_host(logits.clone());
    let mut got = gpu.upload_f32(logits).unwrap();
    for (device, x) in [(&Device::Cpu, &mut want), (&gpu, &mut got)] {
        device.softcap(x, cap).unwrap();
    }
    check("softcap", &got, want.as_host(), SUMS);
}

#[test]
fn what_no_kernel_has_is_said() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [1, 25, 258] {
        let refused = gpu.check_heads(4, 2, head_dim);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{head_dim}");
    }
    assert!(gpu.check_heads(4, 2, 256).is_ok());
    assert!(matches!(gpu.check_heads(4, 3, 64), Err(Error::Unsupported { .. })));
    // Steps go block by block where heads or rotations are not Llama's.
    let norm = [1.0; 8];
    for (head_dim, half, layout) in [
        (256, 128, RopeLayout::Half),
        (64, 16, RopeLayout::Half),
        (64, 32, RopeLayout::Interleaved),
    ] {
        let rope = RopeTable::with(&vec![0.5; half], 16, head_dim, layout, 1.0);
        let norm = Some(&norm[..]);
        let model = StepModel { blocks: Vec::new(), width: 8, norm, eps: 1e-5, rope: &rope };
        let shape = CacheShape { slots: 1, capacity: 16, heads: 2, kv_heads: 1, head_dim };
        assert!(gpu.steps(&model, shape).unwrap().is_none(), "{head_dim} {half} {layout:?}");
    }
}
