//! What completions and chats are asked for alike.

use std::time::Instant;

use gptq_generate::{Origin, Sampling, SamplingOptions};
use serde_json::{Map, Value};

use crate::fields::Fields;
use crate::handlers::Prepared;
use crate::job::Job;
use crate::neutral;
use crate::refusal::Refusal;
use crate::served::Served;
use crate::writer::Writer;

/// Texts that a request may ask for, over all its prompts.
pub(crate) const MOST_TEXTS: usize = 256;
/// The likeliest tokens that may be named.
pub(crate) const MOST_TOP: usize = 20;

/// How texts are made, and how they are sent.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<u64>,
    pub(crate) stop: Vec<String>,
    /// Texts of each prompt.
    pub(crate) n: usize,
    pub(crate) stream: bool,
    /// Whether a stream ends with the counts of tokens.
    pub(crate) include_usage: bool,
}

impl Settings {
    /// What a request says; `own` are the parameters that it has besides these.
    pub(crate) fn read(fields: &Fields, served: &Served, own: &[&str]) -> Result<Self, Refusal> {
        served.check_name(fields.text("model")?)?;
        neutral::check(fields, own)?;
        let n = fields.whole("n", 1, MOST_TEXTS)?.unwrap_or(1);
        if fields.whole("best_of", 1, MOST_TEXTS)?.is_some_and(|best_of| best_of != n) {
            let message = "`best_of` other than `n` is not done by this server";
            return Err(Refusal::param("best_of", message));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.read("stream_options", Value::as_object, "an object")? {
            Some(_) if !stream => {
                let message = "`stream_options` is for requests with `stream: true`";
                return Err(Refusal::param("stream_options", message));
            }
            Some(options) => include_usage(options)?,
            None => false,
        };
        Ok(Self {
            sampling: sampling(fields, served)?,
            seed: fields.read("seed", seed, "a whole number")?,
            stop: fields.stops()?,
            n,
            stream,
            include_usage,
        })
    }

    /// The request, once it is known what it is of: prompts, each with the new tokens that it may get,
    /// and whether these or those are wanted with log-probabilities.
    pub(crate) fn prepare(
        self,
        served: &Served,
        prompts: Vec<(Vec<u32>, usize)>,
        (top, score): (usize, bool),
        writer: Writer,
    ) -> Prepared {
        let (parts, receiver) = tokio::sync::mpsc::unbounded_channel();
        let job = Job {
            prompts,
            n: self.n,
            sampling: self.sampling,
            seed: self.seed,
            stop: self.stop,
            end: served.end.clone(),
            top,
            score,
            parts,
            since: Instant::now(),
        };
        Prepared { job, receiver, writer, stream: self.stream, usage: self.include_usage }
    }
}

/// `stream_options`, of which one changes something here: `include_obfuscation` pads streams on
/// foreign networks.
fn include_usage(options: &Map<String, Value>) -> Result<bool, Refusal> {
    let mut include_usage = false;
    for (name, value) in options {
        match (name.as_str(), value) {
            (_, Value::Null) | ("include_obfuscation", Value::Bool(_)) => {}
            ("include_usage", Value::Bool(wanted)) => include_usage = *wanted,
            ("include_usage" | "include_obfuscation", _) => {
                let message = format!("`stream_options.{name}` is not true or false");
                return Err(Refusal::param("stream_options", message));
            }
            // As some servers have it, a count in every chunk.
            ("continuous_usage_stats", Value::Bool(false)) => {}
            _ => {
                let message = "`stream_options` has more than `include_usage`";
                return Err(Refusal::param("stream_options", message));
            }
        }
    }
    Ok(include_usage)
}

/// The request's settings over those of the model's files.
fn sampling(fields: &Fields, served: &Served) -> Result<Sampling, Refusal> {
    // Some write -1 where all tokens may be drawn.
    let top_k = |value: &Value| match value.as_i64() {
        Some(-1) => Some(0),
        _ => usize::try_from(value.as_u64()?).ok(),
    };
    let none = SamplingOptions::default();
    let options = SamplingOptions {
        temperature: fields.number("temperature")?,
        top_k: fields.read("top_k", top_k, "a whole number of at least -1")?,
        top_p: fields.number("top_p")?,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
    };
    // Each alone, to know which it is that is out of its range.
    for (name, alone) in [
        ("temperature", SamplingOptions { temperature: options.temperature, ..none.clone() }),
        ("top_p", SamplingOptions { top_p: options.top_p, ..none.clone() }),
        ("min_p", SamplingOptions { min_p: options.min_p, ..none.clone() }),
        (
            "repetition_penalty",
            SamplingOptions { repetition_penalty: options.repetition_penalty, ..none },
        ),
    ] {
        Sampling::resolve(&alone, None)
            .map_err(|error| Refusal::param(name, format!("`{name}`: {error}")))?;
    }
    Sampling::resolve(&options, served.generation.as_ref())
        .map(default_sampling)
        .map_err(|error| Refusal::invalid(error.to_string()))
}

/// What becomes of a model's own settings here. The likeliest 50 tokens, to which transformers confines
/// itself where nobody says anything, are no part of OpenAI's interface.
#[must_use]
pub fn default_sampling(mut sampling: Sampling) -> Sampling {
    if sampling.top_k.origin == Origin::Default {
        sampling.top_k.value = 0;
    }
    sampling
}

/// Any whole number is a seed.
fn seed(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64))
}
