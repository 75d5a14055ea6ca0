//! Rendered conversations, against the bytes that transformers renders.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::path::Path;

use chrono::NaiveDateTime;
use gptq_generate::{ChatTemplate, Conversation, Error, Message, SpecialTokens};
use serde_json::{Map, Value};

fn fixture() -> Value {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat_templates.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

fn conversation(given: &Value, add_generation_prompt: bool, now: NaiveDateTime) -> Conversation {
    Conversation {
        messages: given["messages"].as_array().unwrap().clone(),
        tools: given.get("tools").cloned(),
        documents: None,
        add_generation_prompt,
        now: Some(now),
        variables: given.get("variables").and_then(Value::as_object).cloned().unwrap_or_default(),
    }
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let fixture = fixture();
    let now: NaiveDateTime = fixture["now"].as_str().unwrap().parse().unwrap();
    let token = |name: &str| fixture["tokens"][name].as_str().map(str::to_owned);
    let tokens = SpecialTokens {
        bos: token("bos_token"),
        eos: token("eos_token"),
        unk: token("unk_token"),
        pad: token("pad_token"),
    };
    let templates: &Map<String, Value> = fixture["templates"].as_object().unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 200);
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = templates[name].as_str().unwrap();
        let template = ChatTemplate::new(source, &format!("`{name}`"), tokens.clone()).unwrap();
        let given = &fixture["conversations"][case["conversation"].as_str().unwrap()];
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let rendered = template.render_all(&conversation(given, add_generation_prompt, now));
        let same = match &rendered {
            Ok(text) => case["rendered"].as_str() == Some(text),
            Err(Error::TemplateRefused { message, .. }) => {
                case["refused"].as_str() == Some(message)
            }
            Err(Error::Template { line, .. }) => case.get("fails").is_some() && *line == Some(2),
            Err(_) => false,
        };
        if !same {
            wrong.push(format!("{name} {}:\n{rendered:?}\n{case}", case["conversation"]));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n\n"));
}

#[test]
fn messages_of_texts_are_rendered_as_objects_are() {
    let fixture = fixture();
    let source = fixture["templates"]["zephyr"].as_str().unwrap();
    let tokens = SpecialTokens { eos: Some("</s>".to_owned()), ..SpecialTokens::default() };
    let template = ChatTemplate::new(source, "`zephyr`", tokens).unwrap();
    let messages = [Message::new("system", "S"), Message::new("user", "U")];
    assert_eq!(
        template.render(&messages, true).unwrap(),
        "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\n"
    );
}
