//! Damaged models, unfit texts and occupied outputs: one clear error that names the culprit, exit
//! code 1, and nothing left under the output's name. Then the odd inputs that must work.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::Dtype;
use serde_json::{Value, json};
use util::needs::Need;
use util::runs::{CALIBRATION, leaves_nothing, perplexity, ppl, quantize, with_model, workdir};
use util::{TinyLlama, Workdir, listing, words};

/// Quantizing and measuring both refuse the model and name the culprit.
#[track_caller]
fn both_refuse(dir: &Workdir, names: &[&str]) {
    quantize(dir, &[]).refused(names);
    quantize(dir, &["--recipe", "rtn"]).refused(names);
    leaves_nothing(dir);
    ppl(dir, "model", &[]).refused(names);
}

/// A tiny model with one tensor changed.
#[track_caller]
fn damaged(tensor: &str, change: impl FnOnce(&mut util::Weights)) -> Workdir {
    let mut model = TinyLlama::new();
    change(model.tensor(tensor));
    with_model(&model)
}

/// A tiny model changed as a whole.
fn damaged_file(change: impl FnOnce(&mut TinyLlama)) -> Workdir {
    let mut model = TinyLlama::new();
    change(&mut model);
    with_model(&model)
}

#[test]
fn a_missing_shard_is_named() {
    let dir = workdir(|dir| {
        let shards = TinyLlama::new().write_sharded(dir, 3);
        fs::remove_file(&shards[1]).unwrap();
    });
    both_refuse(&dir, &["model.safetensors.index.json", "model-00002-of-00003.safetensors"]);
}

#[test]
fn an_index_that_disagrees_with_its_shards_names_the_tensor() {
    const SHARDS: [&str; 2] =
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let dir = workdir(|dir| {
        TinyLlama::new().write_sharded(dir, 2);
        let path = dir.join("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let place = &mut index["weight_map"]["model.norm.weight"];
        let other = if *place == SHARDS[0] { SHARDS[1] } else { SHARDS[0] };
        *place = json!(other);
        fs::write(&path, index.to_string()).unwrap();
    });
    both_refuse(&dir, &["model.safetensors.index.json", "model.norm.weight"]);
}

/// A pipe that nobody writes to and a device without an end are in no model: none is waited for.
#[test]
fn special_files_are_not_read() {
    let dir = with_model(&TinyLlama::new());
    let file = |name: &str| dir.path("model").join(name);
    let refuse = |name: &str, reason: &str| {
        for outcome in [ppl(&dir, "model", &[]), dir.gptq(&["inspect", "model"])] {
            outcome.refused(&[&format!("model/{name}`")]);
            assert!(outcome.stderr.contains(reason), "{}", outcome.stderr);
        }
        assert_eq!(dir.gptq(&["verify", "model"]).code, 1);
    };
    let special = "no regular file";
    std::os::unix::fs::symlink("/dev/zero", file("quantize_config.json")).unwrap();
    refuse("quantize_config.json", special);
    fs::remove_file(file("quantize_config.json")).unwrap();
    fs::File::create(file("quantize_config.json")).unwrap().set_len(65 << 20).unwrap();
    refuse("quantize_config.json", "more than 64 MiB");
    fs::remove_file(file("quantize_config.json")).unwrap();

    fs::rename(file("config.json"), dir.path("kept.json")).unwrap();
    assert!(Command::new("mkfifo").arg(file("config.json")).status().unwrap().success());
    refuse("config.json", special);
    fs::remove_file(file("config.json")).unwrap();
    // Links are followed, as the Hub's cache needs.
    std::os::unix::fs::symlink("../kept.json", file("config.json")).unwrap();
    perplexity(&dir, "model", &[]);
}

#[test]
fn a_truncated_file_is_named() {
    // In the length of the header, in the header, in the data, and nothing at all.
    for length in [4, 200, 20_000, 0] {
        let dir = workdir(|dir| {
            TinyLlama::new().write(dir);
            let file = fs::OpenOptions::new().write(true).open(dir.join("model.safetensors"));
            file.unwrap().set_len(length).unwrap();
        });
        both_refuse(&dir, &["model/model.safetensors"]);
    }
}

#[test]
fn a_wrong_shape_names_the_tensor_and_both_shapes() {
    for (name, shape) in [
        ("model.layers.1.mlp.up_proj.weight", vec![64, 96]),
        ("model.layers.0.self_attn.k_proj.weight", vec![64, 32]),
        ("model.norm.weight", vec![1, 64]),
        ("model.embed_tokens.weight", vec![32, 128]),
        ("lm_head.weight", vec![64 * 64]),
    ] {
        let dir = damaged(name, |w| w.shape.clone_from(&shape));
        both_refuse(&dir, &[name, &format!("{shape:?}"), "expected"]);
    }
}

#[test]
fn a_wrong_dtype_names_the_tensor() {
    for name in
        ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
    {
        both_refuse(&damaged(name, |w| w.dtype = Dtype::I32), &[name, "I32"]);
        both_refuse(&damaged(name, |w| w.dtype = Dtype::F64), &[name, "F64"]);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    for name in [
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ] {
        let mut model = TinyLlama::new();
        model.tensors.remove(name).unwrap();
        both_refuse(&with_model(&model), &[name]);
    }
}

#[test]
fn what_headers_show_is_refused_before_any_block() {
    let last = "model.layers.1.mlp.down_proj.weight";
    for name in ["lm_head.weight", "model.norm.weight", last] {
        let missing = damaged_file(|model| {
            model.tensors.remove(name);
        });
        let other_shape = damaged_file(|model| model.tensor(name).shape.push(1));
        for dir in [missing, other_shape] {
            for command in [&["--recipe=rtn"][..], &["--recipe=best"]] {
                let refused = quantize(&dir, command);
                refused.refused(&[name]);
                assert!(!refused.stderr.contains("block "), "{}", refused.stderr);
            }
            dir.gptq(&["inspect", "model"]).refused(&[name]);
        }
    }
}

#[test]
fn what_changes_nothing_is_warned_of_or_refused() {
    let dir = with_model(&TinyLlama::new());
    let rtn = ["--recipe", "rtn"];
    quantize(&dir, &[&rtn[..], &["--strict"]].concat()).refused(&["rtn", "--strict"]);
    let made = quantize(&dir, &rtn);
    made.ok();
    assert!(made.stderr.contains("warning: recipe rtn does not calibrate"), "{}", made.stderr);
    for option in ["--device=cpu", "--gpu-memory=1GB"] {
        dir.gptq(&["verify", "out", option]).refused(&["--dataset", "device"]);
    }
    let many = ["--windows", "9000000000000000000"];
    dir.gptq(&[&["quantize", "model", "--out", "other"], &many[..]].concat()).refused(&["windows"]);
}

#[test]
fn a_closed_pipe_does_not_change_the_verdict() {
    let dir = with_model(&TinyLlama::new());
    quantize(&dir, &[]).ok();
    let path = dir.path("out/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len() - 1;
    bytes[end] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["verify", "out"])
        .current_dir(dir.path(""))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_recipe_on_the_command_line_brings_its_own_damping() {
    let dir = with_model(&TinyLlama::new());
    let branch = "[[branch]]\nname = \"b\"\nbits = 4\ngroup_size = 32\nact_order = true\n";
    for (line, damp) in [("", 0.01), ("damp = 0.05\n", 0.05)] {
        let recipe = "model = \"model\"\ncalibration = \"card\"\nrecipe = \"best\"\n";
        dir.write("sweep.toml", &format!("{recipe}{line}{branch}"));
        let options = ["--branch", "b", "--config", "sweep.toml", "--recipe", "autogptq", "--json"];
        assert_eq!(quantize(&dir, &options).json()["damp"], damp);
        fs::remove_dir_all(dir.path("out")).unwrap();
    }
}

#[test]
fn a_configuration_names_files_from_its_own_folder() {
    let dir = workdir(|model| TinyLlama::new().write(model));
    fs::create_dir(dir.path("sub")).unwrap();
    fs::rename(dir.path("text.txt"), dir.path("sub/text.txt")).unwrap();
    dir.write(
        "sub/sweep.toml",
        "model = \"../model\"\ncalibration = \"card\"\nrecipe = \"best\"\n\
         [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 2\nseq_len = 32\n[[branch]]\nname = \"b\"\nbits = 4\n\
         group_size = 32\nact_order = true\n",
    );
    dir.gptq(&["sweep", "sub/sweep.toml", "--device=cpu"]).ok();
}

#[test]
fn a_card_too_small_is_marked_in_the_plan() {
    let dir = with_model(&TinyLlama::new());
    let plan = |memory: &str| {
        dir.gptq(&["plan", "model", "--gpu-memory", memory, "--json"]).json()[0]["fits"].clone()
    };
    assert_eq!((plan("80GB"), plan("1000B")), (json!(true), json!(false)));
    let shown = dir.gptq(&["plan", "model", "--gpu-memory", "1000B"]);
    assert!(shown.ok().contains("too much"), "{}", shown.stdout);
}

#[test]
fn nan_and_infinity_name_the_tensor() {
    for name in [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ] {
        both_refuse(&damaged(name, |w| w.values[33] = f32::NAN), &[name, "NaN"]);
        both_refuse(&damaged(name, |w| w.values[63] = f32::INFINITY), &[name, "inf"]);
    }
    // The embedding of a word that the text does not use matters to the next user.
    let unused = |w: &mut util::Weights| w.values[0] = f32::NAN;
    both_refuse(&damaged("model.embed_tokens.weight", unused), &["model.embed_tokens.weight"]);
}

#[test]
fn what_fp16_cannot_hold_is_named() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let dir = damaged(name, |w| w.values[7] = 1e6);
    quantize(&dir, &[]).refused(&[name, "fp16"]);
    leaves_nothing(&dir);
}

#[test]
fn configurations_of_other_models_are_refused() {
    for (key, value, named) in [
        ("model_type", json!("mamba"), "mamba"),
        ("model_type", Value::Null, "model_type"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("hidden_size", json!(63), "hidden_size"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("vocab_size", json!("many"), "vocab_size"),
    ] {
        let mut model = TinyLlama::new();
        model.config[key] = value;
        both_refuse(&with_model(&model), &["model/config.json", named]);
    }
}

#[test]
fn missing_small_files_are_named() {
    for (file, named) in [("config.json", "config.json"), ("tokenizer.json", "tokenizer.json")] {
        let dir = with_model(&TinyLlama::new());
        fs::remove_file(dir.path("model").join(file)).unwrap();
        quantize(&dir, &[]).refused(&[named]);
        ppl(&dir, "model", &[]).refused(&[named]);
        leaves_nothing(&dir);
    }
    let dir = with_model(&TinyLlama::new());
    dir.write("model/config.json", "{");
    both_refuse(&dir, &["config.json"]);
    let dir = with_model(&TinyLlama::new());
    fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    both_refuse(&dir, &["`model`", "model.safetensors"]);
}

#[test]
fn in_features_that_do_not_pack_name_the_linear() {
    let dir = with_model(&TinyLlama::with_mlp(80));
    quantize(&dir, &[]).refused(&["mlp.", "_proj", "80", "32"]);
    leaves_nothing(&dir);
    // Dense models of any width can be measured.
    perplexity(&dir, "model", &[]);
}

#[test]
fn a_text_shorter_than_a_window_is_named() {
    let dir = with_model(&TinyLlama::new());
    dir.write("text.txt", &words(31));
    quantize(&dir, &[]).refused(&["text.txt", "31 tokens"]);
    leaves_nothing(&dir);
    ppl(&dir, "model", &[]).refused(&["evaluation text", "31 tokens"]);
    dir.write("text.txt", "");
    quantize(&dir, &[]).refused(&["text.txt"]);
    ppl(&dir, "model", &[]).refused(&["text.txt"]);
    fs::remove_file(dir.path("text.txt")).unwrap();
    quantize(&dir, &[]).refused(&["text.txt"]);
    ppl(&dir, "model", &[]).refused(&["text.txt"]);
    leaves_nothing(&dir);
}

#[test]
fn windows_beyond_the_context_are_refused() {
    let dir = with_model(&TinyLlama::new());
    let args = ["ppl", "model", "--device=cpu", "--dataset", "text.txt", "--seq-len", "129"];
    dir.gptq(&args).refused(&["129", "--seq-len"]);
}

#[test]
fn an_output_that_holds_something_else_is_left_as_it_was() {
    let dir = with_model(&TinyLlama::new());
    dir.write("out/precious.txt", "mine");
    quantize(&dir, &[]).refused(&["out"]);
    assert_eq!(listing(&dir.path("out")), ["precious.txt"]);
    assert_eq!(fs::read_to_string(dir.path("out/precious.txt")).unwrap(), "mine");
    assert!(!dir.path("out.partial").exists());

    let dir = with_model(&TinyLlama::new());
    dir.write("out", "a file");
    quantize(&dir, &[]).refused(&["out"]);
    assert_eq!(fs::read_to_string(dir.path("out")).unwrap(), "a file");

    let dir = with_model(&TinyLlama::new());
    dir.write("out.partial/precious.txt", "mine");
    quantize(&dir, &[]).refused(&["out.partial"]);
    assert_eq!(listing(&dir.path("out.partial")), ["precious.txt"]);
    assert!(!dir.path("out").exists());

    let dir = with_model(&TinyLlama::new());
    fs::create_dir(dir.path("out")).unwrap();
    quantize(&dir, &[]).ok();
}

#[test]
fn a_source_is_never_overwritten_nor_quantized_twice() {
    let dir = with_model(&TinyLlama::new());
    let before = fs::read(dir.path("model/model.safetensors")).unwrap();
    dir.gptq(&[&["quantize", "model", "--out", "model"], &CALIBRATION[..]].concat())
        .refused(&["`model`"]);
    assert_eq!(fs::read(dir.path("model/model.safetensors")).unwrap(), before);
    quantize(&dir, &[]).ok();
    dir.gptq(&[&["quantize", "out", "--out", "again"], &CALIBRATION[..]].concat())
        .refused(&["`out`", "GPTQ"]);
    assert!(!dir.path("again").exists());
}

/// A file system of a given size, or `None` where mounting is not allowed.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            Ok(output) => {
                Need::Mount.is_missing(String::from_utf8_lossy(&output.stderr).trim_end());
                None
            }
            Err(error) => {
                Need::Mount.is_missing(format!("cannot run mount: {error}"));
                None
            }
        }
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.0).status());
    }
}

#[test]
fn a_full_disk_is_named_and_left_empty() {
    let dir = with_model(&TinyLlama::new());
    // Spaces make it large without another vocabulary.
    let tokenizer = fs::read_to_string(dir.path("model/tokenizer.json")).unwrap();
    dir.write("model/tokenizer.json", &(tokenizer + &" ".repeat(300_000)));
    let disk = dir.path("disk");
    let quantize =
        || dir.gptq(&[&["quantize", "model", "--out", "disk/out"], &CALIBRATION[..]].concat());
    // The weights do not fit, which is known from the start; or the small files do not.
    for bytes in [16 << 10, 200 << 10] {
        let Some(_mounted) = SmallDisk::mount(&disk, bytes) else { return };
        quantize().refused(&["disk/out"]);
        assert_eq!(listing(&disk), [""; 0]);
    }
    let Some(_mounted) = SmallDisk::mount(&disk, 4 << 20) else { return };
    quantize().ok();
    assert_eq!(listing(&disk), ["out"]);
}

/// Before a model is looked for, which may be a long download.
#[test]
fn a_disk_that_cannot_be_written_is_found_first() {
    let dir = Workdir::new();
    let disk = dir.path("disk");
    let Some(_mounted) = SmallDisk::mount(&disk, 16 << 10) else { return };
    let remounted = Command::new("mount").args(["-o", "remount,ro"]).arg(&disk).status();
    assert!(remounted.unwrap().success());
    let runs: [&[&str]; 3] = [
        &["quantize", "org/absent", "--out=disk/out"],
        &["sweep", "nine", "--model=org/absent", "--out=disk/a/b"],
        &["ppl", "org/absent", "--per-token=disk/losses.csv"],
    ];
    for run in runs {
        let told = dir.gptq(run);
        told.refused(&["`disk", "choose a folder that can be written"]);
        assert!(told.stderr.contains("Read-only") && !told.stderr.contains("absent"), "{run:?}");
    }
}

#[test]
fn damaged_gptq_checkpoints_are_refused() {
    let dir = with_model(&TinyLlama::new());
    quantize(&dir, &["--layout", "card"]).ok();
    let path = dir.path("out/model.safetensors");
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    ppl(&dir, "out", &[]).refused(&["out/model.safetensors"]);
    dir.gptq(&["inspect", "out"]).refused(&["out/model.safetensors"]);
    fs::write(&path, &good).unwrap();

    let text = fs::read_to_string(dir.path("out/quantize_config.json")).unwrap();
    dir.write("out/quantize_config.json", &text.replace("\"bits\": 4", "\"bits\": 5"));
    ppl(&dir, "out", &[]).refused(&["out/quantize_config.json", "bits"]);
    let changed = |text: &str| text.replace("\"group_size\": 128", "\"group_size\": 32");
    dir.write("out/quantize_config.json", &changed(&text));
    dir.gptq(&["inspect", "out"]).refused(&["quantize_config.json", "group_size", "config.json"]);
    let text = fs::read_to_string(dir.path("out/config.json")).unwrap();
    dir.write("out/config.json", &changed(&text));
    dir.gptq(&["inspect", "out"]).refused(&["model.layers.0.self_attn.q_proj", "expected"]);
}

// ---- What must work ----

#[test]
fn a_dead_column_works() {
    let dir = damaged("model.layers.0.input_layernorm.weight", |w| w.values[5] = 0.0);
    for act_order in ["--act-order=true", "--act-order=false"] {
        let out = quantize(&dir, &[act_order, "--strict"]);
        assert!(!out.stderr.contains("warning"), "{}", out.stderr);
        out.ok();
        perplexity(&dir, "out", &[]);
        fs::remove_dir_all(dir.path("out")).unwrap();
    }
}

#[test]
fn a_singular_hessian_raises_damping_and_fails_under_strict() {
    let dir = with_model(&TinyLlama::new());
    // One word over and over gives every linear a Hessian of rank one.
    dir.write("text.txt", &"w7 ".repeat(400));
    let ordinary = quantize(&dir, &["--strict", "--json"]).json();
    assert_eq!((&ordinary["damp_retries"], &ordinary["f64_retries"]), (&0.into(), &0.into()));
    fs::remove_dir_all(dir.path("out")).unwrap();

    let singular = ["--damp", "1e-6"];
    quantize(&dir, &[&singular[..], &["--strict"]].concat())
        .refused(&["model.layers.0.self_attn.q_proj", "--strict"]);
    leaves_nothing(&dir);

    let out = quantize(&dir, &[&singular[..], &["--json"]].concat());
    assert!(out.json()["damp_retries"].as_u64().unwrap() > 0);
    fs::remove_dir_all(dir.path("out")).unwrap();
    // Next to no damping is raised to what counts, and printed in few digits; the head counts as well.
    let out = quantize(&dir, &["--damp", "1e-320", "--recipe", "best", "--json"]);
    let counted = out.json()["damp_retries"].as_u64().unwrap();
    let report = fs::read_to_string(dir.path("out/gptq_report.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    let blocks = report["blocks"].as_array().unwrap().iter();
    let linears = blocks.flat_map(|block| block["linears"].as_array().unwrap());
    let raised = linears.filter(|l| l["damp_retries"].as_u64().unwrap() > 0).count() as u64;
    assert_eq!(report["head"]["name"], "lm_head.weight");
    assert!(report["head"]["damp_retries"].as_u64().unwrap() > 0, "{}", report["head"]);
    assert_eq!((counted, report["damp_retries"].as_u64().unwrap()), (raised + 1, raised + 1));
    let about = |l: &&str| l.starts_with("warning: the Hessian of `lm_head.weight`");
    assert_eq!(out.stderr.lines().filter(about).count(), 1, "{}", out.stderr);
    assert!(out.stderr.lines().all(|line| line.len() < 200), "{}", out.stderr);
    let warned =
        |l: &str| l.starts_with("warning: ") && l.contains("model.layers.0.self_attn.q_proj");
    assert!(out.stderr.lines().any(warned), "{}", out.stderr);
    perplexity(&dir, "out", &[]);
}

#[test]
fn every_width_and_group_works_and_is_as_large_as_planned() {
    let dir = with_model(&TinyLlama::new());
    let dense = perplexity(&dir, "model", &[]);
    // In inputs of 64 and 96: a group of each exact size, a ragged last group, a group that is
    // larger than the input, and one for all.
    for bits in ["2", "3", "4", "8"] {
        for group in ["32", "64", "128", "none"] {
            for layout in ["card", "modern"] {
                let options = ["--bits", bits, "--group-size", group, "--layout", layout, "--json"];
                let made = quantize(&dir, &options).json();
                let size = fs::metadata(dir.path("out/model.safetensors")).unwrap().len();
                assert_eq!(made["file_bytes"], size);
                assert_eq!(planned(&dir, bits, group, layout), size, "{options:?}");
                let shown = dir.gptq(&["inspect", "out", "--json"]).json();
                assert_eq!(shown["file_bytes"], size);
                assert_eq!(shown["quantization"]["bits"].to_string(), bits);
                assert_eq!(shown["quantization"]["linears"], 14);
                if bits == "8" {
                    let ratio = perplexity(&dir, "out", &[]) / dense;
                    assert!((ratio - 1.0).abs() < 0.01, "8 bits change perplexity by {ratio}");
                }
                fs::remove_dir_all(dir.path("out")).unwrap();
            }
        }
    }
}

/// What `plan` says of a branch.
fn planned(dir: &Workdir, bits: &str, group: &str, layout: &str) -> u64 {
    let group = if group == "none" { "\"none\"".to_owned() } else { group.to_owned() };
    dir.write(
        "sweep.toml",
        &format!(
            "model = \"model\"\ncalibration = \"card\"\nlayout = \"{layout}\"\nrecipe = \"best\"\n\
             [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 4\nseq_len = 32\n\
             [[branch]]\nname = \"b\"\nbits = {bits}\ngroup_size = {group}\nact_order = true\n"
        ),
    );
    let plan = dir.gptq(&["plan", "model", "--config", "sweep.toml", "--json"]).json();
    plan[0]["file_bytes"].as_u64().unwrap()
}

#[test]
fn shards_hold_what_one_file_holds() {
    let dir = workdir(|dir| {
        TinyLlama::new().write_sharded(dir, 3);
    });
    quantize(&dir, &["--max-shard-size", "20000"]).ok();
    let names = listing(&dir.path("out"));
    assert!(names.contains(&"model.safetensors.index.json".to_owned()), "{names:?}");
    let shards: Vec<_> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
    assert!(shards.len() > 2, "{names:?}");
    let sharded = perplexity(&dir, "out", &[]);

    let single = with_model(&TinyLlama::new());
    quantize(&single, &[]).ok();
    assert_eq!(perplexity(&single, "out", &[]), sharded);
    let linears =
        |dir: &Workdir| dir.gptq(&["inspect", "out", "--json"]).json()["quantization"].clone();
    assert_eq!(linears(&dir), linears(&single));
}

#[test]
fn every_file_name_and_layout_reloads() {
    let dir = with_model(&TinyLlama::new());
    quantize(&dir, &["--layout", "card"]).ok();
    let expected = perplexity(&dir, "out", &[]);
    // As published in 2023, before and after the file was renamed.
    fs::rename(dir.path("out/model.safetensors"), dir.path("out/gptq_model-4bit-128g.safetensors"))
        .unwrap();
    let text = fs::read_to_string(dir.path("out/quantize_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for name in [json!("gptq_model-4bit-128g"), Value::Null] {
        config["model_file_base_name"] = name;
        dir.write("out/quantize_config.json", &config.to_string());
        assert_eq!(perplexity(&dir, "out", &[]), expected);
    }
    fs::remove_dir_all(dir.path("out")).unwrap();
    quantize(&dir, &["--layout", "modern"]).ok();
    assert_eq!(perplexity(&dir, "out", &[]), expected, "layouts hold the same weights");
}

#[test]
fn every_protocol_measures_a_written_checkpoint() {
    let dir = with_model(&TinyLlama::new());
    quantize(&dir, &[]).ok();
    let counts = [("paper", 12, 12 * 31), ("llama-cpp", 12, 12 * 15), ("strided", 24, 399)];
    for (protocol, windows, tokens) in counts {
        let made = ppl(&dir, "out", &["--protocol", protocol, "--base", "model", "--json"]).json();
        assert_eq!(made["protocol"], protocol);
        assert_eq!(made["windows"], windows);
        assert_eq!(made["tokens"], tokens);
        let kl = made["base"]["kl"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < 1.0, "{protocol}: {kl}");
    }
}

#[test]
fn the_same_inputs_make_the_same_bytes() {
    let dir = with_model(&TinyLlama::new());
    let run = |out: &str, threads: &str| {
        let args = [&["quantize", "model", "--out", out], &CALIBRATION[..]].concat();
        dir.gptq_env(&args, &[("RAYON_NUM_THREADS", threads)]).ok();
        let files = listing(&dir.path(out)).into_iter();
        files.map(|f| (fs::read(dir.path(out).join(&f)).unwrap(), f)).collect::<Vec<_>>()
    };
    let first = run("a", "2");
    assert!(first == run("b", "2"), "two runs differ");
    assert!(first == run("c", "1"), "the number of threads matters");
}
