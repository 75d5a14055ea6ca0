//! What attention makes of the inputs of v, times v's rows, is what attention makes of the values.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../../tests/util/family_models.rs"]
mod family_models;

use gptq_checkpoint::{Checkpoint, LinearId};
use gptq_compute::Device;
use gptq_model::{Block, Model, SourcePrecision, Stage};
use ndarray::{Array2, Axis, s};

const SEQ_LEN: usize = 24;

/// Rows of v that a query head reads, and their bias.
fn values(block: &Block, head: usize) -> (Array2<f32>, Vec<f32>) {
    let rule = block.rule();
    let (id, before) = match block.has(LinearId::V) {
        true => (LinearId::V, 0),
        false => (LinearId::Qkv, (rule.heads + rule.kv_heads) * rule.head_dim),
    };
    let first = before + head / (rule.heads / rule.kv_heads) * rule.head_dim;
    let rows = first..first + rule.head_dim;
    let linear = block.linear(id);
    let weight = linear.weight.to_host().unwrap();
    let bias = linear.bias.as_ref().map_or(vec![0.0; rows.len()], |b| b[rows.clone()].to_vec());
    (weight.slice(s![rows, ..]).to_owned(), bias)
}

/// Sums are taken in another order, on a GPU of fp16 values.
#[test]
fn contexts_are_what_attention_makes_of_the_inputs_times_v() {
    let device = Device::best().unwrap();
    let tolerance = if matches!(device, Device::Cpu) { 1e-5 } else { 0.02 };
    for name in family_models::names() {
        let dir = tempfile::tempdir().unwrap();
        family_models::assemble(dir.path(), name);
        let source = Checkpoint::open(dir.path()).unwrap();
        let model = Model::new(&source, device.clone(), SourcePrecision::Half, SEQ_LEN).unwrap();
        let ids: Vec<u32> = (0..2 * SEQ_LEN as u32).map(|i| (i * i * 5 + i * 7) % 64).collect();
        let hidden = model.embed(&ids).unwrap();
        let ropes = model.ropes(SEQ_LEN);
        for index in 0..model.config().num_hidden_layers {
            let block = model.load_block(index).unwrap();
            let input = block.stage_input(&device, Stage::Qkv, &hidden, ropes, SEQ_LEN).unwrap();
            let contexts = block.next_input(&device, Stage::Output, &input, ropes, SEQ_LEN);
            let contexts = contexts.unwrap().to_host().unwrap();
            let placed = block.queries_keys(&device, &input, ropes, SEQ_LEN).unwrap();
            let width = block.rule().head_dim;
            for head in 0..block.rule().heads {
                let attended = block.attended(&device, &placed, &input, head, SEQ_LEN).unwrap();
                let (weight, bias) = values(&block, head);
                let found = attended.to_host().unwrap().dot(&weight.t());
                let wanted = contexts.slice(s![.., head * width..(head + 1) * width]);
                let found = found + Array2::from_shape_vec((1, width), bias).unwrap();
                let largest = wanted.iter().fold(0.0_f32, |a, v| a.max(v.abs()));
                for (row, (found, wanted)) in
                    found.axis_iter(Axis(0)).zip(wanted.axis_iter(Axis(0))).enumerate()
                {
                    let off = (&found - &wanted).iter().fold(0.0_f32, |a, v| a.max(v.abs()));
                    assert!(off <= tolerance * largest, "{name} {index} {head} {row}: {off}");
                }
            }
        }
    }
}
