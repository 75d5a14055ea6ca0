//! `gptq completions`: what a shell needs to complete the command line.

use anyhow::Result;
use clap_complete::{Shell, generate};

use super::print_as_it_is;
use crate::args::definition;
use crate::printer::Printer;

/// Print a script that completes gptq's command line in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq completions bash > ~/.local/share/bash-completion/completions/gptq
  gptq completions zsh > ~/.zfunc/_gptq
  gptq completions fish > ~/.config/fish/completions/gptq.fish")]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: &Args, _: &Printer) -> Result<()> {
    let mut script = Vec::new();
    generate(args.shell, &mut definition(), "gptq", &mut script);
    print_as_it_is(&String::from_utf8(script)?)
}
