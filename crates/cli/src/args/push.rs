//! `gptq push`.

use std::path::PathBuf;

use clap::Args;

/// Upload checkpoints to the Hugging Face Hub, a branch each
///
/// Makes the repository and its branches where they are missing, and sends only what a branch lacks,
/// so a failed upload is repeated by the same command. Needs a token with the write role: HF_TOKEN,
/// HF_TOKEN_PATH or a login.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq push ./branches --repo me/StableBeluga2-70B-GPTQ --dry-run
  gptq push ./4bit-128g --repo me/SmolLM2-135M-GPTQ --branch 4bit-128g --private")]
pub(crate) struct PushArgs {
    /// A checkpoint, or a folder of checkpoints such as gptq sweep makes, named as their branches
    pub(crate) dir: PathBuf,
    /// Repository to upload to; made if it does not exist
    #[arg(long, value_name = "ORG/NAME")]
    pub(crate) repo: String,
    /// Branch for the checkpoint [default: main], or the only one to upload of several
    #[arg(long, value_name = "NAME")]
    pub(crate) branch: Option<String>,
    /// Make the repository private
    #[arg(long)]
    pub(crate) private: bool,
    /// Print what would go where, without a network
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Attempts after failed ones
    #[arg(long, value_name = "N", default_value_t = super::RETRIES)]
    pub(crate) retries: u32,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
