//! `/v1/chat/completions`: answers to conversations.

use std::sync::Arc;

use gptq_generate::{Finish, Message};
use serde_json::{Value, json};

use crate::completions::check_length;
use crate::fields::Fields;
use crate::handlers::{Prepared, Shared};
use crate::neutral::shown_name;
use crate::part::{Part, Token, reason};
use crate::refusal::Refusal;
use crate::settings::{MOST_TOP, Settings};
use crate::token_texts::TokenTexts;
use crate::writer::{Form, Writer};

/// What a chat is asked besides what every request is.
const PARAMETERS: [&str; 4] = ["logprobs", "max_completion_tokens", "messages", "top_logprobs"];
/// What a message has, and what a part of its content has; where prompts are kept is a provider's
/// business.
const OF_MESSAGE: [&str; 2] = ["content", "role"];
const OF_PART: [&str; 3] = ["cache_control", "text", "type"];

/// Makes a job of a request.
pub(crate) fn prepare(shared: &Arc<Shared>, fields: &Fields) -> Result<Prepared, Refusal> {
    let served = &shared.served;
    let settings = Settings::read(fields, served, &PARAMETERS)?;
    let logprobs = fields.flag("logprobs")?;
    let top = fields.whole("top_logprobs", 0, MOST_TOP)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "`top_logprobs` is for requests with `logprobs: true`";
        return Err(Refusal::param("top_logprobs", message));
    }
    let messages = messages(fields)?;
    let chat = served.chat.as_ref().map_err(|why| Refusal::param("messages", why.clone()))?;
    let prompt = chat(&messages).map_err(|error| Refusal::param("messages", error.to_string()))?;
    if prompt.is_empty() {
        return Err(Refusal::param("messages", "The conversation has no tokens"));
    }
    // At least one, which may be what is too much.
    let max_tokens =
        max_tokens(fields)?.unwrap_or(served.context.saturating_sub(prompt.len()).max(1));
    check_length(&prompt, max_tokens, served)?;
    let form = Chats { begun: vec![false; settings.n], logprobs };
    let writer = Writer::new(Form::Chats(form), settings.n, prompt.len(), shared);
    let prompts = vec![(prompt, max_tokens)];
    Ok(settings.prepare(served, prompts, (top.unwrap_or(0), false), writer))
}

/// How long an answer may be, by either of two names.
fn max_tokens(fields: &Fields) -> Result<Option<usize>, Refusal> {
    let asked = fields.whole("max_completion_tokens", 1, usize::MAX)?;
    match (asked, fields.whole("max_tokens", 1, usize::MAX)?) {
        (Some(asked), Some(other)) if asked != other => {
            let message = format!(
                "`max_tokens` is {other} and `max_completion_tokens` {asked}: only one can hold"
            );
            Err(Refusal::param("max_tokens", message))
        }
        (asked, other) => Ok(asked.or(other)),
    }
}

fn messages(fields: &Fields) -> Result<Vec<Message>, Refusal> {
    let wrong =
        |at: usize, what: &str| Refusal::param("messages", format!("messages[{at}] {what}"));
    let Some(given) = fields.read("messages", Value::as_array, "a list")? else {
        return Err(Refusal::param("messages", "`messages` is missing"));
    };
    if given.is_empty() {
        return Err(Refusal::param("messages", "`messages` is empty"));
    }
    let mut messages = Vec::with_capacity(given.len());
    for (at, message) in given.iter().enumerate() {
        let field = |name: &str| message.get(name).filter(|value| !value.is_null());
        let Some(role) = field("role").and_then(Value::as_str) else {
            return Err(wrong(at, "has no role"));
        };
        check_names(message, &OF_MESSAGE).map_err(|what| wrong(at, &what))?;
        let content = match field("content") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => {
                let texts: Result<Vec<&str>, String> = parts.iter().map(text_part).collect();
                texts.map_err(|what| wrong(at, &what))?.join("\n")
            }
            _ => return Err(wrong(at, "has no content that is a string or a list of texts")),
        };
        messages.push(Message::new(role, content));
    }
    Ok(messages)
}

/// `{"type": "text", "text": …}`.
fn text_part(part: &Value) -> Result<&str, String> {
    let kind = part.get("type").and_then(Value::as_str);
    let text = part.get("text").and_then(Value::as_str).filter(|_| kind == Some("text"));
    let text = text.ok_or("has content other than text")?;
    check_names(part, &OF_PART).map(|()| text)
}

/// That an object says nothing by other names, which a template would not be told of: tools that were
/// called, who of several users speaks. Clients send what they were answered, with what is empty in it.
fn check_names(object: &Value, known: &[&str]) -> Result<(), String> {
    let says = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    let mut fields = object.as_object().into_iter().flatten();
    match fields.find(|(name, value)| !known.contains(&name.as_str()) && says(value)) {
        Some((name, _)) => {
            Err(format!("has `{}`, which is not done by this server", shown_name(name)))
        }
        None => Ok(()),
    }
}

/// How answers are written.
pub(crate) struct Chats {
    /// By text: whether its stream has said who speaks.
    begun: Vec<bool>,
    logprobs: bool,
}

impl Chats {
    /// An element of `choices`; `None` where a part has nothing to show yet.
    pub(crate) fn choice(&mut self, part: Part, texts: &TokenTexts, whole: bool) -> Option<Value> {
        let Part { index, text, finish, tokens, .. } = part;
        let logprobs = match self.logprobs {
            true => {
                // The token that ended the answer is no part of it.
                let end = usize::from(finish == Some(Finish::EndOfText));
                let said = &tokens[..tokens.len().saturating_sub(end)];
                let said: Vec<Value> = said.iter().map(|token| logprob(token, texts)).collect();
                match whole || !said.is_empty() {
                    true => json!({"content": said, "refusal": null}),
                    false => Value::Null,
                }
            }
            false => Value::Null,
        };
        let reason = reason(finish);
        if whole {
            let message = json!({"role": "assistant", "content": text, "refusal": null});
            return Some(json!({
                "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason,
            }));
        }
        let begins = !std::mem::replace(&mut self.begun[index], true);
        if !begins && text.is_empty() && logprobs.is_null() && finish.is_none() {
            return None;
        }
        let delta = match (begins, text.is_empty()) {
            (true, _) => json!({"role": "assistant", "content": text}),
            (false, false) => json!({"content": text}),
            (false, true) => json!({}),
        };
        Some(json!({
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason,
        }))
    }
}

fn logprob(token: &Token, texts: &TokenTexts) -> Value {
    let one = |id: u32, logprob: Option<f64>| json!({"token": texts.shown(id), "logprob": logprob, "bytes": texts.shown_bytes(id)});
    let mut whole = one(token.id, token.logprob);
    let top = token.top.iter().map(|top| one(top.id, Some(top.logprob)));
    whole["top_logprobs"] = top.collect();
    whole
}
