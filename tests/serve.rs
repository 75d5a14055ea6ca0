//! `gptq serve`: the texts that `gptq generate` makes, the log-probabilities that `gptq ppl` has, in the
//! form that OpenAI's clients read; and sensible answers to what makes no sense.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

#[allow(dead_code, reason = "each test binary uses a part of it")]
mod serve_support;
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod util;

use serde_json::{Value, json};
use serve_support::Server;
use util::{Workdir, repository};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:";

fn demo() -> String {
    repository().join("tests/fixtures/demo-llama").display().to_string()
}

/// The embedded model with a chat template.
fn chatty(dir: &Workdir) {
    std::fs::create_dir_all(dir.path("chatty")).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(format!("{}/{file}", demo()), dir.path("chatty").join(file)).unwrap();
    }
    dir.write("chatty/chat_template.jinja", TEMPLATE);
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    list(value).iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A text of which more than one band of scores is made.
fn passage() -> String {
    let text =
        std::fs::read_to_string(repository().join("calib/demo/heldout.txt")).unwrap().to_owned();
    text[..900].to_owned()
}

/// What is the same of two answers: all but names, times and the last bits of numbers.
#[track_caller]
fn assert_same(one: &Value, other: &Value) {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
            for (key, value) in
                a.iter().filter(|(key, _)| !["id", "created"].contains(&key.as_str()))
            {
                assert_same(value, &b[key]);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{one} {other}");
            a.iter().zip(b).for_each(|(a, b)| assert_same(a, b));
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
        _ => assert_eq!(one, other),
    }
}

#[test]
fn greedy_texts_are_those_of_generate() {
    let dir = Workdir::new();
    let server = Server::start(&dir, &demo(), &[]);
    for prompt in ["The king", "She was not", "a"] {
        let args = ["generate", &demo(), "--prompt", prompt, "--max-tokens", "40", "--json"];
        let made = dir.gptq(&[&args[..], &["--temperature", "0", "--device=cpu"]].concat()).json();
        let body = json!({
            "prompt": prompt, "max_tokens": 40, "temperature": 0, "logprobs": 0, "model": "demo-llama",
        });
        let answer = server.complete(&body);
        let (text, choice) = (&made["texts"][0], &answer["choices"][0]);
        assert_eq!(choice["text"], text["text"]);
        assert_same(&choice["logprobs"]["token_logprobs"], &text["logprobs"]);
        assert_eq!(answer["usage"]["prompt_tokens"], list(&text["prompt_ids"]).len());
        assert_eq!(answer["usage"]["completion_tokens"], list(&text["ids"]).len());
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(answer["object"], "text_completion");
        let tokens: String =
            list(&choice["logprobs"]["tokens"]).iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(tokens, choice["text"].as_str().unwrap());
    }
    // Drawn ones, too: the same seed is the same text.
    let args = ["generate", &demo(), "--prompt", "The king", "--max-tokens", "40", "--json"];
    let drawn = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--seed", "7"];
    let made = dir.gptq(&[&args[..], &drawn, &["--device=cpu"]].concat()).json();
    let body = json!({
        "prompt": "The king", "max_tokens": 40, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7,
    });
    assert_eq!(server.complete(&body)["choices"][0]["text"], made["texts"][0]["text"]);
}

/// What an evaluation harness asks for.
#[test]
fn echoed_log_probabilities_are_those_of_ppl() {
    let dir = Workdir::new();
    let (server, text) = (Server::start(&dir, &demo(), &[]), passage());
    let echo = |prompt: &Value, max_tokens: usize| {
        let body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": true,
        });
        server.complete(&body)
    };
    let answer = echo(&json!(text), 1);
    let choice = &answer["choices"][0];
    let tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert!(tokens > 130, "{tokens} tokens are one or two bands");

    dir.write("text.txt", &text);
    let seq_len = tokens.to_string();
    let ppl =
        ["ppl", &demo(), "--dataset", "text.txt", "--seq-len", &seq_len, "--device=cpu", "-q"];
    dir.gptq(&[&ppl[..], &["--per-token", "losses.csv"]].concat()).ok();
    let losses = std::fs::read_to_string(dir.path("losses.csv")).unwrap();
    let logprobs = list(&choice["logprobs"]["token_logprobs"]);
    assert_eq!(logprobs.len(), tokens + 1);
    assert!(logprobs[0].is_null() && choice["logprobs"]["top_logprobs"][0].is_null());
    let (mut ids, mut largest) = (vec![0; tokens], 0.0_f64);
    for row in losses.lines().skip(1) {
        let row: Vec<&str> = row.split(',').collect();
        let (position, loss): (usize, f64) = (row[1].parse().unwrap(), row[3].parse().unwrap());
        ids[position] = row[2].parse::<usize>().unwrap();
        largest = largest.max((logprobs[position].as_f64().unwrap() + loss).abs());
    }
    assert!(largest < 1e-4, "{largest}");
    assert_eq!(ids.iter().filter(|&&id| id == 0).count(), 1, "the first token has no loss");

    // Which is the likeliest is read off, to the bit, and where each stands in the text.
    let top = list(&choice["logprobs"]["top_logprobs"]);
    let greedy = |at: usize| {
        let top = top[at].as_object().unwrap().values().map(|v| v.as_f64().unwrap());
        logprobs[at].as_f64().unwrap() >= top.fold(f64::NEG_INFINITY, f64::max)
    };
    let likeliest = (1..tokens).filter(|&at| greedy(at)).count();
    assert!(greedy(tokens) && likeliest > 10 && likeliest < tokens - 10, "{likeliest}");
    let whole: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    assert!(choice["text"].as_str().unwrap().starts_with(&text));
    let shown = list(&choice["logprobs"]["tokens"]);
    for (token, offset) in shown.iter().zip(numbers(&choice["logprobs"]["text_offset"])) {
        // The first word's space is not in the text, and special tokens are not.
        let (token, from) = (token.as_str().unwrap().trim_start_matches(' '), offset as usize);
        let there: String = whole[from..].iter().collect();
        let there = there.trim_start_matches(' ');
        assert!(there.starts_with(token) || token == "<s>", "{token:?} at {from}: {there:?}");
    }

    // The same as tokens, without a new one, and beside others.
    let none = echo(&json!(text), 0);
    assert_eq!(none["usage"]["completion_tokens"], 0);
    assert_same(&none["choices"][0]["logprobs"]["token_logprobs"], &json!(logprobs[..tokens]));
    ids[0] = 1;
    let again = echo(&json!([ids, [1, 5, 6], ids[..100]]), 1);
    assert_same(&again["choices"][0]["logprobs"], &choice["logprobs"]);
    let part = &again["choices"][2]["logprobs"]["token_logprobs"];
    assert_same(&json!(list(part)[..100]), &json!(logprobs[..100]));
}

#[test]
fn streams_put_together_are_the_whole() {
    let dir = Workdir::new();
    chatty(&dir);
    let server = Server::start(&dir, "chatty", &[]);
    let settings = json!({"temperature": 0.9, "seed": 3, "n": 3, "max_tokens": 24, "stop": ["th"]});
    let with = |more: Value| {
        let mut body = settings.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let streamed = |path: &str, body: &Value| {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        server.post(path, &body).events()
    };
    let body = with(json!({"prompt": ["The king", "A"], "echo": true, "logprobs": 2}));
    let whole = server.complete(&body);
    let mut events = streamed(COMPLETIONS, &body);
    let last = events.pop().unwrap();
    assert_eq!((&last["usage"], &last["choices"]), (&whole["usage"], &json!([])));
    assert_eq!(list(&whole["choices"]).len(), 6);
    for (index, choice) in list(&whole["choices"]).iter().enumerate() {
        assert_eq!(choice["index"], index);
        let (mut text, mut finish) = (String::new(), Value::Null);
        let mut lists = json!({
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        });
        for event in events.iter().filter(|event| event["choices"][0]["index"] == index) {
            assert!(event["usage"].is_null() && finish.is_null());
            let part = &event["choices"][0];
            text.push_str(part["text"].as_str().unwrap());
            finish = part["finish_reason"].clone();
            for (name, values) in part["logprobs"].as_object().into_iter().flatten() {
                lists[name].as_array_mut().unwrap().extend(list(values).clone());
            }
        }
        assert_eq!(choice["text"], text);
        assert_eq!(choice["finish_reason"], finish);
        assert_same(&choice["logprobs"], &lists);
    }

    let body = with(json!({"messages": [{"role": "user", "content": "Who is there?"}]}));
    let whole = server.post(CHAT, &body).ok();
    let mut events = streamed(CHAT, &body);
    assert_eq!(events.pop().unwrap()["usage"], whole["usage"]);
    for (index, choice) in list(&whole["choices"]).iter().enumerate() {
        let parts: Vec<&Value> =
            events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(parts[0]["delta"]["role"], "assistant");
        let text: String = parts.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(choice["message"]["content"], text);
        assert_eq!(choice["finish_reason"], parts.last().unwrap()["finish_reason"]);
        assert!(parts.iter().all(|part| part["logprobs"].is_null()));
    }
}

#[test]
fn chats_go_through_the_template() {
    let dir = Workdir::new();
    chatty(&dir);
    let server = Server::start(&dir, "chatty", &[]);
    let args = ["generate", "chatty", "--system", "Be kind", "--prompt", "Hi\nyou", "--json"];
    let few = ["--max-tokens", "12", "--temperature", "0", "--device=cpu"];
    let made = dir.gptq(&[&args[..], &few].concat()).json();
    let body = json!({
        "model": "./chatty", "max_completion_tokens": 12, "logprobs": true, "top_logprobs": 2,
        "messages": [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
        ],
    });
    // Another name of the same folder is another name.
    server.post(CHAT, &body).refused(404, Some("model"), "./chatty");
    let mut body = body;
    body["model"] = json!("chatty");
    let answer = server.post(CHAT, &body).ok();
    let (choice, text) = (&answer["choices"][0], &made["texts"][0]);
    assert_eq!(choice["message"]["content"], text["text"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(answer["usage"]["prompt_tokens"], list(&text["prompt_ids"]).len());
    let said = list(&choice["logprobs"]["content"]);
    for (token, logprob) in said.iter().zip(numbers(&text["logprobs"])) {
        assert!((token["logprob"].as_f64().unwrap() - logprob).abs() < 1e-6);
        let bytes: Vec<u8> =
            list(&token["bytes"]).iter().map(|b| b.as_u64().unwrap() as u8).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), token["token"].as_str().unwrap());
        assert_eq!(list(&token["top_logprobs"]).len(), 2);
        assert_eq!(token["top_logprobs"][0]["token"], token["token"], "greedy");
    }
    // Without a limit of its own an answer has the context's.
    body.as_object_mut().unwrap().remove("max_completion_tokens");
    let tokens = &server.post(CHAT, &body).ok()["usage"]["total_tokens"];
    assert!(tokens.as_u64().unwrap() <= 512, "{tokens}");

    let plain = Server::start(&dir, &demo(), &[]);
    plain.post(CHAT, &body).refused(404, Some("model"), "chatty");
    body["model"] = json!("demo-llama");
    plain.post(CHAT, &body).refused(400, Some("messages"), "--template");
}

/// Texts of all kinds beside each other are what each is alone.
#[test]
fn requests_together_are_as_alone() {
    let dir = Workdir::new();
    let server = Server::start(&dir, &demo(), &["--max-batch", "4", "--queue", "40"]);
    let mut bodies = vec![
        json!({"prompt": "The king", "max_tokens": 40, "temperature": 0}),
        json!({
            "prompt": ["She was", "And then", "In"], "max_tokens": 15, "n": 2, "temperature": 1, "seed": 9,
        }),
        json!({"prompt": passage(), "max_tokens": 1, "echo": true, "logprobs": 1, "seed": 4}),
        json!({"prompt": [1, 5, 9, 11], "max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 1}),
        json!({"prompt": "A letter from", "max_tokens": 60, "stop": [" the", "."], "temperature": 0}),
        json!({
            "prompt": "The king", "max_tokens": 30, "repetition_penalty": 1.3, "logprobs": 3,
            "temperature": 0,
        }),
    ];
    bodies.extend(bodies.clone());
    let alone: Vec<Value> = bodies.iter().map(|body| server.complete(body)).collect();
    let together: Vec<Value> = std::thread::scope(|scope| {
        let server = &server;
        let ask = |body| scope.spawn(move || server.complete(body));
        let asked: Vec<_> = bodies.iter().map(ask).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    for (one, other) in alone.iter().zip(&together) {
        assert_same(one, other);
    }
    // The ith text of a prompt is that of a larger seed, and a prompt among others is as alone.
    let single = json!({"prompt": "And then", "max_tokens": 15, "temperature": 1, "seed": 10});
    assert_eq!(server.complete(&single)["choices"][0]["text"], alone[1]["choices"][3]["text"]);
    // Without a seed texts differ.
    let drawn = json!({"prompt": "The", "max_tokens": 30, "temperature": 1.5, "n": 4});
    let drawn = server.complete(&drawn);
    let texts: std::collections::BTreeSet<_> =
        list(&drawn["choices"]).iter().map(|choice| choice["text"].as_str()).collect();
    assert_eq!(texts.len(), 4, "{drawn}");
    let stopped = &alone[4]["choices"][0];
    assert_eq!(stopped["finish_reason"], "stop");
    assert!(!stopped["text"].as_str().unwrap().contains(" the"));
    server.wait_for("gptq_texts_active", 0.0);
    assert_eq!(
        server.metric("gptq_requests_total{endpoint=\"/v1/completions\",status=\"200\"}"),
        26.0
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let dir = Workdir::new();
    chatty(&dir);
    let server = Server::start(&dir, "chatty", &["--context", "64"]);
    let text = "word ".repeat(100);
    let long: Vec<u32> = vec![5; 60];
    for (fields, param, named) in [
        (json!({}), "prompt", "missing"),
        (json!({"prompt": null}), "prompt", "missing"),
        (json!({"prompt": 5}), "prompt", "list of tokens"),
        (json!({"prompt": []}), "prompt", "empty"),
        (json!({"prompt": [[]]}), "prompt", "no tokens"),
        (json!({"prompt": ["a", 5]}), "prompt", "list of tokens"),
        (json!({"prompt": [5, "a"]}), "prompt", "list of tokens"),
        (json!({"prompt": [5, -1]}), "prompt", "token -1"),
        (json!({"prompt": [5, 1.5]}), "prompt", "token 1.5"),
        (json!({"prompt": [2048]}), "prompt", "token 2048"),
        (json!({"prompt": [[2048]]}), "prompt", "2048"),
        (json!({"prompt": vec!["a"; 300]}), "prompt", "256"),
        (json!({"prompt": text}), "max_tokens", "context of 64"),
        (json!({"prompt": long, "max_tokens": 5}), "max_tokens", "context of 64"),
        (json!({"max_tokens": 0}), "max_tokens", "echo"),
        (json!({"max_tokens": -1}), "max_tokens", "-1"),
        (json!({"max_tokens": "5"}), "max_tokens", "5"),
        (json!({"max_tokens": 1.5}), "max_tokens", "1.5"),
        (json!({"max_tokens": u64::MAX}), "max_tokens", "context"),
        (json!({"temperature": -0.1}), "temperature", "at least 0"),
        (json!({"temperature": "hot"}), "temperature", "hot"),
        (json!({"top_p": 0}), "top_p", "above 0"),
        (json!({"top_k": -2}), "top_k", "-2"),
        (json!({"min_p": 2}), "min_p", "from 0 to 1"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "above 0"),
        (json!({"seed": 1.5}), "seed", "1.5"),
        (json!({"n": 0}), "n", "from 1"),
        (json!({"n": 1000}), "n", "1000"),
        (json!({"n": 2, "best_of": 3}), "best_of", "best_of"),
        (json!({"stop": ""}), "stop", "empty"),
        (json!({"stop": [5]}), "stop", "a string"),
        (json!({"stop": vec!["a"; 17]}), "stop", "16"),
        (json!({"echo": 1}), "echo", "true or false"),
        (json!({"logprobs": true}), "logprobs", "from 0 to 20"),
        (json!({"logprobs": 21}), "logprobs", "21"),
        (json!({"stream": "yes"}), "stream", "yes"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "stream"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options",
            "include",
        ),
        (json!({"presence_penalty": 0.5}), "presence_penalty", "not done"),
        (json!({"logit_bias": {"5": 100}}), "logit_bias", "not done"),
        (json!({"response_format": {"type": "json_object"}}), "response_format", "not done"),
        (json!({"suffix": "end"}), "suffix", "not done"),
        (json!({"presence_penalty": []}), "presence_penalty", "not done"),
        (json!({"logit_bias": false}), "logit_bias", "not done"),
        (json!({"user": 5}), "user", "a string"),
        (json!({"max_completion_tokens": 5}), "max_completion_tokens", "no parameter"),
        (json!({"top_logprobs": 2}), "top_logprobs", "no parameter"),
        (json!({"temprature": 0.5}), "temprature", "no parameter"),
        (
            json!({"stream": true, "stream_options": {"every": 1}}),
            "stream_options",
            "include_usage",
        ),
    ] {
        let mut body = json!({"prompt": "a"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        if fields == json!({}) {
            body = json!({});
        }
        server.post(COMPLETIONS, &body).refused(400, Some(param), named);
    }
    let user = json!({"role": "user", "content": "Hi"});
    for (fields, param, named) in [
        (json!({"messages": null}), "messages", "missing"),
        (json!({"messages": []}), "messages", "empty"),
        (json!({"messages": "Hi"}), "messages", "a list"),
        (json!({"messages": ["Hi"]}), "messages", "messages[0]"),
        (json!({"messages": [user, {"role": "user"}]}), "messages", "messages[1]"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages",
            "text",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}),
            "messages",
            "tool_calls",
        ),
        (
            json!({"messages": [{"role": "user", "content": "Hi", "name": "Ada"}]}),
            "messages",
            "messages[0] has `name`",
        ),
        (
            json!({"messages": [{"role": "user", "content": [
                {"type": "text", "text": "Hi", "weight": 2},
            ]}]}),
            "messages",
            "messages[0] has `weight`",
        ),
        (json!({"max_tokens": 4, "max_completion_tokens": 5}), "max_tokens", "only one"),
        (json!({"max_tokens": "4", "max_completion_tokens": 4}), "max_tokens", "whole number"),
        (json!({"tools": [{"type": "function"}]}), "tools", "not done"),
        (json!({"echo": true}), "echo", "no parameter"),
        (json!({"top_logprobs": 2}), "top_logprobs", "logprobs"),
        (json!({"logprobs": 2}), "logprobs", "true or false"),
        (json!({"max_tokens": 0}), "max_tokens", "at least 1"),
        (json!({"max_tokens": 64}), "max_tokens", "context"),
        (json!({"messages": [{"role": "user", "content": text}]}), "max_tokens", "context"),
    ] {
        let mut body = json!({"messages": [user]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post(CHAT, &body).refused(400, Some(param), named);
    }
    for body in ["", "{", "[]", "5", "{\"prompt\": \"a\"} x", "{\"prompt\": NaN}", "prompt=a"] {
        server.post_bytes(COMPLETIONS, body.as_bytes()).refused(400, None, "JSON");
    }
    let deep = "[".repeat(100_000);
    server.post_bytes(COMPLETIONS, deep.as_bytes()).refused(400, None, "JSON");
    server.post_bytes(CHAT, &vec![b' '; 5 << 20]).refused(413, None, "bytes");
    server.get("/v1/engines").refused(404, None, "/v1/engines");
    server.get(COMPLETIONS).refused(405, None, "GET");
    server.post("/health", &json!({})).refused(405, None, "POST");
    let other = json!({"prompt": "a", "model": "gpt-5"});
    server.post(COMPLETIONS, &other).refused(404, Some("model"), "chatty");

    // What changes nothing is taken.
    let body = json!({
        "prompt": "a", "user": "me", "metadata": {}, "presence_penalty": 0, "logit_bias": {},
        "best_of": 1, "suffix": null, "stop": null, "stream": null, "seed": -5, "top_k": -1,
    });
    assert_eq!(server.complete(&body)["usage"]["completion_tokens"], 16);
    let part = json!({"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}});
    let answer = json!({"role": "assistant", "content": "Ho", "refusal": null, "tool_calls": []});
    let body = json!({
        "messages": [{"role": "user", "content": [part], "name": ""}, answer],
        "max_tokens": 4, "max_completion_tokens": 4,
    });
    assert_eq!(server.post(CHAT, &body).ok()["usage"]["completion_tokens"], 4);
    let models = server.get("/v1/models").ok();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("chatty")));
    assert_eq!(server.get("/v1/models/chatty").ok(), models["data"][0]);
    server.get("/v1/models/gpt-5").refused(404, Some("model"), "chatty");
    server.get("/v1/models/%FF").refused(400, Some("model"), "UTF-8");
    server.get("/v1/models/some/gpt-5").refused(404, Some("model"), "some/gpt-5");
    assert_eq!(server.get("/health").ok()["status"], "ok");
}
