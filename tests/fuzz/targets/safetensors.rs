//! A whole safetensors file: its header, and what the header says of the values.
#![no_main]

mod folder;

libfuzzer_sys::fuzz_target!(|data: &[u8]| folder::read("model.safetensors", data));
