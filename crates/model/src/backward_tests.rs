//! The backward pass against central differences of the forward one, for every family that has it.

use std::collections::BTreeMap;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use ndarray::Array2;

use super::*;
use crate::{Model, SourcePrecision};

#[path = "../../../tests/util/family_models.rs"]
mod family_models;

const DEVICE: Device = Device::Cpu;
/// Two windows, longer than every sliding window of the fixtures.
const SEQ_LEN: usize = 24;

/// Values in [-1, 1].
fn noise(shape: (usize, usize), seed: u64) -> Array2<f32> {
    let mut state = seed;
    Array2::from_shape_fn(shape, |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// Σ weights ∘ block(hidden), in f64.
fn loss(block: &Block, model: &Model<'_>, hidden: &Array2<f32>, weights: &Array2<f32>) -> f64 {
    let mut states = Tensor::from_host(hidden.clone());
    block.forward(&DEVICE, &mut states, model.ropes(SEQ_LEN), SEQ_LEN).unwrap();
    dot(states.as_host(), weights)
}

fn dot(a: &Array2<f32>, b: &Array2<f32>) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The slope of `loss` at 0, from four places, by Richardson's extrapolation: its own error is of the
/// fourth order, and the f32 of the values that it is taken of weighs 1e-4 or so.
fn slope(loss: impl Fn(f32) -> f64) -> f64 {
    let central = |step: f32| (loss(step) - loss(-step)) / (2.0 * f64::from(step));
    (4.0 * central(0.01) - central(0.02)) / 3.0
}

#[test]
fn gradients_are_the_slopes_of_the_forward_pass() {
    let mut with = 0;
    for name in family_models::names() {
        let dir = tempfile::tempdir().unwrap();
        family_models::assemble(dir.path(), name);
        let source = Checkpoint::open(dir.path()).unwrap();
        let config = source.config();
        let model = Model::new(&source, DEVICE, SourcePrecision::Stored, SEQ_LEN).unwrap();
        let index = config.num_hidden_layers - 1;
        let mut block = model.load_block(index).unwrap();
        let shape = (2 * SEQ_LEN, config.hidden_size);
        let (hidden, weights) = (noise(shape, 1), noise(shape, 2));
        let states = Tensor::from_host(hidden.clone());
        let mut gradient = Tensor::from_host(weights.clone());
        let mut of_weights = BTreeMap::new();
        let mut sink = |id: LinearId, x: &Tensor, dy: &Tensor| {
            let mut sum = DEVICE.zeros(dy.cols(), x.cols())?;
            DEVICE.cross_add(&mut sum, dy, x)?;
            assert!(of_weights.insert(block.place_of(id), sum.into_host()).is_none());
            Ok(())
        };
        let ropes = model.ropes(SEQ_LEN);
        let done = block.backward(&DEVICE, &states, &mut gradient, ropes, SEQ_LEN, &mut sink);
        if let Some(why) = without_backward(config) {
            assert!(done.unwrap_err().to_string().contains(why), "{name}");
            continue;
        }
        done.unwrap();
        with += 1;
        let check = |what: &str, got: f64, want: f64, size: f64| {
            assert!(
                (got - want).abs() < 2e-3 * size,
                "{name}, {what}: {got}, by differences {want}"
            );
        };
        let gradient = gradient.into_host();
        // What a random direction of unit values would give on average.
        let size = |gradient: &Array2<f32>| dot(gradient, gradient).sqrt();
        for seed in 3..6 {
            let along = noise(shape, seed);
            let want = slope(|step| loss(&block, &model, &(&hidden + &(&along * step)), &weights));
            check("hidden states", dot(&gradient, &along), want, size(&gradient));
        }
        assert_eq!(of_weights.len(), block.linears().len(), "{name}");
        for (place, of_weight) in of_weights {
            let (id, weight) =
                (block.linears()[place].id, block.linears()[place].weight.to_host().unwrap());
            // As large as the weights are.
            let along = noise(weight.dim(), 7) * (2.0 / (weight.ncols() as f32).sqrt());
            let want = {
                let moved = |step: f32| {
                    let mut moved = block.clone();
                    moved.set_weight(id, Tensor::from_host(&weight + &(&along * step)));
                    loss(&moved, &model, &hidden, &weights)
                };
                slope(moved)
            };
            let expected = size(&of_weight) * 2.0 / (weight.ncols() as f64).sqrt();
            check(&format!("{id:?}"), dot(&of_weight, &along), want, expected);
            block.set_weight(id, Tensor::from_host(weight));
        }
    }
    // All but Cohere's and the mixtures of experts.
    assert_eq!(with, family_models::names().count() - 4 - 10);
}

/// Rows, each multiplied by cosines that go on from row to row, and summed.
fn summed(gradient: &Array2<f32>) -> Vec<f64> {
    let mut place = 0.0;
    let mut of_row = |row: ndarray::ArrayView1<'_, f32>| {
        row.iter().fold(0.0, |sum, &value| {
            place += 1.0;
            sum + f64::from(value) * f64::cos(place)
        })
    };
    gradient.rows().into_iter().map(&mut of_row).collect()
}

/// What tests/fixtures/block_gradients_oracle.py had PyTorch compute in f64.
#[test]
fn gradients_are_those_of_pytorch() {
    let path = family_models::fixture("../block_gradients.json");
    let oracle: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    for (name, want) in oracle.as_object().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        family_models::assemble(dir.path(), name);
        let source = Checkpoint::open(dir.path()).unwrap();
        let ids: Vec<u32> = numbers(&want["ids"]).into_iter().map(|id| id as u32).collect();
        let model = Model::new(&source, DEVICE, SourcePrecision::Stored, ids.len()).unwrap();
        let ropes = model.ropes(ids.len());
        let last = source.config().num_hidden_layers - 1;
        let mut hidden = model.embed(&ids).unwrap();
        for index in 0..last {
            let block = model.load_block(index).unwrap();
            block.forward(&DEVICE, &mut hidden, ropes, ids.len()).unwrap();
        }
        let width = source.config().hidden_size;
        let sines = Array2::from_shape_fn((ids.len(), width), |(row, column)| {
            f64::sin((row * width + column + 1) as f64) as f32
        });
        let mut gradient = Tensor::from_host(sines);
        let block = model.load_block(last).unwrap();
        let mut seen = 0;
        let close = |what: &str, got: Vec<f64>, want: Vec<f64>| {
            let size = want.iter().map(|v| v * v).sum::<f64>().sqrt() / (want.len() as f64).sqrt();
            assert_eq!(got.len(), want.len(), "{name}, {what}");
            for (got, want) in got.into_iter().zip(want) {
                assert!(
                    (got - want).abs() < 2e-4 * size,
                    "{name}, {what}: {got}, PyTorch's {want}"
                );
            }
        };
        let mut sink = |id: LinearId, x: &Tensor, dy: &Tensor| {
            let mut sum = DEVICE.zeros(dy.cols(), x.cols())?;
            DEVICE.cross_add(&mut sum, dy, x)?;
            let prefix = gptq_checkpoint::ModelConfig::block_prefix(last);
            let of = block.linear(id).name.strip_prefix(&format!("{prefix}.")).unwrap().to_owned();
            let want = &want["weights"][format!("{of}.weight")];
            close(&of, summed(sum.as_host()), numbers(want));
            seen += 1;
            Ok(())
        };
        block.backward(&DEVICE, &hidden, &mut gradient, ropes, ids.len(), &mut sink).unwrap();
        assert_eq!(seen, want["weights"].as_object().unwrap().len(), "{name}");
        close("states", summed(gradient.as_host()), numbers(&want["states"]));
    }
}
