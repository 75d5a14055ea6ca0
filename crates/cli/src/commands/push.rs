//! `gptq push`: folders to branches on the Hub.

use std::path::PathBuf;

use crate::args::values::{RETRIES, parse_whole};

/// Upload checkpoints to the Hugging Face Hub, a branch each
///
/// Makes the repository and its branches where they are missing, and sends only what a branch lacks,
/// so a failed upload is repeated by the same command. Needs a token with the write role: HF_TOKEN,
/// HF_TOKEN_PATH or a login.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq push ./branches --repo me/StableBeluga2-70B-GPTQ --dry-run
  gptq push ./4bit-128g --repo me/SmolLM2-135M-GPTQ --branch 4bit-128g --private")]
pub(crate) struct Args {
    /// A checkpoint, or a folder of checkpoints such as gptq sweep makes, named as their branches
    dir: PathBuf,
    /// Repository to upload to; made if it does not exist
    #[arg(long, value_name = "ORG/NAME")]
    repo: String,
    /// Branch for the checkpoint [default: main], or the only one to upload of several
    #[arg(long, value_name = "NAME")]
    branch: Option<String>,
    /// Make the repository private
    #[arg(long)]
    private: bool,
    /// Print what would go where, without a network
    #[arg(long)]
    dry_run: bool,
    /// Attempts after failed ones
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
    use anyhow::Result;
    use gptq_hub::{BranchPlan, Hub, PushRequest, plan_push, push};
    use serde::Serialize;

    use super::Args;
    use crate::commands::table::{size, table};
    use crate::commands::{print_json, print_result};
    use crate::hub::Transfer;
    use crate::printer::Printer;

    /// What `--json` prints of a dry run.
    #[derive(Serialize)]
    struct Plan<'a> {
        repo: &'a str,
        files: usize,
        bytes: u64,
        branches: &'a [BranchPlan],
    }

    /// What `--json` prints of an upload.
    #[derive(Serialize)]
    struct Output<'a> {
        repo: &'a str,
        address: String,
        branches: Vec<&'a str>,
        uploaded_files: usize,
        uploaded_bytes: u64,
        unchanged_files: usize,
    }

    pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
        let repo = &args.repo;
        let branches = plan_push(repo, &args.dir, args.branch.as_deref())?;
        if args.dry_run {
            let files = || branches.iter().flat_map(|plan| &plan.files);
            let bytes = files().map(|file| file.bytes).sum();
            let plan = Plan { repo, files: files().count(), bytes, branches: &branches };
            return if args.json { print_json(&plan) } else { print_result(&listing(&plan)) };
        }
        let hub = Hub::from_env(args.retries, gptq_checkpoint::hub_token_file())?;
        let request = PushRequest { repo, private: args.private, branches: &branches };
        let done = push(&hub, &request, &Transfer::new(printer.clone()))?;
        let output = Output {
            repo,
            address: hub.address(repo),
            branches: branches.iter().map(|plan| plan.branch.as_str()).collect(),
            uploaded_files: done.files,
            uploaded_bytes: done.bytes,
            unchanged_files: done.unchanged,
        };
        if args.json { print_json(&output) } else { print_result(&summary(&output)) }
    }

    fn listing(plan: &Plan<'_>) -> String {
        let mut rows = Vec::new();
        for branch in plan.branches {
            for file in &branch.files {
                rows.push(vec![branch.branch.clone(), file.path.clone(), size(file.bytes)]);
            }
        }
        let (files, branches, total) = (plan.files, plan.branches.len(), size(plan.bytes));
        let text = table(&["branch", "file", "size"], 2, &rows);
        format!("{text}{files} files on {branches} branches of {}, {total}", plan.repo)
    }

    fn summary(output: &Output<'_>) -> String {
        let (files, bytes) = (output.uploaded_files, size(output.uploaded_bytes));
        let unchanged = match output.unchanged_files {
            0 => String::new(),
            n => format!(", {n} were there already"),
        };
        format!("{}: {files} files uploaded, {bytes}{unchanged}", output.address)
    }
}
