//! What is kept and how likely it is, against transformers' processors.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::path::Path;

use gptq_generate::{Sampler, Sampling, SamplingOptions};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    rows: std::collections::HashMap<String, Row>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Row {
    logits: Vec<Option<f32>>,
    logprobs: Vec<Option<f64>>,
}

#[derive(Deserialize)]
struct Case {
    row: String,
    settings: Settings,
    history: Vec<u32>,
    kept: Vec<u32>,
    probabilities: Vec<f64>,
    greedy: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
}

/// The fixture's processors do nothing where a setting is absent; 0 is no top-k.
fn sampling(settings: &Settings, temperature: f64) -> Sampling {
    let options = SamplingOptions {
        temperature: Some(temperature),
        top_k: Some(settings.top_k.unwrap_or(0)),
        top_p: settings.top_p,
        min_p: settings.min_p,
        repetition_penalty: settings.repetition_penalty,
    };
    Sampling::resolve(&options, None).unwrap()
}

#[test]
fn kept_tokens_and_probabilities_are_those_of_transformers() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/sampling.json");
    let fixture: Fixture = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert!(fixture.cases.len() > 100);
    for case in &fixture.cases {
        let row = &fixture.rows[&case.row];
        let logits: Vec<f32> =
            row.logits.iter().map(|logit| logit.unwrap_or(f32::NEG_INFINITY)).collect();
        let what = format!("{} {:?}", case.row, case.settings);
        let temperature = case.settings.temperature.unwrap_or(1.0);
        let mut sampler = Sampler::new(sampling(&case.settings, temperature), 1);
        let (ids, probabilities): (Vec<_>, Vec<_>) =
            sampler.distribution(&logits, &case.history).unwrap().into_iter().unzip();
        assert_eq!(ids, case.kept, "{what}");
        for (ours, theirs) in probabilities.iter().zip(&case.probabilities) {
            assert!((ours - theirs).abs() < 1e-6, "{what}: {ours} {theirs}");
        }
        for _ in 0..5 {
            let choice = sampler.sample(&logits, &case.history).unwrap();
            assert!(case.kept.contains(&choice.id), "{what}");
            let logprob = row.logprobs[choice.id as usize].unwrap();
            assert!((choice.logprob - logprob).abs() < 1e-9, "{what}");
        }
        let mut greedy = Sampler::new(sampling(&case.settings, 0.0), 1);
        assert_eq!(greedy.sample(&logits, &case.history).unwrap().id, case.greedy, "{what}");
    }
}
