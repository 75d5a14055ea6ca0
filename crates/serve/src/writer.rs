//! Answers in OpenAI's form, whole or as they come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::chat::Chats;
use crate::completions::Completions;
use crate::handlers::Shared;
use crate::part::Part;

/// Which of the two forms.
pub(crate) enum Form {
    Completions(Completions),
    Chats(Chats),
}

/// Writes the answer to a request.
pub(crate) struct Writer {
    form: Form,
    shared: Arc<Shared>,
    id: String,
    created: u64,
    /// Texts that were asked for.
    texts: usize,
    ended: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// Numbers answers, so that each has a name of its own.
static ANSWERS: AtomicU64 = AtomicU64::new(0);

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Writer {
    pub(crate) fn new(
        form: Form,
        texts: usize,
        prompt_tokens: usize,
        shared: &Arc<Shared>,
    ) -> Self {
        let prefix = match form {
            Form::Completions(_) => "cmpl",
            Form::Chats(_) => "chatcmpl",
        };
        let (created, number) = (now(), ANSWERS.fetch_add(1, Ordering::Relaxed));
        Self {
            form,
            shared: Arc::clone(shared),
            id: format!("{prefix}-{created:x}-{number:x}"),
            created,
            texts,
            ended: 0,
            prompt_tokens,
            completion_tokens: 0,
        }
    }

    /// How many texts were asked for.
    pub(crate) fn texts(&self) -> usize {
        self.texts
    }

    /// Whether all texts have ended.
    pub(crate) fn is_over(&self) -> bool {
        self.ended == self.texts
    }

    /// The whole answer.
    pub(crate) fn whole(&mut self, parts: Vec<Part>) -> Value {
        let choices: Vec<Value> =
            parts.into_iter().filter_map(|part| self.choice(part, true)).collect();
        let kind = match self.form {
            Form::Completions(_) => "text_completion",
            Form::Chats(_) => "chat.completion",
        };
        let mut answer = self.frame(kind, choices);
        answer["usage"] = self.usage();
        answer
    }

    /// What a stream says of a part; `None` where that is nothing yet. With `usage`, streams have
    /// counts, which all but the last chunk leave open.
    pub(crate) fn chunk(&mut self, part: Part, usage: bool) -> Option<Value> {
        let choice = self.choice(part, false)?;
        let mut chunk = self.frame(self.chunk_kind(), vec![choice]);
        if usage {
            chunk["usage"] = Value::Null;
        }
        Some(chunk)
    }

    /// The chunk with the counts.
    pub(crate) fn usage_chunk(&self) -> Value {
        let mut chunk = self.frame(self.chunk_kind(), Vec::new());
        chunk["usage"] = self.usage();
        chunk
    }

    fn chunk_kind(&self) -> &'static str {
        match self.form {
            Form::Completions(_) => "text_completion",
            Form::Chats(_) => "chat.completion.chunk",
        }
    }

    fn choice(&mut self, part: Part, whole: bool) -> Option<Value> {
        self.completion_tokens += part.made;
        self.ended += usize::from(part.finish.is_some());
        let texts = &self.shared.texts;
        match &mut self.form {
            Form::Completions(form) => form.choice(part, texts, whole),
            Form::Chats(form) => form.choice(part, texts, whole),
        }
    }

    fn frame(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.shared.served.name,
            "choices": choices,
        })
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}
