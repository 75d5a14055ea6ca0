//! `gptq card`: README.md of every checkpoint.

use anyhow::Result;
use gptq_report::card::write_cards;
use gptq_report::card_facts::CardFacts;

use super::{print_json, print_result};
use crate::args::CardArgs;

pub(crate) fn run(args: &CardArgs) -> Result<()> {
    let facts = CardFacts::open(&args.facts, args.repo.as_deref())?;
    let written = write_cards(&args.dir, &facts)?;
    if args.json {
        return print_json(&written);
    }
    let lines: String = written.iter().map(|path| format!("{}\n", path.display())).collect();
    print_result(&lines)
}
