//! `gptq doctor`: what this machine has for GPU runs, and what to do about what it lacks.

use anyhow::Result;
use gptq_compute::cuda::{Library, Probe, probe};
use gptq_pipeline::host_memory;
use serde::Serialize;

use super::table::{gigabytes, table};
use super::{print_json, print_result};
use crate::printer::Printer;

/// Show what this machine has for GPU runs, and what it lacks
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  gptq doctor")]
pub(crate) struct Args {
    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
}

/// One fact.
#[derive(Serialize)]
struct Check {
    what: String,
    found: Option<String>,
    /// What to do, where something is missing that a GPU run needs.
    advice: Option<&'static str>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    verdict: Verdict,
    checks: Vec<Check>,
}

/// What all facts come to.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Verdict {
    /// What a run uses, `gpu` or `cpu`; none where it stops.
    runs_on: Option<&'static str>,
    verdict: String,
    next: String,
}

pub(crate) fn run(args: &Args, _: &Printer) -> Result<()> {
    let probe = probe();
    let missing = |library: &Library| *library != Library::Nccl && !library.is_present();
    let missing: Vec<&str> = Library::ALL.into_iter().filter(missing).map(Library::file).collect();
    let cards = probe.cards.iter().map(|card| (card.name.as_str(), card.supported));
    let output = Output { verdict: verdict(cards, &missing), checks: checks(&probe) };
    if args.json {
        return print_json(&output);
    }
    let mut said = None;
    let rows: Vec<Vec<String>> = output
        .checks
        .iter()
        .map(|c| {
            let found = c.found.clone().unwrap_or_else(|| "missing".to_owned());
            // One package brings several libraries.
            let advice = match c.advice {
                advice @ Some(_) if advice == said => "as above",
                advice => advice.unwrap_or_default(),
            };
            said = c.advice;
            vec![c.what.clone(), found, advice.to_owned()]
        })
        .collect();
    let Verdict { verdict, next, .. } = &output.verdict;
    let table = table(&["", "found", "what to do"], 3, &rows);
    print_result(&format!("{table}\n{verdict}\nNext: {next}\n"))
}

/// The one thing that this machine can do and the one to do next, of its cards and whether their
/// kernels can run there, and of the libraries that are missing.
fn verdict<'a>(cards: impl Iterator<Item = (&'a str, bool)>, missing: &[&str]) -> Verdict {
    let cards: Vec<(&str, bool)> = cards.collect();
    let usable: Vec<&str> = cards.iter().filter(|card| card.1).map(|card| card.0).collect();
    let plan = "gptq plan MODEL, for size, memory and time of nine branches".to_owned();
    let (runs_on, verdict, next) = match (usable.as_slice(), missing) {
        ([first, rest @ ..], []) => {
            let more = match rest.len() {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            (Some("gpu"), format!("Ready: runs use the GPU, {first}{more}."), plan)
        }
        // The program does not go on without being told to: a CPU takes hours for minutes of a GPU.
        ([first, ..], missing) => (
            None,
            format!("Not ready: {first} cannot be used without {}.", missing.join(", ")),
            "install what is missing as said above, or run with --device cpu".to_owned(),
        ),
        ([], _) if !cards.is_empty() => {
            (Some("cpu"), "Ready, on the CPU: the GPU is older than sm_80.".to_owned(), plan)
        }
        ([], _) => (Some("cpu"), "Ready, on the CPU: no driver shows a GPU.".to_owned(), plan),
    };
    Verdict { runs_on, verdict, next }
}

fn checks(probe: &Probe) -> Vec<Check> {
    let mut checks = Vec::new();
    for facts in &probe.libraries {
        let version = facts.version.clone().unwrap_or_else(|| "yes".to_owned());
        checks.push(Check {
            what: facts.library.file().to_owned(),
            found: facts.place.map(|place| format!("{version}, {place}")),
            advice: facts.place.is_none().then(|| facts.library.hint()),
        });
    }
    for card in &probe.cards {
        let (major, minor) = card.capability;
        checks.push(Check {
            what: format!("cuda:{}", card.ordinal),
            found: Some(format!(
                "{}, sm_{major}{minor}, {}",
                card.name,
                gigabytes(card.memory as u64)
            )),
            advice: if card.supported { None } else { Some("too old: sm_80 or newer is needed") },
        });
    }
    if probe.cards.len() > 1 {
        let pairs: Vec<String> = probe.apart.iter().map(|(a, b)| format!("{a} and {b}")).collect();
        let found = match pairs.as_slice() {
            [] => "all reach each other's memory".to_owned(),
            pairs => format!("apart: {}", pairs.join(", ")),
        };
        let advice = "those exchange through host memory, which is slower";
        let advice = (!pairs.is_empty()).then_some(advice);
        checks.push(Check { what: "GPU pairs".to_owned(), found: Some(found), advice });
    }
    if probe.cards.is_empty() {
        let advice = "everything runs on the CPU";
        checks.push(Check { what: "GPU".to_owned(), found: None, advice: Some(advice) });
    }
    checks.push(Check {
        what: "kernel cache".to_owned(),
        found: probe.cache.as_ref().map(|p| p.display().to_string()),
        advice: match probe.cache {
            Some(_) => None,
            None => Some("set XDG_CACHE_HOME or HOME; kernels are compiled at every start"),
        },
    });
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = host_memory::total().map_or_else(String::new, |b| format!(", {}", gigabytes(b)));
    checks.push(Check {
        what: "host".to_owned(),
        found: Some(format!("{threads} threads{memory}")),
        advice: None,
    });
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_facts_come_to_one_verdict_and_one_step() {
        let of = |cards: &[(&str, bool)], missing: &[&str]| {
            let Verdict { runs_on, verdict, next } = verdict(cards.iter().copied(), missing);
            assert!(!verdict.contains('\n') && !next.contains('\n'));
            (runs_on, verdict, next)
        };
        let (ready, verdict, next) = of(&[("H100", true), ("H100", true)], &[]);
        assert_eq!(
            (ready, verdict.as_str()),
            (Some("gpu"), "Ready: runs use the GPU, H100, and 1 more.")
        );
        assert!(next.starts_with("gptq plan "));
        // A driver and a card, as without any toolkit.
        let (ready, verdict, next) = of(&[("H100", true)], &["libnvrtc.so.13"]);
        assert_eq!(verdict, "Not ready: H100 cannot be used without libnvrtc.so.13.");
        assert!(ready.is_none() && next.contains("--device cpu"));
        let (ready, verdict, _) = of(&[("V100", false)], &[]);
        assert_eq!(
            (ready, verdict.as_str()),
            (Some("cpu"), "Ready, on the CPU: the GPU is older than sm_80.")
        );
        let (_, verdict, next) = of(&[], &["libcuda.so.1", "libnvrtc.so.13"]);
        assert_eq!(verdict, "Ready, on the CPU: no driver shows a GPU.");
        assert!(next.starts_with("gptq plan "));
    }
}
