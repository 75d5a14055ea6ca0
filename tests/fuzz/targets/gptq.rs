//! A quantized linear: settings from the input's first bytes, tensors from the rest.
#![no_main]

mod folder;

use std::fs;

use gptq_checkpoint::{Bits, Checkpoint, LinearShape};

const PREFIX: &str = "model.layers.0.self_attn.q_proj";

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let [bits, group, format, skew, rest @ ..] = data else { return };
    let bits = [2_u8, 3, 4, 8][usize::from(bits % 4)];
    let group = [-1_i64, 32, 48, 64, 128][usize::from(group % 5)];
    let format = if format % 2 == 0 { "gptq" } else { "gptq_v2" };
    let dir = folder::folder();
    let text = format!(
        r#"{{"bits": {bits}, "group_size": {group}, "desc_act": true,
            "checkpoint_format": "{format}"}}"#
    );
    fs::write(dir.join("quantize_config.json"), text).expect("the settings");
    let groups = if group < 0 { 1 } else { 64_usize.div_ceil(group as usize) };
    let packed = 64 / 32 * usize::from(bits);
    let tensors = [
        ("qweight", "I32", [packed, 64], 4),
        ("qzeros", "I32", [groups, packed], 4),
        // Some inputs get a wrong shape.
        ("scales", "F16", [groups + usize::from(skew % 16 == 15), 64], 2),
        ("g_idx", "I32", [64, 1], 4),
        ("bias", "F16", [64, 1], 2),
    ];
    let mut entries = Vec::new();
    let mut values = Vec::new();
    let mut input = rest.iter().copied();
    for (leaf, dtype, shape, size) in tensors {
        let from = values.len();
        let bytes = shape[0] * shape[1] * size;
        values.extend((0..bytes).map(|_| input.next().unwrap_or(0)));
        let shape = if shape[1] == 1 { format!("[{}]", shape[0]) } else { format!("{shape:?}") };
        let to = from + bytes;
        entries.push(format!(
            r#""{PREFIX}.{leaf}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(values);
    fs::write(dir.join("model.safetensors"), file).expect("the input's file");

    let Ok(checkpoint) = Checkpoint::open(dir) else { panic!("a sound file was refused") };
    let config = checkpoint.quantize_config().expect("a quantized folder");
    assert_eq!(config.bits, Bits::new(bits).expect("a width of the format"));
    let shape: LinearShape = checkpoint.config().block_linears(0)[0].clone();
    if let Ok(linear) = checkpoint.gptq_linear(PREFIX, &shape) {
        assert_eq!(linear.dequantize().len(), 64 * 64);
        assert_eq!(linear.unpack_zeros().len(), groups * 64);
    }
});
