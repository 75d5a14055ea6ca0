//! Arguments of `gptq card`.

use std::path::PathBuf;

use clap::Args;

/// Write the model card, README.md, of every checkpoint in a folder
#[derive(Debug, Args)]
#[command(
    after_help = "Sizes, perplexities and settings come from the folders' reports; the facts are what only a
person knows: author, licence, prompt. A README.md that is there is replaced.

Example:
  gptq card branches --facts configs/cards/stablebeluga2.toml --repo my-org/StableBeluga2-70B-GPTQ"
)]
pub(crate) struct CardArgs {
    /// Sweep folder, or the folder of one checkpoint
    pub(crate) dir: PathBuf,
    /// Facts of the model, as TOML; configs/cards has examples
    #[arg(long, value_name = "FILE")]
    pub(crate) facts: PathBuf,
    /// Hub repository of the branches instead of the facts'
    #[arg(long, value_name = "ORG/NAME")]
    pub(crate) repo: Option<String>,
    /// Print the files written as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
