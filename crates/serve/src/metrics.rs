//! Counts for those who watch the server, as Prometheus reads them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What has happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Answers by path and status.
    pub(crate) requests: BTreeMap<(&'static str, u16), u64>,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    /// Texts whose clients went away once the engine had their request.
    pub(crate) cancelled: u64,
    /// Texts that are being made.
    pub(crate) active: usize,
    /// Steps of the engine, each a token of every active text.
    pub(crate) steps: u64,
    /// Requests that got a token, and how long that took them together.
    pub(crate) first_tokens: u64,
    pub(crate) first_token_seconds: f64,
    /// Time in prompts and in steps.
    pub(crate) spent: [Duration; 2],
}

impl Metrics {
    pub(crate) fn counts(&self) -> MutexGuard<'_, Counts> {
        // Counts are counts, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The text that Prometheus reads, with the queue's counts of what waits and of texts that were
    /// cancelled there.
    pub(crate) fn text(&self, (queued, cancelled): (usize, u64)) -> String {
        let counts = self.counts();
        let mut text = String::new();
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            // A String takes what is written.
            let _ = write!(text, "# HELP gptq_{name} {help}\n# TYPE gptq_{name} {kind}\n");
        };
        head(&mut text, "requests_total", "counter", "Answers by path and status.");
        for ((path, status), count) in &counts.requests {
            let labels = format!("{{endpoint=\"{path}\",status=\"{status}\"}}");
            let _ = writeln!(text, "gptq_requests_total{labels} {count}");
        }
        let [prompts, steps] = counts.spent.map(|spent| spent.as_secs_f64());
        for (name, kind, help, value) in [
            (
                "prompt_tokens_total",
                "counter",
                "Tokens of prompts read.",
                counts.prompt_tokens as f64,
            ),
            ("completion_tokens_total", "counter", "Tokens made.", counts.completion_tokens as f64),
            (
                "texts_cancelled_total",
                "counter",
                "Texts whose clients went away.",
                (counts.cancelled + cancelled) as f64,
            ),
            (
                "steps_total",
                "counter",
                "Steps, each a token of every active text.",
                counts.steps as f64,
            ),
            ("prompt_seconds_total", "counter", "Time in prompts.", prompts),
            ("step_seconds_total", "counter", "Time in steps.", steps),
            ("texts_active", "gauge", "Texts that are being made.", counts.active as f64),
            ("requests_queued", "gauge", "Requests that wait.", queued as f64),
        ] {
            head(&mut text, name, kind, help);
            let _ = writeln!(text, "gptq_{name} {value}");
        }
        let name = "time_to_first_token_seconds";
        head(&mut text, name, "summary", "From a request to its first token.");
        let _ = writeln!(text, "gptq_{name}_sum {}", counts.first_token_seconds);
        let _ = writeln!(text, "gptq_{name}_count {}", counts.first_tokens);
        text
    }
}
