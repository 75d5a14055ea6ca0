//! The GPU solver against f64: factors, scales, codes, packing, and reading packed weights.
//!
//! A code that lies near a rounding tie may fall either way, and a different code changes every
//! later one of its row; so codes are not compared with another solver's one by one. Instead the
//! device's own codes are replayed in f64: at each column the weight, corrected for the device's
//! earlier choices, must round to the device's code, and each scale must follow from the weights at
//! the time. The host's solver must reach the same loss. Errors print as fractions of a tolerance.
//! `GPTQ_GPU_TIMING=1` adds the sizes of a 70B model, with the times that were predicted; ask for
//! `--release`, `--nocapture` and one test thread.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test that reports its errors")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use std::sync::Arc;
use std::time::Duration;

use gptq_checkpoint::{Bits, GptqLinear};
use gptq_compute::cuda::{self, ClipSearch, Cuda, PackedLinear, SolveOptions, Solved, Timer};
use gptq_compute::{Device, Error, FloatType, HessianPrep, HostMatrix, Precision, Tensor, linalg};
use gptq_quant::{QuantSpec, Recipe, Signs, rounded_weight};
use half::f16;
use ndarray::{Array2, s};
use rayon::prelude::*;

use gpus::gpu;
use needs::Need;
use support::{Case, Plan, Replay, gram, noise, weights, weights_at_the_ends_of_fp16, within};

/// The first GPU, where there is one.
fn card() -> Option<(Device, Arc<Cuda>)> {
    let device = gpu()?;
    let Device::Cuda(cuda) = &device else { return None };
    let cuda = Arc::clone(cuda);
    Some((device, cuda))
}

/// A Gram whose lower triangle is poisoned: nothing may read it.
fn upload_gram(device: &Device, gram: &Array2<f32>) -> Tensor {
    let poisoned =
        Array2::from_shape_fn(gram.dim(), |(i, j)| if i <= j { gram[[i, j]] } else { f32::NAN });
    device.upload_f32(poisoned).unwrap()
}

fn relative(found: &Array2<f32>, exact: &Array2<f32>) -> f64 {
    let norm = |a: Array2<f64>| a.iter().map(|v| v * v).sum::<f64>().sqrt();
    let exact = exact.mapv(f64::from);
    norm(found.mapv(f64::from) - &exact) / norm(exact)
}

#[test]
fn factors_match_f64() {
    let Some((device, _)) = card() else { return };
    for (n, act_order) in [
        (1, false),
        (31, true),
        (32, false),
        (33, true),
        (64, true),
        (160, true),
        (1000, true),
        (1088, false),
        (2500, true),
    ] {
        let gram = gram(n);
        let plan = Plan::new(&gram, act_order);
        let exact = linalg::inverse_upper_factor(&plan.hessian(&gram)).unwrap();
        let (upper, precision) =
            cuda::upper_factor(&upload_gram(&device, &gram), &plan.prep()).unwrap();
        let upper = upper.to_host().unwrap();
        assert_eq!(precision, Precision::Usual);
        within(&format!("factor n={n}"), relative(&upper, &exact), 1e-4);
        assert!(
            upper.indexed_iter().all(|((i, j), &v)| i <= j || v == 0.0),
            "n={n}: below diagonal"
        );
    }
}

#[test]
fn a_factor_that_f32_cannot_make_is_made_in_f64() {
    let Some((device, _)) = card() else { return };
    // 256 pairs [p q; q r] with r the first f32 above q² / p: f32 rounds about half of their second
    // pivots to zero or below, f64 none.
    let n = 512;
    let mut gram = Array2::<f32>::zeros((n, n));
    for i in (0..n).step_by(2) {
        let (p, q) = (2.0 + noise(9, i), 1.5 + 0.5 * noise(9, i + 1));
        let least = f64::from(q) * f64::from(q) / f64::from(p) * (1.0 + 2e-9);
        let near = least as f32;
        let r = if f64::from(near) < least { near.next_up() } else { near };
        gram[[i, i]] = p;
        gram[[i, i + 1]] = q;
        gram[[i + 1, i]] = q;
        gram[[i + 1, i + 1]] = r;
    }
    let order: Vec<u32> = (0..n as u32).collect();
    let dead = vec![false; n];
    let prep = HessianPrep { scale: 1.0, order: &order, dead: &dead, damp: 0.0 };
    let exact = linalg::inverse_upper_factor(&gram).unwrap();
    let (upper, precision) = cuda::upper_factor(&upload_gram(&device, &gram), &prep).unwrap();
    assert_eq!(precision, Precision::RetriedInF64);
    within("factor in f64", relative(&upper.to_host().unwrap(), &exact), 1e-6);

    let mut indefinite = Array2::from_diag_elem(n, 2.0_f32);
    indefinite[[70, 70]] = -1.0;
    match cuda::upper_factor(&upload_gram(&device, &indefinite), &prep) {
        Err(Error::NotPositiveDefinite { n: 512, pivot, value }) => {
            println!("indefinite: pivot {pivot}, value {value}");
            assert_eq!(pivot, 70);
        }
        other => panic!("an indefinite matrix gave {:?}", other.map(|f| f.1)),
    }
}

/// Solves on the device, replays every row, and checks the weights and the packed words.
fn check_case(name: &str, device: &Device, case: &Case<'_>) -> f64 {
    let (rows, n) = case.w.dim();
    let weight = device.upload(gptq_compute::HostMatrix::new(
        half_bytes(case.w).as_slice(),
        gptq_compute::FloatType::F16,
        rows,
        n,
    ));
    let upper = device.upload_f32(case.upper.clone()).unwrap();
    let options = case.options;
    let plan = case.plan;
    let solved = cuda::solve(&weight.unwrap(), &upper, &plan.order, &plan.dead, &options).unwrap();
    let codes = solved.codes().unwrap();
    let groups = n.div_ceil(case.group());
    let mut replay = Replay::default();
    for row in 0..rows {
        let code: Vec<u8> = plan.order.iter().map(|&c| codes[row * n + c as usize]).collect();
        let scale: Vec<f32> = (0..groups).map(|g| solved.scales[g * rows + row]).collect();
        case.replay(row, &code, &scale, &mut replay);
    }
    within(&format!("{name}: codes, steps beyond half"), replay.code, 2e-3);
    within(&format!("{name}: scales"), replay.scale, 1e-4);
    within(&format!("{name}: loss"), (solved.loss / replay.loss - 1.0).abs(), 1e-4);
    check_outputs(case, &solved, &codes);
    solved.loss
}

fn half_bytes(w: &Array2<f32>) -> Vec<u8> {
    w.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
}

/// The fp16 weights follow from codes and scales, and the packed words from the codes.
fn check_outputs(case: &Case<'_>, solved: &Solved, codes: &[u8]) {
    let (rows, n) = case.w.dim();
    let bits = usize::from(case.options.bits);
    let zero = (1_u32 << (bits - 1)) as f32;
    let weight = solved.weight.to_host().unwrap();
    for (place, &c) in case.plan.order.iter().enumerate() {
        for row in 0..rows {
            let scale = solved.scales[place / case.group() * rows + row];
            let want = f16::from_f32(scale * (f32::from(codes[row * n + c as usize]) - zero));
            assert_eq!(weight[[row, c as usize]], want.to_f32(), "weight {row},{c}");
        }
    }
    if n.is_multiple_of(32) {
        assert_eq!(solved.pack().unwrap(), packed(codes, rows, n, bits), "packed words");
    } else {
        assert!(matches!(solved.pack(), Err(Error::Unsupported { .. })));
    }
}

/// The bit streams of codes `[rows, n]` down the columns of `[n / 32 · bits, rows]`.
fn packed(codes: &[u8], rows: usize, n: usize, bits: usize) -> Vec<u32> {
    let mut words = vec![0_u32; n / 32 * bits * rows];
    for (i, &code) in codes.iter().enumerate() {
        let (row, column) = (i / n, i % n);
        for b in 0..bits {
            let bit = column * bits + b;
            words[bit / 32 * rows + row] |= u32::from(code >> b & 1) << (bit % 32);
        }
    }
    words
}

fn options(bits: u8, group_size: Option<usize>) -> SolveOptions<'static> {
    SolveOptions { bits, group_size, fresh: false, half_scales: false, search: None }
}

#[test]
fn autogptq_solves_like_the_host() {
    let Some((device, _)) = card() else { return };
    // Ragged rows, ragged blocks, more than one window, groups below, at, beside and above a block.
    for (rows, n, bits, group, act_order) in [
        (70, 160, 4, Some(128), true),
        (64, 384, 3, None, true),
        (70, 384, 4, None, false),
        (37, 1056, 4, Some(32), true),
        (5, 1056, 2, Some(96), false),
        (65, 1344, 3, Some(128), true),
        (16, 1344, 8, Some(200), true),
        (9, 2200, 4, Some(1500), true),
        (4, 100, 4, Some(7), true),
    ] {
        let (w, gram) = (weights(rows, n), gram(n));
        let plan = Plan::new(&gram, act_order);
        let upper = linalg::inverse_upper_factor(&plan.hessian(&gram)).unwrap();
        let options = options(bits, group);
        let half_values = options.half_scales;
        let case = Case { w: &w, upper: &upper, plan: &plan, options, half_values };
        let name = format!("{rows}x{n} {bits} bit group {group:?} act-order {act_order}");
        let loss = check_case(&name, &device, &case);

        let spec = QuantSpec::new(bits, group, act_order, 0.01, Recipe::AutoGptq);
        let factored = plan.factored(&upper, Precision::Usual);
        let host = gptq_quant::solve(&Tensor::from_host(w.clone()), &factored, &spec).unwrap();
        within(&format!("{name}: loss, host's"), (loss / host.loss.unwrap() - 1.0).abs(), 5e-3);
    }
}

#[test]
fn the_other_choices_are_solved() {
    let Some((device, _)) = card() else { return };
    let (rows, n) = (41, 1200);
    let (w, gram) = (weights(rows, n), gram(n));
    let plan = Plan::new(&gram, true);
    let upper = linalg::inverse_upper_factor(&plan.hessian(&gram)).unwrap();
    let ratios = support::ratios(Signs::Positive);
    let search = ClipSearch { ratios: &ratios, importance: &plan.importance, by_solving: false };
    let tried = ClipSearch { by_solving: true, ..search };
    let both = support::ratios(Signs::Both);
    let signed_search = Some(ClipSearch { ratios: &both, ..search });
    let signed_tried = Some(ClipSearch { ratios: &both, ..tried });
    let (search, tried) = (Some(search), Some(tried));
    for (name, group, search) in [
        ("fresh", Some(32), None),
        ("fresh, searched", Some(128), search),
        ("fresh, searched, odd groups", Some(100), search),
        ("fresh, searched, one group", None, search),
        ("fresh, searched, more than a block", Some(192), search),
        ("fresh, tried", Some(128), tried),
        ("fresh, tried, small groups", Some(32), tried),
        ("fresh, tried, odd groups", Some(100), tried),
        ("fresh, tried, more than a block", Some(192), tried),
        ("fresh, tried, one group", None, tried),
        ("fresh, both signs searched", Some(192), signed_search),
        ("fresh, both signs, one group", None, signed_search),
        ("fresh, both signs tried", Some(128), signed_tried),
        ("fresh, both signs tried, odd groups", Some(100), signed_tried),
        ("fresh, both signs tried, more than a block", Some(200), signed_tried),
        ("fresh, both signs tried, one group", None, signed_tried),
    ] {
        let options = SolveOptions { fresh: true, half_scales: true, search, ..options(4, group) };
        let half_values = options.half_scales;
        let case = Case { w: &w, upper: &upper, plan: &plan, options, half_values };
        check_case(name, &device, &case);
    }
}

/// The rule of both ends of fp16 is the host's: finite scales, none 0, the same ones where no column
/// pays for another, and weights that fp16 holds.
#[test]
fn scales_fit_both_ends_of_fp16() {
    let Some((device, _)) = card() else { return };
    let n = 128;
    let w = weights_at_the_ends_of_fp16(n);
    let plan = Plan::new(&Array2::from_diag_elem(n, 3.0_f32), false);
    let upper = Array2::from_diag_elem(n, 0.5_f32);
    let ratios = support::ratios(Signs::Positive);
    let search = ClipSearch { ratios: &ratios, importance: &plan.importance, by_solving: false };
    let tried = ClipSearch { by_solving: true, ..search };
    let both = support::ratios(Signs::Both);
    let signed = ClipSearch { ratios: &both, ..tried };
    for (bits, group) in [(2, Some(32)), (3, None), (4, Some(16)), (4, Some(48)), (8, Some(128))] {
        for (half_scales, search) in [None, Some(search), Some(tried), Some(signed)]
            .map(|search| (true, search))
            .into_iter()
            .chain([(false, None)])
        {
            let options = SolveOptions { fresh: true, half_scales, search, ..options(bits, group) };
            let title = format!("{bits} bits, group {group:?}, {search:?}");
            let weight = device.upload_f32(w.clone()).unwrap();
            let on_card = device.upload_f32(upper.clone()).unwrap();
            let solved = cuda::solve(&weight, &on_card, &plan.order, &plan.dead, &options).unwrap();
            assert!(solved.loss.is_finite(), "{title}");
            let (least, most) = (2.0_f32.powi(-24), 65504.0 / (1_u32 << (bits - 1)) as f32);
            for &scale in &solved.scales {
                let stored = f16::from_f32(scale).to_f32();
                let magnitude = if search.is_some() { stored.abs() } else { stored };
                assert!((least..=most).contains(&magnitude), "{title}: {scale}");
            }
            let given = solved.weight.to_host().unwrap();
            assert!(given.iter().all(|v| v.is_finite()), "{title}");
            for (&given, &wanted) in given.rows().into_iter().take(2).flatten().zip(w.iter()) {
                // f32 scales are rounded in the file alone, so that their values lie between.
                let near = if half_scales { least / 2.0 } else { least };
                assert!((given - wanted).abs() <= near, "{title}: {given} for {wanted}");
            }
            let mut spec = QuantSpec::new(bits, group, false, 0.01, Recipe::Best);
            spec.choices.scales = match half_scales {
                true => gptq_quant::ScalePrecision::Half,
                false => gptq_quant::ScalePrecision::F32,
            };
            spec.choices.clip = match search {
                None => gptq_quant::Clip::None,
                Some(search) if search.by_solving => gptq_quant::Clip::Solve,
                Some(_) => gptq_quant::Clip::Search,
            };
            let factored = plan.factored(&upper, Precision::Usual);
            let host = gptq_quant::solve(&Tensor::from_host(w.clone()), &factored, &spec).unwrap();
            let card: Vec<f16> = solved.scales.iter().map(|&s| f16::from_f32(s)).collect();
            if search.is_none() {
                assert_eq!(card, host.stored.scales, "{title}");
            }
        }
    }
    // What fp16 cannot hold is left for the host to refuse.
    let beyond = device.upload_f32(Array2::from_elem((1, n), -2e6_f32)).unwrap();
    let on_card = device.upload_f32(upper).unwrap();
    let solved =
        cuda::solve(&beyond, &on_card, &plan.order, &plan.dead, &options(4, None)).unwrap();
    assert!(solved.scales.iter().all(|&s| s > 65504.0), "{:?}", solved.scales);
}

/// The host's weights, to the bit: ragged groups, rows of zeros, of one sign, and at fp16's ends.
#[test]
fn weights_are_rounded_as_the_host_rounds_them() {
    let Some((device, _)) = card() else { return };
    for (rows, cols, group) in
        [(1, 1, None), (7, 33, Some(32)), (61, 500, Some(128)), (130, 4097, None), (8, 64, Some(7))]
    {
        let value = |(i, j)| noise(rows * cols, i * cols + j);
        let mut values = Array2::from_shape_fn((rows, cols), value);
        let ends = [0.0, 6e-8, 65504.0, 1e-6];
        for (row, end) in (0..rows).zip(ends.iter().cycle()) {
            match row % 7 {
                // Of one sign; and larger or smaller than any other.
                1 => values.row_mut(row).mapv_inplace(f32::abs),
                3 => values.row_mut(row).mapv_inplace(|v| v * end),
                5 => values.row_mut(row).mapv_inplace(|v| -v.abs()),
                _ => {}
            }
        }
        let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
        let bytes = bytemuck::cast_slice(&halves);
        let matrix = HostMatrix::new(bytes, FloatType::F16, rows, cols);
        let (host, there) = (Device::Cpu.upload(matrix).unwrap(), device.upload(matrix).unwrap());
        for bits in [2, 3, 4, 8] {
            let spec = QuantSpec::new(bits, group, false, 0.01, Recipe::Rtn);
            let want = rounded_weight(&Device::Cpu, &host, &spec).unwrap().to_host().unwrap();
            let want = want.mapv(|v| f16::from_f32(v).to_f32());
            let found = rounded_weight(&device, &there, &spec).unwrap().to_host().unwrap();
            let differs = found.iter().zip(&want).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{rows}×{cols}, {group:?}, {bits} bits");
        }
    }
}

#[test]
fn solves_are_deterministic_and_refuse_what_does_not_fit() {
    let Some((device, _)) = card() else { return };
    let (rows, n) = (130, 1184);
    let (w, gram) = (weights(rows, n), gram(n));
    let plan = Plan::new(&gram, true);
    let upper = cuda::upper_factor(&upload_gram(&device, &gram), &plan.prep()).unwrap().0;
    let weight = device.upload_f32(w.clone()).unwrap();
    let solve =
        |options: &SolveOptions<'_>| cuda::solve(&weight, &upper, &plan.order, &plan.dead, options);
    let (a, b) = (solve(&options(4, Some(64))).unwrap(), solve(&options(4, Some(64))).unwrap());
    assert_eq!(a.codes().unwrap(), b.codes().unwrap());
    assert_eq!((a.loss.to_bits(), &a.scales), (b.loss.to_bits(), &b.scales));
    assert!(solve(&options(5, None)).is_err());
    assert!(solve(&options(4, Some(0))).is_err());
    let twice = vec![0_u32; n];
    assert!(cuda::solve(&weight, &upper, &twice, &plan.dead, &options(4, None)).is_err());
    let mut poisoned = w;
    poisoned[[7, 7]] = f32::NAN;
    let poisoned = device.upload_f32(poisoned).unwrap();
    let solved =
        cuda::solve(&poisoned, &upper, &plan.order, &plan.dead, &options(4, None)).unwrap();
    assert!(!solved.loss.is_finite());
}

/// A slice of rows gives what the whole gives for them. Products of another height may sum in another
/// order, so a code on a rounding tie may fall otherwise and take later ones of its row with it; the
/// loss hardly notices.
#[test]
fn rows_are_solved_independently() {
    let Some((device, _)) = card() else { return };
    let (rows, n, slice) = (130, 1184, 64..100);
    let (w, gram) = (weights(rows, n), gram(n));
    let plan = Plan::new(&gram, true);
    let upper = linalg::inverse_upper_factor(&plan.hessian(&gram)).unwrap();
    let on_card = device.upload_f32(upper.clone()).unwrap();
    let options = options(4, Some(64));
    let solved = |w: Array2<f32>| {
        let w = device.upload_f32(w).unwrap();
        cuda::solve(&w, &on_card, &plan.order, &plan.dead, &options).unwrap()
    };
    let (whole, part) = (solved(w.clone()), solved(w.slice(s![slice.clone(), ..]).to_owned()));
    let codes = whole.codes().unwrap();

    let case = Case { w: &w, upper: &upper, plan: &plan, options, half_values: false };
    let mut replay = Replay::default();
    for row in slice.clone() {
        let code: Vec<u8> = plan.order.iter().map(|&c| codes[row * n + c as usize]).collect();
        let scales = whole.scales.chunks_exact(rows);
        let scale: Vec<f32> = scales.map(|group| group[row]).collect();
        case.replay(row, &code, &scale, &mut replay);
    }
    within("loss of a slice of rows", (part.loss / replay.loss - 1.0).abs(), 5e-3);
    let (part, whole) = (part.codes().unwrap(), &codes[slice.start * n..slice.end * n]);
    assert_eq!(part.len(), whole.len());
    let differing = part.iter().zip(whole).filter(|(a, b)| a != b).count();
    within("codes that depend on other rows", differing as f64 / part.len() as f64, 1e-3);
}

#[test]
fn packed_weights_mean_what_the_format_says() {
    let Some((_, cuda)) = card() else { return };
    let (rows, cols, groups) = (96, 544, 5);
    let words = |seed: usize, count: usize| -> Vec<u32> {
        (0..count)
            .map(|i| (noise(seed, i).to_bits() << 9) ^ (noise(seed + 1, i).to_bits() >> 3))
            .collect()
    };
    for bits in Bits::ALL {
        let mut linear = GptqLinear {
            bits,
            in_features: cols,
            out_features: rows,
            groups,
            qweight: words(20, bits.words(cols) * rows),
            qzeros: words(30, groups * bits.words(rows)),
            scales: (0..groups * rows).map(|i| f16::from_f32(noise(40, i) * 0.02)).collect(),
            g_idx: (0..cols).map(|k| (k * 7 % groups) as u32).collect(),
        };
        // Stored zeros of all ones, which mean 0, among ordinary ones: 32 outputs of every group.
        for zeros in linear.qzeros.chunks_exact_mut(bits.words(rows)) {
            zeros[..bits.words(32)].fill(u32::MAX);
        }
        let packed = PackedLinear {
            bits: bits.get(),
            rows,
            cols,
            qweight: &linear.qweight,
            qzeros: &linear.qzeros,
            scales: &linear.scales,
            g_idx: bytemuck::cast_slice(&linear.g_idx),
        };
        let found = cuda::dequantize(&cuda, &packed).unwrap().to_host().unwrap();
        for (((r, k), &found), value) in found.indexed_iter().zip(linear.dequantize()) {
            let want = f16::from_f32(value).to_f32();
            assert_eq!(found, want, "{bits} bits, output {r}, input {k}");
        }
        let beyond = vec![groups as i32; cols];
        let packed = PackedLinear { g_idx: &beyond, ..packed };
        assert!(matches!(cuda::dequantize(&cuda, &packed), Err(Error::RowOutOfRange { .. })));
    }
}

/// The median of three timed runs after a warm-up.
fn median(cuda: &Arc<Cuda>, mut run: impl FnMut()) -> Duration {
    run();
    let mut times: Vec<Duration> = (0..3)
        .map(|_| {
            let timer = Timer::start(cuda).unwrap();
            run();
            timer.stop().unwrap()
        })
        .collect();
    times.sort();
    times[1]
}

fn report(what: &str, took: Duration, operations: f64, predicted_ms: f64) {
    let ms = took.as_secs_f64() * 1e3;
    println!(
        "{what}: {ms:.2} ms (predicted {predicted_ms:.1}), {:.1} TFLOP/s",
        operations / took.as_secs_f64() / 1e12
    );
}

#[test]
fn times_of_a_70b_model() {
    if std::env::var_os("GPTQ_GPU_TIMING").is_none() {
        Need::Timing.is_missing("GPTQ_GPU_TIMING is not set");
        return;
    }
    let Some((device, cuda)) = card() else { return };
    // Predicted for one H100: f32 products at 50 TFLOP/s, memory at 3 TB/s.
    for (n, predicted) in [(8192, 14.0), (28672, 380.0)] {
        let upper = time_factor(&device, &cuda, n, predicted);
        let shapes: &[(usize, f64, f64)] = match n {
            8192 => &[(8192, 14.0, 17.0), (28672, 43.0, 55.0)],
            _ => &[(8192, 142.0, 155.0)],
        };
        for &(rows, plain, searched) in shapes {
            time_solve(&device, &cuda, &upper, (rows, n), (plain, searched));
        }
    }
}

fn random_halves(device: &Device, seed: usize, rows: usize, n: usize) -> Tensor {
    let mut bytes = vec![0_u8; 2 * rows * n];
    bytes.par_chunks_mut(2 * n).enumerate().for_each(|(row, bytes)| {
        for (j, half) in bytes.chunks_exact_mut(2).enumerate() {
            half.copy_from_slice(&f16::from_f32(noise(seed, row * n + j)).to_le_bytes());
        }
    });
    let matrix = gptq_compute::HostMatrix::new(&bytes, gptq_compute::FloatType::F16, rows, n);
    device.upload(matrix).unwrap()
}

fn time_factor(device: &Device, cuda: &Arc<Cuda>, n: usize, predicted: f64) -> Tensor {
    let tokens = 4096;
    let mut gram = device.gram(n).unwrap();
    device.gram_add(&mut gram, &random_halves(device, 60, tokens, n)).unwrap();
    let order: Vec<u32> = scattered(n);
    let dead = vec![false; n];
    let scale = 2.0 / tokens as f32;
    let prep = HessianPrep { scale, order: &order, dead: &dead, damp: 0.01 };
    cuda.reset_peak();
    let held = cuda.memory().unwrap().held;
    let mut upper = gram.upper_factor(&prep).unwrap();
    let took = median(cuda, || upper = gram.upper_factor(&prep).unwrap());
    report(&format!("factor {n}"), took, 2.0 * (n as f64).powi(3) / 3.0, predicted);
    let peak = cuda.memory().unwrap().peak - held;
    println!("factor {n}: {:.2} GiB beside the Gram", peak as f64 / (1_u64 << 30) as f64);
    upper.0
}

/// A permutation that scatters neighbors: n has no factor in common with the step.
fn scattered(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 4099 % n) as u32).collect()
}

fn time_solve(
    device: &Device,
    cuda: &Arc<Cuda>,
    upper: &Tensor,
    (rows, n): (usize, usize),
    (plain, searched): (f64, f64),
) {
    let weight = random_halves(device, 70, rows, n);
    let (order, dead) = (scattered(n), vec![false; n]);
    let ratios = support::ratios(Signs::Positive);
    let importance = vec![1.0; n];
    let search = ClipSearch { ratios: &ratios, importance: &importance, by_solving: false };
    let tried = ClipSearch { by_solving: true, ..search };
    let operations = rows as f64 * (n as f64).powi(2);
    let mut solved = None;
    // A trial: 48 times the solver's kernel, 30 µs for 28672 rows and 128 columns.
    let trial = plain + 48.0 * 0.03 * (rows * n) as f64 / (28672.0 * 128.0);
    for (what, search, predicted) in [
        ("solve", None, plain),
        ("solve, searched", Some(search), searched),
        ("solve, tried", Some(tried), trial),
    ] {
        let options = SolveOptions { search, fresh: true, ..options(4, Some(128)) };
        let took = median(cuda, || {
            solved = Some(cuda::solve(&weight, upper, &order, &dead, &options).unwrap());
        });
        report(&format!("{what} {rows}x{n} group 128"), took, operations, predicted);
    }
    let solved = solved.unwrap();
    assert!(solved.loss.is_finite());
    let took = median(cuda, || {
        solved.pack().unwrap();
    });
    report(&format!("pack {rows}x{n} to the host"), took, 0.0, (rows * n / 2) as f64 / 25e6);
}
