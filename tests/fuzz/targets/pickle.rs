//! A pickle in a sound archive with two storages of 64 bytes, so that inputs reach the machine.
#![no_main]

mod folder;
#[allow(dead_code, reason = "shared with the tests")]
#[path = "../../util/torch_file.rs"]
mod torch_file;

use torch_file::{Item, archive};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let items = [
        Item::new("data.pkl", data.to_vec()),
        Item::new("data/0", vec![0; 64]),
        Item::new("data/1", vec![0; 64]),
    ];
    folder::read("pytorch_model.bin", &archive(&items, false));
});
