//! Sequences that grow in a cache have the hidden states of whole windows.

#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../../../tests/util/family_models.rs"]
mod family_models;
#[path = "../../../tests/util/gpus.rs"]
mod gpus;
#[path = "../../../tests/util/needs.rs"]
mod needs;

use std::path::Path;

use gptq_checkpoint::Checkpoint;
use gptq_compute::Device;
use gptq_model::{Decoder, Error, Model, SourcePrecision};
use gpus::{gpu, gpus};
use ndarray::{Array2, Axis};

const TOKENS: usize = 90;

fn demo() -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/demo-llama");
    Checkpoint::open(&folder).unwrap()
}

fn ids(seed: u32, vocab: usize) -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * 7919 + seed * 104_729) % vocab as u32).collect()
}

/// Final hidden states of a whole window, by the walk that measures perplexities.
fn whole(checkpoint: &Checkpoint, ids: &[u32]) -> Array2<f32> {
    let model = Model::new(checkpoint, Device::Cpu, SourcePrecision::Stored, ids.len()).unwrap();
    let mut hidden = model.embed(ids).unwrap();
    for index in 0..model.config().num_hidden_layers {
        let block = model.load_block(index).unwrap();
        block.forward(model.device(), &mut hidden, model.ropes(ids.len()), ids.len()).unwrap();
    }
    model.load_head().unwrap().norm(model.device(), &hidden).unwrap().into_host()
}

fn close(found: &Array2<f32>, wanted: &Array2<f32>) {
    let worst = (found - wanted).iter().fold(0.0_f32, |worst, v| worst.max(v.abs()));
    let largest = wanted.iter().fold(0.0_f32, |largest, v| largest.max(v.abs()));
    assert!(worst < 1e-5 * largest, "worst {worst:e} of {largest}");
}

#[test]
fn sequences_that_grow_have_what_whole_windows_have() {
    let checkpoint = demo();
    let decoder = Decoder::load(&checkpoint, &[Device::Cpu], 128, |_| ()).unwrap();
    let texts = [ids(1, decoder.config().vocab_size), ids(2, decoder.config().vocab_size)];
    let wanted = texts.each_ref().map(|ids| whole(&checkpoint, ids));

    // One in a prompt of many tokens, the other in one of few, then both together.
    let mut cache = decoder.cache(2, 100).unwrap();
    let prompts = [40, 3];
    let mut found = [0, 1].map(|slot| {
        let hidden = decoder.feed(&mut cache, slot, &texts[slot][..prompts[slot]]).unwrap();
        vec![hidden.into_host()]
    });
    for i in 0..TOKENS {
        let next: Vec<_> = (0..2)
            .filter(|&slot| prompts[slot] + i < TOKENS)
            .map(|slot| (slot, texts[slot][prompts[slot] + i]))
            .collect();
        if next.is_empty() {
            break;
        }
        let hidden = decoder.step(&mut cache, &next).unwrap().into_host();
        for (row, (slot, _)) in hidden.axis_chunks_iter(Axis(0), 1).zip(next) {
            found[slot].push(row.to_owned());
        }
    }
    for (found, wanted) in found.iter().zip(&wanted) {
        let views: Vec<_> = found.iter().map(|part| part.view()).collect();
        close(&ndarray::concatenate(Axis(0), &views).unwrap(), wanted);
    }

    // Taken back to some length, a sequence goes on as if the rest had not been.
    cache.truncate(0, 17);
    decoder.feed(&mut cache, 0, &texts[1][..5]).unwrap();
    cache.truncate(0, 17);
    let again = decoder.feed(&mut cache, 0, &texts[0][17..30]).unwrap().into_host();
    close(&again, &wanted[0].slice(ndarray::s![17..30, ..]).to_owned());
}

/// Every kind of block of every family: a prompt in two parts, then token by token, beyond the windows of
/// attention that slides.
#[test]
fn sequences_of_every_family_grow_as_whole_windows() {
    const LENGTH: usize = 48;
    let mut kinds = 0;
    for name in family_models::names() {
        let dir = tempfile::tempdir().unwrap();
        family_models::assemble(dir.path(), name);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let length = LENGTH.min(gptq_model::context_limit(checkpoint.config()).0);
        let ids: Vec<u32> = (0..length as u32).map(|i| 2 + (i * 7919 + 5) % 62).collect();
        let wanted = whole(&checkpoint, &ids);
        let decoder = Decoder::load(&checkpoint, &[Device::Cpu], length, |_| ()).unwrap();
        let mut cache = decoder.cache(1, length).unwrap();
        let mut found = vec![
            decoder.feed(&mut cache, 0, &ids[..13]).unwrap().into_host(),
            decoder.feed(&mut cache, 0, &ids[13..20]).unwrap().into_host(),
        ];
        for &id in &ids[20..] {
            found.push(decoder.step(&mut cache, &[(0, id)]).unwrap().into_host());
        }
        let views: Vec<_> = found.iter().map(|part| part.view()).collect();
        let found = ndarray::concatenate(Axis(0), &views).unwrap();
        close(&found, &wanted);
        // Logits are those of the head, with its cap.
        let row = decoder
            .last_row(&decoder.feed(&mut decoder.cache(1, length).unwrap(), 0, &ids).unwrap());
        let logits = decoder.logits(&row.unwrap()).unwrap();
        let most = decoder.config().logit_softcap.unwrap_or(f32::INFINITY);
        assert!(logits.iter().all(|v| v.abs() <= most), "{name}");
        kinds += 1;
    }
    assert!(kinds > 50, "{kinds}");
}

/// Final hidden states and logits of two sequences that grow together, by a model on some devices.
fn grown(checkpoint: &Checkpoint, devices: &[Device]) -> Vec<Array2<f32>> {
    let decoder = Decoder::load(checkpoint, devices, 128, |_| ()).unwrap();
    let vocab = decoder.config().vocab_size;
    let texts = [ids(1, vocab), ids(2, vocab)];
    let mut cache = decoder.cache(2, 100).unwrap();
    let mut found = Vec::new();
    for (slot, prompt) in [40, 3].into_iter().enumerate() {
        let hidden = decoder.feed(&mut cache, slot, &texts[slot][..prompt]).unwrap();
        found.push(decoder.logits(&decoder.last_row(&hidden).unwrap()).unwrap());
        found.push(hidden.to_host().unwrap());
    }
    for i in 0..20 {
        let next = [(1, texts[1][3 + i]), (0, texts[0][40 + i])];
        let hidden = decoder.step(&mut cache, if i % 3 == 0 { &next[..1] } else { &next }).unwrap();
        found.push(decoder.logits(&hidden).unwrap());
        found.push(hidden.to_host().unwrap());
    }
    found
}

/// A model that is cut into parts has the states and logits of the whole, to the bit.
#[test]
fn parts_have_what_the_whole_has() {
    let checkpoint = demo();
    let blocks = checkpoint.config().num_hidden_layers;
    let whole = grown(&checkpoint, &[Device::Cpu]);
    for parts in [2, 3, blocks] {
        assert!(grown(&checkpoint, &vec![Device::Cpu; parts]) == whole, "{parts} parts");
    }
    let error = Decoder::load(&checkpoint, &vec![Device::Cpu; blocks + 1], 16, |_| ()).unwrap_err();
    let wanted = format!("{} devices were named for a model of {blocks} blocks", blocks + 1);
    assert_eq!(error.to_string(), wanted);
}

/// So has one whose parts are on one GPU, and on several.
#[test]
fn parts_on_gpus_have_what_the_whole_has() {
    let Some(gpu) = gpu() else { return };
    let checkpoint = demo();
    let whole = grown(&checkpoint, std::slice::from_ref(&gpu));
    assert!(grown(&checkpoint, &[gpu.clone(), gpu.clone(), gpu]) == whole, "three parts, one GPU");
    let Some(gpus) = gpus() else { return };
    let one = grown(&checkpoint, &gpus[1..2]);
    assert!(one == whole, "another GPU");
    assert!(grown(&checkpoint, &gpus[..2]) == whole, "two GPUs");
}

#[test]
fn contexts_have_an_end() {
    let checkpoint = demo();
    let most = checkpoint.config().positions();
    let error = Decoder::load(&checkpoint, &[Device::Cpu], most + 1, |_| ()).unwrap_err();
    assert!(matches!(error, Error::ContextTooLong { .. }), "{error}");
    let decoder = Decoder::load(&checkpoint, &[Device::Cpu], 16, |_| ()).unwrap();
    assert!(decoder.cache(1, 17).is_err());
    let mut cache = decoder.cache(1, 8).unwrap();
    let error = decoder.feed(&mut cache, 0, &[1; 9]).unwrap_err();
    assert!(matches!(error, Error::ContextFull { capacity: 8 }), "{error}");
    assert_eq!(cache.len(0), 0);
    decoder.feed(&mut cache, 0, &[1; 8]).unwrap();
    let error = decoder.step(&mut cache, &[(0, 1)]).unwrap_err();
    assert_eq!(error.to_string(), "The context of 8 tokens is full");
}
