//! `gptq card`: README.md of every checkpoint.

use std::path::PathBuf;

use anyhow::Result;
use gptq_report::card::write_cards;
use gptq_report::card_facts::CardFacts;

use super::{print_json, print_result};
use crate::printer::Printer;

/// Write the model card, README.md, of every checkpoint in a folder
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Sizes, perplexities and settings come from the folders' reports; the facts are what only a
person knows: author, license, prompt. A README.md that is there is replaced.

Example:
  gptq card branches --facts configs/cards/stablebeluga2.toml --repo my-org/StableBeluga2-70B-GPTQ"
)]
pub(crate) struct Args {
    /// Sweep folder, or the folder of one checkpoint
    dir: PathBuf,
    /// Facts of the model, as TOML; configs/cards has examples
    #[arg(long, value_name = "FILE")]
    facts: PathBuf,
    /// Hub repository of the branches instead of the facts'
    #[arg(long, value_name = "ORG/NAME")]
    repo: Option<String>,
    /// Print the files written as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, _: &Printer) -> Result<()> {
    let facts = CardFacts::open(&args.facts, args.repo.as_deref())?;
    let written = write_cards(&args.dir, &facts)?;
    if args.json {
        return print_json(&written);
    }
    let lines: String = written.iter().map(|path| format!("{}\n", path.display())).collect();
    print_result(&lines)
}
