//! `quantize_config.json`: what is accepted and written again is read as the same.
#![no_main]

use std::path::Path;

use gptq_checkpoint::{CheckpointFormat, Layout, QuantizeConfig};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = Path::new("quantize_config.json");
    let Ok(config) = QuantizeConfig::parse(text, file) else { return };
    assert!(config.groups(4096) > 0);
    // The format's version is not among the keys that AutoGPTQ reads.
    let written = QuantizeConfig { checkpoint_format: CheckpointFormat::Gptq, ..config };
    let text = written.file_text(Layout::Modern).expect("text of what was read");
    assert_eq!(QuantizeConfig::parse(&text, file).expect("our own text"), written);
});
