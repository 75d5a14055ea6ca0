//! Several cards against one: sums, gathered rows, and a factor made together.
//!
//! Skipped, with the reason, where there are not two cards and NCCL; the environment must have
//! `NCCL_NVLS_ENABLE=0` and `NCCL_P2P_DIRECT_DISABLE=1`, which the program sets by itself.
//! `GPTQ_GPU_TIMING=1` adds the times of a 70B model's largest factor and sum.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;
mod support;

use std::time::{Duration, Instant};

use gptq_compute::{Device, Error, Gram, HessianPrep, RankHandle, Ranks, Result, Tensor};
use ndarray::Array2;

use gpus::gpus;
use needs::Need;
use support::{Random, check};

/// Runs `part` on every card; outcomes in rank order.
fn on_cards<R: Send>(
    devices: &[Device],
    part: impl Fn(&Device, &Ranks) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    std::thread::scope(|scope| {
        let part = &part;
        let threads: Vec<_> = RankHandle::threads(devices.len())
            .into_iter()
            .zip(devices)
            .map(|(handle, device)| {
                scope.spawn(move || handle.run(device, |ranks| part(device, ranks)))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn same_bits(a: &Array2<f32>, b: &Array2<f32>) -> bool {
    a.dim() == b.dim() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn sums_are_the_same_everywhere() {
    let Some(devices) = gpus() else { return };
    let mut random = Random::new();
    for (rows, cols) in [(1, 1), (3, 5), (64, 576), (2048, 8192)] {
        let parts: Vec<Array2<f32>> =
            devices.iter().map(|_| random.halves(rows, cols, 1.0)).collect();
        let run = || {
            let sums = on_cards(&devices, |device, ranks| {
                let mut tensor = device.upload_f32(parts[ranks.rank()].clone())?;
                ranks.sum(&mut tensor)?;
                tensor.to_host()
            });
            sums.into_iter().map(Result::unwrap).collect::<Vec<_>>()
        };
        let sums = run();
        let want = parts.iter().skip(1).fold(parts[0].clone(), |sum, part| sum + part);
        check("sum", &Tensor::from_host(sums[0].clone()), &want, 1e-6);
        assert!(sums.iter().all(|sum| same_bits(sum, &sums[0])), "ranks differ");
        assert!(run().iter().all(|sum| same_bits(sum, &sums[0])), "runs differ");
    }
}

#[test]
fn rows_are_gathered_in_order() {
    let Some(devices) = gpus() else { return };
    let mut random = Random::new();
    for (rows, unit) in [(64, 64), (576, 64), (8192, 64), (5, 2)] {
        let want = random.halves(rows, 160, 1.0);
        for half in [false, true] {
            let gathered = on_cards(&devices, |device, ranks| {
                let range = ranks.share(rows, unit);
                let own = want.slice(ndarray::s![range, ..]).to_owned();
                let own = if half {
                    let bytes = support::bytes_of(&own, gptq_compute::FloatType::F16);
                    let dtype = gptq_compute::FloatType::F16;
                    let matrix = gptq_compute::HostMatrix::new(&bytes, dtype, own.nrows(), 160);
                    device.upload(matrix)?
                } else {
                    device.upload_f32(own)?
                };
                ranks.gather_rows(own, rows, unit)?.to_host()
            });
            for whole in gathered {
                assert!(same_bits(&whole.unwrap(), &want), "{rows} rows in units of {unit}");
            }
        }
    }
}

/// A Gram of 3000 random tokens with a few large features.
fn gram(device: &Device, n: usize) -> Gram {
    let tokens = 3000;
    let noise = |i: usize| {
        let bits = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32
    };
    let size = |j: usize| if j.is_multiple_of(97) { 10.0 } else { 1.0 };
    let x = Array2::from_shape_fn((tokens, n), |(i, j)| (noise(i * n + j) - 1.0) * size(j));
    let mut gram = device.gram(n).unwrap();
    device.gram_add(&mut gram, &device.upload_f32(x).unwrap()).unwrap();
    gram
}

/// Every card adds the same Gram, so that their sum is a multiple of what one factors alone.
#[test]
fn cards_factor_together_what_one_factors_alone() {
    let Some(devices) = gpus() else { return };
    for n in [12_288, 13_000] {
        let order: Vec<u32> = (0..n as u32).map(|j| (j * 7 + 3) % n as u32).collect();
        let order: Vec<u32> = if n % 7 == 0 { (0..n as u32).rev().collect() } else { order };
        let dead = vec![false; n];
        let prep = HessianPrep {
            scale: 2.0 / devices.len() as f32,
            order: &order,
            dead: &dead,
            damp: 40.0,
        };
        let outcomes = on_cards(&devices, |device, ranks| {
            let mut sum = gram(device, n);
            let alone = {
                let prep = HessianPrep { scale: 2.0, ..prep };
                (ranks.is_first()).then(|| sum.upper_factor(&prep)).transpose()?
            };
            sum.sum_over(ranks)?;
            device.synchronize("the sum")?;
            let start = Instant::now();
            let together = sum.upper_factor(&prep)?.0;
            device.synchronize("the factor")?;
            let seconds = start.elapsed();
            Ok((alone.map(|(u, _)| u.to_host()).transpose()?, together.to_host()?, seconds))
        });
        let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
        let alone = outcomes[0].0.as_ref().unwrap();
        for (_, together, seconds) in &outcomes {
            assert!(same_bits(together, &outcomes[0].1), "ranks differ");
            println!("{n}: {seconds:?}");
        }
        check(&format!("factor {n}"), &Tensor::from_host(outcomes[0].1.clone()), alone, 1e-3);
    }
}

#[test]
fn timings_of_the_largest_factor() {
    if std::env::var_os("GPTQ_GPU_TIMING").is_none() {
        Need::Timing.is_missing("GPTQ_GPU_TIMING is not set");
        return;
    }
    let Some(devices) = gpus() else { return };
    for n in [8192_usize, 16_384, 28_672] {
        let order: Vec<u32> = (0..n as u32).rev().collect();
        let dead = vec![false; n];
        let prep = HessianPrep { scale: 2.0, order: &order, dead: &dead, damp: 40.0 };
        let outcomes = on_cards(&devices, |device, ranks| {
            let mut sum = gram(device, n);
            let timed = |what: &mut dyn FnMut() -> Result<()>| {
                let mut least = f64::INFINITY;
                for _ in 0..3 {
                    device.synchronize("before")?;
                    ranks.exchange(Vec::new())?;
                    let start = Instant::now();
                    what()?;
                    device.synchronize("the timed work")?;
                    least = least.min(start.elapsed().as_secs_f64() * 1e3);
                }
                Ok::<_, Error>(least)
            };
            let alone = timed(&mut || sum.upper_factor(&prep).map(|_| ()))?;
            let mut tensor = device.zeros(n, n)?;
            let summed = timed(&mut || ranks.sum(&mut tensor))?;
            sum.sum_over(ranks)?;
            let together = timed(&mut || sum.upper_factor(&prep).map(|_| ()))?;
            Ok((alone, together, summed))
        });
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            let (alone, together, summed) = outcome.unwrap();
            println!(
                "{n}, card {rank}: factor alone {alone:.1} ms, together {together:.1} ms; \
                 all-reduce {summed:.1} ms"
            );
        }
    }
}

#[test]
fn what_is_not_positive_definite_is_so_on_every_card() {
    let Some(devices) = gpus() else { return };
    let n = 12_288;
    let order: Vec<u32> = (0..n as u32).collect();
    let dead = vec![false; n];
    let outcomes = on_cards(&devices, |device, ranks| {
        let mut sum = gram(device, n);
        sum.sum_over(ranks)?;
        // The Gram matrix has rank 3000 at most, and the negative damping shifts it below zero.
        let prep = HessianPrep { scale: 1.0, order: &order, dead: &dead, damp: -1.0 };
        Ok(sum.upper_factor(&prep).map(|_| ()).unwrap_err().to_string())
    });
    let messages: Vec<String> = outcomes.into_iter().map(Result::unwrap).collect();
    assert!(messages[0].contains("not positive definite"), "{}", messages[0]);
    assert!(messages.iter().all(|m| *m == messages[0]), "{messages:?}");
}

#[test]
fn a_lost_card_ends_the_others() {
    let Some(devices) = gpus() else { return };
    let start = Instant::now();
    let outcomes = on_cards(&devices, |device, ranks| {
        let mut tensor = device.zeros(1024, 1024)?;
        ranks.sum(&mut tensor)?;
        device.synchronize("the first sum")?;
        if ranks.rank() == 1 {
            std::thread::sleep(Duration::from_millis(500));
            return Err(Error::Ranks { message: "full disk".to_owned(), advice: None });
        }
        // The other does not come.
        ranks.sum(&mut tensor)?;
        device.synchronize("the second sum")?;
        ranks.exchange(Vec::new()).map(|_| ())
    });
    assert!(matches!(outcomes[0], Err(Error::RankLost { rank: Some(1) })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Err(Error::Ranks { .. })), "{outcomes:?}");
    println!("the others ended after {:?}", start.elapsed());
}
