//! Recipes of several sources, conversations, and `gptq calib`, which shows what they hold.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::fs;

use serde_json::{Value, json};
use util::{TinyLlama, Workdir, repository, words};

/// Every message's words behind its role, `w2` or `w3`, as a template would; two of one role are refused.
const TEMPLATE: &str = "{% for m in messages %}\
    {% if not loop.first and m.role == messages[loop.index0 - 1].role %}\
    {{ raise_exception('roles must alternate') }}{% endif %}\
    {{ '<s> ' if loop.first }}{{ 'w2 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} {% endfor %}";

/// Texts for half of the windows, rows of conversations for the others.
const RECIPE: &str = "name = \"both\"\nwindows = 8\nseq_len = 32\nseed = 0\n\
    [[source]]\ndataset = \"text.txt\"\njoin = \"card\"\nshare = 1\n\
    [[source]]\ndataset = \"chats.jsonl\"\ntemplate = \"chat\"\nrows = \"padded\"\nshare = 1\n";

/// A tiny model with a template, a text, conversations of 3 to 22 tokens, and recipes.
fn workdir() -> Workdir {
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("model/chat_template.jinja", TEMPLATE);
    dir.write("text.txt", &words(400));
    let chat = |i: usize| json!({"prompt": "w9", "completion": words(1 + i).trim()}).to_string();
    let chats: Vec<String> = (0..20).map(chat).collect();
    dir.write("chats.jsonl", &chats.join("\n"));
    dir.write("both.toml", RECIPE);
    dir
}

fn calib(dir: &Workdir, recipe: &str, more: &[&str]) -> util::Outcome {
    dir.gptq(&[&["calib", recipe, "--model", "model"][..], more].concat())
}

fn read(dir: &Workdir, path: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.path(path)).unwrap()).unwrap()
}

/// By Python with tokenizers: the text encoded whole, `random.seed(SEED)`, windows at
/// `random.randint(0, N - seq_len - 1)`, hashlib.sha256 over struct.pack('<NI', …).
#[test]
fn windows_are_pythons() {
    let dir = Workdir::new();
    let model = repository().join("tests/fixtures/demo-llama").display().to_string();
    let digest = |recipe: &str| {
        let shown = dir.gptq(&["calib", recipe, "--model", &model, "--json"]).json();
        shown["sha256"].as_str().unwrap().to_owned()
    };
    let demo = repository().join("calib/demo.toml").display().to_string();
    assert_eq!(digest(&demo), "60a68ee185c26aba1d1f5b6075ed92cf49e8e2c1612ead7e828c6bcfc858b6dd");
    let heldout = repository().join("calib/demo/heldout.txt").display().to_string();
    let recipe = format!(
        "name = \"two\"\nseq_len = 64\nseed = 5\n\
         [[source]]\ndataset = \"builtin:addresses\"\njoin = \"card\"\nwindows = 3\n\
         [[source]]\ndataset = {heldout:?}\njoin = \"card\"\nwindows = 2\n"
    );
    dir.write("two.toml", &recipe);
    // Seeds 5 and 6; in the order first, second, first, second, first.
    assert_eq!(
        digest("two.toml"),
        "2a95f89a4d998e17e3ea5e9aa06dcd41d10e04db4ede59beba8f1cea73edd933"
    );
}

#[test]
fn a_checkpoint_says_of_all_its_sources() {
    let dir = workdir();
    let shown = calib(&dir, "both.toml", &["--json"]).json();
    assert_eq!((&shown["windows"], &shown["seq_len"]), (&json!(8), &json!(32)));
    let fixed = ["quantize", "model", "--out", "out", "--device=cpu", "--bits=4", "--json"];
    let quantize = [&fixed[..], &["--group-size=32", "--calib", "both.toml"]].concat();
    let made = dir.gptq(&quantize);
    let all = shown["tokens"].as_u64().unwrap();
    let note = format!(
        "calibrating on 8 windows of up to 32 tokens, {all} in all: 4 of text.txt, 4 of chats.jsonl"
    );
    assert!(made.stderr.replace("[DIR]/", "").contains(&note), "{}", made.stderr);
    let made = made.json();
    assert_eq!(made["calibration"]["tokens"], shown["tokens"]);
    assert_eq!(made["calibration"]["sources"].as_array().unwrap().len(), 2);
    let report = read(&dir, "out/gptq_report.json");
    let record = &report["calibration"];
    assert_eq!(record["dataset"]["name"], "text.txt + chats.jsonl");
    assert_eq!(record["dataset"]["sources"][1]["name"], "chats.jsonl");
    assert_eq!(record["source_windows"], json!([4, 4]));
    assert_eq!((&record["tokens"], &record["sha256"]), (&shown["tokens"], &shown["sha256"]));
    let file = fs::read(dir.path("out/model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["calibration"], "text.txt + chats.jsonl");
    assert_eq!(metadata["calibration_windows"], "8 x 32");
    // Either source is one that the checkpoint has seen.
    let seen = |dataset: &str| {
        let fixed = ["ppl", "out", "--seq-len=16", "--device=cpu", "--json", "--dataset", dataset];
        dir.gptq(&fixed).json()["contaminated"].clone()
    };
    dir.write(
        "copy.jsonl",
        &fs::read_to_string(dir.path("text.txt"))
            .map(|text| json!({"text": text}).to_string())
            .unwrap(),
    );
    dir.write("other.txt", &words(300));
    assert_eq!(
        (seen("text.txt"), seen("copy.jsonl"), seen("other.txt")),
        (json!(true), json!(true), json!(false))
    );
    let page = dir.gptq(&["report", "out"]);
    assert!(page.ok().contains("4 of text.txt, 4 of chats.jsonl, seed 0"), "{}", page.stdout);
    // Two runs are one.
    let again = quantize.iter().map(|&word| if word == "out" { "again" } else { word });
    dir.gptq(&again.collect::<Vec<_>>()).ok();
    for file in ["model.safetensors", "gptq_report.json"] {
        let bytes = |out: &str| fs::read(dir.path(out).join(file)).unwrap();
        assert_eq!(bytes("out"), bytes("again"), "{file}");
    }
}

/// No weights are there to be read.
#[test]
fn what_windows_hold_is_shown_without_weights() {
    let dir = workdir();
    fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    let shown = calib(&dir, "both.toml", &["--show=2"]);
    let text = shown.ok();
    assert!(
        text.starts_with("both, tokens of model, seed 0: 8 windows of up to 32 tokens, "),
        "{text}"
    );
    assert!(text.contains("chat, padded"), "{text}");
    assert!(text.contains("\nwindow 1: 32 tokens of text.txt, from token "), "{text}");
    assert!(text.contains("\nwindow 2: ") && text.contains(" of chats.jsonl, from row "), "{text}");
    assert!(text.contains("\n  \"<s> w2 w9 w3 "), "{text}");
    assert!(!text.contains("window 3") && !text.contains("It holds"), "{text}");
    let shown = calib(&dir, "both.toml", &["--json", "--show=100"]).json();
    let windows = shown["shown"].as_array().unwrap();
    assert_eq!(windows.len(), 8);
    assert!(windows[0]["row"].is_null() && windows[1]["token"].is_null());
    let tokens: u64 = windows.iter().map(|window| window["tokens"].as_u64().unwrap()).sum();
    assert_eq!(shown["tokens"], tokens);
    let sources = shown["sources"].as_array().unwrap();
    let share = |source: &Value| source["share"].as_f64().unwrap();
    assert!((sources.iter().map(share).sum::<f64>() - 1.0).abs() < 1e-12);
    let fewer = calib(&dir, "both.toml", &["--json", "--windows=2", "--seq-len=8"]).json();
    assert_eq!(fewer["shown"], json!([]));
    assert_eq!((&fewer["windows"], &fewer["sources"][1]["windows"]), (&json!(2), &json!(1)));
}

/// By its text, whatever it is called.
#[test]
fn evaluation_sets_among_the_sources_are_named() {
    let Some(shared) = util::needs::shared() else { return };
    let hub = shared.join("hf").display().to_string();
    let dir = workdir();
    let card = |more: &[&str]| {
        let fixed = ["calib", "card", "--model", "model", "--seq-len=32", "--windows=4"];
        dir.gptq_env(&[&fixed[..], more].concat(), &[("HF_HOME", &hub)])
    };
    let text = card(&[]);
    let warning = "It holds Salesforce/wikitext:wikitext-2-raw-v1:test: perplexity and KL there";
    assert!(text.ok().contains(warning), "{}", text.stdout);
    let sets = &card(&["--json"]).json()["evaluation_sets"];
    assert_eq!(sets.as_array().unwrap().len(), 2, "{sets}");
    let other = card(&["--json", "--calib-dataset=builtin:addresses"]).json();
    assert_eq!(other["evaluation_sets"], json!([]));
}

#[test]
fn mistakes_in_recipes_are_told() {
    let dir = workdir();
    calib(&dir, "nope", &[]).refused(&["`nope`", "wikitext2, mix, card", "--calib-dataset"]);
    calib(&dir, "both.toml", &["--windows=1"]).refused(&["`chats.jsonl`", "none of the 1 windows"]);
    calib(&dir, "both.toml", &["--windows=80"]).refused(&[
        "20 rows",
        "40 windows",
        "smaller share",
    ]);
    dir.write("packed.toml", &RECIPE.replace("rows = \"padded\"\n", ""));
    calib(&dir, "packed.toml", &["--windows=80"])
        .refused(&["chats.jsonl", "40 windows of 32 need"]);
    dir.write("text.toml", &RECIPE.replace("chats.jsonl", "text.txt"));
    calib(&dir, "text.toml", &[]).refused(&["text.txt` is one text", "leave `template` out"]);
    let twice =
        json!({"messages": [{"role": "user", "content": "w4"}, {"role": "user", "content": "w5"}]});
    dir.write("chats.jsonl", &twice.to_string());
    calib(&dir, "both.toml", &[]).refused(&["refuses every conversation", "roles must alternate"]);
    let good = json!({"conversations": [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w5"}]});
    dir.write("chats.jsonl", &format!("{twice}\n{}", format!("{good}\n").repeat(4)));
    let shown = calib(&dir, "both.toml", &[]);
    assert!(shown.ok().contains("both, "), "{}", shown.stdout);
    let warning = "warning: 1 conversations of [DIR]/chats.jsonl were passed over";
    assert!(
        shown.stderr.replace("of chats", "of [DIR]/chats").contains(warning),
        "{}",
        shown.stderr
    );
    let empty = json!({"prompt": "w4", "response": " "});
    dir.write(
        "chats.jsonl",
        &format!("{twice}\n{empty}\n{empty}\n{}", format!("{good}\n").repeat(4)),
    );
    let shown = calib(&dir, "both.toml", &["--json"]);
    // The rows of the windows come before the last of them in Python's order.
    assert!(shown.stderr.contains("for others, as an answer in them is empty"), "{}", shown.stderr);
    assert_eq!(shown.json()["sources"][1]["unanswered"], 1);
    calib(&dir, "both.toml", &["--windows=10"]).refused(&[
        "4 rows with text but 5 windows",
        "template refuses 1 more",
        "2 more have an empty answer",
    ]);
    calib(&dir, "packed.toml", &["--windows=80"])
        .refused(&["32 need 1280", "refuses 1 more; 2 more"]);
    dir.write("chats.jsonl", "{\"text\": \"w4\"}");
    calib(&dir, "both.toml", &[]).refused(&[
        "Line 1 of `chats.jsonl` is no conversation",
        "messages",
        "mend the row",
    ]);
    fs::remove_file(dir.path("model/chat_template.jinja")).unwrap();
    calib(&dir, "both.toml", &[]).refused(&[
        "chats.jsonl",
        "no chat template",
        "without `template`",
    ]);
    dir.write("model/chat_template.jinja", "{% for %}");
    calib(&dir, "both.toml", &[]).refused(&["chat_template.jinja"]);
    // A recipe of texts does not look at it.
    dir.write("plain.toml", "name = \"p\"\ndataset = \"text.txt\"\njoin = \"card\"\nwindows = 2\nseq_len = 8\nseed = 0\n");
    calib(&dir, "plain.toml", &[]).ok();
    // As `quantize` refuses it.
    let long = ["Windows of 200 tokens do not fit the model's context of 128"];
    calib(&dir, "plain.toml", &["--seq-len=200"]).refused(&long);
    dir.gptq(&[
        "quantize",
        "model",
        "--out",
        "q",
        "--calib",
        "plain.toml",
        "--seq-len=200",
        "--device=cpu",
    ])
    .refused(&long);
}
