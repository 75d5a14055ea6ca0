//! `gptq fetch`: from the Hub into the standard cache.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use gptq_hub::{Hub, Source};
use gptq_text::dataset::DatasetSpec;
use serde::Serialize;

use super::transfer::Transfer;
use crate::args::FetchArgs;
use crate::commands::table::size;
use crate::commands::{print_json, print_result};
use crate::hint::advised;
use crate::printer::Printer;

/// What `--json` prints, one for each thing asked for.
#[derive(Serialize)]
struct Output {
    name: String,
    revision: String,
    commit: String,
    folder: PathBuf,
    files: usize,
    bytes: u64,
    downloaded_bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &FetchArgs, printer: &Printer) -> Result<()> {
    let hub = Hub::from_env(args.retries, gptq_checkpoint::hub_token_file())?;
    let cache = cache_root()?;
    let mut wanted = Vec::new();
    if let Some(id) = &args.model {
        let revision = args.revision.as_deref().unwrap_or("main");
        wanted.push((id.clone(), Source::Model(id.clone()), revision));
    }
    for dataset in &args.dataset {
        wanted.push((dataset.to_string(), split_source(dataset)?, "main"));
    }
    let mut outputs = Vec::new();
    for (name, source, revision) in wanted {
        let start = Instant::now();
        let progress = Transfer::new(printer.clone());
        let done = gptq_hub::fetch(&hub, &source, revision, &cache, args.verify, &progress)?;
        let output = Output {
            name,
            revision: revision.to_owned(),
            commit: done.commit,
            folder: done.folder,
            files: done.files,
            bytes: done.bytes,
            downloaded_bytes: done.downloaded,
            seconds: start.elapsed().as_secs_f64(),
        };
        printer.note(&summary(&output));
        outputs.push(output);
    }
    if args.json {
        return print_json(&outputs);
    }
    let folders: Vec<String> =
        outputs.iter().map(|output| output.folder.display().to_string()).collect();
    print_result(&folders.join("\n"))
}

/// The folder of all repositories.
pub(super) fn cache_root() -> Result<PathBuf> {
    gptq_checkpoint::hub_cache_root()
        .ok_or_else(|| advised("No place for the cache is known", "set HF_HOME to a folder"))
}

/// A dataset's split as what the Hub has.
pub(super) fn split_source(dataset: &DatasetSpec) -> Result<Source> {
    let Some(hub) = dataset.hub() else {
        return Err(advised(
            format!("`{dataset}` is a local file"),
            "name a dataset on the Hub as ORG/NAME:CONFIG:SPLIT",
        ));
    };
    Ok(Source::Dataset {
        id: hub.repo.clone(),
        config: hub.config.clone(),
        split: hub.split.clone(),
    })
}

fn summary(output: &Output) -> String {
    let moved = match output.downloaded_bytes {
        0 => "all there already".to_owned(),
        bytes => format!("{} downloaded in {:.1} s", size(bytes), output.seconds),
    };
    format!("{}: {} files, {}, {moved}", output.name, output.files, size(output.bytes))
}
