//! Conversations as calibration reads them: messages, and how rows of a dataset become them.
//!
//! Three shapes are read: a list of messages in `messages` or `conversations`, whose messages have
//! `role` and `content` (OpenAI's) or `from` and `value` (ShareGPT's, with its own words for the
//! roles), or that is a list of each; a prompt and its response as two such lists (TRL's); and columns
//! of a prompt and its response, which are a conversation of two messages. A column `system` begins
//! what has no system message of its own. What a model's chat template makes of them is another
//! crate's business: callers pass a [`Render`] in.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Most messages of a conversation.
const MOST_MESSAGES: usize = 4096;
/// Most bytes that its messages say: as many as a chat template may write.
const MOST_BYTES: usize = 16 << 20;

/// Columns that may hold a list of messages, in the order in which they are looked for.
const LISTS: [&str; 2] = ["messages", "conversations"];
/// Columns of a prompt, of what the prompt is about where there is such a column, and of a response.
const PAIRS: [(&str, Option<&str>, &str); 4] = [
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("instruction", Some("input"), "output"),
    ("question", None, "answer"),
];
/// What the columns may be, for messages.
pub(crate) const COLUMNS: &str = "messages, conversations, prompt and response or completion, instruction and output, question \
     and answer";

/// The column of what the system says before the first message.
pub(crate) const SYSTEM: &str = "system";

/// The role of answers.
const ASSISTANT: &str = "assistant";

/// What is wrong with messages of which a list of each is had.
pub(crate) const UNEVEN: &str = "its messages have not as many roles as texts";

/// Names of a message's two fields.
pub(crate) const FIELDS: [(&str, &str); 2] = [("role", "content"), ("from", "value")];

/// What one side says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user` or `assistant`; a template may know others.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message.
    #[must_use]
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why a conversation has no text.
#[derive(Debug)]
pub enum Unrendered {
    /// The template refuses it, as one whose roles do not alternate: another row may do.
    Refused(String),
    /// The template is at fault.
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

/// A chat template: the text of a conversation, with its special tokens, and no beginning of another
/// answer at its end.
pub type Render<'r> = dyn Fn(&[Message]) -> Result<String, Unrendered> + 'r;

/// The columns of a dataset that hold its conversations.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Columns<'n> {
    /// A list of messages.
    List(&'n str),
    /// Texts.
    Pair { prompt: &'n str, about: Option<&'n str>, response: &'n str },
}

impl<'n> Columns<'n> {
    /// Of a dataset with columns of these names; `asked` is one that was named. `None` where none is
    /// known.
    pub(crate) fn find(names: &[&'n str], asked: Option<&str>) -> Option<Self> {
        let named = |name: &str| names.iter().copied().find(|known| *known == name);
        if let Some(asked) = asked {
            return named(asked).map(Self::List);
        }
        if let Some(list) = LISTS.into_iter().find_map(named) {
            return Some(Self::List(list));
        }
        PAIRS.into_iter().find_map(|(prompt, about, response)| {
            let (prompt, response) = (named(prompt)?, named(response)?);
            Some(Self::Pair { prompt, about: about.and_then(named), response })
        })
    }
}

/// A conversation of a prompt, what it is about, and its response.
pub(crate) fn of_pair(
    mut prompt: String,
    about: Option<String>,
    response: String,
) -> Result<Vec<Message>, String> {
    if let Some(about) = about.filter(|about| !about.trim().is_empty()) {
        prompt.push_str("\n\n");
        prompt.push_str(&about);
    }
    checked(vec![Message::new("user", prompt), Message::new(ASSISTANT, response)])
}

/// A conversation behind what its row's column `system` says, unless it begins so itself or the column is
/// blank.
pub(crate) fn behind_system(
    mut chat: Vec<Message>,
    system: Option<String>,
) -> Result<Vec<Message>, String> {
    let begins = chat.first().is_some_and(|first| first.role == SYSTEM);
    if let Some(system) = system.filter(|system| !begins && !system.trim().is_empty()) {
        chat.insert(0, Message::new(SYSTEM, system));
    }
    checked(chat)
}

/// Whether an answer in it is empty: of a row that was never answered, or whose answer was something else
/// than text.
pub(crate) fn has_empty_answer(chat: &[Message]) -> bool {
    chat.iter().any(|message| message.role == ASSISTANT && message.content.trim().is_empty())
}

/// Role and text of a message, as a file has them.
pub(crate) type Said = (Option<String>, Content);

/// What a file has in the place of a message's text.
#[derive(Debug)]
pub(crate) enum Content {
    /// The text.
    Text(String),
    /// That there is none: as of an answer that calls a tool, or was never given.
    Empty,
    /// Nothing.
    Missing,
    /// Something else than a text.
    Other(&'static str),
}

impl Content {
    /// Of a column of texts.
    pub(crate) fn of_text(text: Option<String>) -> Self {
        text.map_or(Self::Empty, Self::Text)
    }

    /// Of a field of JSON that is there.
    fn of_json(value: &Value) -> Self {
        match value {
            Value::String(text) => Self::Text(text.clone()),
            Value::Null => Self::Empty,
            Value::Array(_) => Self::Other("a list"),
            Value::Object(_) => Self::Other("an object"),
            Value::Number(_) => Self::Other("a number"),
            Value::Bool(_) => Self::Other("a boolean"),
        }
    }

    /// Of a message in JSON.
    fn of_message(message: &Value) -> Self {
        let mut fields = FIELDS.iter().filter_map(|(_, content)| message.get(content));
        let text = fields.clone().find(|field| field.is_string());
        match text.or_else(|| fields.next()) {
            Some(field) => Self::of_json(field),
            None if message.get("tool_calls").is_some() => Self::Empty,
            None => Self::Missing,
        }
    }

    /// The text of the message of this number; an answer may be empty.
    fn text(self, role: &str, number: usize) -> Result<String, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Empty if role == ASSISTANT => Ok(String::new()),
            Self::Empty | Self::Missing => Err(format!("message {number} has no text")),
            Self::Other(what) => {
                Err(format!("the text of message {number} is {what}, where only a string is read"))
            }
        }
    }
}

/// A conversation of messages by role and text.
pub(crate) fn of_messages(messages: impl Iterator<Item = Said>) -> Result<Vec<Message>, String> {
    let mut conversation = Vec::new();
    for (index, (role, content)) in messages.enumerate() {
        let number = index + 1;
        let role = role.ok_or_else(|| format!("message {number} has no role"))?;
        let role = role_of(role, number)?;
        let content = content.text(&role, number)?;
        if conversation.len() == MOST_MESSAGES {
            return Err(format!("it has more than {MOST_MESSAGES} messages"));
        }
        conversation.push(Message { role, content });
    }
    checked(conversation)
}

/// ShareGPT's words for roles, and others as they are.
fn role_of(role: String, number: usize) -> Result<String, String> {
    Ok(match role.as_str() {
        "human" => "user".to_owned(),
        "gpt" => ASSISTANT.to_owned(),
        "" => return Err(format!("the role of message {number} is empty")),
        _ => role,
    })
}

fn checked(conversation: Vec<Message>) -> Result<Vec<Message>, String> {
    if conversation.is_empty() {
        return Err("it has no messages".to_owned());
    }
    let bytes: usize = conversation.iter().map(|m| m.role.len() + m.content.len()).sum();
    if bytes > MOST_BYTES {
        return Err(format!("its messages have {bytes} bytes, more than {MOST_BYTES}"));
    }
    Ok(conversation)
}

/// A conversation of a row of JSON lines.
pub(crate) fn of_json(row: &Value, asked: Option<&str>) -> Result<Vec<Message>, String> {
    let row = row.as_object().ok_or("it is not a JSON object")?;
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    let text = |name: &str| match row.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(format!("field `{name}` is not a string")),
    };
    // Many rows are about nothing, and say so by a null.
    let present = |name: &&str| !row.get(*name).is_none_or(Value::is_null);
    let chat = match Columns::find(&names, asked) {
        None => {
            let wanted = asked.unwrap_or(COLUMNS);
            return Err(format!("none of its fields {} is {wanted}", names.join(", ")));
        }
        Some(Columns::Pair { prompt, response, .. }) if row[prompt].is_array() => {
            let messages = [prompt, response].map(|name| messages(&row[name], name));
            let [asked, answered] = messages;
            of_messages(asked?.into_iter().chain(answered?))?
        }
        Some(Columns::Pair { prompt, about, response }) => {
            let about = about.filter(present).map(text).transpose()?;
            let response = Some(response).filter(present).map(text).transpose()?;
            of_pair(text(prompt)?, about, response.unwrap_or_default())?
        }
        Some(Columns::List(list)) => of_messages(messages(&row[list], list)?.into_iter())?,
    };
    let system = Some(SYSTEM).filter(present).map(text).transpose()?;
    behind_system(chat, system)
}

/// Role and text of the messages in field `name`: a list of objects, or an object of two lists.
fn messages(value: &Value, name: &str) -> Result<Vec<Said>, String> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    if let Value::Array(messages) = value {
        let message = |message: &Value| {
            let role = FIELDS.iter().find_map(|(role, _)| text(message.get(role)));
            (role, Content::of_message(message))
        };
        return Ok(messages.iter().map(message).collect());
    }
    let list = |field: &str| value.get(field).and_then(Value::as_array);
    let lists = FIELDS.iter().find_map(|(role, content)| Some((list(role)?, list(content)?)));
    let Some((roles, contents)) = lists else {
        return Err(format!("field `{name}` is not a list of messages"));
    };
    if roles.len() != contents.len() {
        return Err(UNEVEN.to_owned());
    }
    let pairs = roles.iter().zip(contents);
    Ok(pairs.map(|(role, content)| (text(Some(role)), Content::of_json(content))).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(row: &Value) -> Vec<(String, String)> {
        of_json(row, None).unwrap().into_iter().map(|m| (m.role, m.content)).collect()
    }

    #[test]
    fn every_shape_of_a_conversation_is_read() {
        let two = [("user", "Q"), ("assistant", "A")].map(|(r, c)| (r.to_owned(), c.to_owned()));
        for row in [
            json!({"messages": [{"role": "user", "content": "Q"},
                                {"content": "A", "role": "assistant", "weight": 1}]}),
            json!({"id": 1, "conversations": [{"from": "human", "value": "Q"},
                                              {"from": "gpt", "value": "A"}]}),
            json!({"conversations": [{"role": "user", "content": "Q"},
                                     {"role": "assistant", "content": "A"}]}),
            json!({"prompt": "Q", "response": "A"}),
            json!({"completion": "A", "prompt": "Q"}),
            json!({"instruction": "Q", "output": "A"}),
            json!({"instruction": "Q", "input": " ", "output": "A"}),
            json!({"instruction": "Q", "input": null, "output": "A"}),
            json!({"question": "Q", "answer": "A"}),
            json!({"prompt": [{"role": "user", "content": "Q"}],
                   "completion": [{"role": "assistant", "content": "A"}]}),
            json!({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}),
            json!({"messages": {"content": ["Q", "A"], "role": ["user", "assistant"]}, "system": null}),
            json!({"prompt": "Q", "response": "A", "system": " "}),
            // A list says more than the prompt that it begins with.
            json!({"prompt": "no", "response": "no", "messages": [
                {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
        ] {
            assert_eq!(said(&row), two, "{row}");
        }
        let about = json!({"instruction": "Sum up.", "input": "Text", "output": "A"});
        assert_eq!(said(&about)[0].1, "Sum up.\n\nText");
        let tool = json!({"conversations": [{"from": "system", "value": "S"},
                                            {"from": "tool", "value": "T"}]});
        assert_eq!(said(&tool).iter().map(|m| &*m.0).collect::<Vec<_>>(), ["system", "tool"]);
        for row in [
            json!({"system": "S", "messages": [{"role": "user", "content": "Q"}]}),
            json!({"system": "no", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}),
        ] {
            let two = [("system", "S"), ("user", "Q")].map(|(r, c)| (r.to_owned(), c.to_owned()));
            assert_eq!(said(&row), two, "{row}");
        }
        let pair = said(&json!({"system": "S", "instruction": "Q", "output": "A"}));
        assert_eq!(pair.iter().map(|m| &*m.0).collect::<Vec<_>>(), ["system", "user", "assistant"]);
        let named = json!({"messages": [], "turns": [{"role": "user", "content": "Q"}]});
        assert_eq!(of_json(&named, Some("turns")).unwrap().len(), 1);
    }

    #[test]
    fn an_empty_answer_is_known() {
        let empty = |row: Value| has_empty_answer(&of_json(&row, None).unwrap());
        assert!(empty(json!({"prompt": "Q", "response": " \n"})));
        assert!(!empty(json!({"prompt": "", "response": "A"})));
        let called = json!({"messages": [{"role": "user", "content": "Q"},
            {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "T"}]});
        assert!(empty(called));
        // As OpenAI's interface has calls of tools, and files rows that nobody answered.
        let calls = |answer: Value| json!({"messages": [{"role": "user", "content": "Q"}, answer]});
        for answer in [
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}),
            json!({"role": "assistant", "tool_calls": [{"id": "1"}]}),
            json!({"from": "gpt", "value": null}),
            json!({"role": "assistant", "content": null, "value": ""}),
        ] {
            assert!(empty(calls(answer.clone())), "{answer}");
        }
        assert!(empty(json!({"prompt": "Q", "response": null})));
        assert!(empty(json!({"conversations": {"from": ["human", "gpt"], "value": ["Q", null]}})));
    }

    #[test]
    fn what_is_no_conversation_says_why() {
        let many: Vec<Value> =
            (0..=MOST_MESSAGES).map(|_| json!({"role": "user", "content": "x"})).collect();
        for (row, reason) in [
            (json!([]), "not a JSON object"),
            (json!({"text": "x"}), "none of its fields text is messages, conversations"),
            (json!({"messages": "x"}), "field `messages` is not a list of messages"),
            (json!({"messages": []}), "it has no messages"),
            (json!({"messages": [{"content": "x"}]}), "message 1 has no role"),
            (json!({"messages": [{"role": "user", "content": null}]}), "message 1 has no text"),
            (json!({"messages": [{"role": "", "content": "x"}]}), "message 1 is empty"),
            (json!({"messages": [{"role": "assistant", "text": "x"}]}), "message 1 has no text"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
                "the text of message 1 is a list, where only a string is read",
            ),
            (json!({"prompt": null, "response": "x"}), "field `prompt` is not a string"),
            (json!({"messages": many}), "more than 4096 messages"),
            (json!({"prompt": "x".repeat(MOST_BYTES), "response": ""}), "more than 16777216"),
            (json!({"prompt": "x", "response": ["x"]}), "field `response` is not a string"),
            (json!({"prompt": [], "response": "x"}), "field `response` is not a list of messages"),
            (json!({"messages": {"role": ["user"], "content": []}}), "not as many roles as texts"),
            (json!({"messages": {"role": ["user"]}}), "field `messages` is not a list of messages"),
            (
                json!({"prompt": "x", "response": "y", "system": 1}),
                "field `system` is not a string",
            ),
            (
                json!({"prompt": "x", "response": "y", "system": "x".repeat(MOST_BYTES)}),
                "more than 16777216",
            ),
        ] {
            let error = of_json(&row, None).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let error = of_json(&json!({"messages": []}), Some("turns")).unwrap_err();
        assert_eq!(error, "none of its fields messages is turns");
    }
}
