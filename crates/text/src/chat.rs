//! Conversations as calibration reads them: messages, and how rows of a dataset become them.
//!
//! Three shapes are read: a list of messages in `messages` or `conversations`, whose messages have
//! `role` and `content` (OpenAI's) or `from` and `value` (ShareGPT's, with its own words for the
//! roles); and columns of a prompt and its response, which are a conversation of two messages. What a
//! model's chat template makes of them is another crate's business: callers pass a [`Render`] in.

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
    checked(vec![Message::new("user", prompt), Message::new("assistant", response)])
}

/// A conversation of messages by role and text, as a file has them.
pub(crate) fn of_messages(
    messages: impl Iterator<Item = (Option<String>, Option<String>)>,
) -> Result<Vec<Message>, String> {
    let mut conversation = Vec::new();
    for (index, (role, content)) in messages.enumerate() {
        let number = index + 1;
        let role = role.ok_or_else(|| format!("message {number} has no role"))?;
        let content = content.ok_or_else(|| format!("message {number} has no text"))?;
        if conversation.len() == MOST_MESSAGES {
            return Err(format!("it has more than {MOST_MESSAGES} messages"));
        }
        conversation.push(Message { role: role_of(role, number)?, content });
    }
    checked(conversation)
}

/// ShareGPT's words for roles, and others as they are.
fn role_of(role: String, number: usize) -> Result<String, String> {
    Ok(match role.as_str() {
        "human" => "user".to_owned(),
        "gpt" => "assistant".to_owned(),
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
    let list = match Columns::find(&names, asked) {
        None => {
            let wanted = asked.unwrap_or(COLUMNS);
            return Err(format!("none of its fields {} is {wanted}", names.join(", ")));
        }
        Some(Columns::Pair { prompt, about, response }) => {
            let text = |name: &str| match row.get(name) {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err(format!("field `{name}` is not a string")),
            };
            // Many rows are about nothing, and say so by a null.
            let about = about.filter(|name| !row.get(*name).is_none_or(Value::is_null));
            return of_pair(text(prompt)?, about.map(text).transpose()?, text(response)?);
        }
        Some(Columns::List(list)) => list,
    };
    let messages = row.get(list).and_then(Value::as_array);
    let messages = messages.ok_or_else(|| format!("field `{list}` is not a list of messages"))?;
    let text = |message: &Value, name| match message.get(name) {
        Some(Value::String(text)) => Some(text.clone()),
        _ => None,
    };
    of_messages(messages.iter().map(|message| {
        let of = |fields: fn(&(&'static str, &'static str)) -> &'static str| {
            FIELDS.iter().find_map(|pair| text(message, fields(pair)))
        };
        (of(|pair| pair.0), of(|pair| pair.1))
    }))
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
        let named = json!({"messages": [], "turns": [{"role": "user", "content": "Q"}]});
        assert_eq!(of_json(&named, Some("turns")).unwrap().len(), 1);
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
            (json!({"messages": many}), "more than 4096 messages"),
            (json!({"prompt": "x".repeat(MOST_BYTES), "response": ""}), "more than 16777216"),
            (json!({"prompt": "x", "response": ["x"]}), "field `response` is not a string"),
        ] {
            let error = of_json(&row, None).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let error = of_json(&json!({"messages": []}), Some("turns")).unwrap_err();
        assert_eq!(error, "none of its fields messages is turns");
    }
}
