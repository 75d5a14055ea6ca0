//! Parameters that are in no request's own list.
//!
//! Some change what a model writes and are not done here: a client may send them with the values that do
//! nothing, as several do. Some change nothing at all. All others are refused: an answer without them
//! would perhaps not be what was asked for.

use serde_json::Value;

use crate::fields::{Fields, shown};
use crate::refusal::Refusal;

/// What both kinds of request know.
const COMMON: [&str; 13] = [
    "best_of",
    "max_tokens",
    "min_p",
    "model",
    "n",
    "repetition_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
];

/// Names in order, each with the values, as JSON, that do nothing.
const NOT_DONE: [(&str, &[&str]); 57] = [
    ("add_generation_prompt", &["true"]),
    ("allowed_token_ids", &["[]"]),
    ("audio", &[]),
    ("bad_words", &["[]"]),
    ("chat_template", &[r#""""#]),
    ("chat_template_kwargs", &["{}"]),
    ("continue_final_message", &["false"]),
    ("detokenize", &["true"]),
    ("documents", &["[]"]),
    ("dry_multiplier", &["0"]),
    ("dynatemp_range", &["0"]),
    ("early_stopping", &["false"]),
    ("epsilon_cutoff", &["0"]),
    ("eta_cutoff", &["0"]),
    ("frequency_penalty", &["0"]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("functions", &["[]"]),
    ("grammar", &[r#""""#]),
    ("guided_choice", &["[]"]),
    ("guided_grammar", &[r#""""#]),
    ("guided_json", &["{}", r#""""#]),
    ("guided_regex", &[r#""""#]),
    ("ignore_eos", &["false"]),
    ("include_stop_str_in_output", &["false"]),
    ("json_schema", &["{}"]),
    ("length_penalty", &["1"]),
    ("logit_bias", &["{}"]),
    ("logits_processors", &["[]"]),
    ("min_tokens", &["0"]),
    ("mirostat", &["0"]),
    ("mirostat_mode", &["0"]),
    ("modalities", &[r#"["text"]"#]),
    ("no_repeat_ngram_size", &["0"]),
    ("prediction", &[]),
    ("presence_penalty", &["0"]),
    ("prompt_embeds", &[]),
    ("prompt_logprobs", &[]),
    ("reasoning_effort", &[r#""none""#]),
    ("response_format", &[r#"{"type":"text"}"#]),
    ("return_token_ids", &["false"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("skip_special_tokens", &["true"]),
    ("smoothing_factor", &["0"]),
    ("spaces_between_special_tokens", &["true"]),
    ("stop_token_ids", &["[]"]),
    ("structured_outputs", &["{}"]),
    ("suffix", &[r#""""#]),
    ("tfs_z", &["1"]),
    ("tool_choice", &[r#""none""#, r#""auto""#]),
    ("tools", &["[]"]),
    ("top_a", &["0"]),
    ("truncate_prompt_tokens", &[]),
    ("typical_p", &["1"]),
    ("use_beam_search", &["false"]),
    ("verbosity", &[r#""medium""#]),
    ("web_search_options", &[]),
    ("xtc_probability", &["0"]),
];

/// Of what kind a value has to be.
type Kind = (fn(&Value) -> bool, &'static str);

const TEXT: Kind = (Value::is_string, "a string");
const FLAG: Kind = (Value::is_boolean, "true or false");
const NUMBER: Kind = (Value::is_number, "a number");
const LIST: Kind = (Value::is_array, "a list");
const OBJECT: Kind = (Value::is_object, "an object");

/// What changes no text, in order: what a provider keeps of a request, and settings of what is turned on
/// by another parameter.
const CHANGES_NOTHING: [(&str, Kind); 19] = [
    ("cache_prompt", FLAG),
    ("dry_allowed_length", NUMBER),
    ("dry_base", NUMBER),
    ("dry_penalty_last_n", NUMBER),
    ("dry_sequence_breakers", LIST),
    ("dynatemp_exponent", NUMBER),
    ("metadata", OBJECT),
    ("mirostat_eta", NUMBER),
    ("mirostat_tau", NUMBER),
    ("parallel_tool_calls", FLAG),
    ("priority", NUMBER),
    ("prompt_cache_key", TEXT),
    ("prompt_cache_retention", TEXT),
    ("request_id", TEXT),
    ("safety_identifier", TEXT),
    ("service_tier", TEXT),
    ("store", FLAG),
    ("user", TEXT),
    ("xtc_threshold", NUMBER),
];

/// Refuses what is not done and what nobody here knows; `own` are the names that this request knows
/// besides those of all.
pub(crate) fn check(fields: &Fields, own: &[&str]) -> Result<(), Refusal> {
    for (name, value) in fields.iter() {
        let asked = name.as_str();
        if COMMON.contains(&asked) || own.contains(&asked) {
            continue;
        }
        if let Some((_, (is_kind, expected))) = CHANGES_NOTHING.iter().find(|row| row.0 == asked) {
            fields.read(name, |value| is_kind(value).then_some(()), expected)?;
            continue;
        }
        let Some((_, neutral)) = NOT_DONE.iter().find(|row| row.0 == asked) else {
            let message = format!("`{}` is no parameter of this request", shown_name(name));
            return Err(Refusal::param(shown_name(name), message));
        };
        if !neutral.iter().any(|neutral| is_same(value, neutral)) {
            let message = format!("`{name}` ({}) is not done by this server", shown(value));
            return Err(Refusal::param(name, message));
        }
    }
    Ok(())
}

/// A name that a client has made up, as far as an answer repeats it.
pub(crate) fn shown_name(name: &str) -> &str {
    name.char_indices().nth(80).map_or(name, |(end, _)| &name[..end])
}

/// Whether a value is one that is written as JSON, whatever way a number is written.
fn is_same(value: &Value, json: &str) -> bool {
    match (value, serde_json::from_str(json)) {
        (Value::Number(one), Ok(Value::Number(other))) => one.as_f64() == other.as_f64(),
        (one, Ok(other)) => *one == other,
        (_, Err(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(body: &str) -> Result<(), Refusal> {
        check(&Fields::parse(body.as_bytes()).unwrap(), &["prompt"])
    }

    #[test]
    fn names_stand_in_order_once() {
        assert!(COMMON.is_sorted());
        assert!(NOT_DONE.is_sorted_by(|(one, _), (other, _)| one < other));
        assert!(CHANGES_NOTHING.is_sorted_by(|(one, _), (other, _)| one < other));
        for (name, neutral) in NOT_DONE {
            assert!(CHANGES_NOTHING.iter().all(|row| row.0 != name), "{name}");
            for json in neutral {
                assert!(serde_json::from_str::<Value>(json).is_ok(), "{name}: {json}");
            }
        }
    }

    #[test]
    fn what_does_nothing_passes_and_what_does_something_is_named() {
        for body in [
            r#"{"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "tools": []}"#,
            r#"{"response_format": {"type": "text"}, "logit_bias": {}, "tool_choice": "auto"}"#,
            r#"{"suffix": "", "typical_p": 1.0, "ignore_eos": false, "skip_special_tokens": true}"#,
            r#"{"logit_bias": null, "tools": null, "made_up": null, "prompt": 1, "top_p": "x"}"#,
            r#"{"metadata": {"a": "b"}, "store": true, "service_tier": "auto", "dry_base": 1.75}"#,
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
            // Of another kind, though empty.
            ("presence_penalty", "false"),
            ("tools", "{}"),
            ("logit_bias", "[]"),
            ("ignore_eos", "[]"),
            ("suffix", "false"),
            ("user", "5"),
            ("metadata", "\"a\""),
            // In no list.
            ("max_completion_tokens", "5"),
            ("temprature", "0"),
        ] {
            let refusal = checked(&format!("{{\"{name}\": {value}}}")).unwrap_err();
            assert_eq!(refusal.json()["error"]["param"], name);
            assert!(refusal.json()["error"]["message"].to_string().contains(name));
        }
        let long = "ä".repeat(5000);
        let refusal = checked(&format!("{{\"{long}\": 1}}")).unwrap_err();
        assert!(refusal.json().to_string().len() < 1000);
    }
}
