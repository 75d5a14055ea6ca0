use std::fs;

use super::*;

fn template(source: &str) -> Result<ChatTemplate> {
    ChatTemplate::new(source, "`chat_template.jinja`", SpecialTokens::default())
}

fn render(source: &str) -> Result<String> {
    template(source)?.render(&[Message::new("user", "Hi")], true)
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn open(files: &[(&str, &str)]) -> Result<String> {
    let folder = folder(files);
    ChatTemplate::open(folder.path())?.render(&[Message::new("user", "Hi")], true)
}

#[test]
fn a_template_is_found_in_either_file() {
    let file = ("chat_template.jinja", "file {{ bos_token }}");
    let config = |template: &str| format!(r#"{{"bos_token": "<s>", "chat_template": {template}}}"#);
    let text = config(r#""text {{ messages[0].content }}""#);
    assert_eq!(open(&[file, ("tokenizer_config.json", &text)]).unwrap(), "file <s>");
    assert_eq!(open(&[("tokenizer_config.json", &text)]).unwrap(), "text Hi");
    let tool = r#"{"name": "tool_use", "template": "t"}"#;
    let list = config(&format!(r#"[{tool}, {{"name": "default", "template": "d"}}]"#));
    assert_eq!(open(&[("tokenizer_config.json", &list)]).unwrap(), "d");

    let list = config(&format!("[{tool}]"));
    let error = open(&[("tokenizer_config.json", &list)]).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer_config.json") && error.contains("it has tool_use"),
        "{error}"
    );
    let error = open(&[("tokenizer_config.json", &config("3"))]).unwrap_err().to_string();
    assert!(error.contains("neither a text nor a list"), "{error}");
    for none in [&[][..], &[("tokenizer_config.json", "{}")]] {
        let error = open(none).unwrap_err();
        assert!(matches!(error, Error::NoChatTemplate { .. }), "{error}");
        assert!(error.hint().unwrap().contains("--template"));
    }
}

#[test]
fn an_error_names_the_file_and_the_line() {
    let error = render("a\n{% if %}").unwrap_err().to_string();
    assert!(error.starts_with("Chat template `chat_template.jinja` failed in line 2:"), "{error}");
    let error = open(&[("tokenizer_config.json", r#"{"chat_template": "\n\n{{ x.y.z }}"}"#)]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json` failed in line 3: "), "{error}");
    let error = render("{{ raise_exception('Roles must ' ~ 'alternate') }}").unwrap_err();
    assert_eq!(
        error.to_string(),
        "Chat template `chat_template.jinja` refuses the conversation in line 1: Roles must alternate"
    );
    let error = render("{% include 'x' %}").unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
    let error = render("{{ strftime_now('%Q') }}").unwrap_err().to_string();
    assert!(error.contains("strftime_now"), "{error}");
}

#[test]
fn what_a_template_does_is_bounded() {
    let nines = "{% for a in range(9999) %}".repeat(3) + &"{% endfor %}".repeat(3);
    let double = "{% set x = 'aaaaaaaaaaaaaaaa' %}".to_owned() + &"{% set x = x ~ x %}".repeat(60);
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let write = "{% set x = 'a' * 100000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
    for source in [&nines, &double, &write.to_owned()] {
        let error = render(source).unwrap_err();
        assert!(matches!(error, Error::TemplateTooLarge { .. }), "{error}");
    }
    assert!(render(recursion).is_err());
    let deep = "{% set n = namespace(x=[]) %}{% for a in range(300) %}\
                {% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}";
    assert!(render(deep).unwrap_err().to_string().contains("200 levels"));
    let error = template(&"a".repeat(MOST_SOURCE + 1)).unwrap_err();
    assert!(matches!(error, Error::TemplateTooLarge { .. }), "{error}");
    assert!(template(&"{% if a %}".repeat(10_000)).is_err());
    assert!(template(&format!("{{{{ {} }}}}", "(".repeat(10_000))).is_err());
}

/// As deep as the fuel goes, and read in every way that goes down.
#[test]
fn deep_values_end_in_an_error_or_a_text() {
    for turns in [30_000, 99_999] {
        for wrapped in ["[n.x]", "{'a': n.x}"] {
            for used in
                ["", "{{ n.x }}", "{{ n.x == [n.x] }}", "{{ n.x | tojson }}", "{{ n.x ~ 1 }}"]
            {
                let source = format!(
                    "{{% set n = namespace(x=[]) %}}{{% for a in range({turns}) %}}\
                     {{% set n.x = {wrapped} %}}{{% endfor %}}{used}"
                );
                let rendered = render(&source);
                assert_eq!(
                    rendered.is_ok(),
                    turns < 50_000 && !used.contains("tojson"),
                    "{source}"
                );
            }
        }
    }
}

#[test]
fn what_is_null_in_a_message_is_not_there() {
    let messages = vec![serde_json::json!({"role": "user", "content": null})];
    let given = Conversation { messages, ..Default::default() };
    let template = template("{{ messages[0].content is defined }} {{ tools is none }}").unwrap();
    assert_eq!(template.render_all(&given).unwrap(), "False True");
}

#[test]
fn line_ends_are_one_and_the_last_is_none() {
    assert_eq!(render("a\r\n{% if true %}\r\nb{% endif %}\r\n").unwrap(), "a\nb");
    assert_eq!(render("a\n\n").unwrap(), "a\n");
}

/// Calibration reads it: any other day would be other tokens.
#[test]
fn a_document_is_the_same_on_any_day_and_ends_with_its_last_message() {
    let source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.role }}: {{ m.content }}\
                  {% endfor %}{% if add_generation_prompt %}|assistant: {% endif %}";
    let messages = [Message::new("user", "Hi"), Message::new("assistant", "Ho")];
    let text = template(source).unwrap().render_document(&messages).unwrap();
    assert_eq!(text, "26 Jul 2024|user: Hi|assistant: Ho");
}
