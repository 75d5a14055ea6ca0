//! `--source-dtype`: which values of a source wider than fp16 reach the solver.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;

use safetensors::{Dtype, SafeTensors};
use util::runs::with_model;
use util::{Outcome, TinyLlama, Workdir};

const Q: &str = "model.layers.0.self_attn.q_proj";

/// Options of a run whose first column is solved first, and whose groups are of 32 columns.
const FIXED: [&str; 12] = [
    "--bits=4",
    "--group-size=32",
    "--act-order=false",
    "--calib-dataset",
    "text.txt",
    "--windows=4",
    "--seq-len",
    "32",
    "--seed",
    "0",
    "--out",
    "out",
];

/// A model in whose first group -0.9375 is the largest weight, so that the scale is exactly 1/8, and
/// 2.5 steps and a bit is the first: nearest to 3 as stored, and to even, 2, when fp16 drops the bit.
fn model() -> TinyLlama {
    let mut model = TinyLlama::new();
    let q = model.tensor(&format!("{Q}.weight"));
    q.values[..32].fill(0.0);
    q.values[0] = 0.3125 + 2_f32.powi(-14);
    q.values[1] = -0.9375;
    model
}

fn quantize(dir: &Workdir, options: &[&str]) -> Outcome {
    drop(fs::remove_dir_all(dir.path("out")));
    dir.gptq(&[&["quantize", "model"], &FIXED[..], options].concat())
}

/// The first code and the first scale's bits of q, and the recorded type.
fn written(dir: &Workdir, out: &str) -> (u8, u16, Option<String>) {
    let bytes = fs::read(dir.path(out).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().and_then(|m| m.get("source_dtype").cloned());
    let codes = file.tensor(&format!("{Q}.qweight")).unwrap().data()[0];
    let scale = file.tensor(&format!("{Q}.scales")).unwrap();
    let scale = u16::from_le_bytes(scale.data()[..2].try_into().unwrap());
    (codes & 15, scale, metadata)
}

#[test]
fn codes_are_of_the_values_asked_for() {
    let dir = with_model(&model());
    for recipe in ["--recipe=rtn", "--recipe=autogptq"] {
        for (options, code, name) in [
            (&["--device=cpu"][..], 8 + 2, "fp16"),
            (&["--device=cpu", "--source-dtype=fp16"], 8 + 2, "fp16"),
            (&["--device=cpu", "--source-dtype=fp32"], 8 + 3, "fp32"),
        ] {
            let made = quantize(&dir, &[options, &[recipe, "--json"]].concat()).json();
            assert_eq!(made["source_dtype"], name);
            // 1/8 in fp16 is 0x3000.
            let expected = (code, 0x3000, Some(name.to_owned()));
            assert_eq!(written(&dir, "out"), expected, "{recipe} {options:?}");
        }
    }
    quantize(&dir, &["--device=cpu", "--recipe=best", "--source-dtype=fp32"]).ok();
    assert_eq!(written(&dir, "out").2.unwrap(), "fp32");
    quantize(&dir, &["--device=cpu", "--layout=card", "--source-dtype=fp32"]).ok();
    assert_eq!(written(&dir, "out").2, None, "the published layout has no metadata");
    assert_eq!(quantize(&dir, &["--source-dtype=bf16"]).code, 1);
}

#[test]
fn fp16_sources_give_the_same_codes_either_way() {
    let mut model = TinyLlama::new();
    for tensor in model.tensors.values_mut() {
        // Nine bits below the leading one: exact in fp16.
        tensor.values.iter_mut().for_each(|v| *v = (*v * 512.0).round() / 512.0);
    }
    let dir = with_model(&model);
    let values = |options: &[&str]| {
        quantize(&dir, options).ok();
        let bytes = fs::read(dir.path("out/model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[header..].to_vec()
    };
    for recipe in ["--recipe=rtn", "--recipe=autogptq", "--recipe=best"] {
        let half = values(&["--device=cpu", recipe]);
        assert!(half == values(&["--device=cpu", recipe, "--source-dtype=fp32"]), "{recipe}");
    }
}

#[test]
fn what_fp16_cannot_hold_is_refused_either_way() {
    let name = format!("{Q}.weight");
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut model = model();
        model.tensor(&name).dtype = dtype;
        model.tensor(&name).values[7] = -65536.0;
        let dir = with_model(&model);
        for option in ["--source-dtype=fp16", "--source-dtype=fp32"] {
            for recipe in ["--recipe=rtn", "--recipe=autogptq"] {
                let outcome = quantize(&dir, &["--device=cpu", option, recipe]);
                outcome.refused(&[&name, "fp16"]);
                assert!(!dir.path("out").exists());
            }
        }
    }
}

#[test]
fn a_sweep_takes_it_from_its_configuration_or_the_command_line() {
    let dir = with_model(&model());
    let config = |line: &str| {
        dir.write("calib.toml", "name = \"t\"\ndataset = \"text.txt\"\njoin = \"card\"\nwindows = 4\nseq_len = 32\nseed = 0\n");
        dir.write(
            "sweep.toml",
            &format!(
                "model = \"model\"\ncalibration = \"calib.toml\"\n{line}\nrecipe = \"rtn\"\n\
                 damp = 0.01\n[evaluation]\ndataset = \"text.txt\"\nprotocol = \"paper\"\n\
                 seq_len = 32\n[[branch]]\nname = \"b\"\nbits = 4\ngroup_size = 32\n\
                 act_order = false\n"
            ),
        );
    };
    let sweep = |options: &[&str]| {
        drop(fs::remove_dir_all(dir.path("branches")));
        dir.gptq(&[&["sweep", "sweep.toml", "--device=cpu"], options].concat())
    };
    for (line, options, code, name) in [
        ("", &[][..], 10, "fp16"),
        ("source_dtype = \"fp32\"", &[], 11, "fp32"),
        ("source_dtype = \"fp32\"", &["--source-dtype=fp16"], 10, "fp16"),
        ("", &["--source-dtype=fp32"], 11, "fp32"),
    ] {
        config(line);
        let report = sweep(&[options, &["--json"]].concat()).json();
        assert_eq!(report["source_dtype"], name);
        let made = written(&dir, "branches/b");
        assert_eq!((made.0, made.2.as_deref()), (code, Some(name)), "{line} {options:?}");
        let shown = sweep(options);
        assert!(shown.ok().contains(&format!("KL to {name} in nats")), "{}", shown.stdout);
    }
    config("source_dtype = \"fp64\"");
    let refused = sweep(&[]);
    refused.refused(&["sweep.toml"]);
    assert!(refused.stderr.contains("fp64"), "{}", refused.stderr);
}

/// On a GPU the forward needs fp16, and the solver must still get what is stored.
#[test]
fn a_gpu_solves_the_stored_values_too() {
    if util::gpus::gpu().is_none() {
        return;
    }
    let dir = with_model(&model());
    let on = |device: &str, recipe: &str| {
        quantize(&dir, &[device, recipe, "--source-dtype=fp32"]).ok();
        fs::read(dir.path("out/model.safetensors")).unwrap()
    };
    // Rounding has no sums: one right result.
    assert!(on("--device=cuda", "--recipe=rtn") == on("--device=cpu", "--recipe=rtn"));
    on("--device=cuda", "--recipe=autogptq");
    assert_eq!(written(&dir, "out"), (8 + 3, 0x3000, Some("fp32".to_owned())));
    quantize(&dir, &["--device=cuda", "--recipe=autogptq"]).ok();
    assert_eq!(written(&dir, "out").0, 8 + 2);
    on("--device=cuda", "--recipe=best");
    println!("codes of a GPU are of the stored values");
}
