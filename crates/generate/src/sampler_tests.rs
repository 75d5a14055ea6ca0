use proptest::prelude::*;

use super::*;
use crate::sampling::SamplingOptions;

fn sampler(options: SamplingOptions, seed: u64) -> Sampler {
    Sampler::new(Sampling::resolve(&options, None).unwrap(), seed)
}

fn drawn(temperature: f64) -> SamplingOptions {
    SamplingOptions { temperature: Some(temperature), top_k: Some(0), ..Default::default() }
}

#[test]
fn greedy_takes_the_highest_and_of_equals_the_first() {
    let mut greedy = Sampler::new(Sampling::greedy(), 0);
    let choice = greedy.sample(&[0.0, 2.0, 2.0, -1.0], &[]).unwrap();
    assert_eq!(choice.id, 1);
    let sum: f64 = [0.0f64, 2.0, 2.0, -1.0].map(f64::exp).iter().sum();
    assert!((choice.logprob - (2.0 - sum.ln())).abs() < 1e-14);
    let penalty = SamplingOptions { repetition_penalty: Some(1.5), ..Default::default() };
    let mut penalized = sampler(penalty, 0);
    // The probability is the model's own, without the penalty, which acts once and knows its row.
    let choice = penalized.sample(&[1.9, 2.0, -0.1], &[1, 1, 1, 9]).unwrap();
    assert_eq!(choice.id, 0);
    assert!(
        (choice.logprob - (1.9f32 as f64 - log_sum_exp(&[1.9, 2.0, -0.1]).unwrap())).abs() < 1e-14
    );
}

#[test]
fn a_seed_gives_the_same_tokens() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
    let tokens = |seed| {
        let mut sampler = sampler(drawn(0.9), seed);
        (0..8).map(|_| sampler.sample(&logits, &[]).unwrap().id).collect::<Vec<_>>()
    };
    assert_eq!(tokens(7), tokens(7));
    assert_ne!(tokens(7), tokens(8));
    // SplitMix64's first numbers for the seed 0, as its author gives them.
    let mut state = 0;
    assert_eq!(split_mix(&mut state), 0xe220_a839_7b1d_cdaf);
    assert_eq!(split_mix(&mut state), 0x6e78_9e6a_a1b9_65f4);
}

#[test]
fn tokens_come_as_often_as_is_likely() {
    let logits = [0.0f32, 1.0, -1.0, f32::NEG_INFINITY, 2.0];
    let mut sampler = sampler(drawn(1.3), 3);
    let expected = sampler.distribution(&logits, &[]).unwrap();
    assert_eq!(expected.iter().map(|kept| kept.0).collect::<Vec<_>>(), [0, 1, 2, 4]);
    let mut counts = [0.0; 5];
    let draws = 40_000;
    for _ in 0..draws {
        counts[sampler.sample(&logits, &[]).unwrap().id as usize] += 1.0;
    }
    for (id, probability) in expected {
        let sigma = (probability * (1.0 - probability) * f64::from(draws)).sqrt();
        let off = (counts[id as usize] - probability * f64::from(draws)).abs() / sigma;
        assert!(off < 4.0, "token {id}: {off} sigma");
    }
    assert_eq!(counts[3], 0.0);
}

#[test]
fn broken_logits_are_an_error_and_never_a_token() {
    for options in [drawn(1.0), drawn(0.0)] {
        let mut sampler = sampler(options, 0);
        for broken in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 3], &[]] {
            let error = sampler.sample(broken, &[]).unwrap_err();
            assert!(matches!(error, Error::Logits { .. }), "{error}");
        }
        let error = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err().to_string();
        assert_eq!(error, "The model's logits are broken: that of token 1 is NaN");
    }
}

#[test]
fn extreme_settings_choose_a_token() {
    let logits = [1e38f32, -1e38, 0.0, f32::NEG_INFINITY, 3e38];
    for temperature in [1e-320, 1e-40, 1e40, 1e300] {
        for penalty in [1e-300, 1e-20, 1e20, 1e300] {
            let options =
                SamplingOptions { repetition_penalty: Some(penalty), ..drawn(temperature) };
            let mut sampler = sampler(options, 1);
            let kept = sampler.distribution(&logits, &[0, 1, 2, 3, 4]).unwrap();
            assert!(kept.iter().all(|&(id, p)| id != 3 && (0.0..=1.0).contains(&p)), "{kept:?}");
            sampler.sample(&logits, &[0, 1, 2, 3, 4]).unwrap();
        }
    }
}

/// What is kept by top-p is also kept by its definition, which sorts everything.
fn top_p_by_definition(logits: &[f32], p: f64) -> Vec<u32> {
    let highest = f64::from(highest(logits));
    let weight = |id: u32| exp(f64::from(logits[id as usize]) - highest);
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
    let total: f64 = ids.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for (place, &id) in ids.iter().enumerate() {
        sum += weight(id) / total;
        if sum > 1.0 - p || place + 1 == ids.len() {
            kept.push(id);
        }
    }
    kept.sort_unstable();
    kept
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn top_p_sorts_no_more_than_it_must(
        seed in any::<u64>(),
        count in 1..6000usize,
        p in 0.01..0.999f64,
        spread in 0.01..6.0f32,
    ) {
        let mut state = seed;
        let logits: Vec<f32> =
            (0..count).map(|_| (split_mix(&mut state) >> 40) as f32 / 2e7 * spread).collect();
        let mut sampler = sampler(SamplingOptions { top_p: Some(p), ..drawn(1.0) }, 0);
        let kept = sampler.distribution(&logits, &[]).unwrap();
        let ids: Vec<u32> = kept.iter().map(|kept| kept.0).collect();
        prop_assert_eq!(ids, top_p_by_definition(&logits, p));
        let sum: f64 = kept.iter().map(|kept| kept.1).sum();
        prop_assert!((sum - 1.0).abs() < 1e-9);
    }
}
