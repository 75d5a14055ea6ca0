//! `gptq fetch`: from the Hub into the standard cache.

use gptq_text::dataset::DatasetSpec;

use crate::args::values::{RETRIES, parse_whole};

/// Download a model or dataset from the Hugging Face Hub
///
/// Files go to the Hub's standard cache, each checked by size and hash when it arrives; a download
/// that was cut short goes on where it stopped. Other commands then take the model by its id.
/// HF_TOKEN (or HF_TOKEN_PATH, or a login) opens private models; HF_HOME and HF_HUB_CACHE place the
/// cache, and HF_ENDPOINT names another Hub.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq fetch HuggingFaceTB/SmolLM2-135M --dataset Salesforce/wikitext:wikitext-2-raw-v1:test
  gptq fetch stabilityai/StableBeluga2 --revision main --json")]
pub(crate) struct Args {
    /// Model on the Hub: weights (safetensors, else PyTorch), configuration, tokenizer, licenses
    #[arg(value_name = "ORG/NAME", required_unless_present = "dataset")]
    model: Option<String>,
    /// Branch, tag or commit of the model [default: main]
    #[arg(long, value_name = "REVISION", requires = "model")]
    revision: Option<String>,
    /// Split of a dataset, ORG/NAME:CONFIG:SPLIT; may be repeated
    #[arg(long, value_name = "DATASET")]
    dataset: Vec<DatasetSpec>,
    /// Hash what is in the cache already, too, and download again what is damaged
    #[arg(long)]
    verify: bool,
    /// Attempts after failed ones, 1, 2, 4 s and so on apart; what arrives starts the count anew
    #[arg(long, value_name = "N", default_value_t = RETRIES, value_parser = parse_whole::<u32>)]
    retries: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[cfg(not(feature = "hub"))]
pub(crate) use crate::hub::refuse as run;
#[cfg(feature = "hub")]
pub(crate) use with_hub::run;

#[cfg(feature = "hub")]
mod with_hub {
    use std::path::PathBuf;
    use std::time::Instant;

    use anyhow::Result;
    use gptq_hub::{Hub, Source};
    use serde::Serialize;

    use super::Args;
    use crate::commands::table::size;
    use crate::commands::{print_json, print_result};
    use crate::hub::{Transfer, cache_root, split_source};
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

    pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
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

    fn summary(output: &Output) -> String {
        let moved = match output.downloaded_bytes {
            0 => "all there already".to_owned(),
            bytes => format!("{} downloaded in {:.1} s", size(bytes), output.seconds),
        };
        format!("{}: {} files, {}, {moved}", output.name, output.files, size(output.bytes))
    }
}
