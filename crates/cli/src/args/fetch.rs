//! `gptq fetch`.

use clap::Args;
use gptq_text::dataset::DatasetSpec;

/// Attempts after failed ones, where nobody asks for another number.
pub(crate) const RETRIES: u32 = 5;

/// Download a model or dataset from the Hugging Face Hub
///
/// Files go to the Hub's standard cache, each checked by size and hash when it arrives; a download
/// that was cut short goes on where it stopped. Other commands then take the model by its id.
/// HF_TOKEN (or HF_TOKEN_PATH, or a login) opens private models; HF_HOME and HF_HUB_CACHE place the
/// cache, and HF_ENDPOINT names another Hub.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq fetch HuggingFaceTB/SmolLM2-135M --dataset Salesforce/wikitext:wikitext-2-raw-v1:test
  gptq fetch stabilityai/StableBeluga2 --revision main --json")]
pub(crate) struct FetchArgs {
    /// Model on the Hub: weights (safetensors, else PyTorch), configuration, tokeniser, licences
    #[arg(value_name = "ORG/NAME", required_unless_present = "dataset")]
    pub(crate) model: Option<String>,
    /// Branch, tag or commit of the model [default: main]
    #[arg(long, value_name = "REVISION", requires = "model")]
    pub(crate) revision: Option<String>,
    /// Split of a dataset, ORG/NAME:CONFIG:SPLIT; may be repeated
    #[arg(long, value_name = "DATASET")]
    pub(crate) dataset: Vec<DatasetSpec>,
    /// Hash what is in the cache already, too, and download again what is damaged
    #[arg(long)]
    pub(crate) verify: bool,
    /// Attempts after failed ones, 1, 2, 4 s and so on apart; what arrives starts the count anew
    #[arg(long, value_name = "N", default_value_t = RETRIES)]
    pub(crate) retries: u32,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
