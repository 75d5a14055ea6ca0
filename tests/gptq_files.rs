//! GPTQ files as other programs write them: `ppl`, `inspect` and `verify` have one opinion of each.
//!
//! The files are packed here, bit by bit, from random codes, and beside each stands its *twin*: the
//! dense model that the file means, by the definition `scale * (code - zero)`. Reading a file rightly
//! is having the twin's perplexity.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::collections::BTreeMap;
use std::fs;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use util::{Noise, Outcome, TinyLlama, Workdir, words};

/// `DTYPE`, shape and bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// How a file is packed.
#[derive(Clone, Copy)]
struct Form {
    bits: usize,
    group: usize,
    sym: bool,
    /// Zeros are stored as they are, not minus one.
    plain_zeros: bool,
    /// Zeros of an asymmetric grid begin here.
    least_zero: u32,
}

const FOUR: Form = Form { bits: 4, group: 32, sym: true, plain_zeros: false, least_zero: 1 };

/// A GPTQ file, and the dense model that it means.
struct Packed {
    config: Value,
    tensors: BTreeMap<String, Stored>,
    twin: TinyLlama,
}

impl Packed {
    /// Packs every linear but those whose name ends in one of `dense`.
    fn new(form: Form, dense: &[&str]) -> Self {
        let mut twin = TinyLlama::with_mlp(128);
        // What is dense is held exactly by fp16, too.
        let round = |v: &mut f32| *v = (*v * 1024.0).round() / 1024.0;
        twin.tensors.values_mut().flat_map(|w| &mut w.values).for_each(round);
        let mut packed = BTreeMap::new();
        let mut noise = Noise::new(3);
        let linears: Vec<String> = twin
            .tensors
            .keys()
            .filter_map(|name| name.strip_suffix("_proj.weight"))
            .map(|name| format!("{name}_proj"))
            .filter(|name| !dense.iter().any(|d| name.ends_with(d)))
            .collect();
        for name in linears {
            let weight = twin.tensor(&format!("{name}.weight"));
            let (rows, cols) = (weight.shape[0], weight.shape[1]);
            let top = (1 << form.bits) - 1;
            let mut draw = |from: u32| {
                let unit = (noise.next() + 1.0) / 2.0;
                (from + (unit * (top + 1 - from) as f32) as u32).min(top)
            };
            let groups = cols.div_ceil(form.group);
            let codes: Vec<u32> = (0..rows * cols).map(|_| draw(0)).collect();
            let zero = |draw: &mut dyn FnMut(u32) -> u32| match form.sym {
                true => top.div_ceil(2),
                false => draw(form.least_zero),
            };
            let zeros: Vec<u32> = (0..groups * rows).map(|_| zero(&mut draw)).collect();
            // 2^-6 to 2^-9, which fp16 holds exactly, for codes of about one size.
            let powers: Vec<i32> =
                (0..groups * rows).map(|i| (i % 2) as i32 + form.bits as i32 + 1).collect();
            for r in 0..rows {
                for c in 0..cols {
                    let at = c / form.group * rows + r;
                    let step = codes[r * cols + c] as f32 - zeros[at] as f32;
                    weight.values[r * cols + c] = step * 2_f32.powi(-powers[at]);
                }
            }
            let column = |r: usize| (0..cols).map(|c| codes[r * cols + c]).collect::<Vec<_>>();
            let columns: Vec<Vec<u32>> = (0..rows).map(|r| stream(&column(r), form.bits)).collect();
            let mut qweight = Vec::new();
            for word in 0..cols / 32 * form.bits {
                qweight.extend(columns.iter().map(|column| column[word]));
            }
            let stored = |z: &u32| if form.plain_zeros { *z } else { z.wrapping_sub(1) & top };
            let qzeros: Vec<u32> = zeros
                .chunks(rows)
                .flat_map(|row| stream(&row.iter().map(stored).collect::<Vec<_>>(), form.bits))
                .collect();
            let scales: Vec<u8> =
                powers.iter().flat_map(|p| (((15 - p) as u16) << 10).to_le_bytes()).collect();
            let g_idx: Vec<u32> = (0..cols).map(|c| (c / form.group) as u32).collect();
            let mut add = |leaf: &str, dtype, shape: [usize; 2], bytes| {
                packed.insert(format!("{name}.{leaf}"), (dtype, shape.to_vec(), bytes));
            };
            let words = |values: &[u32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
            add("qweight", Dtype::I32, [cols / 32 * form.bits, rows], words(&qweight));
            add("qzeros", Dtype::I32, [groups, rows / 32 * form.bits], words(&qzeros));
            add("scales", Dtype::F16, [groups, rows], scales);
            packed.insert(format!("{name}.g_idx"), (Dtype::I32, vec![cols], words(&g_idx)));
        }
        let mut tensors = packed;
        for (name, weight) in &twin.tensors {
            let linear = name.strip_suffix(".weight").unwrap_or(name);
            if !tensors.contains_key(&format!("{linear}.qweight")) {
                let bytes = weight.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                tensors.insert(name.clone(), (Dtype::F32, weight.shape.clone(), bytes));
            }
        }
        let mut config = twin.config.clone();
        config["quantization_config"] = json!({
            "bits": form.bits, "group_size": form.group, "desc_act": false, "sym": form.sym,
            "damp_percent": 0.01, "true_sequential": true, "quant_method": "gptq",
        });
        Self { config, tensors, twin }
    }

    fn settings(&mut self) -> &mut Value {
        &mut self.config["quantization_config"]
    }

    /// Writes the file as `g` and its twin as `twin`, with the settings in config.json.
    fn write(&self, dir: &Workdir) {
        self.twin.write(&dir.path("twin"));
        let folder = dir.path("g");
        let _ = fs::remove_dir_all(&folder);
        self.twin.write_small_files(&folder);
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        let bytes = safetensors::serialize(views, metadata).unwrap();
        fs::write(folder.join("model.safetensors"), bytes).unwrap();
        dir.write("text.txt", &words(300));
    }

    fn each(&mut self, leaf: &str, change: impl Fn(&mut Stored)) {
        let found = self.tensors.iter_mut().filter(|(name, _)| name.ends_with(leaf));
        found.for_each(|(_, stored)| change(stored));
    }
}

/// Values of `bits` bits as one little-endian stream, 32 of them in `bits` words.
fn stream(values: &[u32], bits: usize) -> Vec<u32> {
    let mut words = vec![0; values.len() / 32 * bits];
    for (i, value) in values.iter().enumerate() {
        for bit in 0..bits {
            let at = i * bits + bit;
            words[at / 32] |= (value >> bit & 1) << (at % 32);
        }
    }
    words
}

fn ppl(dir: &Workdir, folder: &str) -> Outcome {
    let args = ["--device", "cpu", "--dataset", "text.txt", "--seq-len", "64", "--json"];
    dir.gptq(&[&["ppl", folder], &args[..]].concat())
}

/// Asserts that the file has its twin's perplexity; gives what was said on the way.
#[track_caller]
fn reads_as_twin(dir: &Workdir) -> String {
    let number = |outcome: &Outcome| outcome.json()["perplexity"].as_f64().unwrap();
    let (file, twin) = (ppl(dir, "g"), ppl(dir, "twin"));
    let (found, wanted) = (number(&file), number(&twin));
    assert!((found / wanted - 1.0).abs() < 1e-5, "{found}, its twin {wanted}: {}", file.stderr);
    dir.gptq(&["inspect", "g"]).ok();
    file.stderr
}

/// The verdict on a loader: whether it loads the file, and the reasons.
fn verdict(dir: &Workdir, loader: &str) -> (bool, String) {
    let outcome = dir.gptq(&["verify", "g", "--json"]);
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let rows = report["loaders"].as_array().unwrap();
    let row = rows.iter().find(|row| row["loader"] == loader).unwrap_or_else(|| panic!("{loader}"));
    (row["loads"].as_bool().unwrap(), row["reasons"].to_string())
}

#[track_caller]
fn refuses(dir: &Workdir, loader: &str, why: &str) {
    let (loads, reasons) = verdict(dir, loader);
    assert!(!loads && reasons.contains(why), "{loader}: {loads} {reasons}");
}

/// Asserts that all three commands refuse the file with these words.
#[track_caller]
fn all_refuse(dir: &Workdir, names: &[&str]) {
    ppl(dir, "g").refused(names);
    dir.gptq(&["inspect", "g"]).refused(names);
    let outcome = dir.gptq(&["verify", "g"]);
    let messages = format!("{}{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.code, 1, "{messages}");
    names.iter().for_each(|name| assert!(messages.contains(name), "`{name}` is not in {messages}"));
}

#[test]
fn the_zeros_of_a_symmetric_grid_tell_how_they_are_stored() {
    let dir = Workdir::new();
    for bits in [2, 3, 4, 8] {
        for plain_zeros in [false, true] {
            let mut file = Packed::new(Form { bits, plain_zeros, ..FOUR }, &[]);
            let (right, wrong) = match plain_zeros {
                true => ("gptq_v2", "gptq"),
                false => ("gptq", "gptq_v2"),
            };
            file.settings()["checkpoint_format"] = json!(right);
            file.write(&dir);
            assert!(!reads_as_twin(&dir).contains("warning"));
            dir.gptq(&["verify", "g"]).ok();

            file.settings()["checkpoint_format"] = json!(wrong);
            file.write(&dir);
            let messages = reads_as_twin(&dir);
            let counted = format!(
                "14 of 14 packed linears store their zeros {}",
                match plain_zeros {
                    true => "without the minus one",
                    false => "minus one",
                }
            );
            assert!(messages.contains("warning") && messages.contains(&counted), "{messages}");
            let outcome = dir.gptq(&["verify", "g"]);
            assert_eq!(outcome.code, 1);
            assert!(outcome.stdout.contains("minus one"), "{}", outcome.stdout);
            refuses(&dir, "GPTQModel", "zeros are stored");
        }
    }
    // Zeros that a symmetric grid does not have: read as they are, and said.
    let mut file = Packed::new(Form { sym: false, ..FOUR }, &[]);
    file.settings()["sym"] = json!(true);
    file.write(&dir);
    assert!(reads_as_twin(&dir).contains("14 of 14 packed linears hold zeros"));
}

#[test]
fn the_format_of_zeros_has_two_names_and_two_places() {
    let dir = Workdir::new();
    let v2 = Form { sym: false, plain_zeros: true, ..FOUR };
    for bits in [3, 4, 8] {
        let mut file = Packed::new(Form { bits, ..v2 }, &[]);
        file.settings()["format"] = json!("gptq_v2");
        file.write(&dir);
        reads_as_twin(&dir);
    }
    // AutoGPTQ's file does not say it.
    let mut file = Packed::new(v2, &[]);
    let mut keys = file.settings().clone();
    keys.as_object_mut().unwrap().remove("quant_method");
    file.settings()["checkpoint_format"] = json!("gptq_v2");
    file.write(&dir);
    dir.write("g/quantize_config.json", &keys.to_string());
    reads_as_twin(&dir);

    keys["format"] = json!("gptq");
    dir.write("g/quantize_config.json", &keys.to_string());
    let names = ["quantize_config.json", "`format` is `gptq`", "`checkpoint_format`", "`gptq_v2`"];
    ppl(&dir, "g").refused(&names);
    dir.gptq(&["inspect", "g"]).refused(&names);
    let outcome = dir.gptq(&["verify", "g"]);
    let both = "checkpoint_format is gptq in quantize_config.json and gptq_v2 in config.json";
    assert!(outcome.code == 1 && outcome.stdout.contains(both), "{}", outcome.stdout);
    fs::remove_file(dir.path("g/quantize_config.json")).unwrap();
    file.settings()["format"] = json!("gptq");
    file.write(&dir);
    all_refuse(&dir, &["`format` is `gptq`", "`checkpoint_format` is `gptq_v2`"]);
}

/// Writes quantize_config.json: the settings of config.json, changed.
fn beside(dir: &Workdir, file: &mut Packed, change: impl FnOnce(&mut Value)) {
    let mut keys = file.settings().clone();
    keys.as_object_mut().unwrap().remove("quant_method");
    change(&mut keys);
    dir.write("g/quantize_config.json", &keys.to_string());
}

#[test]
fn what_one_file_does_not_say_the_other_does() {
    let dir = Workdir::new();
    // Not symmetric, by config.json alone: otherwise its zeros are reported as odd.
    let mut file = Packed::new(Form { sym: false, ..FOUR }, &[]);
    file.write(&dir);
    for key in ["sym", "bits", "group_size", "desc_act", "true_sequential", "damp_percent"] {
        beside(&dir, &mut file, |keys| drop(keys.as_object_mut().unwrap().remove(key)));
        assert!(!reads_as_twin(&dir).contains("warning"), "{key}");
    }
    // Act-order by config.json alone, with an index of zeros or none.
    let mut file = Packed::new(FOUR, &[]);
    file.settings()["desc_act"] = json!(true);
    for (lost, gone) in [("holds only zeros", false), ("is missing", true)] {
        file.each(".g_idx", |(_, _, bytes)| bytes.fill(0));
        file.tensors.retain(|name, _| !gone || !name.ends_with(".g_idx"));
        file.write(&dir);
        beside(&dir, &mut file, |keys| drop(keys.as_object_mut().unwrap().remove("desc_act")));
        ppl(&dir, "g").refused(&["q_proj.g_idx", lost, "act-order"]);
        dir.gptq(&["inspect", "g"]).refused(&["q_proj.g_idx", lost, "act-order"]);
        let outcome = dir.gptq(&["verify", "g"]);
        assert!(outcome.code == 1 && outcome.stdout.contains("q_proj.g_idx"), "{}", outcome.stdout);
    }
}

#[test]
fn what_two_files_contradict_each_other_in_is_refused() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    file.settings()["model_file_base_name"] = json!("model");
    file.settings()["modules_in_block_to_quantize"] = json!(["mlp.up_proj", "mlp.down_proj"]);
    file.write(&dir);
    beside(&dir, &mut file, |keys| {
        keys["modules_in_block_to_quantize"] = json!([["mlp.down_proj"], ["mlp.up_proj"]]);
    });
    dir.gptq(&["inspect", "g"]).ok();
    for (key, value) in [
        ("bits", json!(8)),
        ("group_size", json!(64)),
        ("desc_act", json!(true)),
        ("sym", json!(false)),
        ("modules_in_block_to_quantize", json!(["mlp.up_proj"])),
    ] {
        beside(&dir, &mut file, |keys| keys[key] = value.clone());
        let shown = format!("`{key}` is `{value}`").replace('"', "");
        let other = format!("but `{key}` in quantization_config of config.json is `");
        let place = "quantize_config.json`";
        let names =
            if value.is_array() { [place, &other, &other] } else { [place, &shown, &other] };
        ppl(&dir, "g").refused(&names);
        dir.gptq(&["inspect", "g"]).refused(&names);
        let outcome = dir.gptq(&["verify", "g"]);
        let found = outcome.stdout.contains(&format!("{key} is "));
        assert!(outcome.code == 1 && found, "{key}: {}", outcome.stdout);
    }
    // How it was made changes nothing that is read, but one of the files is wrong about it.
    for (key, value) in [("damp_percent", json!(0.1)), ("true_sequential", json!(false))] {
        beside(&dir, &mut file, |keys| keys[key] = value.clone());
        dir.gptq(&["inspect", "g"]).ok();
        let outcome = dir.gptq(&["verify", "g"]);
        let found = outcome.stdout.contains(&format!("{key} is "));
        assert!(outcome.code == 1 && found, "{key}: {}", outcome.stdout);
    }
}

#[test]
fn both_files_are_held_to_what_is_supported() {
    let dir = Workdir::new();
    for (key, value) in [
        ("dynamic", json!({"-:.*down.*": {}})),
        ("pack_dtype", json!("int16")),
        ("lm_head", json!(true)),
        ("is_marlin_format", json!(true)),
        ("checkpoint_format", json!("marlin")),
        ("bits", json!(5)),
        ("desc_act", json!("yes")),
    ] {
        let mut file = Packed::new(FOUR, &[]);
        let sound = file.settings().clone();
        file.settings()[key] = value.clone();
        file.write(&dir);
        beside(&dir, &mut file, |keys| {
            *keys = sound;
            keys.as_object_mut().unwrap().remove("quant_method");
        });
        all_refuse(&dir, &["g/config.json", &format!("`{key}` is")]);
    }
    let mut file = Packed::new(FOUR, &[]);
    file.write(&dir);
    beside(&dir, &mut file, |_| {});
    file.config["quantization_config"] = json!([]);
    dir.write("g/config.json", &file.config.to_string());
    dir.gptq(&["inspect", "g"]).refused(&["g/config.json", "`quantization_config` is `[]`"]);
}

/// Changes the type that scales are stored in.
fn store_scales(file: &mut Packed, as_bf16: bool, change: impl Fn(f32) -> f32) {
    file.each(".scales", |(dtype, _, bytes)| {
        let halves = bytes.as_chunks().0.iter().map(|&half| f16::from_le_bytes(half));
        let values = halves.map(|half| change(half.to_f32()));
        (*dtype, *bytes) = match as_bf16 {
            true => (
                Dtype::BF16,
                values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>(),
            ),
            false => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
        };
    });
}

#[test]
fn scales_and_indices_of_other_types_are_read_with_a_warning() {
    let dir = Workdir::new();
    for as_bf16 in [true, false] {
        let mut file = Packed::new(FOUR, &[]);
        store_scales(&mut file, as_bf16, |scale| scale);
        file.write(&dir);
        let messages = reads_as_twin(&dir);
        let counted = "14 of 14 packed linears store their `scales` as F32 or BF16";
        assert!(messages.contains(counted) && messages.contains("exactly"), "{messages}");
        let outcome = dir.gptq(&["verify", "g"]);
        assert_eq!(outcome.code, 1);
        assert!(outcome.stdout.contains("expected F16"), "{}", outcome.stdout);
        assert!(outcome.stdout.contains("not checked with scales stored as"), "{}", outcome.stdout);
    }
    // A third has no end in binary.
    let mut file = Packed::new(FOUR, &[]);
    store_scales(&mut file, false, |scale| scale / 3.0);
    file.write(&dir);
    let outcome = ppl(&dir, "g");
    outcome.ok();
    assert!(outcome.stderr.contains("and those of 14 rounded"), "{}", outcome.stderr);
    for (factor, named) in [(1e-6, "too small for fp16"), (1e8, "overflows fp16")] {
        let mut file = Packed::new(FOUR, &[]);
        store_scales(&mut file, false, |scale| scale * factor);
        file.write(&dir);
        ppl(&dir, "g").refused(&["_proj.scales", named]);
        dir.gptq(&["inspect", "g"]).refused(&["_proj.scales", named]);
    }

    let mut file = Packed::new(FOUR, &[]);
    file.each(".g_idx", |(dtype, _, bytes)| {
        let groups = bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
        *bytes = groups.flat_map(|group| u64::from(group).to_le_bytes()).collect();
        *dtype = Dtype::I64;
    });
    file.write(&dir);
    let messages = reads_as_twin(&dir);
    assert!(messages.contains("14 of 14 packed linears store their `g_idx` as I64"), "{messages}");
    let verified = dir.gptq(&["verify", "g"]);
    assert_eq!(verified.code, 1);
    assert!(
        verified.stdout.contains("not checked with g_idx stored as I64"),
        "{}",
        verified.stdout
    );
    // They have a sum, as all that is there.
    dir.gptq(&["inspect", "g", "--checksum"]).ok();
    // The low half of what is no group at all is one.
    file.each("layers.1.mlp.up_proj.g_idx", |(_, _, bytes)| bytes[4] = 1);
    file.write(&dir);
    let names = ["layers.1.mlp.up_proj.g_idx", "to group 4294967296"];
    ppl(&dir, "g").refused(&names);
    dir.gptq(&["inspect", "g"]).refused(&names);
}

#[test]
fn a_dense_weight_beside_a_packed_one_is_warned_of() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    let name = "model.layers.0.self_attn.q_proj.weight";
    file.tensors.insert(name.to_owned(), (Dtype::F16, vec![64, 64], vec![0; 2 * 64 * 64]));
    file.write(&dir);
    let messages = reads_as_twin(&dir);
    assert!(messages.contains("1 dense tensor") && messages.contains(name), "{messages}");
    let inspected = dir.gptq(&["inspect", "g", "--json"]);
    assert!(inspected.stderr.contains(name), "{}", inspected.stderr);
    assert_eq!(inspected.json()["left_out"], json!([name]));
    let outcome = dir.gptq(&["verify", "g"]);
    assert!(outcome.code == 1 && outcome.stdout.contains(name), "{}", outcome.stdout);

    // And what is left of a packing beside a dense linear.
    let mut file = Packed::new(FOUR, &["o_proj"]);
    let left = "model.layers.0.self_attn.o_proj.scales";
    file.tensors.insert(left.to_owned(), (Dtype::F16, vec![2, 64], vec![0; 2 * 2 * 64]));
    file.write(&dir);
    assert!(reads_as_twin(&dir).contains(left));
}

#[test]
fn an_absent_group_index_is_known_without_act_order() {
    let dir = Workdir::new();
    for group in [32, 128] {
        let mut file = Packed::new(Form { group, ..FOUR }, &[]);
        file.tensors.retain(|name, _| !name.ends_with(".g_idx"));
        file.write(&dir);
        reads_as_twin(&dir);
        dir.gptq(&["verify", "g"]).ok();
        refuses(&dir, "TGI", "no g_idx");
        file.settings()["desc_act"] = json!(true);
        file.write(&dir);
        if group == 32 {
            all_refuse(&dir, &["q_proj.g_idx", "is missing", "act-order"]);
        } else {
            // One group has one order.
            file.settings()["group_size"] = json!(-1);
            file.write(&dir);
            reads_as_twin(&dir);
        }
    }
}

#[test]
fn a_placeholder_index_is_not_read_in_silence() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    file.each(".g_idx", |(_, _, bytes)| bytes.fill(0));
    file.write(&dir);
    assert!(reads_as_twin(&dir).contains("14 of 14 packed linears have a `g_idx` of zeros"));
    let outcome = dir.gptq(&["verify", "g"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stdout.contains("q_proj.g_idx gives group 0"), "{}", outcome.stdout);
    refuses(&dir, "GPTQModel", "placeholder");

    file.settings()["desc_act"] = json!(true);
    file.write(&dir);
    let names = ["q_proj.g_idx", "holds only zeros", "act-order"];
    ppl(&dir, "g").refused(&names);
    dir.gptq(&["inspect", "g"]).refused(&names);
    assert_eq!(dir.gptq(&["verify", "g"]).code, 1);
}

#[test]
fn settings_in_config_json_alone_are_no_fault() {
    let dir = Workdir::new();
    Packed::new(FOUR, &[]).write(&dir);
    dir.gptq(&["verify", "g"]).ok();
    refuses(&dir, "AutoGPTQ 0.4", "no quantize_config.json");
    assert!(verdict(&dir, "transformers").0);
}

#[test]
fn linears_that_were_left_dense_are_read_by_all() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &["down_proj", "o_proj"]);
    let packed = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].as_slice()];
    let packed = [packed[0], &["mlp.gate_proj", "mlp.up_proj"]];
    file.settings()["modules_in_block_to_quantize"] = json!(packed);
    file.write(&dir);
    reads_as_twin(&dir);
    let report = dir.gptq(&["inspect", "g", "--json"]).json();
    assert_eq!(report["quantization"]["linears"], 10);
    assert_eq!(report["quantization"]["dense_linears"], 4);
    dir.gptq(&["verify", "g", "--base", "twin"]).ok();
    refuses(&dir, "AutoGPTQ 0.7", "self_attn.o_proj is dense");

    // A dense linear that is not the base's is found like any other tensor.
    let name = "model.layers.1.mlp.down_proj.weight";
    file.tensors.get_mut(name).unwrap().2[..4].fill(0);
    file.write(&dir);
    let outcome = dir.gptq(&["verify", "g", "--base", "twin"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stdout.contains(&format!("{name} has 1 values")), "{}", outcome.stdout);

    // Without the list nobody else would know.
    file.settings()["modules_in_block_to_quantize"] = Value::Null;
    file.write(&dir);
    let outcome = dir.gptq(&["verify", "g"]);
    assert!(outcome.stdout.contains("mlp.down_proj.qweight is missing"), "{}", outcome.stdout);
}

#[test]
fn a_packed_head_is_refused_by_name() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    file.tensors.remove("lm_head.weight");
    let head = (Dtype::I32, vec![8, 64], vec![0; 4 * 8 * 64]);
    file.tensors.insert("lm_head.qweight".to_owned(), head);
    file.write(&dir);
    all_refuse(&dir, &["`lm_head.qweight` is packed"]);
}

#[test]
fn packed_tensors_without_settings_are_named_with_what_to_do() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    file.config.as_object_mut().unwrap().remove("quantization_config");
    file.write(&dir);
    let packed = "model.layers.0.mlp.down_proj.qweight";
    all_refuse(&dir, &[packed, "no file says how they are quantized", "quantize_config.json"]);
    // What others call a setting.
    dir.write("g/quantize_config.json", r#"{"wbits": 4, "groupsize": 32}"#);
    all_refuse(&dir, &["`bits` is missing", "`wbits`"]);
    fs::remove_file(dir.path("g/quantize_config.json")).unwrap();
    dir.write("g/quant_config.json", r#"{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}"#);
    all_refuse(&dir, &["AWQ", "quantize the dense model"]);
    fs::remove_file(dir.path("g/quant_config.json")).unwrap();
    let number = (Dtype::I64, vec![1], 4_u64.to_le_bytes().to_vec());
    file.tensors.insert("gptq_bits".to_owned(), number);
    file.write(&dir);
    all_refuse(&dir, &["TGI", "`gptq_bits`"]);
}

/// Files of 2023 have frequencies without biases, or biases of some linears.
#[test]
fn what_old_files_add_in_part_is_no_fault() {
    let dir = Workdir::new();
    let mut file = Packed::new(FOUR, &[]);
    let frequencies = (Dtype::F32, vec![8], vec![0; 32]);
    for block in 0..2 {
        let name = format!("model.layers.{block}.self_attn.rotary_emb.inv_freq");
        file.tensors.insert(name, frequencies.clone());
    }
    file.write(&dir);
    reads_as_twin(&dir);
    dir.gptq(&["verify", "g"]).ok();
    let bias = (Dtype::F16, vec![64], vec![0; 128]);
    file.tensors.insert("model.layers.1.self_attn.o_proj.bias".to_owned(), bias);
    file.write(&dir);
    reads_as_twin(&dir);
    dir.gptq(&["verify", "g"]).ok();
}

#[test]
fn asymmetric_files_are_refused_by_who_cannot_read_them() {
    let dir = Workdir::new();
    let mut file = Packed::new(Form { sym: false, ..FOUR }, &[]);
    file.write(&dir);
    reads_as_twin(&dir);
    dir.gptq(&["verify", "g"]).ok();
    refuses(&dir, "GPTQModel", "asymmetric");
    assert!(verdict(&dir, "ExLlama").0);
    file.settings()["meta"] = json!({"quantizer": ["gptqmodel:1.4.5"]});
    file.write(&dir);
    assert!(verdict(&dir, "GPTQModel").0);
    file.settings()["meta"] = json!({"quantizer": "gptqmodel:0.8.1"});
    file.write(&dir);
    refuses(&dir, "GPTQModel", "asymmetric");

    // A zero of 0 is stored as all ones: adding one without wrapping gives 16.
    Packed::new(Form { sym: false, least_zero: 0, ..FOUR }, &[]).write(&dir);
    reads_as_twin(&dir);
    dir.gptq(&["verify", "g"]).ok();
    refuses(&dir, "ExLlama", "zeros of 0");
}
