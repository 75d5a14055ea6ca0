//! Mixtures of experts from the command line: made, told of, planned, shared by ranks, swept and verified.
//!
//! Whether their forward is right is `families`' matter, whether each expert's Hessian is that of its tokens
//! the pipeline's own tests'.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "util/family_models.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod family_models;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod ranks_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod schema_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;

use ranks_support::ranks;
use schema_support::Schema;
use serde_json::{Value, json};
use util::weight_file::with_damage;
use util::{Outcome, Workdir, contents, words};

/// One of each way to route: softmax, a gated shared expert, groups with a correction.
const FAMILIES: [&str; 3] = ["qwen3-moe", "qwen2-moe", "glm4-moe"];

/// A folder with these models, a text to calibrate on and one to measure.
fn workdir(models: &[&str]) -> Workdir {
    let dir = Workdir::new();
    for name in models {
        let folder = dir.path(name);
        family_models::assemble(&folder, name);
        fs::write(folder.join("tokenizer.json"), util::tokenizer().to_string()).unwrap();
    }
    dir.write("text.txt", &words(1700));
    dir.write("held.txt", &words(2200).split_inclusive(' ').skip(1700).collect::<String>());
    dir
}

fn quantize<'a>(model: &'a str, out: &'a str, windows: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["quantize", model, "--out", out, "--group-size=32", "--device=cpu", "--json"];
    let text = ["--calib-dataset=text.txt", "--seq-len=48", "--seed=0", windows];
    [&fixed[..], &text, more].concat()
}

fn kl(dir: &Workdir, model: &str, base: &str) -> f64 {
    let fixed = ["--device=cpu", "--dataset", "held.txt", "--seq-len=48", "--json"];
    let report = dir.gptq(&[&["ppl", model, "--base", base], &fixed[..]].concat()).json();
    report["base"]["kl"].as_f64().unwrap()
}

/// Every linear of a report that says how many tokens it saw, by block.
fn seen(blocks: &Value) -> Vec<Vec<(String, u64)>> {
    let of_block = |block: &Value| {
        let linears = block["linears"].as_array().unwrap().iter();
        let seen = |l: &Value| Some((l["name"].as_str()?.to_owned(), l["tokens"].as_u64()?));
        linears.filter_map(seen).collect()
    };
    blocks.as_array().unwrap().iter().map(of_block).collect()
}

#[track_caller]
fn held(dir: &Workdir, command: &str, outcome: &Outcome) -> Value {
    let json = outcome.json();
    let wrong = Schema::new(dir.gptq(&["schema", command]).json()).check(&json);
    assert!(wrong.is_empty(), "{command}: {}", wrong.join("\n"));
    json
}

/// A warning a block, counts in the result, in the folder and in both forms of the report; an error with
/// `--strict`, which leaves nothing.
#[test]
fn experts_that_see_too_few_tokens_are_told_of() {
    let dir = workdir(&["mixtral"]);
    let outcome = dir.gptq(&quantize("mixtral", "out", "--windows=1", &["--recipe=autogptq"]));
    let made = held(&dir, "quantize", &outcome);
    let count = made["few_tokens"].as_u64().unwrap();
    // 48 tokens are fewer than any linear's inputs, of all of which there are two blocks of 12.
    assert_eq!(count, 24);
    let warnings =
        outcome.stderr.lines().filter(|line| line.contains("warning: 12 linears of experts"));
    assert_eq!(warnings.count(), 2, "{}", outcome.stderr);
    for block in seen(&made["blocks"]) {
        // Gate, up and down of four experts; each token goes through two.
        assert_eq!(block.len(), 12);
        assert_eq!(block.iter().map(|(_, tokens)| tokens).sum::<u64>(), 3 * 2 * 48);
    }
    let recorded: Value =
        serde_json::from_slice(&fs::read(dir.path("out/gptq_report.json")).unwrap()).unwrap();
    assert_eq!(recorded["few_tokens"], count);
    let linears = recorded["blocks"][0]["linears"].as_array().unwrap();
    assert_eq!(linears.iter().filter(|l| l["few_tokens"] == json!(true)).count(), 12);
    assert_eq!(linears[0].get("tokens"), None, "q sees all tokens");
    held(&dir, "report", &dir.gptq(&["report", "out", "--json"]));
    let told = "24 linears of experts saw fewer tokens than they have inputs";
    assert!(dir.gptq(&["report", "out"]).ok().contains(told));
    dir.gptq(&["report", "out", "--html", "page.html"]).ok();
    let page = fs::read_to_string(dir.path("page.html")).unwrap();
    // Rows of all experts together.
    assert!(page.contains(told) && page.contains(">experts.w1<"));
    let strict = quantize("mixtral", "strict", "--windows=1", &["--recipe=autogptq", "--strict"]);
    dir.gptq(&strict).refused(&["block_sparse_moe.experts.", "--strict", "more windows"]);
    assert!(!dir.path("strict").exists());
    let enough = quantize("mixtral", "enough", "--windows=32", &["--recipe=autogptq", "--strict"]);
    let enough = dir.gptq(&enough).json();
    assert_eq!(enough["few_tokens"], 0);
}

/// Both are the default recipe's; what shifts what is said.
#[test]
fn several_ranks_make_experts_together() {
    let dir = workdir(&FAMILIES);
    for name in FAMILIES {
        let eight = ["--bits=8", "--recipe=best"];
        let one = dir.gptq(&quantize(name, "one", "--windows=33", &eight));
        assert!(one.stderr.contains(" holds for o, and for down where there are no experts"));
        let several = ranks(&dir, 2, &quantize(name, "two", "--windows=33", &eight));
        let again = ranks(&dir, 2, &quantize(name, "again", "--windows=33", &eight));
        assert_eq!(several[1].ok(), "");
        let same =
            |file: &str| contents(&dir.path("two"))[file] == contents(&dir.path("again"))[file];
        assert!(same("model.safetensors") && same("gptq_report.json"), "{name}");
        drop(again);
        let (one, two) = (seen(&one.json()["blocks"]), seen(&several[0].json()["blocks"]));
        for (block, (one, two)) in one.iter().zip(&two).enumerate() {
            let total = |of: &[(String, u64)]| of.iter().map(|(_, tokens)| tokens).sum::<u64>();
            // Nothing before the first experts is rounded otherwise.
            assert_eq!(total(one), total(two), "{name}, block {block}");
            assert!(one.is_empty() || total(one) == 3 * 3 * 33 * 48, "{name}: {one:?}");
        }
        let apart = kl(&dir, "two", "one");
        // As in `families`: next to equal experts.
        assert!(apart < 1e-2, "{name}: {apart}");
        for out in ["one", "two", "again"] {
            fs::remove_dir_all(dir.path(out)).unwrap();
        }
    }
}

/// Files are as large as planned, and a sweep reuses what it made.
#[test]
fn sweeps_of_experts_are_as_planned_and_taken_up_again() {
    let dir = workdir(&["qwen2-moe"]);
    let text = "model = \"qwen2-moe\"\ncalibration = \"card\"\nrecipe = \"best\"\nlayout = \"LAYOUT\"\n\
                [calibration_overrides]\ndataset = \"text.txt\"\nwindows = 8\nseq_len = 48\n\
                [evaluation]\ndataset = \"held.txt\"\nprotocol = \"paper\"\nseq_len = 48\n\
                [[branch]]\nname = \"a\"\nrecipe = \"autogptq\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
                [[branch]]\nname = \"r\"\nrecipe = \"rtn\"\nbits = 3\ngroup_size = \"none\"\nact_order = false\n\
                [[branch]]\nname = \"b\"\nrecipe = \"best\"\nbits = 4\ngroup_size = 64\nact_order = true\n";
    for layout in ["modern", "card"] {
        dir.write("sweep.toml", &text.replace("LAYOUT", layout));
        let plan = dir.gptq(&["plan", "qwen2-moe", "--config", "sweep.toml", "--json"]);
        let plan = held(&dir, "plan", &plan);
        let run = ["sweep", "sweep.toml", "--device=cpu", "--together=2", "--out", layout];
        let first = [&run[..], &["--only=a", "--only=r", "--json"]].concat();
        held(&dir, "sweep", &dir.gptq(&first));
        let kept = contents(&dir.path(&format!("{layout}/a")));
        let made = held(&dir, "sweep", &dir.gptq(&[&run[..], &["--json"]].concat()));
        assert_eq!(contents(&dir.path(&format!("{layout}/a"))), kept);
        for row in plan.as_array().unwrap() {
            let branch = dir.path(layout).join(row["branch"].as_str().unwrap());
            let bytes = fs::metadata(branch.join("model.safetensors")).unwrap().len();
            assert_eq!(row["file_bytes"], bytes, "{layout}: {row}");
        }
        let best =
            made["rows"].as_array().unwrap().iter().find(|row| row["branch"] == "b").unwrap();
        let (kl, rounded) = (&best["result"]["kl"], &best["rtn"]["kl"]);
        assert!(kl.as_f64().unwrap() < rounded.as_f64().unwrap(), "{best}");
        for branch in ["a", "r", "b"] {
            let of = format!("{layout}/{branch}");
            held(&dir, "verify", &dir.gptq(&["verify", &of, "--base=qwen2-moe", "--json"]));
        }
    }
}

/// A sound file passes with its base and a text; what a router decides by is looked at, too, in whatever
/// coordinates.
#[test]
fn experts_are_verified_against_the_base() {
    let dir = workdir(&["glm4-moe"]);
    dir.gptq(&quantize("glm4-moe", "out", "--windows=32", &["--recipe=best"])).ok();
    let text = ["--dataset=held.txt", "--seq-len=48", "--device=cpu", "--json"];
    let verify = |out: &str| dir.gptq(&[&["verify", out, "--base=glm4-moe"], &text[..]].concat());
    let sound = verify("out");
    let report = held(&dir, "verify", &sound);
    assert_eq!(report["findings"], json!([]));
    let linears = report["weights"]["linears"].as_array().unwrap();
    // q, k, v and o of three blocks, a dense MLP, two mixtures of eight and a shared one.
    assert_eq!(linears.len(), 3 * 4 + 3 + 2 * 9 * 3);
    let measured = linears.iter().filter(|l| l["output_error"].is_number()).count();
    assert!(measured > linears.len() / 2, "{measured}");
    let table = dir.gptq(&["verify", "out", "--base=glm4-moe"]);
    assert!(table.ok().contains("mlp.experts.*.gate_proj"), "{}", table.stdout);
    for name in
        ["model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.e_score_correction_bias"]
    {
        // The sum of the file tells it, too; of the tensor only the comparison does.
        with_damage(
            &dir,
            "out",
            |file| file.tensor(name)[1] ^= 0x40,
            || {
                let damaged: Value = serde_json::from_str(&verify("out").stdout).unwrap();
                let findings = damaged["findings"].as_array().unwrap();
                assert!(findings.iter().any(|f| f["place"] == name), "{damaged:#}");
            },
        );
    }
}

/// What is wrong with a mixture's configuration, its values or what is asked of it is said by name, and before
/// a text is read.
#[test]
fn what_cannot_be_is_said_before_the_work() {
    let dir = workdir(&["qwen3-moe"]);
    let text = ["--calib-dataset=no-such.txt", "--windows=4", "--seq-len=48", "--device=cpu"];
    let tuned = ["quantize", "qwen3-moe", "--out=out", "--recipe=tuned"];
    dir.gptq(&[&tuned[..], &text].concat()).refused(&["tune=0", "qwen3_moe model cannot be tuned"]);
    let sweep = "model = \"qwen3-moe\"\ncalibration = \"card\"\nrecipe = \"autogptq\"\n\
                 [calibration_overrides]\ndataset = \"no-such.txt\"\nwindows = 8\nseq_len = 48\n\
                 [[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\nact_order = true\n\
                 [[branch]]\nname = \"t\"\nrecipe = \"tuned\"\nbits = 4\ngroup_size = 32\nact_order = true\n";
    dir.write("sweep.toml", sweep);
    dir.gptq(&["sweep", "sweep.toml", "--out=branches", "--device=cpu"])
        .refused(&["cannot be tuned"]);
    assert!(!dir.path("branches").exists() && !dir.path("out").exists());

    let gain = "model.layers.0.input_layernorm.weight";
    let router = "model.layers.1.mlp.gate.weight";
    let nan = f32::NAN.to_le_bytes();
    with_damage(
        &dir,
        "qwen3-moe",
        |file| {
            file.tensor(router)[4..8].copy_from_slice(&nan);
            file.tensor(gain)[..4].copy_from_slice(&nan);
            file.tensor(gain)[8..12].copy_from_slice(&nan);
        },
        || {
            let run = dir.gptq(&["inspect", "qwen3-moe", "--json"]);
            let shown = held(&dir, "inspect", &run);
            assert_eq!(shown["not_finite"], json!({gain: 2, router: 1}));
            let table = dir.gptq(&["inspect", "qwen3-moe"]);
            assert!(table.ok().contains(&format!("2 values of {gain}")), "{}", table.stdout);
        },
    );

    let file = dir.path("qwen3-moe/config.json");
    let config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut Value), named: &[&str]| {
        let mut config = config.clone();
        change(&mut config);
        fs::write(&file, config.to_string()).unwrap();
        dir.gptq(&["inspect", "qwen3-moe"]).refused(named);
    };
    let block = "model.layers.1.mlp.";
    let without = |key: &str| {
        let key = key.to_owned();
        move |config: &mut Value| drop(config.as_object_mut().unwrap().remove(&key))
    };
    refused(&without("num_experts"), &["`num_experts` is missing; with 128", block]);
    refused(&without("moe_intermediate_size"), &["`moe_intermediate_size` is missing; with 768"]);
    refused(
        &|config| config["num_local_experts"] = json!(4),
        &["`num_experts` is 8, but `num_local_experts` is 4: correct the wrong one"],
    );
    refused(&|config| config["num_experts_per_tok"] = json!(9), &["chooses from 8 experts"]);
}
