//! `gptq doctor`: what this machine has for GPU runs, and what to do about what it lacks.

use anyhow::Result;
use gptq_compute::cuda::{Probe, probe};
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

pub(crate) fn run(args: &Args, _: &Printer) -> Result<()> {
    let checks = checks(&probe());
    if args.json {
        return print_json(&checks);
    }
    let rows: Vec<Vec<String>> = checks
        .iter()
        .map(|c| {
            let found = c.found.clone().unwrap_or_else(|| "missing".to_owned());
            vec![c.what.clone(), found, c.advice.unwrap_or_default().to_owned()]
        })
        .collect();
    print_result(&table(&["", "found", "what to do"], 3, &rows))
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
