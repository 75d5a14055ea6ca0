//! A whole `.bin` file: the archive's directory, the pickle, and the views of its storages.
#![no_main]

mod folder;

libfuzzer_sys::fuzz_target!(|data: &[u8]| folder::read("pytorch_model.bin", data));
