//! What config.json says of the parts around a language model, against the base's.
//!
//! Programs that save such a model add settings, spell defaults out and leave others off, so only a value that
//! both files have, and a part that one does not speak of at all, is told from the base's.

use gptq_checkpoint::TEXT_CONFIG;
use serde_json::{Map, Value};

/// Settings that change with the file and not with the model.
const PASSING: [&str; 6] = [
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "_attn_implementation",
];

/// Adds a sentence for every setting of other parts that is not the base's.
pub(super) fn compare(
    mine: &Map<String, Value>,
    theirs: &Map<String, Value>,
    differ: &mut Vec<String>,
) {
    for (key, theirs) in theirs {
        let part = match theirs {
            Value::Object(_) => {
                key.ends_with("_config") && ![TEXT_CONFIG, "quantization_config"].contains(&&**key)
            }
            _ => {
                key == "model_type"
                    || ["image", "video", "vision", "projector"].iter().any(|of| key.contains(of))
            }
        };
        if part {
            value(key, mine.get(key), theirs, differ);
        }
    }
}

fn value(path: &str, mine: Option<&Value>, theirs: &Value, differ: &mut Vec<String>) {
    match (mine, theirs) {
        (None, Value::Object(_)) if !path.contains('.') => {
            differ.push(format!("says nothing of {path}, which the base's does"));
        }
        (Some(Value::Object(mine)), Value::Object(theirs)) => {
            for (key, theirs) in theirs.iter().filter(|(key, _)| !PASSING.contains(&key.as_str())) {
                value(&format!("{path}.{key}"), mine.get(key), theirs, differ);
            }
        }
        (None | Some(Value::Null), _) | (_, Value::Null) => {}
        (Some(mine), theirs) if mine == theirs => {}
        // 14 and 14.0 are one number.
        (Some(mine), theirs) if mine.as_f64().is_some() && mine.as_f64() == theirs.as_f64() => {}
        (Some(mine), theirs) => {
            differ.push(format!("says {path} {mine}, but the base's says {theirs}"));
        }
    }
}
