//! `generation_config.json`: how a model's makers would have it write.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Result;
use crate::json_file::JsonFile;

/// The file's name.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// What `generation_config.json` says, where it says it. A field that is null is not said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// The file.
    pub path: PathBuf,
    /// Whether tokens are drawn; without it the likeliest is taken.
    pub do_sample: Option<bool>,
    /// What logits are divided by, finite and not negative; 0 stands for no drawing.
    pub temperature: Option<f64>,
    /// How many of the likeliest tokens are drawn from; 0 is all.
    pub top_k: Option<usize>,
    /// The probability that the likeliest tokens which are drawn from have together, in (0, 1].
    pub top_p: Option<f64>,
    /// The least probability, as a part of the likeliest token's, in [0, 1].
    pub min_p: Option<f64>,
    /// What the logits of tokens that were there are divided by, or multiplied if negative; above 0.
    pub repetition_penalty: Option<f64>,
    /// Tokens that end a text; empty where nothing is said.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text; -1, which some files have here and for padding, is none.
    pub bos_token_id: Option<u32>,
    /// The token that fills a batch.
    pub pad_token_id: Option<u32>,
    /// How many tokens an answer has at most.
    pub max_new_tokens: Option<usize>,
    /// How many tokens a prompt and its answer have at most, to which transformers prefers
    /// `max_new_tokens`. Files carry 20, transformers' default of old, or the model's window; it is not
    /// followed here, and a caller should say so where it would change something.
    pub max_length: Option<usize>,
    /// What else the file asks for that transformers would do and this program does not, as
    /// `num_beams 4`: a caller should say so.
    pub not_followed: Vec<String>,
}

/// Fields that change what transformers writes, with the values that do nothing.
const NOT_FOLLOWED: [(&str, &[f64]); 22] = [
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("max_time", &[]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("stop_strings", &[]),
    ("suppress_tokens", &[]),
    ("top_h", &[1.0]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

impl GenerationConfig {
    /// Reads the file in a checkpoint's folder; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Read`](crate::Error::Read), and for values of another kind or outside their range
    /// [`Error::Invalid`](crate::Error::Invalid), which names the file and the key.
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        JsonFile::open(folder.join(GENERATION_CONFIG_FILE))?.map(|file| Self::of(&file)).transpose()
    }

    fn of(file: &JsonFile) -> Result<Self> {
        let number = |key: &str, holds: fn(f64) -> bool, range: &str| {
            file.read(key, |value| value.as_f64().filter(|&number| holds(number)), range)
        };
        // -1 is how several makers write that there is none.
        let token = |key: &str| match file.get(key) {
            Some(none) if none.as_i64() == Some(-1) => Ok(None),
            _ => file.read(key, token_id, "a token"),
        };
        let most = |key: &str| {
            let above = |value: &Value| whole(value).filter(|&most| most > 0);
            file.read(key, above, "a whole number above 0")
        };
        Ok(Self {
            path: file.path().to_owned(),
            do_sample: file.read("do_sample", Value::as_bool, "true or false")?,
            temperature: number("temperature", is_temperature, TEMPERATURE)?,
            top_k: file.read("top_k", whole, WHOLE)?,
            top_p: number("top_p", is_top_p, TOP_P)?,
            min_p: number("min_p", is_min_p, MIN_P)?,
            repetition_penalty: number("repetition_penalty", is_penalty, PENALTY)?,
            eos_token_ids: eos_token_ids(file)?,
            bos_token_id: token("bos_token_id")?,
            pad_token_id: token("pad_token_id")?,
            max_new_tokens: most("max_new_tokens")?,
            // Nothing follows it, and files have 0, -1 and 4096.0 here.
            max_length: file.get("max_length").and_then(length),
            not_followed: not_followed(file),
        })
    }
}

pub(crate) const TEMPERATURE: &str = "a number of at least 0";
pub(crate) const TOP_P: &str = "a number above 0 and at most 1";
pub(crate) const MIN_P: &str = "a number from 0 to 1";
pub(crate) const PENALTY: &str = "a number above 0";
const WHOLE: &str = "a whole number of at least 0";

pub(crate) fn is_temperature(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

pub(crate) fn is_top_p(value: f64) -> bool {
    value > 0.0 && value <= 1.0
}

pub(crate) fn is_min_p(value: f64) -> bool {
    (0.0..=1.0).contains(&value)
}

pub(crate) fn is_penalty(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

/// A length that says something, however it is written.
fn length(value: &Value) -> Option<usize> {
    let exact = |number: f64| (number.fract() == 0.0 && number < 1e15).then_some(number as usize);
    whole(value).or_else(|| value.as_f64().and_then(exact)).filter(|&length| length > 0)
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// `eos_token_id` of this file or of `config.json`: a token or a list of them.
pub(crate) fn eos_token_ids(file: &JsonFile) -> Result<Vec<u32>> {
    let read = |value: &Value| match value {
        Value::Array(ids) => ids.iter().map(token_id).collect(),
        one => token_id(one).map(|id| vec![id]),
    };
    Ok(file.read("eos_token_id", read, "a token or a list of tokens")?.unwrap_or_default())
}

fn not_followed(file: &JsonFile) -> Vec<String> {
    let asked = |&(key, neutral): &(&str, &[f64])| {
        let value = file.get(key)?;
        let nothing = value == &Value::Bool(false)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_f64().is_some_and(|number| neutral.contains(&number));
        (!nothing).then(|| format!("{key} {value}"))
    };
    NOT_FOLLOWED.iter().filter_map(asked).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn config(text: &str) -> Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(GENERATION_CONFIG_FILE), text).unwrap();
        GenerationConfig::open(folder.path()).map(Option::unwrap)
    }

    #[test]
    fn what_a_file_says_is_read_and_nothing_else_made_up() {
        let folder = tempfile::tempdir().unwrap();
        assert!(GenerationConfig::open(folder.path()).unwrap().is_none());
        let empty = config("{}").unwrap();
        assert_eq!(empty, GenerationConfig { path: empty.path.clone(), ..Default::default() });
        let llama = config(
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "max_length": 4096,
                "bos_token_id": 128000, "eos_token_id": [128001, 128009], "top_k": null,
                "pad_token_id": -1, "num_beams": 1, "typical_p": 1.0, "stop_strings": ["x"],
                "num_return_sequences": 3, "repetition_penalty": 1, "max_new_tokens": 7}"#,
        )
        .unwrap();
        assert_eq!(llama.do_sample, Some(true));
        assert_eq!((llama.temperature, llama.top_p, llama.top_k), (Some(0.6), Some(0.9), None));
        assert_eq!(llama.repetition_penalty, Some(1.0));
        assert_eq!(llama.eos_token_ids, [128_001, 128_009]);
        assert_eq!((llama.bos_token_id, llama.pad_token_id), (Some(128_000), None));
        assert_eq!((llama.max_new_tokens, llama.max_length), (Some(7), Some(4096)));
        assert_eq!(llama.not_followed, [r#"stop_strings ["x"]"#]);
        assert_eq!(config(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
    }

    #[test]
    fn a_length_that_nothing_follows_is_no_reason_to_refuse_a_model() {
        for (value, length) in [
            ("4096", Some(4096)),
            ("4096.0", Some(4096)),
            ("0", None),
            ("-1", None),
            ("-1.0", None),
            ("1.5", None),
            ("1e300", None),
            ("\"long\"", None),
        ] {
            let config = config(&format!("{{\"max_length\": {value}}}")).unwrap();
            assert_eq!(config.max_length, length, "{value}");
        }
    }

    #[test]
    fn a_wrong_value_names_the_file_and_the_key() {
        for (key, value) in [
            ("temperature", "-0.1"),
            ("temperature", "\"0.7\""),
            ("top_p", "0"),
            ("top_p", "1.01"),
            ("top_k", "-1"),
            ("top_k", "1.5"),
            ("min_p", "2"),
            ("repetition_penalty", "0.0"),
            ("do_sample", "1"),
            ("eos_token_id", "-1"),
            ("eos_token_id", "[1, \"</s>\"]"),
            ("eos_token_id", "4294967296"),
            ("pad_token_id", "-2"),
            ("max_new_tokens", "0"),
        ] {
            let error = config(&format!("{{\"{key}\": {value}}}")).unwrap_err().to_string();
            assert!(error.contains(GENERATION_CONFIG_FILE) && error.contains(key), "{error}");
        }
        // Python writes numbers that JSON has not.
        let error = config("{\n\"temperature\": NaN}").unwrap_err().to_string();
        assert!(error.contains(GENERATION_CONFIG_FILE) && error.contains("line 2"), "{error}");
        assert!(config("[]").is_err());
    }
}
