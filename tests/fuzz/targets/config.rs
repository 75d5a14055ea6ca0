//! `config.json`: what is accepted has a shape that can be planned with.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use gptq_checkpoint::{Bits, Layout, ModelConfig, QuantizeConfig, plan_files};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(config) = ModelConfig::parse(text, Path::new("config.json")) else { return };
    for linear in config.block_linears(0) {
        assert!(linear.in_features > 0 && linear.out_features > 0);
    }
    // A plan has a line for each tensor.
    const LINEARS: usize = 10_000;
    if config.linears().take(LINEARS).count() < LINEARS {
        let quantize = QuantizeConfig::new(Bits::Four, Some(128), 0.01, true);
        let _ = plan_files(&config, &quantize, Layout::Card, &BTreeMap::new(), None);
    }
});
