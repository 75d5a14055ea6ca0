//! A model's chat template: from a conversation to the text that the model continues.
//!
//! Rendered as transformers renders it; `tests/chat_templates.rs` compares the bytes. A template comes
//! from outside: what it may do, and how much it may write, is bounded.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use chrono::{NaiveDate, NaiveDateTime};
use gptq_text::chat::Message;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::generation_tag::replace_generation_tags;
use crate::json_file::{JsonFile, read_if_present};
use crate::special_tokens::SpecialTokens;
use crate::template_environment::{Raised, environment, strftime_now};

/// The file of a template alone.
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The file that holds it otherwise.
const CONFIG_FILE: &str = "tokenizer_config.json";
/// The template's name in the environment.
const NAME: &str = "chat";
/// Most bytes that a template has; the longest known have 30 thousand.
const MOST_SOURCE: usize = 1 << 20;
/// Most bytes that it may write: more than any model reads.
const MOST_WRITTEN: usize = 16 << 20;

/// Bytes of the stack that a template is rendered on, of which only what is used takes memory. The
/// deepest value that the fuel pays for needs less than a quarter of it.
const STACK: usize = 256 << 20;
/// The longest that it may take: a conversation takes milliseconds.
const MOST_TIME: Duration = Duration::from_secs(10);

/// All that a template is given, for callers that have more than texts.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    /// The messages, objects with `role` and `content` at least; what is null in one is left out, as
    /// transformers does.
    pub messages: Vec<Json>,
    /// Schemas of the tools that the model may call; none is `None` for the template.
    pub tools: Option<Json>,
    /// Documents to answer from; none is `None` for the template.
    pub documents: Option<Json>,
    /// Whether the text ends with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// What `strftime_now` gives; without it the machine's local time.
    pub now: Option<NaiveDateTime>,
    /// What a template knows besides, as `enable_thinking`; the names above come first.
    pub variables: Map<String, Json>,
}

/// A template that is compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// Where the template is, for errors.
    origin: String,
    tokens: SpecialTokens,
}

impl ChatTemplate {
    /// The template of a checkpoint's folder: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json`, which is a text, or a list of named ones of which `default` is taken.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] where neither is there; [`Error::Read`], [`Error::Invalid`], and
    /// [`Error::Template`] for what is no template, with its line.
    pub fn open(folder: &Path) -> Result<Self> {
        let tokens = SpecialTokens::open(folder)?;
        let path = folder.join(TEMPLATE_FILE);
        if let Some(source) = read_if_present(&path)? {
            return Self::new(&source, &format!("`{}`", path.display()), tokens);
        }
        let config = JsonFile::open(folder.join(CONFIG_FILE))?;
        let Some((config, template)) =
            config.as_ref().and_then(|config| Some((config, config.get("chat_template")?)))
        else {
            return Err(Error::NoChatTemplate { folder: folder.to_owned() });
        };
        let source = default_template(template).map_err(|reason| config.invalid(reason))?;
        Self::new(source, &format!("chat_template of `{}`", config.path().display()), tokens)
    }

    /// A template from its text; `origin` is what errors call it, with its own backticks.
    ///
    /// # Errors
    /// [`Error::Template`] and [`Error::TemplateTooLarge`].
    pub fn new(source: &str, origin: &str, tokens: SpecialTokens) -> Result<Self> {
        if source.len() > MOST_SOURCE {
            let what = format!("has {} bytes, and {MOST_SOURCE} are the most", source.len());
            return Err(Error::TemplateTooLarge { origin: origin.to_owned(), line: None, what });
        }
        // As Jinja reads it: all line ends are one.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = replace_generation_tags(&source).into_owned();
        let compiled = environment().and_then(|mut environment| {
            environment.add_template_owned(NAME, source)?;
            Ok(environment)
        });
        let environment = compiled.map_err(|error| failed(origin, &error))?;
        let environment = Arc::new(environment);
        Ok(Self { environment, origin: origin.to_owned(), tokens })
    }

    /// The text of a conversation. With `add_generation_prompt` it ends with what begins the
    /// assistant's answer, which the model is to continue.
    ///
    /// Its special tokens are in the text, the first one too where the template puts it there:
    /// encode it with [`encode_chat`](gptq_text::tokens::TextTokenizer::encode_chat).
    ///
    /// # Errors
    /// [`Error::TemplateRefused`] where the template itself refuses the conversation, as one whose
    /// roles do not alternate; [`Error::Template`] and [`Error::TemplateTooLarge`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = to_json(messages);
        self.render_all(&Conversation { messages, add_generation_prompt, ..Default::default() })
    }

    /// The text of a conversation that is a document: it does not end with the beginning of an answer,
    /// and a template that asks for today's date is given Llama 3.1's own, 26 July 2024, so that the same
    /// conversations are the same text on any day.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_document(&self, messages: &[Message]) -> Result<String> {
        let messages = to_json(messages);
        let now = NaiveDate::from_ymd_opt(2024, 7, 26).and_then(|date| date.and_hms_opt(0, 0, 0));
        self.render_all(&Conversation { messages, now, ..Default::default() })
    }

    /// As [`render`](Self::render), with all that transformers gives a template.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_all(&self, conversation: &Conversation) -> Result<String> {
        // A value that a template nests is taken apart by as many calls as it has levels. What takes too
        // long is left to itself: a template can make work that no bound of the library counts.
        let (environment, context) = (Arc::clone(&self.environment), self.context(conversation));
        let (done, rendered) = channel();
        let thread = std::thread::Builder::new().stack_size(STACK);
        let spawned = thread.spawn(move || {
            // Nobody waits any more where it took too long.
            let _ = done.send(render(&environment, context));
        });
        spawned.map_err(|error| self.no_thread(&error.to_string()))?;
        match rendered.recv_timeout(MOST_TIME) {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => Err(failed(&self.origin, &error)),
            Err(RecvTimeoutError::Disconnected) => Err(self.no_thread("it panicked")),
            Err(RecvTimeoutError::Timeout) => Err(Error::TemplateTooLarge {
                origin: self.origin.clone(),
                line: None,
                what: format!("takes more than {} seconds", MOST_TIME.as_secs()),
            }),
        }
    }

    fn no_thread(&self, reason: &str) -> Error {
        let reason = format!("its thread failed: {reason}");
        Error::Template { origin: self.origin.clone(), line: None, reason }
    }

    fn context(&self, conversation: &Conversation) -> Value {
        let mut known = BTreeMap::new();
        for (name, value) in &conversation.variables {
            known.insert(name.as_str(), Value::from(Serde(value)));
        }
        for (name, token) in [
            ("bos_token", &self.tokens.bos),
            ("eos_token", &self.tokens.eos),
            ("unk_token", &self.tokens.unk),
            ("pad_token", &self.tokens.pad),
        ] {
            if let Some(token) = token {
                known.insert(name, Value::from(token));
            }
        }
        let messages: Vec<Json> = conversation.messages.iter().map(without_null).collect();
        let now = conversation.now.unwrap_or_else(|| chrono::Local::now().naive_local());
        known.insert("messages", Value::from(Serde(&messages)));
        known.insert("tools", Value::from(Serde(&conversation.tools)));
        known.insert("documents", Value::from(Serde(&conversation.documents)));
        known.insert("add_generation_prompt", conversation.add_generation_prompt.into());
        known.insert("strftime_now", strftime_now(now));
        Value::from_pairs(known)
    }
}

fn to_json(messages: &[Message]) -> Vec<Json> {
    let message =
        |message: &Message| serde_json::json!({"role": message.role, "content": message.content});
    messages.iter().map(message).collect()
}

fn render(
    environment: &Environment<'static>,
    context: Value,
) -> std::result::Result<String, minijinja::Error> {
    let mut writer = Bounded { written: Vec::new() };
    environment.get_template(NAME)?.render_captured_to(context, &mut writer)?;
    // Templates write text, so that it is UTF-8.
    Ok(String::from_utf8_lossy(&writer.written).into_owned())
}

/// The library's error as a sentence.
fn failed(origin: &str, error: &minijinja::Error) -> Error {
    let origin = origin.to_owned();
    let line = error.line();
    if let Some(message) = raised(error) {
        return Error::TemplateRefused { origin, line, message };
    }
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "does more than any conversation needs".to_owned(),
        ErrorKind::WriteFailure => format!("writes more than {MOST_WRITTEN} bytes"),
        kind => {
            let reason = match error.detail() {
                Some(detail) => format!("{kind}: {detail}"),
                None => kind.to_string(),
            };
            return Error::Template { origin, line, reason };
        }
    };
    Error::TemplateTooLarge { origin, line, what }
}

fn default_template(template: &Json) -> Result<&str, String> {
    let named = match template {
        Json::String(source) => return Ok(source),
        Json::Array(named) => named,
        _ => return Err("chat_template is neither a text nor a list of templates".to_owned()),
    };
    let name = |entry: &Json| entry.get("name").and_then(Json::as_str).map(str::to_owned);
    let default = named.iter().find(|entry| name(entry).as_deref() == Some("default"));
    let source = default.and_then(|entry| entry.get("template")).and_then(Json::as_str);
    source.ok_or_else(|| {
        let names: Vec<String> = named.iter().filter_map(name).collect();
        format!("chat_template has no template named default; it has {}", names.join(", "))
    })
}

fn without_null(message: &Json) -> Json {
    match message {
        Json::Object(fields) => {
            let said = fields.iter().filter(|(_, value)| !value.is_null());
            Json::Object(said.map(|(key, value)| (key.clone(), value.clone())).collect())
        }
        other => other.clone(),
    }
}

/// What `raise_exception` was given, if that is what happened.
fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source: Option<&(dyn StdError + 'static)> = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

/// Text up to a bound.
struct Bounded {
    written: Vec<u8>,
}

impl Write for &mut Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written.len() + bytes.len() > MOST_WRITTEN {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.written.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;
