//! `gptq verify`: its command line.

use clap::Args;
use gptq_pipeline::verify::Limits;
use gptq_text::dataset::DatasetSpec;
use gptq_text::protocol::Protocol;

use super::DeviceArgs;
use super::values::parse_limit;

/// Check a GPTQ checkpoint in every respect, and say who loads it
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq verify ./SmolLM2-135M-4bit-128g
  gptq verify ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M
  gptq verify ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --dataset ./book.txt \\
    --max-windows 8 --max-kl 0.05 --max-ppl-ratio 1.1")]
pub(crate) struct VerifyArgs {
    /// Folder of the checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    pub(crate) checkpoint: String,
    /// Dense model that it was made from: compares every weight
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<String>,
    /// Text to run on: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl or .parquet; with --base, also measures
    /// every linear's output error and the KL divergence
    #[arg(long)]
    pub(crate) dataset: Option<DatasetSpec>,
    /// How the text is cut and scored: paper, llama-cpp or strided
    #[arg(long, default_value = "paper", requires = "dataset")]
    pub(crate) protocol: Protocol,
    /// Tokens of a window [default: 2048 (paper), 512 (llama-cpp), the context (strided)]
    #[arg(long, value_name = "N", requires = "dataset")]
    pub(crate) seq_len: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N", requires = "dataset")]
    pub(crate) max_windows: Option<usize>,
    /// Highest perplexity to accept
    #[arg(long, value_name = "X", value_parser = parse_limit, requires = "dataset")]
    pub(crate) max_ppl: Option<f64>,
    /// Highest perplexity to accept, over the base's
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    pub(crate) max_ppl_ratio: Option<f64>,
    /// Highest KL divergence from the base to accept, in nats a token
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    pub(crate) max_kl: Option<f64>,
    /// Highest output error of a linear to accept, as energy over that of its outputs
    #[arg(long, value_name = "X", value_parser = parse_limit, requires_all = ["dataset", "base"])]
    pub(crate) max_output_error: Option<f64>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl VerifyArgs {
    /// What the outputs may at most be.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            perplexity: self.max_ppl,
            ratio: self.max_ppl_ratio,
            kl: self.max_kl,
            output_error: self.max_output_error,
        }
    }
}
