//! `gptq_manifest.json` as it comes from the Hub: what is accepted names files inside the folder only.
#![no_main]

use std::path::{Component, Path};

use gptq_records::manifest::Manifest;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if Manifest::parse(data).is_err() {
        return;
    }
    // Keys that nothing here reads may hold escapes that a reader of all keys refuses.
    let Ok(keys) = serde_json::from_slice::<serde_json::Value>(data) else { return };
    for name in keys["files"].as_object().into_iter().flat_map(|files| files.keys()) {
        let inside = |part| matches!(part, Component::Normal(_));
        assert!(Path::new(name).components().all(inside), "{name}");
    }
});
