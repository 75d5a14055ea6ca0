//! `gptq generate` and `gptq chat`: the tokens that transformers chooses, the log-probabilities that
//! `gptq ppl` has, and sensible answers to what makes no sense.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use util::{TinyLlama, Workdir, repository, words};

const CPU: &str = "--device=cpu";
const GPU: &str = "--device=cuda:0";

fn demo() -> String {
    repository().join("tests/fixtures/demo-llama").display().to_string()
}

fn oracle() -> Value {
    let path = repository().join("tests/fixtures/greedy-demo.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// The embedded model's folder, written anew with more or less in the small files beside it.
fn demo_with(dir: &Workdir, name: &str, files: &[(&str, Option<&str>)]) {
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::create_dir_all(dir.path(name)).unwrap();
        std::fs::copy(format!("{}/{file}", demo()), dir.path(name).join(file)).unwrap();
    }
    for (file, text) in files {
        match text {
            Some(text) => dir.write(&format!("{name}/{file}"), text),
            None => std::fs::remove_file(dir.path(name).join(file)).unwrap(),
        }
    }
}

/// Of log-probabilities on the CPU, and where activations are fp16.
const EXACT: f64 = 1e-4;
const HALF: f64 = 2e-2;

#[test]
fn greedy_texts_are_those_of_transformers() {
    check_greedy(CPU, EXACT);
}

#[test]
fn greedy_texts_on_a_gpu_are_those_of_transformers() {
    if util::gpus::gpu().is_some() {
        check_greedy(GPU, HALF);
    }
}

fn check_greedy(device: &str, tolerance: f64) {
    let (dir, oracle) = (Workdir::new(), oracle());
    let prompts = oracle["model"]["prompts"].as_array().unwrap();
    let lines: Vec<String> = prompts.iter().map(|p| p["text"].to_string()).collect();
    dir.write("prompts.jsonl", &lines.join("\n"));
    let model = demo();
    let args = ["generate", &model, "--prompts", "prompts.jsonl", "--temperature", "0"];
    let made = dir.gptq(&[&args[..], &["--max-tokens", "64", "--json", device]].concat()).json();
    for (prompt, text) in prompts.iter().zip(made["texts"].as_array().unwrap()) {
        assert_eq!(ids(&text["prompt_ids"]), ids(&prompt["ids"]));
        assert_eq!(ids(&text["ids"]), ids(&prompt["new"]), "after {}", prompt["text"]);
        for (found, expected) in numbers(&text["logprobs"]).iter().zip(numbers(&prompt["logprobs"]))
        {
            assert!((found - expected).abs() < tolerance, "{found}, {expected}");
        }
        assert_eq!(text["finish"], "max_tokens");
    }
}

/// Codes of every width, in any order of columns, against the walk that measures perplexities: it
/// dequantizes whole weights and looks at whole windows.
#[test]
fn log_probabilities_are_those_of_ppl() {
    check_log_probabilities(CPU, EXACT);
}

#[test]
fn log_probabilities_on_a_gpu_are_those_of_ppl() {
    if util::gpus::gpu().is_some() {
        check_log_probabilities(GPU, HALF);
    }
}

fn check_log_probabilities(device: &str, tolerance: f64) {
    let dir = Workdir::new();
    let model = demo();
    let calibration = repository().join("calib/demo/calibration.txt").display().to_string();
    for (bits, group, order) in [
        ("2", "32", "--act-order"),
        ("3", "64", "--act-order"),
        ("4", "none", "-q"),
        ("8", "128", "-q"),
    ] {
        let _ = std::fs::remove_dir_all(dir.path("made"));
        let quantize = ["quantize", &model, "--out", "made", "--bits", bits, "--group-size", group];
        let few = ["--windows", "2", "--seq-len", "64", "--recipe", "autogptq", CPU, order];
        let dataset = ["--calib-dataset", &calibration];
        dir.gptq(&[&quantize[..], &few, &dataset].concat()).ok();
        let generate =
            ["generate", "made", "--prompt", "The", "--max-tokens", "60", "--json", device];
        let drawn = ["--temperature", "0.9", "--top-p", "0.9", "--seed", "5"];
        let made = dir.gptq(&[&generate[..], &drawn].concat()).json();
        let text = &made["texts"][0];
        let (new, logprobs) = (ids(&text["ids"]), numbers(&text["logprobs"]));
        assert!(new.len() > 8, "{text}");

        // The same tokens as a window of their own.
        let whole = format!("The{}", text["text"].as_str().unwrap());
        dir.write("text.txt", &whole);
        let prompt = ids(&text["prompt_ids"]);
        let seq_len = (prompt.len() + new.len() - 1).to_string();
        let ppl = ["ppl", "made", "--dataset", "text.txt", "--seq-len", &seq_len, device, "-q"];
        dir.gptq(&[&ppl[..], &["--per-token", "losses.csv"]].concat()).ok();
        let losses = std::fs::read_to_string(dir.path("losses.csv")).unwrap();
        let rows: Vec<Vec<&str>> = losses.lines().skip(1).map(|l| l.split(',').collect()).collect();
        let mut compared = 0;
        for row in rows.iter().filter(|row| row[0] == "0") {
            let position: usize = row[1].parse().unwrap();
            let Some(at) = position.checked_sub(prompt.len()) else { continue };
            // A text may have been made of other tokens than the tokenizer makes of it.
            if row[2].parse::<u64>().unwrap() != new[at] {
                break;
            }
            let loss: f64 = row[3].parse().unwrap();
            let apart = (loss + logprobs[at]).abs();
            assert!(apart < tolerance, "{bits} bits: {loss}, {}", logprobs[at]);
            compared += 1;
        }
        assert!(compared > 8, "{bits} bits: {compared} compared in {losses}");
    }
}

#[test]
fn texts_are_the_same_alone_and_together() {
    let dir = Workdir::new();
    let model = demo();
    let prompts = ["The king", "She was not", "And then", "In the", "A letter from"];
    let lines: Vec<String> = prompts.iter().map(|p| json!({ "prompt": p }).to_string()).collect();
    dir.write("prompts.jsonl", &lines.join("\n\n"));
    let drawn = ["--temperature", "0.8", "--seed", "3", "--max-tokens", "40", "--json", CPU];
    let together = |batch| {
        let args = ["generate", &model, "--prompts", "prompts.jsonl", "--batch", batch];
        dir.gptq(&[&args[..], &drawn].concat()).json()["texts"].clone()
    };
    let all = together("5");
    assert_eq!(all, together("2"));
    assert_eq!(all, together("1"));
    for (prompt, text) in prompts.iter().zip(all.as_array().unwrap()) {
        let args = ["generate", &model, "--prompt", prompt];
        let alone = dir.gptq(&[&args[..], &drawn].concat()).json();
        assert_eq!(alone["texts"][0], *text, "{prompt}");
    }
}

/// What streams to stdout is what JSON holds, up to stop strings and limits.
#[test]
fn texts_end_where_they_should() {
    let dir = Workdir::new();
    let model = demo();
    let make = |more: &[&str]| {
        let args = ["generate", &model, "--prompt", "The", "--max-tokens", "30", CPU];
        dir.gptq(&[&args[..], &["--temperature", "0"], more].concat())
    };
    let whole = make(&["--json"]).json()["texts"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(make(&[]).ok(), format!("{whole}\n"));
    let stop = &whole[10..14];
    let before = whole.split(stop).next().unwrap();
    let stopped = make(&["--stop", stop, "--stop", "never there", "--json"]).json();
    assert_eq!(stopped["texts"][0]["text"], before);
    assert_eq!(stopped["texts"][0]["finish"], "stop");
    assert_eq!(make(&["--stop", stop]).ok(), format!("{before}\n"));

    let counted = make(&["--context", "12", "--json"]).json();
    let tokens = |key: &str| ids(&counted["texts"][0][key]).len();
    assert_eq!(tokens("prompt_ids") + tokens("ids"), 12);
    let full = make(&["--context", "12"]);
    assert!(full.stderr.contains("the context of 12 tokens is full"), "{}", full.stderr);
    assert!(whole.starts_with(full.ok().trim_end_matches('\n')));

    // A token that ends a text is no part of it.
    let made = make(&["--json"]).json();
    let fifth = &made["texts"][0]["ids"][4];
    let config = json!({ "eos_token_id": [fifth] }).to_string();
    demo_with(&dir, "ends", &[("generation_config.json", Some(&config))]);
    let args = ["generate", "ends", "--prompt", "The", "--max-tokens", "30", CPU, "--json"];
    let ended = dir.gptq(&args).json();
    let text = &ended["texts"][0];
    assert_eq!(text["finish"], "end_of_text");
    assert!(ids(&text["ids"]).len() <= 5);
    assert!(whole.starts_with(text["text"].as_str().unwrap()));
}

#[test]
fn prompts_come_from_files_and_pipes_and_through_templates() {
    let dir = Workdir::new();
    dir.write("prompt.txt", "The king");
    let model = demo();
    let tail = ["--max-tokens", "8", "--temperature", "0", CPU, "-q"];
    let typed = dir.gptq(&[&["generate", &model, "--prompt", "The king"][..], &tail].concat());
    dir.gptq(&[&["generate", &model, "--prompt", "-5", "--stop", "-"][..], &tail].concat()).ok();
    let read = dir.gptq(&[&["generate", &model, "--prompt", "prompt.txt"][..], &tail].concat());
    assert_eq!(typed.ok(), read.ok());
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["generate", &model, "--prompt", "-"])
        .args(tail)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The king").unwrap();
    let piped = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(piped.stdout).unwrap(), typed.stdout);

    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:";
    demo_with(&dir, "chatty", &[("chat_template.jinja", Some(template))]);
    let prompt_ids = |args: &[&str]| {
        let made = dir.gptq(&[args, &tail[..], &["--json"]].concat()).json();
        ids(&made["texts"][0]["prompt_ids"])
    };
    let through = prompt_ids(&["generate", "chatty", "--system", "Be kind", "--prompt", "Hi"]);
    dir.write("facts.toml", FACTS);
    let card = ["generate", "chatty", "--template", "facts.toml", "--prompt", "Hi"];
    let card = prompt_ids(&[&card[..], &["--system", "Be kind"]].concat());
    let plain = prompt_ids(&["generate", &model, "--prompt", "system: Be kind\nuser: Hi\nbot:"]);
    // A chat template writes its own BOS, a card's text gets the tokenizer's.
    assert_eq!(card, plain);
    assert_eq!(through, plain[1..]);
    let line = json!({ "messages": [
        { "role": "system", "content": "Be kind" }, { "role": "user", "content": "Hi" },
    ] });
    dir.write("lines.jsonl", &line.to_string());
    assert_eq!(prompt_ids(&["generate", "chatty", "--prompts", "lines.jsonl"]), through);
    // What --system says is said of messages, too, and a template that cannot say it is named.
    let line = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    dir.write("lines.jsonl", &line.to_string());
    let told = ["generate", "chatty", "--prompts", "lines.jsonl", "--system", "Be kind"];
    assert_eq!(prompt_ids(&told), through);
    dir.write("deaf.toml", &FACTS.replace("system: {system_message}\\n", ""));
    let line = json!({ "messages": [{ "role": "tool", "content": "Hi" }] });
    dir.write("lines.jsonl", &line.to_string());
    let unknown = ["generate", "chatty", "--template", "facts.toml", "--prompts", "lines.jsonl"];
    dir.gptq(&[&unknown[..], &tail].concat()).refused(&["role `tool`", "system, user"]);
    // A length that the files ask for and that is not followed is named, unless it changes nothing.
    for (length, named) in [(20, false), (300, true), (512, false)] {
        let config = format!("{{\"max_length\": {length}}}");
        demo_with(&dir, "long", &[("generation_config.json", Some(&config))]);
        let made = dir.gptq(&["generate", "long", "--prompt", "Hi", "--stop", "e", CPU]);
        made.ok();
        let says = made.stderr.contains("max_length 300");
        assert_eq!(says, named, "{}", made.stderr);
    }
    let deaf = ["generate", "chatty", "--template", "deaf.toml", "--system", "x", "--prompt", "Hi"];
    let made = dir.gptq(&[&deaf[..], &["--max-tokens", "2", CPU]].concat());
    assert!(
        made.ok().len() > 1 && made.stderr.contains("no place for --system"),
        "{}",
        made.stderr
    );
}

const FACTS: &str = r#"
name = "Demo"
repository = "org/demo"
author = "somebody"
license = "mit"
languages = ["en"]
description = "A demo."
[prompt]
name = "Plain"
template = "system: {system_message}\nuser: {prompt}\nbot:"
"#;

#[test]
fn a_conversation_goes_on() {
    let dir = Workdir::new();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:";
    demo_with(&dir, "chatty", &[("chat_template.jinja", Some(template))]);
    let chat_bytes = |said: &[u8]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
            .args(["chat", "chatty", CPU, "-q", "--temperature", "0", "--max-tokens", "12"])
            .current_dir(dir.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(said).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let chat = |said: &str| chat_bytes(said.as_bytes());
    let one = chat("Who is there?\n");
    assert!(!one.trim().is_empty());
    let two = chat("Who is there?\n\nAnd why?\n");
    // What is no text is left out, and the conversation goes on.
    assert_eq!(chat_bytes(b"\xff\xfe\nWho is there?\r\n"), one);
    assert!(two.starts_with(&one) && two.len() > one.len(), "{one:?} {two:?}");
    // What was said counts: begun anew, the same question has the answer of a first one.
    let anew = chat("Who is there?\n/reset\nAnd why?\n/exit\nnever read\n");
    assert_eq!(anew, format!("{one}{}", chat("And why?\n")));
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["chat", "chatty", CPU, "-q", "--temperature", "0", "--max-tokens", "12", "--json"])
        .current_dir(dir.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Who is there?\n").unwrap();
    let line: Value = serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(format!("{}\n", line["text"].as_str().unwrap()), one);
    assert_eq!(ids(&line["ids"]).len(), numbers(&line["logprobs"]).len());
    // Each turn reads on from what is kept of the last; the answer is that of the whole read at once.
    let answer = one.trim_end_matches('\n');
    let messages = json!({ "messages": [
        { "role": "user", "content": "Who is there?" },
        { "role": "assistant", "content": answer },
        { "role": "user", "content": "And why?" },
    ] });
    dir.write("lines.jsonl", &messages.to_string());
    let args =
        ["generate", "chatty", "--prompts", "lines.jsonl", "--max-tokens", "12", CPU, "--json"];
    let whole = dir.gptq(&[&args[..], &["--temperature", "0"]].concat()).json();
    assert_eq!(two, format!("{one}{}\n", whole["texts"][0]["text"].as_str().unwrap()));
}

/// The first Ctrl-C ends the text, not its output; the process ends as interrupted ones do.
#[test]
fn an_interrupted_text_is_whole_as_far_as_it_goes() {
    use std::os::unix::process::ExitStatusExt;
    let dir = Workdir::new();
    TinyLlama::new().write(&dir.path("model"));
    dir.write("model/generation_config.json", r#"{"eos_token_id": 63}"#);
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["generate", "model", "--prompt", &words(3), "--max-tokens", "100000", "--json", CPU])
        .args(["--context", "128", "--repetition-penalty", "1.0"])
        .current_dir(dir.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Tiny models are quick: what is asked for here is that neither way of ending loses the output.
    let mut line = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    while !line.starts_with("load:") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0);
    }
    let id = child.id().to_string();
    let _ = Command::new("kill").args(["-INT", &id]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let whole = serde_json::from_slice::<Value>(&output.stdout);
    match output.status.signal() {
        // Before anything was being made, too.
        Some(2) => assert!(output.stdout.is_empty() || whole.unwrap()["interrupted"] == true),
        Some(other) => panic!("signal {other}"),
        None => assert_eq!(whole.unwrap()["interrupted"], false),
    }
}

/// A long prompt is not read to its end for nobody.
#[test]
fn an_interrupted_prompt_is_left_unread() {
    use std::os::unix::process::ExitStatusExt;
    let dir = Workdir::new();
    let mut model = TinyLlama::new();
    model.config["max_position_embeddings"] = json!(65_536);
    model.write(&dir.path("model"));
    dir.write("prompt.txt", &words(60_000));
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(["generate", "model", "--prompt", "prompt.txt", "--max-tokens", "9", "--json", CPU])
        .current_dir(dir.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("load:") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0);
    }
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(2));
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&made["interrupted"], &made["texts"][0]["ids"]), (&json!(true), &json!([])));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn what_makes_no_sense_is_refused_in_a_sentence() {
    let dir = Workdir::new();
    let model = demo();
    let refused = |args: &[&str], names: &[&str]| dir.gptq(args).refused(names);
    let long = "word ".repeat(2000);
    refused(&["generate", &model, "--prompt", &long, CPU], &["tokens", "max_position_embeddings"]);
    refused(&["generate", &model, "--prompt", &long, "--context", "99", CPU], &["context of 99"]);
    refused(&["generate", &model, "--prompt", "x", "--context", "1000000", CPU], &["1000000"]);
    refused(&["generate", &model, "--prompt", "x", "--temperature=-1", CPU], &["temperature"]);
    refused(&["generate", &model, "--prompt", "x", "--stop", "", CPU], &["stop"]);
    refused(&["generate", &model, "--prompt", "x", "--batch", "17", CPU], &["--batch 17"]);
    refused(
        &["generate", &model, "--prompt", "x", "--chat", CPU],
        &["no chat template", "--template"],
    );
    refused(&["chat", &model, CPU], &["no chat template", "--template"]);
    dir.write("bad.jsonl", "\"fine\"\n{\"text\": \"what\"}\n");
    refused(&["generate", &model, "--prompts", "bad.jsonl", CPU], &["Line 2 of `bad.jsonl`"]);
    dir.write("bad.jsonl", "{\"prompt\": \"x\", \"messages\": []}\n");
    refused(&["generate", &model, "--prompts", "bad.jsonl", CPU], &["Line 1 of `bad.jsonl`"]);
    dir.write("bad.jsonl", &format!("\"fine\"\n{}\n", json!(long)));
    refused(&["generate", &model, "--prompts", "bad.jsonl", CPU], &["Prompt 2 of 2"]);
    dir.write("none.jsonl", "\n\n");
    refused(&["generate", &model, "--prompts", "none.jsonl", CPU], &["holds no prompts"]);
    refused(&["generate", &model, "--prompts", "absent.jsonl", CPU], &["absent.jsonl"]);
    for (file, text, named) in [
        ("generation_config.json", "{\"temperature\": \"hot\"}", "temperature"),
        ("generation_config.json", "{", "generation_config.json"),
        ("generation_config.json", "{\"top_p\": 7}", "top_p"),
        ("chat_template.jinja", "{% for m in messages %}{{ m.content }}", "chat_template.jinja"),
        ("chat_template.jinja", "{{ raise_exception('no such role') }}", "no such role"),
        (
            "chat_template.jinja",
            "{% for i in range(99999999) %}x{% endfor %}",
            "chat_template.jinja",
        ),
    ] {
        demo_with(&dir, "broken", &[(file, Some(text))]);
        refused(&["generate", "broken", "--chat", "--prompt", "x", CPU], &[named]);
        std::fs::remove_dir_all(dir.path("broken")).unwrap();
    }
    // Several processes would each make the text.
    let launched = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
    let launched: Vec<_> =
        launched.into_iter().zip(["0", "0", "2", "localhost", "29500"]).collect();
    dir.gptq_env(&["generate", &model, "--prompt", "x", CPU], &launched)
        .refused(&["one process", "--device cuda:0,1"]);
}
