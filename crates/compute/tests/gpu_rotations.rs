//! What a learned rotation takes of a GPU, against f64: mean fourth powers and their gradient, steps that stay
//! orthogonal, turned weights.
//!
//! Weights are values that fp16 holds exactly. Each check prints its error. Without a GPU the tests say why they are
//! skipped.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use std::time::Instant;

use gptq_compute::{Device, Tensor, Turned};
use gpus::gpu;
use ndarray::{Array2, ArrayView2, Axis, concatenate};
use support::{ONE_ROUNDING, Random, both, check};

/// A random orthogonal matrix: steps of the host, from the identity.
fn orthogonal(random: &mut Random, order: usize) -> Array2<f64> {
    let mut r = Array2::eye(order);
    for _ in 0..4 {
        let noise = random.halves(order, order, 0.5 / (order as f32).sqrt()).mapv(f64::from);
        // Its singular values end at about 0.7.
        let skew = (&noise - &noise.t()) / 2.0;
        r = Device::Cpu.orthogonal_step(&r, &skew, 0.8, 0.5).unwrap();
    }
    r
}

/// By its definition, in f64: the mean, and the gradient over the number of vectors.
fn defined(rotation: &Array2<f64>, vectors: ArrayView2<'_, f32>) -> (f64, Array2<f64>) {
    let order = rotation.nrows() as f64;
    let mut turned = vectors.mapv(f64::from).dot(rotation);
    for mut row in turned.outer_iter_mut() {
        let norm = row.dot(&row).sqrt();
        row.mapv_inplace(|v| if norm == 0.0 { 0.0 } else { v * order.sqrt() / norm });
    }
    let count = vectors.nrows() as f64;
    let mean = turned.mapv(|v| v.powi(4)).sum() / order / count;
    (mean, turned.t().dot(&turned.mapv(|v| v.powi(3))) / count)
}

/// The root of the summed squared error over that of what is wanted.
fn relative(got: &Array2<f64>, want: &Array2<f64>) -> f64 {
    let square = |a: &Array2<f64>| a.iter().map(|v| v * v).sum::<f64>();
    (square(&(got - want)) / square(want)).sqrt()
}

#[test]
fn fourth_powers_and_their_gradient_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (order, reading, writing) in
        [(7, 3, 5), (8, 1, 1), (64, 300, 0), (576, 1000, 777), (1001, 130, 64), (1536, 40, 9)]
    {
        let r = orthogonal(&mut random, order);
        let gain: Vec<f32> = random.halves(1, order, 0.02).iter().map(|v| v + 0.01).collect();
        let mut rows = random.halves(reading, order, 0.05);
        if reading > 2 {
            rows.row_mut(2).fill(0.0);
        }
        let columns = random.halves(order, writing, 1.0);
        let mut sums = gpu.fourth_powers(&r.mapv(|v| v as f32)).unwrap();
        let mut all = vec![&rows * &ndarray::arr1(&gain), rows.clone()];
        let rows = both(&gpu, &rows).1;
        sums.add(&rows, Turned::Rows(Some(&gain))).unwrap();
        sums.add(&rows, Turned::Rows(None)).unwrap();
        if writing > 0 {
            sums.add(&both(&gpu, &columns).1, Turned::Columns).unwrap();
            all.push(columns.reversed_axes());
        }
        let views: Vec<_> = all.iter().map(|part| part.view()).collect();
        let (mean, gradient) = defined(&r, concatenate(Axis(0), &views).unwrap().view());
        let off = (sums.mean() / mean - 1.0).abs();
        let got = sums.gradient().unwrap();
        let (whole, skew) =
            (relative(&got, &gradient), relative(&(&got - &got.t()), &(&gradient - &gradient.t())));
        println!(
            "order {order}: mean {mean:.4}, off by {off:.1e}; gradient {whole:.1e}, its skew part {skew:.1e}"
        );
        assert!(off < 1e-3 && whole < 3e-3 && skew < 1e-2, "{order}: {off} {whole} {skew}");
        if order == 576 {
            assert!(off < 3e-5, "{off}");
        }
    }
}

/// All of a vector in one value, whose cube is the largest that there is.
#[test]
fn the_largest_cubes_are_within_fp16() {
    let Some(gpu) = gpu() else { return };
    for order in [576, 8192, 16_384] {
        let weight = Array2::from_shape_fn((2, order), |(i, j)| f32::from(u8::from(j == 3 * i)));
        let mut sums = gpu.fourth_powers(&Array2::eye(order)).unwrap();
        sums.add(&both(&gpu, &weight).1, Turned::Rows(None)).unwrap();
        let n = order as f64;
        assert!((sums.mean() / n - 1.0).abs() < 1e-4, "{order}: {}", sums.mean());
        let gradient = sums.gradient().unwrap();
        for at in [0, 3] {
            let found = gradient[[at, at]] / (n * n / 2.0);
            assert!((found - 1.0).abs() < 2e-3, "{order}: {found}");
        }
        assert!((gradient.sum() / (n * n) - 1.0).abs() < 2e-3);
    }
}

#[test]
fn the_same_bits_come_of_the_same_weights() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    let r = orthogonal(&mut random, 576);
    let weight = both(&gpu, &random.halves(1536, 576, 0.05)).1;
    let look = || {
        let mut sums = gpu.fourth_powers(&r.mapv(|v| v as f32)).unwrap();
        sums.add(&weight, Turned::Rows(None)).unwrap();
        (sums.mean().to_bits(), sums.gradient().unwrap())
    };
    assert_eq!(look(), look());
    let skew = &r - &r.t();
    let step = || gpu.orthogonal_step(&r, &skew, 2.0, 0.2).unwrap();
    assert_eq!(step(), step());
}

#[test]
fn steps_match_the_hosts_and_stay_orthogonal() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for order in [2, 9, 64, 577] {
        let r = orthogonal(&mut random, order);
        let noise = random.halves(order, order, 0.5 / (order as f32).sqrt()).mapv(f64::from);
        let skew = (&noise - &noise.t()) / 2.0;
        let got = gpu.orthogonal_step(&r, &skew, 0.8, 0.4).unwrap();
        let want = Device::Cpu.orthogonal_step(&r, &skew, 0.8, 0.4).unwrap();
        let largest = |a: &Array2<f64>| a.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
        let off = largest(&(got.t().dot(&got) - Array2::<f64>::eye(order)));
        let apart = largest(&(&got - &want));
        println!("order {order}: {off:.1e} from orthogonal, {apart:.1e} from the host's");
        assert!(off < 1e-12 && apart < 1e-12, "{order}: {off} {apart}");
        let stretched = &r * 1.3;
        let got = gpu.nearest_orthogonal(&stretched).unwrap();
        assert!(largest(&(got - &r)) < 1e-12);
    }
}

#[test]
fn turned_weights_match() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random::new();
    for (order, rows) in [(7, 3), (8, 1), (576, 1000), (1001, 130), (576, 1536)] {
        let r = orthogonal(&mut random, order);
        let turning = gpu.turning(&r.mapv(|v| v as f32)).unwrap().unwrap();
        // So large that fp16 has all its bits for what comes of the smallest gains, too.
        let reading = random.halves(rows, order, 4.0);
        let there = both(&gpu, &reading).1;
        for size in [2e-3, 1.0, 40.0] {
            let gain: Vec<f32> = random.halves(1, order, size).into_raw_vec_and_offset().0;
            let want = (&reading * &ndarray::arr1(&gain)).mapv(f64::from).dot(&r);
            let got = turning.inputs(&there, Some(&gain)).unwrap();
            let what = format!("turned inputs {rows}×{order}, gains of {size}");
            check(&what, &got, &want.mapv(|v| v as f32), ONE_ROUNDING);
        }
        let got = turning.inputs(&there, None).unwrap();
        let want = reading.mapv(f64::from).dot(&r).mapv(|v| v as f32);
        check(&format!("turned inputs {rows}×{order}"), &got, &want, ONE_ROUNDING);
        let writing = random.halves(order, rows, 0.05);
        let want = r.t().dot(&writing.mapv(f64::from)).mapv(|v| v as f32);
        let got = turning.outputs(&both(&gpu, &writing).1).unwrap();
        check(&format!("turned outputs {order}×{rows}"), &got, &want, ONE_ROUNDING);
        assert!(turning.outputs(&both(&gpu, &random.halves(order + 1, 2, 1.0)).1).is_err());
    }
    assert!(Device::Cpu.turning(&Array2::eye(4)).unwrap().is_none());
}

/// One look at a 70B block and what follows from it; nothing is asserted.
#[test]
#[ignore = "measures; run it alone"]
fn a_look_at_a_70b_block() {
    let Some(gpu) = gpu() else { return };
    const ORDER: usize = 8192;
    let mut random = Random::new();
    let some = random.halves(64, ORDER, 0.02);
    let tensor = |rows: usize, cols: usize| -> Tensor {
        let values = some.iter().copied().cycle().take(rows * cols).collect();
        let weight = Array2::from_shape_vec((rows, cols), values).unwrap();
        both(&gpu, &weight).1
    };
    let q = tensor(ORDER + 2 * 1024, ORDER);
    let (gate_up, o) = (tensor(2 * 28_672, ORDER), tensor(ORDER, ORDER));
    let down = tensor(ORDER, 28_672);
    let r = Array2::<f64>::eye(ORDER);
    let mut sums = gpu.fourth_powers(&r.mapv(|v| v as f32)).unwrap();
    let gain = vec![1.0; ORDER];
    let timed = |what: &str, run: &mut dyn FnMut()| {
        for pass in ["first", "again"] {
            gpu.synchronize("timing").unwrap();
            let start = Instant::now();
            run();
            gpu.synchronize("timing").unwrap();
            println!("{what}, {pass}: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        }
    };
    timed("a look at a 70B block", &mut || {
        for weight in [&q, &gate_up] {
            sums.add(weight, Turned::Rows(Some(&gain))).unwrap();
        }
        for weight in [&o, &down] {
            sums.add(weight, Turned::Columns).unwrap();
        }
    });
    let turning = gpu.turning(&r.mapv(|v| v as f32)).unwrap().unwrap();
    timed("a 70B block turned", &mut || {
        for weight in [&q, &gate_up] {
            turning.inputs(weight, Some(&gain)).unwrap();
        }
        for weight in [&o, &down] {
            turning.outputs(weight).unwrap();
        }
    });
    let skew = Array2::from_shape_fn((ORDER, ORDER), |(i, j)| {
        if i == j { 0.0 } else { (i as f64 - j as f64).signum() * 1e-5 }
    });
    timed("a step of order 8192", &mut || {
        gpu.orthogonal_step(&r, &skew, 0.1, 0.4).unwrap();
    });
}
