//! `/v1/completions`: texts that go on with texts, in OpenAI's older form.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::fields::Fields;
use crate::handlers::{Prepared, Shared};
use crate::part::{Part, Token, reason};
use crate::refusal::Refusal;
use crate::served::Served;
use crate::settings::{MOST_TEXTS, MOST_TOP, Settings};
use crate::token_texts::{Offset, TokenTexts};
use crate::writer::{Form, Writer};

/// New tokens where a request does not say how many.
const MAX_TOKENS: usize = 16;

/// What a completion is asked besides what every request is.
const PARAMETERS: [&str; 3] = ["echo", "logprobs", "prompt"];

/// A prompt, and its text if it is asked for.
struct Prompt {
    ids: Vec<u32>,
    text: String,
}

/// Makes a job of a request.
pub(crate) fn prepare(shared: &Arc<Shared>, fields: &Fields) -> Result<Prepared, Refusal> {
    let served = &shared.served;
    let settings = Settings::read(fields, served, &PARAMETERS)?;
    let echo = fields.flag("echo")?;
    // `true` is the newer form's; here it is a number.
    let top = fields.whole("logprobs", 0, MOST_TOP)?;
    let max_tokens = fields.whole("max_tokens", 0, usize::MAX)?.unwrap_or(MAX_TOKENS);
    if max_tokens == 0 && !echo {
        let message = "`max_tokens` is 0, and without `echo` nothing would come of that";
        return Err(Refusal::param("max_tokens", message));
    }
    let prompts = prompts(fields, shared, settings.n, echo || top.is_some())?;
    for prompt in &prompts {
        check_length(&prompt.ids, max_tokens, served)?;
    }
    let begin = |prompt: &Prompt| match echo {
        true => Offset::default(),
        false => Offset { characters: prompt.text.chars().count() },
    };
    let texts = || prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, settings.n));
    let choices = texts().map(|prompt| Choice {
        offset: begin(prompt),
        first: echo,
        echo: echo.then(|| prompt.text.clone()),
    });
    let form = Completions { choices: choices.collect(), top };
    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let writer = Writer::new(Form::Completions(form), texts().count(), prompt_tokens, shared);
    let score = echo && top.is_some();
    let prompts = prompts.into_iter().map(|prompt| (prompt.ids, max_tokens)).collect();
    Ok(settings.prepare(served, prompts, (top.unwrap_or(0), score), writer))
}

/// That a text has room.
pub(crate) fn check_length(
    prompt: &[u32],
    max_tokens: usize,
    served: &Served,
) -> Result<(), Refusal> {
    let (tokens, context) = (prompt.len(), served.context);
    if tokens.saturating_add(max_tokens) > context {
        let message = format!(
            "The prompt has {tokens} tokens, and with `max_tokens` {max_tokens} it exceeds the \
             context of {context}"
        );
        return Err(Refusal::too_long("max_tokens", message));
    }
    Ok(())
}

/// `prompt`: a text, some, tokens, or some lists of them.
fn prompts(
    fields: &Fields,
    shared: &Shared,
    n: usize,
    with_text: bool,
) -> Result<Vec<Prompt>, Refusal> {
    let wrong = || {
        Refusal::param(
            "prompt",
            "`prompt` is not a string, a list of strings, a list of tokens or a list of such lists",
        )
    };
    let given = fields.get("prompt").ok_or_else(|| Refusal::param("prompt", "`prompt` is missing"));
    let given = given?;
    let values: Vec<&Value> = match given {
        Value::String(_) => vec![given],
        Value::Array(several) => match several.first() {
            Some(Value::Number(_)) => vec![given],
            Some(_) => several.iter().collect(),
            None => return Err(Refusal::param("prompt", "`prompt` is empty")),
        },
        _ => return Err(wrong()),
    };
    if values.len().saturating_mul(n) > MOST_TEXTS {
        let message = format!("More than {MOST_TEXTS} texts are asked for at once");
        return Err(Refusal::param("prompt", message));
    }
    let tokenizer = shared.texts.tokenizer();
    let failed = |error: gptq_text::Error| Refusal::param("prompt", error.to_string());
    let mut prompts = Vec::with_capacity(values.len());
    for value in values {
        let prompt = match value {
            Value::String(text) => {
                Prompt { ids: tokenizer.encode(text).map_err(failed)?, text: text.clone() }
            }
            Value::Array(ids) => {
                let ids = tokens(ids, shared.served.vocabulary)?.ok_or_else(wrong)?;
                let text = match with_text {
                    true => tokenizer.decode(&ids, true).map_err(failed)?,
                    false => String::new(),
                };
                Prompt { ids, text }
            }
            _ => return Err(wrong()),
        };
        if prompt.ids.is_empty() {
            return Err(Refusal::param("prompt", "A prompt has no tokens"));
        }
        prompts.push(prompt);
    }
    Ok(prompts)
}

/// Tokens of the vocabulary; `None` where something is no number.
fn tokens(ids: &[Value], vocabulary: usize) -> Result<Option<Vec<u32>>, Refusal> {
    let mut tokens = Vec::with_capacity(ids.len());
    for id in ids {
        if !id.is_number() {
            return Ok(None);
        }
        let token = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(token) = token.filter(|&token| (token as usize) < vocabulary) else {
            let message = format!("`prompt` has token {id}, and the model knows {vocabulary}");
            return Err(Refusal::param("prompt", message));
        };
        tokens.push(token);
    }
    Ok(Some(tokens))
}

/// How completions are written.
pub(crate) struct Completions {
    choices: Vec<Choice>,
    top: Option<usize>,
}

/// How far a text is.
struct Choice {
    /// Characters of prompt and text so far.
    offset: Offset,
    /// Whether no token has given a text yet.
    first: bool,
    /// The prompt's text, until it is written.
    echo: Option<String>,
}

impl Completions {
    /// An element of `choices`; `None` where a part has nothing to show yet.
    pub(crate) fn choice(&mut self, part: Part, texts: &TokenTexts, whole: bool) -> Option<Value> {
        let choice = &mut self.choices[part.index];
        let text = choice.echo.take().unwrap_or_default() + &part.text;
        let logprobs = match self.top {
            Some(_) if !part.tokens.is_empty() || whole => choice.logprobs(&part.tokens, texts),
            _ => Value::Null,
        };
        if !whole && text.is_empty() && logprobs.is_null() && part.finish.is_none() {
            return None;
        }
        Some(json!({
            "index": part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason(part.finish),
        }))
    }
}

impl Choice {
    fn logprobs(&mut self, tokens: &[Token], texts: &TokenTexts) -> Value {
        let mut offsets = Vec::with_capacity(tokens.len());
        for token in tokens {
            let bytes = texts.text_bytes(token.id, self.first);
            self.first &= bytes.is_empty();
            offsets.push(self.offset.take(&bytes));
        }
        let top = |token: &Token| {
            let logprob = token.logprob?;
            let mut named = Map::new();
            let all = token.top.iter().map(|top| (top.id, top.logprob));
            for (id, logprob) in all.chain([(token.id, logprob)]) {
                // Two tokens may look alike; the likelier one stays.
                named.entry(texts.shown(id)).or_insert(json!(logprob));
            }
            Some(named)
        };
        json!({
            "tokens": tokens.iter().map(|token| texts.shown(token.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}
