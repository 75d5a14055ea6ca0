//! `gptq verify`: sound checkpoints pass in every layout and recipe, and each planted fault is found
//! and named.
//!
//! Faults are planted by writing bytes into a checkpoint's files, so that nothing of the code under
//! test has a part in making them.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use util::weight_file::{File, with_damage};
use util::{Noise, Outcome, Workdir, repository, tokenizer, words};

const BLOCK_1_UP: &str = "model.layers.1.mlp.up_proj";

fn demo() -> String {
    repository().join("tests/fixtures/demo-llama").display().to_string()
}

/// Quantizes the embedded model on a few short windows.
fn quantize(dir: &Workdir, name: &str, settings: &[&str]) {
    let calibration = repository().join("calib/demo.toml").display().to_string();
    let (demo, mut args) = (demo(), vec!["quantize"]);
    args.extend([demo.as_str(), "--out", name, "--device", "cpu", "-q"]);
    args.extend(["--calib", calibration.as_str(), "--windows", "8", "--seq-len", "256"]);
    args.extend(settings);
    dir.gptq(&args).ok();
    forget_sums(dir, name);
}

/// With recorded sums any change is found: these tests are of what is found without.
fn forget_sums(dir: &Workdir, name: &str) {
    fs::remove_file(dir.path(name).join("gptq_manifest.json")).unwrap();
}

fn against_base(dir: &Workdir, name: &str) -> Outcome {
    dir.gptq(&["verify", name, "--base", &demo(), "-q"])
}

/// Asserts that verification fails, and that its listing has a line with all of `names`.
#[track_caller]
fn finds(outcome: &Outcome, names: &[&str]) {
    assert_eq!(outcome.code, 1, "{}{}", outcome.stdout, outcome.stderr);
    let named = |line: &str| names.iter().all(|name| line.contains(name));
    assert!(outcome.stdout.lines().any(named), "no line with {names:?} in\n{}", outcome.stdout);
    assert!(outcome.stderr.contains("fault"), "{}", outcome.stderr);
}

#[test]
fn sound_checkpoints_pass_in_their_own_coordinates() {
    let dir = Workdir::new();
    for (name, rotation, settings) in [
        (
            "modern",
            "none",
            ["--bits", "4", "--recipe", "autogptq", "--group-size", "64"].as_slice(),
        ),
        ("card", "none", &["--bits", "3", "--recipe", "autogptq", "--layout", "card"]),
        ("rtn", "none", &["--bits", "3", "--recipe", "rtn", "--group-size", "none"]),
        ("best", "learned", &["--bits", "3", "--recipe", "best", "--group-size", "64"]),
        // Without metadata the rotation has to be found from the weights.
        ("bare", "learned", &["--bits", "4", "--recipe", "best", "--layout", "card"]),
        ("full", "full", &["--bits", "3", "--recipe", "best", "--set", "rotate=full"]),
        ("heads", "heads", &["--recipe", "best", "--set", "rotate=heads", "--set", "head=0"]),
    ] {
        quantize(&dir, name, settings);
        let report = dir.gptq(&["verify", name, "--base", &demo(), "-q", "--json"]).json();
        assert_eq!(report["passed"], true, "{name}: {}", report["findings"]);
        assert_eq!(report["weights"]["rotation"], rotation, "{name}");
        let linears = report["weights"]["linears"].as_array().unwrap();
        assert_eq!(linears.len(), 35);
        assert!(linears.iter().all(|l| l["weight_error"].as_f64().unwrap() > 1e-3), "{name}");
        let loaders = report["loaders"].as_array().unwrap();
        let takes =
            |loader| loaders.iter().find(|l| l["loader"] == loader).unwrap()["loads"].clone();
        assert_eq!(takes("transformers"), true);
        assert_eq!(takes("ExLlama"), !matches!(name, "card" | "rtn" | "best" | "full"));
        // It splits q, k and v into equal parts, which those of this model are not.
        assert_eq!(takes("GPTQ-for-LLaMa"), false);
    }
}

/// It is found from the two models, not from what made it: nothing that a report leaves out or says wrongly, nor
/// another device's roundings, make another one of it.
#[test]
fn a_learned_rotation_is_found_whatever_is_said_of_it() {
    let dir = Workdir::new();
    let settings = ["--bits", "3", "--recipe", "best", "--layout", "card", "--set"];
    for (name, rotation) in [("l", "learned"), ("f", "full")] {
        let choice = format!("rotate={rotation}");
        quantize(&dir, name, &[&settings[..], &[choice.as_str()]].concat());
        let report = dir.path(name).join("gptq_report.json");
        let before = fs::read_to_string(&report).unwrap();
        let verify = || {
            let outcome = dir.gptq(&["verify", name, "--base", &demo(), "-q", "--json"]);
            let verdict: Value = serde_json::from_str(&outcome.stdout).unwrap();
            assert_eq!(verdict["weights"]["rotation"], rotation);
            verdict["findings"].to_string()
        };
        assert_eq!(verify(), "[]");
        for said in ["learned", "full", "heads"].into_iter().filter(|said| *said != rotation) {
            fs::write(&report, before.replace(&choice, &format!("rotate={said}"))).unwrap();
            let wanted = format!("records rotate={said}, but the weights have {rotation}");
            let findings = verify();
            assert!(
                findings.contains(&wanted) && findings.matches("place").count() == 1,
                "{findings}"
            );
        }
        fs::remove_file(&report).unwrap();
        assert_eq!(verify(), "[]");
    }
    // Every embedding but a few values, and nothing else, tells of it: a row that was changed is found, and R is
    // what it was.
    let embedding = "model.embed_tokens.weight";
    let change = |file: &mut File| {
        let row = file.tensor(embedding);
        row[1] ^= 0x80;
        row[3 * 512..4 * 512].fill(0x55);
    };
    with_damage(&dir, "l", change, || {
        let outcome = against_base(&dir, "l");
        finds(&outcome, &[embedding, "257 values"]);
        assert!(outcome.stderr.contains("has a fault"), "{}", outcome.stdout);
    });
}

#[test]
fn outputs_are_measured_and_held_to_limits() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--bits", "3", "--recipe", "best"]);
    let text = repository().join("calib/demo/heldout.txt").display().to_string();
    let (base, demo) = (["--base"], demo());
    let mut args = vec!["verify", "q", base[0], &demo, "--dataset", &text];
    args.extend(["--seq-len", "256", "--max-windows", "4", "--device", "cpu", "-q"]);
    let json = [args.as_slice(), &["--json"]].concat();
    let report = dir.gptq(&json).json();

    assert_eq!(report["text"]["contaminated"], false);
    // On what it was calibrated on; and where no report says on what.
    let calibration = repository().join("calib/demo/calibration.txt").display().to_string();
    let mut on_calibration =
        vec!["verify", "q", "--dataset", &calibration, "--device", "cpu", "-q"];
    on_calibration.extend(["--seq-len", "64", "--max-windows", "1", "--json"]);
    let contaminated = || dir.gptq(&on_calibration).json()["text"]["contaminated"].clone();
    assert_eq!(contaminated(), true);
    fs::remove_file(dir.path("q/gptq_report.json")).unwrap();
    assert_eq!(contaminated(), Value::Null);

    // The same numbers as `gptq ppl --base` gives.
    let mut ppl = vec!["ppl", "q", "--base", &demo, "--dataset", &text, "--json"];
    ppl.extend(["--seq-len", "256", "--max-windows", "4", "--device", "cpu"]);
    let ppl = dir.gptq(&ppl).json();
    let near = |a: &Value, b: &Value, tolerance: f64| {
        let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
        assert!((a - b).abs() <= tolerance * b.abs(), "{a} and {b}");
    };
    near(&report["outputs"]["perplexity"], &ppl["perplexity"], 1e-6);
    near(&report["outputs"]["base_perplexity"], &ppl["base"]["perplexity"], 1e-5);
    near(&report["outputs"]["kl"], &ppl["base"]["kl"], 1e-3);
    for linear in report["weights"]["linears"].as_array().unwrap() {
        let (weight, output) = (&linear["weight_error"], &linear["output_error"]);
        let (weight, output) = (weight.as_f64().unwrap(), output.as_f64().unwrap());
        assert!(output > 0.0 && output < 3.0 * weight, "{linear}");
    }

    dir.gptq(&[args.as_slice(), &["--max-kl", "1", "--max-ppl-ratio", "1.5"]].concat()).ok();
    let strict = ["--max-kl", "0.001", "--max-ppl-ratio", "1.0001", "--max-output-error", "0.01"];
    let outcome = dir.gptq(&[args.as_slice(), &strict].concat());
    finds(&outcome, &["KL divergence is", "above the limit 0.001"]);
    finds(&outcome, &["perplexity over the base's is", "1.0001"]);
    finds(&outcome, &["model.layers.0.self_attn.o_proj has an output error", "0.01"]);
    // Any comparison with one of these is false.
    for limit in ["--max-ppl", "--max-ppl-ratio", "--max-kl", "--max-output-error"] {
        for value in ["nan", "inf", "-1"] {
            let limit = format!("{limit}={value}");
            let outcome = dir.gptq(&[args.as_slice(), &[limit.as_str()]].concat());
            assert!(
                outcome.code != 0 && outcome.stderr.contains("from 0 on"),
                "{}",
                outcome.stderr
            );
        }
    }
    let outcome = dir.gptq(&["verify", "q", "--max-kl", "1"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("--dataset"), "{}", outcome.stderr);
}

/// Any word whose codes are inverted is found among 140,000, wherever it is.
#[test]
fn single_words_are_found_against_the_base() {
    let dir = Workdir::new();
    for (name, settings) in [
        ("a4", ["--bits", "4", "--recipe", "autogptq"].as_slice()),
        ("a3", &["--bits", "3", "--recipe", "autogptq", "--group-size", "64"]),
        ("b4", &["--bits", "4", "--recipe", "best", "--group-size", "none"]),
        ("b3", &["--bits", "3", "--recipe", "best"]),
        ("f3", &["--bits", "3", "--recipe", "best", "--set", "rotate=full"]),
    ] {
        quantize(&dir, name, settings);
        let mut noise = Noise::new(11);
        for linear in ["mlp.up_proj", "self_attn.v_proj", "mlp.down_proj"] {
            let tensor = format!("model.layers.3.{linear}.qweight");
            let [rows, columns] = File::open(&dir.path(name)).shape(&tensor);
            let mut below = |n: usize| ((noise.next() + 1.0) / 2.0 * n as f32) as usize % n;
            let (row, column) = (below(rows), below(columns));
            let flip = |file: &mut File| {
                let at = 4 * (row * columns + column);
                file.tensor(&tensor)[at..at + 4].iter_mut().for_each(|b| *b = !*b);
            };
            with_damage(&dir, name, flip, || {
                // Nothing but the base shows it.
                dir.gptq(&["verify", name, "-q"]).ok();
                let outcome = against_base(&dir, name);
                let place = format!("row {row}, output {column} ");
                finds(&outcome, &[&tensor, "holds a word at", &place]);
                assert!(outcome.stderr.contains("has a fault"), "{name}: {}", outcome.stdout);
            });
        }
        against_base(&dir, name).ok();
    }
}

#[test]
fn a_single_bit_and_a_single_digit_are_found_by_recorded_sums() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--recipe", "rtn"]);
    let sum = |name: &str| {
        let digest = Sha256::digest(fs::read(dir.path("q").join(name)).unwrap());
        digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let report = sum("gptq_report.json");
    let mut files = serde_json::Map::new();
    for name in ["model.safetensors", "tokenizer.json"] {
        let bytes = fs::metadata(dir.path("q").join(name)).unwrap().len();
        files.insert(name.to_owned(), json!({"bytes": bytes, "sha256": sum(name)}));
    }
    let manifest = json!({
        "format": 1, "made_from": {}, "measured_on": null, "files": files, "made_report": report,
        "report": report,
    });
    dir.write("q/gptq_manifest.json", &manifest.to_string());
    let passed = dir.gptq(&["verify", "q", "--json"]).json();
    assert_eq!(passed["checks"][0], json!({"check": "sums", "examined": 3, "findings": 0}));

    let flip = |file: &mut File| file.tensor(&format!("{BLOCK_1_UP}.qweight"))[77] ^= 4;
    with_damage(&dir, "q", flip, || {
        let outcome = dir.gptq(&["verify", "q"]);
        finds(&outcome, &["model.safetensors has another content than when it was written"]);
    });
    // The numbers that a branch is judged by.
    let whole = fs::read_to_string(dir.path("q/gptq_report.json")).unwrap();
    dir.write("q/gptq_report.json", &whole.replace("\"damp\": 0.01", "\"damp\": 0.02"));
    let other = "gptq_report.json has another content than when it was written";
    finds(&dir.gptq(&["verify", "q"]), &[other]);
    fs::remove_file(dir.path("q/gptq_report.json")).unwrap();
    fs::remove_file(dir.path("q/tokenizer.json")).unwrap();
    let outcome = dir.gptq(&["verify", "q"]);
    finds(&outcome, &["gptq_report.json cannot be read"]);
    finds(&outcome, &["tokenizer.json cannot be read"]);

    for (manifest, why) in [
        (r#"{"format": 2}"#, "is not a manifest of files: missing field"),
        (&manifest.to_string().replace("\"format\":1", "\"format\":3"), "its format is 3"),
    ] {
        dir.write("q/gptq_manifest.json", manifest);
        finds(&dir.gptq(&["verify", "q"]), &["gptq_manifest.json", why]);
    }
}

/// The sum of a weight file by its definition: the SHA-256 of the SHA-256 of the header and of each
/// tensor, in the order of the file.
fn sum_of_tensors(file: &[u8]) -> String {
    let header = 8 + u64::from_le_bytes(*file.first_chunk::<8>().unwrap()) as usize;
    let tensors: serde_json::Map<String, Value> = serde_json::from_slice(&file[8..header]).unwrap();
    let mut ranges: Vec<[usize; 2]> = tensors
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(_, of)| serde_json::from_value(of["data_offsets"].clone()).unwrap())
        .collect();
    ranges.sort_unstable();
    let mut sums = Sha256::digest(&file[..header]).to_vec();
    for [from, to] in ranges {
        sums.extend(Sha256::digest(&file[header + from..header + to]));
    }
    Sha256::digest(sums).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn weight_files_are_summed_by_tensor() {
    let dir = Workdir::new();
    let (demo, half) = (demo(), ["--max-shard-size", "2500000B"]);
    let settings = ["--recipe", "rtn", "--layout", "card", "--device", "cpu", "-q"];
    dir.gptq(&[&["quantize", &demo, "--out", "q"], &half[..], &settings].concat()).ok();
    let manifest: Value =
        serde_json::from_slice(&fs::read(dir.path("q/gptq_manifest.json")).unwrap()).unwrap();
    let listed = manifest["files"].as_object().unwrap();
    let weights: Vec<&String> = listed.keys().filter(|n| n.ends_with(".safetensors")).collect();
    assert!(weights.len() > 1, "{weights:?}");
    for name in &weights {
        let file = fs::read(dir.path("q").join(name)).unwrap();
        let expected = json!({"bytes": file.len(), "tensors_sha256": sum_of_tensors(&file)});
        assert_eq!(listed[*name], expected, "{name}");
    }
    dir.gptq(&["verify", "q"]).ok();

    let path = format!("q/{}", weights[0]);
    let whole = fs::read(dir.path(&path)).unwrap();
    let changed = format!("{} has another content than when it was written", weights[0]);
    // The last byte of all, and the first letter of a tensor's name.
    for at in [whole.len() - 1, 8 + whole[8..].windows(5).position(|w| w == b"model").unwrap()] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(dir.path(&path), damaged).unwrap();
        finds(&dir.gptq(&["verify", "q"]), &[&changed]);
    }
    // A header that says nothing.
    let mut damaged = whole;
    damaged[8] = b'x';
    fs::write(dir.path(&path), damaged).unwrap();
    let outcome = dir.gptq(&["verify", "q"]);
    assert_eq!(outcome.code, 1);
    let output = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(output.contains("its header is malformed"), "{output}");
}

/// A manifest comes with a checkpoint from the Hub: it is no list of what to read on this machine.
#[test]
fn a_manifest_names_files_of_its_folder_only() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--recipe", "rtn"]);
    dir.write("secret", "x");
    for name in ["/dev/zero", "../secret"] {
        let files = json!({name: {"bytes": 0, "sha256": "0".repeat(64)}});
        let manifest = json!({
            "format": 1, "made_from": {}, "measured_on": null, "files": files, "made_report": "",
            "report": "",
        });
        dir.write("q/gptq_manifest.json", &manifest.to_string());
        finds(&dir.gptq(&["verify", "q"]), &["gptq_manifest.json", name, "no plain path"]);
    }
}

/// A name may set a terminal's clipboard, title and colors; shown in full it does nothing.
#[test]
fn names_from_files_do_not_command_the_terminal() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--recipe", "rtn"]);
    dir.write("text.txt", &words(400));
    // In JSON, as a header has it, and as it is shown. Both commands name what they do not know.
    let (stored, shown) = ("\\u001b]52;c;\\u0007", "\\u{1b}]52;c;\\u{7}");
    let plain = |text: &str| !text.contains(|c: char| c.is_control() && c != '\n');
    let name = format!("{BLOCK_1_UP}.qzeros");
    let stem = &name[..name.len() - stored.len()];
    let rename = |file: &mut File| file.retell(&name, &format!("{stem}{stored}"));
    with_damage(&dir, "q", rename, || {
        let outcome = dir.gptq(&["verify", "q"]);
        finds(&outcome, &[&format!("{stem}{shown}")]);
        assert!(plain(&outcome.stdout) && plain(&outcome.stderr), "{}", outcome.stdout);
        let json = dir.gptq(&["verify", "q", "--json"]);
        assert!(json.stdout.contains(&format!("{stem}{stored}")), "{}", json.stdout);
        assert_eq!(json.code, 1);
        let ppl = dir.gptq(&["ppl", "q", "--device=cpu", "--dataset=text.txt", "--seq-len=32"]);
        assert_eq!(ppl.code, 1);
        assert!(plain(&ppl.stdout) && plain(&ppl.stderr), "{}", ppl.stderr);
    });
}

#[test]
fn wrong_values_are_found_without_a_base() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--bits", "4", "--recipe", "autogptq", "--group-size", "64"]);
    let look = |damage: &dyn Fn(&mut File), names: &[&str]| {
        with_damage(&dir, "q", damage, || finds(&dir.gptq(&["verify", "q"]), names));
    };
    let up = |leaf: &str| format!("{BLOCK_1_UP}.{leaf}");

    let plain_zeros = |file: &mut File| file.tensor(&up("qzeros")).fill(0x88);
    look(&plain_zeros, &[&up("qzeros"), "without the minus one", "8 instead of 7"]);
    let one_zero = |file: &mut File| file.tensor(&up("qzeros"))[5] = 0x57;
    look(&one_zero, &[&up("qzeros"), "holds 5 at group 0, output 11", "(1 such)"]);

    let half = |value: u16| {
        move |file: &mut File| {
            file.tensor(&up("scales"))[6..8].copy_from_slice(&value.to_le_bytes());
        }
    };
    look(&half(0), &[&up("scales"), "holds 0 at group 0, output 3"]);
    look(&half(0xB400), &[&up("scales"), "holds -0.25 at group 0, output 3"]);
    look(&half(0x7C00), &[&up("scales"), "holds inf at group 0, output 3"]);

    let group = |value: i32| {
        move |file: &mut File| {
            file.tensor(&up("g_idx"))[8..12].copy_from_slice(&value.to_le_bytes());
        }
    };
    look(&group(-1), &[&up("g_idx"), "puts column 2 into group -1 of"]);
    // Whatever group column 2 had, two groups now differ from gate's and have wrong counts.
    let other = |file: &mut File| {
        let old = file.tensor(&up("g_idx"))[8];
        group(i32::from(old == 0))(file);
    };
    look(&other, &[&up("g_idx"), "columns, expected 64"]);
    look(&other, &[&up("g_idx"), "differs from that of mlp.gate_proj at column 2"]);

    let norm = "model.layers.2.input_layernorm.weight";
    let nan = |file: &mut File| file.tensor(norm)[..2].copy_from_slice(&0x7E00_u16.to_le_bytes());
    look(&nan, &[norm, "NaN"]);
    look(
        &|file| file.retell("up_proj.qzeros", "up_proj.qzerox"),
        &["1.mlp.up_proj.qzeros is missing"],
    );
    look(&|file| file.retell("up_proj.qzeros", "up_proj.qzerox"), &["qzerox is not part of"]);
    look(
        &|file| file.retell(r#""format":"pt""#, r#""format":"tf""#),
        &["format = tf, expected pt"],
    );
    look(
        &|file| file.retell(r#""gptq_bits":"4""#, r#""gptq_bits":"3""#),
        &["gptq_bits = 3, expected 4"],
    );
    dir.gptq(&["verify", "q"]).ok();

    // All findings come at once.
    let several = |file: &mut File| {
        plain_zeros(file);
        half(0)(file);
        nan(file);
    };
    with_damage(&dir, "q", several, || {
        let outcome = dir.gptq(&["verify", "q"]);
        finds(&outcome, &["without the minus one"]);
        finds(&outcome, &["holds 0 at group 0"]);
        finds(&outcome, &[norm]);
        assert!(outcome.stderr.contains("3 faults"), "{}", outcome.stderr);
    });
}

/// A small random model of a family that has more than Llama, and a checkpoint made from it.
fn family(dir: &Workdir, name: &str, recipe: &str, layout: &str) -> (String, String) {
    let fixtures = repository().join("tests/fixtures/families");
    let source = dir.path(name);
    fs::create_dir_all(&source).unwrap();
    fs::copy(fixtures.join(format!("{name}.json")), source.join("config.json")).unwrap();
    let weights = fixtures.join(format!("{name}.safetensors"));
    fs::copy(weights, source.join("model.safetensors")).unwrap();
    dir.write(&format!("{name}/tokenizer.json"), &tokenizer().to_string());
    dir.write("text.txt", &words(600));
    let out = format!("{name}-{recipe}-{layout}");
    let quantize = format!(
        "quantize {name} --out {out} --recipe {recipe} --layout {layout} --bits 4 --group-size 32 \
         --calib-dataset text.txt --windows 8 --seq-len 48 --device cpu -q"
    );
    dir.gptq(&quantize.split_whitespace().collect::<Vec<_>>()).ok();
    forget_sums(dir, &out);
    (name.to_owned(), out)
}

/// Biases and head norms are values like any other: finite, and the base's.
#[test]
fn an_architectures_own_biases_and_head_norms_are_looked_at() {
    let dir = Workdir::new();
    let (nan, hundred) = (0x7E00_u16, 0x5640);
    for (name, tensor, recipe, layout) in [
        ("qwen2", "model.layers.0.self_attn.q_proj.bias", "autogptq", "modern"),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias", "best", "card"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", "best", "modern"),
    ] {
        let (base, made) = family(&dir, name, recipe, layout);
        let with_base = || dir.gptq(&["verify", &made, "--base", &base, "-q"]);
        let with_text = || {
            let text = ["--dataset", "text.txt", "--seq-len", "48", "--device", "cpu"];
            dir.gptq(&[&["verify", &made, "--base", &base, "-q"], &text[..]].concat())
        };
        with_text().ok();
        // ExLlama would skip the biases, and knows no head norms.
        let report = dir.gptq(&["verify", &made, "--json"]).json();
        let exllama =
            report["loaders"].as_array().unwrap().iter().find(|l| l["loader"] == "ExLlama");
        assert_eq!(exllama.unwrap()["loads"], false, "{report}");

        let fill = |half: u16| {
            move |file: &mut File| {
                let values = file.tensor(tensor).chunks_mut(2);
                values.for_each(|value| value.copy_from_slice(&half.to_le_bytes()));
            }
        };
        with_damage(&dir, &made, fill(nan), || {
            // What is wrong with the checkpoint is no reason to end without the table.
            for outcome in [dir.gptq(&["verify", &made, "-q"]), with_base(), with_text()] {
                finds(&outcome, &[tensor, "NaN"]);
                assert!(outcome.stdout.contains("\nother values "), "{}", outcome.stdout);
            }
        });
        with_damage(&dir, &made, fill(hundred), || {
            dir.gptq(&["verify", &made, "-q"]).ok();
            finds(&with_base(), &[tensor, "values of", "that the base does not"]);
        });
    }
}

#[test]
fn a_bias_where_the_model_has_none_is_a_finding_with_and_without_a_base() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--bits", "4", "--recipe", "rtn", "--layout", "card"]);
    let bias = format!("{BLOCK_1_UP}.bias");
    let one = |file: &mut File| file.tensor(&bias)[7] = 0x3C;
    with_damage(&dir, "q", one, || {
        let found = [bias.as_str(), "holds 1 values that are not zero"];
        finds(&dir.gptq(&["verify", "q", "-q"]), &found);
        finds(&against_base(&dir, "q"), &found);
    });
}

#[test]
fn swapped_scale_rows_are_found_against_the_base() {
    let dir = Workdir::new();
    let tensor = format!("{BLOCK_1_UP}.scales");
    let swapped = [tensor.as_str(), "gives group 0 scales that are those of group 1"];
    // Scales of the other sign turn half of the weights around.
    let turned = [BLOCK_1_UP, "has no column near the base's"];
    let best = "--bits 3 --recipe best --group-size 128";
    for (name, settings, found) in [
        ("a", "--bits 4 --recipe autogptq --group-size 64", swapped),
        ("b", &format!("{best} --set signs=positive"), swapped),
        ("c", best, turned),
    ] {
        quantize(&dir, name, &settings.split(' ').collect::<Vec<_>>());
        let swap = |file: &mut File| {
            let [_, outputs] = file.shape(&tensor);
            let (first, second) = file.tensor(&tensor).split_at_mut(2 * outputs);
            first.swap_with_slice(&mut second[..2 * outputs]);
        };
        with_damage(&dir, name, swap, || {
            dir.gptq(&["verify", name, "-q"]).ok();
            finds(&against_base(&dir, name), &found);
        });
    }
}

#[test]
fn truncated_files_and_wrong_configurations_are_found() {
    let dir = Workdir::new();
    quantize(
        &dir,
        "q",
        &["--bits", "4", "--recipe", "rtn", "--group-size", "64", "--act-order=false"],
    );
    with_damage(
        &dir,
        "q",
        |file| file.bytes.truncate(file.bytes.len() - 100),
        || {
            finds(&dir.gptq(&["verify", "q"]), &["model.safetensors", "truncated"]);
        },
    );

    let edit = |file: &str, from: &str, to: &str, names: &[&[&str]]| {
        let path = dir.path("q").join(file);
        let whole = fs::read_to_string(&path).unwrap();
        assert!(whole.contains(from), "{whole}");
        fs::write(&path, whole.replace(from, to)).unwrap();
        let outcome = dir.gptq(&["verify", "q"]);
        names.iter().for_each(|names| finds(&outcome, names));
        fs::write(&path, whole).unwrap();
        // The tensors tell what is meant, so one wrong setting is no flood of wrong shapes.
        assert!(outcome.stdout.lines().filter(|line| line.contains("_proj")).count() < 8);
    };
    for file in ["quantize_config.json", "config.json"] {
        let size = ["says group size 128, but the tensors have 64"];
        edit(
            file,
            "\"group_size\": 64",
            "\"group_size\": 128",
            &[&[file, size[0]], &["group_size is", "in quantize_config.json and"]],
        );
        edit(file, "\"bits\": 4", "\"bits\": 3", &[&[file, "says 3 bits, but the tensors have 4"]]);
        edit(file, "\"sym\": true", "\"sym\": false", &[&["sym is"]]);
    }
    edit(
        "config.json",
        "quantization_config",
        "something_else",
        &[&["config.json has no quantization_config"]],
    );
    edit("quantize_config.json", "{", "[", &[&["quantize_config.json"]]);
    // Transformers writes config.json alone: no fault, but the table says who needs the other file.
    fs::remove_file(dir.path("q/quantize_config.json")).unwrap();
    let outcome = dir.gptq(&["verify", "q"]);
    let row = "AutoGPTQ 0.4      no     there is no quantize_config.json";
    assert!(outcome.ok().contains(row), "{}", outcome.stdout);

    dir.gptq(&["verify", &demo()]).refused(&["demo-llama", "not a GPTQ checkpoint"]);
    dir.gptq(&["verify", "nowhere"]).refused(&["nowhere"]);
}

/// Changes the JSON of a file of a checkpoint for as long as it is looked at.
fn with_edit(dir: &Workdir, file: &str, change: impl FnOnce(&mut Value), look: impl FnOnce()) {
    let path = dir.path(file);
    let whole = fs::read_to_string(&path).unwrap();
    let mut json: Value = serde_json::from_str(&whole).unwrap();
    change(&mut json);
    fs::write(&path, json.to_string()).unwrap();
    look();
    fs::write(&path, whole).unwrap();
}

/// A key of config.json that makes another model of the same tensors.
#[test]
fn a_configuration_of_another_model_is_found_against_the_base() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--recipe", "rtn"]);
    let scaling = json!({"rope_type": "linear", "factor": 4.0});
    for (keys, found) in [
        (json!({"rms_norm_eps": 0.1}), ["rms_norm_eps 0.1", "1e-5"]),
        (json!({"rope_theta": 500_000.0}), ["rope_theta 500000.0", "10000.0"]),
        (json!({"rope_scaling": scaling}), ["rope_scaling linear, factor 4", "none"]),
        (json!({"model_type": "mistral", "sliding_window": 8}), ["sliding_window 8", "none"]),
        (json!({"model_type": "mistral", "sliding_window": 8}), ["model_type mistral", "llama"]),
        (json!({"mlp_bias": true}), ["biases of mlp.gate_proj", "none"]),
        (json!({"tie_word_embeddings": true}), ["", ""]),
    ] {
        let change = |config: &mut Value| {
            for (key, value) in keys.as_object().unwrap() {
                config[key] = value.clone();
            }
        };
        with_edit(&dir, "q/config.json", change, || {
            let outcome = against_base(&dir, "q");
            if found[0].is_empty() {
                // The head holds what it is tied to.
                outcome.ok();
            } else {
                let parts = format!("but the base's says {}", found[1]);
                finds(&outcome, &["config.json says", found[0], &parts]);
            }
        });
    }
    // The same in other words.
    let change = |config: &mut Value| {
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10_000});
        let keys = config.as_object_mut().unwrap();
        for key in ["rope_scaling", "rope_theta", "mlp_bias"] {
            keys.remove(key).unwrap();
        }
        config["torch_dtype"] = json!("bfloat16");
    };
    with_edit(&dir, "q/config.json", change, || assert!(!against_base(&dir, "q").ok().is_empty()));
}

/// What every family's configuration says is what it says in the checkpoint.
#[test]
fn checkpoints_of_every_family_have_their_bases_configuration() {
    let fixtures = repository().join("tests/fixtures/families");
    for (name, weights) in [
        ("dynamic", "plain"),
        ("linear", "plain"),
        ("llama2", "plain"),
        ("llama3", "plain"),
        ("llama3-new", "plain"),
        ("llama-biases", "biases"),
        ("mistral", "plain"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("smollm", "tied"),
        ("tinyllama", "plain"),
    ] {
        let dir = Workdir::new();
        fs::create_dir(dir.path(name)).unwrap();
        for (from, to) in [
            (format!("{name}.json"), "config.json"),
            (format!("{weights}.safetensors"), "model.safetensors"),
        ] {
            fs::copy(fixtures.join(from), dir.path(name).join(to)).unwrap();
        }
        dir.write(&format!("{name}/tokenizer.json"), &tokenizer().to_string());
        for layout in ["card", "modern"] {
            let (out, recipe) = (format!("{layout}-q"), "--recipe=rtn");
            dir.gptq(&["quantize", name, "--out", &out, recipe, "--layout", layout, "-q"]).ok();
            forget_sums(&dir, &out);
            let outcome = dir.gptq(&["verify", &out, "--base", name, "-q"]);
            assert_eq!(outcome.code, 0, "{name}, {layout}: {}{}", outcome.stdout, outcome.stderr);
            assert!(outcome.stdout.contains("model against the base"), "{}", outcome.stdout);
        }
    }
}

#[test]
fn a_tokenizer_that_is_not_the_bases_is_found() {
    let dir = Workdir::new();
    quantize(&dir, "q", &["--recipe", "rtn"]);
    let find = |file: &str, change: &dyn Fn(&mut Value), names: &[&str]| {
        with_edit(&dir, file, change, || finds(&against_base(&dir, "q"), names));
    };
    let tokenizer = "q/tokenizer.json";
    let swap = |json: &mut Value| {
        let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocabulary["a"].clone(), vocabulary["b"].clone());
        vocabulary.insert("a".to_owned(), b);
        vocabulary.insert("b".to_owned(), a);
    };
    find(tokenizer, &swap, &["tokenizer.json", "has `b` as token", "where the base's has `a`"]);
    let merges = |json: &mut Value| json["model"]["merges"].as_array_mut().unwrap().swap(0, 1);
    find(tokenizer, &merges, &["tokenizer.json", "other merges"]);
    let lower = |json: &mut Value| json["normalizer"] = json!({"type": "Lowercase"});
    find(tokenizer, &lower, &["tokenizer.json", "makes other tokens of \"Hello\""]);
    let no_bos = |json: &mut Value| json["add_bos_token"] = json!(false);
    let parts = ["tokenizer.json", "begins texts with BOS none, the base's with 1"];
    find("q/tokenizer_config.json", &no_bos, &parts);
    let broken = |json: &mut Value| json["model"] = json!({});
    find(tokenizer, &broken, &["tokenizer.json"]);
    // Written by another program, cut to the length of a training batch, and with a token of its own.
    let other = |json: &mut Value| {
        json["truncation"] =
            json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0});
        let mut token = json["added_tokens"][2].clone();
        token["id"] = json!(2048);
        token["content"] = json!("[PAD]");
        json["added_tokens"].as_array_mut().unwrap().push(token);
    };
    with_edit(&dir, tokenizer, other, || assert!(!against_base(&dir, "q").ok().is_empty()));
    // Another program may keep none beside the weights.
    fs::remove_file(dir.path(tokenizer)).unwrap();
    against_base(&dir, "q").ok();
}

/// Takes away what says how a checkpoint was made, as if another program had written it.
fn forget_recipe(dir: &Workdir, name: &str) {
    let mut file = File::open(&dir.path(name));
    file.retell("\"recipe\"", "\"recipx\"");
    file.write();
    fs::remove_file(dir.path(name).join("gptq_report.json")).unwrap();
}

/// The vocabulary and the width of the embedded model.
const HEAD_SIZES: [usize; 2] = [2048, 256];

#[test]
fn a_head_that_is_not_the_bases_is_found_fitted_or_not() {
    let dir = Workdir::new();
    quantize(&dir, "fitted", &["--bits", "3", "--recipe", "best"]);
    quantize(&dir, "kept", &["--bits", "4", "--recipe", "rtn"]);
    quantize(&dir, "foreign", &["--bits", "4", "--recipe", "autogptq"]);
    forget_recipe(&dir, "foreign");
    let head = "lm_head.weight";
    let [rows, width] = HEAD_SIZES;
    for name in ["fitted", "kept", "foreign"] {
        against_base(&dir, name).ok();
        let whole = File::open(&dir.path(name)).tensor(head).to_vec();
        let value =
            |at: usize| half::f16::from_le_bytes([whole[2 * at], whole[2 * at + 1]]).to_f32();
        let find = |change: &dyn Fn(usize, f32) -> f32| {
            let damage = |file: &mut File| file.change_halves(head, change);
            with_damage(&dir, name, damage, || finds(&against_base(&dir, name), &[head]));
        };
        find(&|_, _| 0.0);
        find(&|at, v| if at < rows / 2 * width { 0.0 } else { v });
        find(&|at, v| if at / width == 1000 { 0.0 } else { v });
        find(&|_, v| 2.0 * v);
        find(&|_, v| 1.3 * v);
        find(&|_, v| -v);
        // Every row is the one after it.
        find(&|at, _| value((at + width) % (rows * width)));
        find(&|at, _| value(at / width * width + (width - 1 - at % width)));
        // One row of another token, ten that are a little larger, ten with some of the row after them.
        find(&|at, v| if at / width == 1000 { value(at + width) } else { v });
        let few = |at: usize| at / width % (rows / 10) == 7;
        find(&|at, v| if few(at) { 1.1 * v } else { v });
        find(&|at, v| if few(at) { v + 0.3 * value((at + width) % (rows * width)) } else { v });
    }
    // What no recipe fitted is the base's to the last bit or so.
    for name in ["kept", "foreign"] {
        let damage = |file: &mut File| file.change_halves(head, |_, v| 1.01 * v);
        with_damage(&dir, name, damage, || {
            finds(&against_base(&dir, name), &[head, "differs from the base's by 1.0"]);
        });
    }
}

/// The card layout has no metadata, and who publishes a file may leave out the report: what a recipe
/// fitted is known by its values then.
#[test]
fn a_fitted_head_is_known_where_nothing_says_how_the_file_was_made() {
    let dir = Workdir::new();
    let plain = ["--recipe", "best", "--set", "rotate=none", "--layout", "card"];
    for (name, settings) in [
        ("best", ["--bits", "3"].as_slice()),
        // At 8 bits the head is changed by less than rounding of turned values may.
        ("moved", &["--bits", "8", "--group-size", "none", "--set", "residual=1"]),
    ] {
        quantize(&dir, name, &[&plain, settings].concat());
        fs::remove_file(dir.path(name).join("gptq_report.json")).unwrap();
        against_base(&dir, name).ok();
        let [_, width] = HEAD_SIZES;
        let damage = |file: &mut File| {
            file.change_halves("lm_head.weight", |at, v| if at / width == 9 { 2.0 * v } else { v });
        };
        with_damage(&dir, name, damage, || {
            finds(&against_base(&dir, name), &["lm_head.weight", "differs from the base's by"]);
        });
    }
}

/// All o and down of a file that says nothing of its recipe, and a factor that all scales have too
/// many.
#[test]
fn steps_and_scales_of_o_and_down_are_found_where_no_recipe_moved_them() {
    let dir = Workdir::new();
    for (name, bits, settings, moved) in [
        ("foreign", 4, ["--bits", "4", "--recipe", "autogptq", "--group-size", "64"], false),
        ("foreign3", 3, ["--bits", "3", "--recipe", "autogptq", "--group-size", "64"], false),
        ("best", 4, ["--bits", "4", "--recipe", "best", "--group-size", "64"], true),
    ] {
        quantize(&dir, name, &settings);
        if !moved {
            forget_recipe(&dir, name);
        }
        against_base(&dir, name).ok();
        let linears = |of: &[&str]| -> Vec<String> {
            let prefixes = (0..5).map(|block| format!("model.layers.{block}"));
            prefixes.flat_map(|p| of.iter().map(move |linear| format!("{p}.{linear}"))).collect()
        };
        let writers = linears(&["self_attn.o_proj", "mlp.down_proj"]);
        let all = linears(&[
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ]);
        let find_all = |of: &[String], damage: &dyn Fn(&mut File, &str)| {
            let damage = |file: &mut File| of.iter().for_each(|linear| damage(file, linear));
            with_damage(&dir, name, damage, || {
                dir.gptq(&["verify", name, "-q"]).ok();
                let outcome = dir.gptq(&["verify", name, "--base", &demo(), "-q", "--json"]);
                let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
                let findings = report["findings"].as_array().unwrap();
                for linear in of {
                    let place = |f: &&Value| f["place"].as_str().unwrap().starts_with(linear);
                    assert!(findings.iter().any(|f| place(&f)), "{name}, {linear}: {findings:?}");
                }
            });
        };
        if !moved {
            find_all(&writers, &|file, linear| {
                let most = u8::MAX >> (8 - bits);
                file.change_codes(linear, bits, |codes| {
                    codes.iter_mut().flatten().for_each(|code| *code = (*code + 1).min(most));
                });
            });
        }
        for (of, factor) in [(&writers, 1.3), (&all, 1.3), (&all, 0.75)] {
            find_all(of, &|file, linear| {
                file.change_halves(&format!("{linear}.scales"), |_, scale| factor * scale);
            });
        }
    }
}
