//! What is to be made of a prompt: options that `generate` and `chat` share.

use std::path::PathBuf;

use clap::Args;
use gptq_generate::SamplingOptions;

use super::values::{parse_count, parse_number, parse_whole};

/// How text is made.
#[derive(Debug, Default, Args)]
pub(crate) struct SamplingArgs {
    /// New tokens of a text, at most [default: generation_config.json's, or 256]
    #[arg(long, value_name = "N", value_parser = parse_count, visible_alias = "max-new-tokens")]
    pub(crate) max_tokens: Option<usize>,
    /// What logits are divided by before a token is drawn; 0 takes the likeliest [default:
    /// generation_config.json's, or 0]
    #[arg(long, value_name = "T", value_parser = parse_number)]
    temperature: Option<f64>,
    /// Draw from the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", value_parser = parse_number)]
    top_p: Option<f64>,
    /// Draw from so many of the likeliest tokens; 0 is all
    #[arg(long, value_name = "K", value_parser = parse_whole::<usize>)]
    top_k: Option<usize>,
    /// Draw from tokens that have at least this part of the likeliest one's probability
    #[arg(long, value_name = "P", value_parser = parse_number)]
    min_p: Option<f64>,
    /// Divide the logits of tokens that were there by this
    #[arg(long, value_name = "R", value_parser = parse_number)]
    repetition_penalty: Option<f64>,
    /// What draws depend on: the same seed makes the same text
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = parse_whole::<u64>)]
    pub(crate) seed: u64,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Tokens that a prompt and its text may have together [default: as many as are needed, up to the
    /// model's limit]
    #[arg(long, value_name = "N", value_parser = parse_count, visible_alias = "ctx-size")]
    pub(crate) context: Option<usize>,
    /// Card facts whose prompt template is used in place of the model's chat template
    #[arg(long, value_name = "FACTS.toml")]
    pub(crate) template: Option<PathBuf>,
    /// What the model is told before the first prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
}

impl SamplingArgs {
    /// What of it decides how tokens are chosen.
    pub(crate) fn options(&self) -> SamplingOptions {
        SamplingOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}
