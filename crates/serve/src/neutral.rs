//! Parameters that change what a model writes and are not done here.
//!
//! A client may send them with the values that do nothing, as several do. All others are refused: an
//! answer without them would not be what was asked for. Parameters that are in no list are ignored,
//! as OpenAI's `user` and `metadata` change nothing.

use serde_json::{Value, json};

use crate::fields::{Fields, shown};
use crate::refusal::Refusal;

/// Names in order, each with the values, as JSON, that do nothing besides `false` and what is empty.
const NOT_DONE: [(&str, &[&str]); 49] = [
    ("add_generation_prompt", &["true"]),
    ("allowed_token_ids", &[]),
    ("audio", &[]),
    ("bad_words", &[]),
    ("chat_template", &[]),
    ("chat_template_kwargs", &[]),
    ("continue_final_message", &[]),
    ("documents", &[]),
    ("dry_multiplier", &["0"]),
    ("early_stopping", &[]),
    ("epsilon_cutoff", &["0"]),
    ("eta_cutoff", &["0"]),
    ("frequency_penalty", &["0"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("functions", &[]),
    ("grammar", &["\"\""]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("ignore_eos", &[]),
    ("include_stop_str_in_output", &[]),
    ("json_schema", &[]),
    ("length_penalty", &["1"]),
    ("logit_bias", &[]),
    ("logits_processors", &[]),
    ("min_tokens", &["0"]),
    ("mirostat", &["0"]),
    ("modalities", &["[\"text\"]"]),
    ("no_repeat_ngram_size", &["0"]),
    ("prediction", &[]),
    ("presence_penalty", &["0"]),
    ("prompt_embeds", &[]),
    ("prompt_logprobs", &[]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("stop_token_ids", &[]),
    ("structured_outputs", &[]),
    ("suffix", &["\"\""]),
    ("tfs_z", &["1"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("tools", &[]),
    ("top_a", &["0"]),
    ("truncate_prompt_tokens", &[]),
    ("typical_p", &["1"]),
    ("use_beam_search", &[]),
    ("web_search_options", &[]),
    ("xtc_probability", &["0"]),
];

/// Refuses what is not done.
pub(crate) fn check(fields: &Fields) -> Result<(), Refusal> {
    for (name, value) in fields.iter() {
        let Ok(place) = NOT_DONE.binary_search_by_key(&name.as_str(), |&(name, _)| name) else {
            continue;
        };
        let empty = value == &json!([]) || value == &json!({}) || value == &json!(false);
        let nothing = |neutral: &&str| match (value, serde_json::from_str(neutral)) {
            // Whatever way a number is written.
            (Value::Number(one), Ok(Value::Number(other))) => one.as_f64() == other.as_f64(),
            (one, Ok(other)) => *one == other,
            (_, Err(_)) => false,
        };
        // What is on where it is not said is turned off by `false`.
        let on = NOT_DONE[place].1.contains(&"true");
        if (empty && !on) || NOT_DONE[place].1.iter().any(nothing) {
            continue;
        }
        let message = format!("`{name}` ({}) is not done by this server", shown(value));
        return Err(Refusal::param(name, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(body: &str) -> Result<(), Refusal> {
        check(&Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn the_table_can_be_searched() {
        assert!(NOT_DONE.is_sorted_by_key(|&(name, _)| name));
    }

    #[test]
    fn what_does_nothing_passes_and_what_does_something_is_named() {
        for body in [
            r#"{"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "tools": []}"#,
            r#"{"response_format": {"type": "text"}, "logit_bias": {}, "tool_choice": "auto"}"#,
            r#"{"suffix": "", "typical_p": 1.0, "ignore_eos": false, "skip_special_tokens": true}"#,
            r#"{"logit_bias": null, "tools": null}"#,
        ] {
            assert_eq!(checked(body), Ok(()), "{body}");
        }
        for (name, value) in [
            ("presence_penalty", "0.1"),
            ("frequency_penalty", "\"0\""),
            ("tools", "[{}]"),
            ("response_format", r#"{"type": "json_object"}"#),
            ("logit_bias", r#"{"5": 1}"#),
            ("ignore_eos", "true"),
            ("skip_special_tokens", "false"),
            ("suffix", "\"x\""),
        ] {
            let refusal = checked(&format!("{{\"{name}\": {value}}}")).unwrap_err();
            assert_eq!(refusal.json()["error"]["param"], name);
            assert!(refusal.json().to_string().contains(name));
        }
    }
}
