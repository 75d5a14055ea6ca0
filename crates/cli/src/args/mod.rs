//! The command line as typed, and the checks that turn it into what the pipeline takes.
//!
//! Options that other GPTQ programs have under another name (`--desc-act`, `--groupsize`,
//! `--nsamples` and so on) are taken by that name, too, so that nobody is led to a wrong one by clap's
//! guess. Help shows one name of each.

mod card;
mod check;
mod device;
mod fetch;
mod push;
mod report;
mod typed;
mod values;
mod verify;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use gptq_checkpoint::Layout;
use gptq_pipeline::sweep::jobs::Share;
use gptq_quant::Recipe;
use gptq_records::source_dtype::SourceDtype;
use gptq_text::calibration::CalibrationOverrides;
use gptq_text::dataset::{DatasetSpec, Join};
use gptq_text::protocol::Protocol;

pub(crate) use card::CardArgs;
pub(crate) use check::CheckArgs;
pub(crate) use device::DeviceArgs;
pub(crate) use fetch::{FetchArgs, RETRIES};
pub(crate) use push::PushArgs;
pub(crate) use report::ReportArgs;
pub(crate) use typed::typed;
pub(crate) use verify::VerifyArgs;

/// Quantise Llama models with GPTQ and prove the result.
#[derive(Debug, Parser)]
#[command(name = "gptq", version, propagate_version = true)]
pub(crate) struct Cli {
    /// Print warnings, errors and results only
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Print lines instead of progress bars, on a terminal too
    #[arg(long, global = true)]
    pub(crate) no_progress: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Quantize(Box<QuantizeArgs>),
    Ppl(PplArgs),
    Plan(PlanArgs),
    Inspect(InspectArgs),
    Verify(Box<VerifyArgs>),
    Sweep(SweepArgs),
    Report(ReportArgs),
    Check(CheckArgs),
    Card(CardArgs),
    Bench(BenchArgs),
    Doctor(DoctorArgs),
    Fetch(FetchArgs),
    Push(PushArgs),
}

/// Help of `--set`.
fn set_help() -> String {
    format!("Change one choice of the recipe: {}; may be repeated", gptq_quant::Choices::help())
}

/// Make one quantised checkpoint
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq quantize ./SmolLM2-135M --out ./SmolLM2-135M-4bit-128g --bits 4 --group-size 128
  gptq quantize stabilityai/StableBeluga2 --branch gptq-4bit-32g-actorder_True --out ./4bit-32g")]
pub(crate) struct QuantizeArgs {
    /// Folder of the dense model, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    pub(crate) model: String,
    /// Folder to make; it must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Bits of a weight: 2, 3, 4 or 8 [default: 4]
    #[arg(long, alias = "wbits")]
    pub(crate) bits: Option<u8>,
    /// Input features that share a scale: a number, or none (or -1) for all [default: 128]
    #[arg(long, value_name = "N|none", alias = "groupsize", allow_hyphen_values = true)]
    pub(crate) group_size: Option<gptq_checkpoint::GroupSize>,
    /// Solve columns in order of importance [default: true]
    #[arg(long, alias = "desc-act", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) act_order: Option<bool>,
    /// Fraction of the Hessian's mean diagonal added to it [default: 0.03 (best), 0.01]
    #[arg(long, alias = "percdamp", alias = "damp-percent")]
    pub(crate) damp: Option<f64>,
    /// Solver choices: best, autogptq, or rtn (round to nearest, no calibration) [default: best]
    #[arg(long)]
    pub(crate) recipe: Option<Recipe>,
    #[arg(long, value_name = "KEY=VALUE", help = set_help())]
    pub(crate) set: Vec<String>,
    /// Type in which the source's weights are quantised: fp16 (rounded first, as the published
    /// branches were) or fp32 (as stored) [default: fp16]
    #[arg(long, value_name = "TYPE")]
    pub(crate) source_dtype: Option<SourceDtype>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Tensors beside the quantised ones: modern, or card as published in 2023 [default: modern]
    #[arg(long)]
    pub(crate) layout: Option<Layout>,
    /// Take the settings of this branch of --config; options given here win
    #[arg(long, value_name = "NAME")]
    pub(crate) branch: Option<String>,
    /// Sweep configuration that holds --branch [default: the built-in stablebeluga2]
    #[arg(long, value_name = "FILE", requires = "branch")]
    pub(crate) config: Option<String>,
    /// Split the weights into files of at most this size, such as 5GB
    #[arg(long, value_name = "SIZE", value_parser = values::parse_bytes)]
    pub(crate) max_shard_size: Option<u64>,
    /// Download the model's shards as they are needed and delete them when they are read, for a
    /// disk smaller than the model; shards that the Hub's cache holds already stay
    #[arg(long)]
    pub(crate) discard_shards: bool,
    /// Treat as errors: warnings about the source, and a Hessian that needs more damping, or f64 on
    /// a GPU
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to calibrate on.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// Calibration recipe: wikitext2, card, or a TOML file [default: the configuration's, or
    /// wikitext2 without one]
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) calib: Option<String>,
    /// Text instead of the recipe's: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl or .parquet
    #[arg(long, value_name = "DATASET")]
    pub(crate) calib_dataset: Option<DatasetSpec>,
    /// How the text's rows are joined, instead of the recipe's way: card (nothing between rows;
    /// wikitext2 and card do so) or paragraphs (a blank line between)
    #[arg(long, value_name = "JOIN")]
    pub(crate) calib_join: Option<Join>,
    /// Number of calibration windows instead of the recipe's
    #[arg(long, value_name = "N", alias = "nsamples", alias = "num-samples")]
    pub(crate) windows: Option<usize>,
    /// Tokens of a calibration window instead of the recipe's
    #[arg(long, value_name = "N", alias = "seqlen")]
    pub(crate) seq_len: Option<usize>,
    /// Seed of the windows' positions instead of the recipe's
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

impl CalibrationArgs {
    /// Whether any of them was given.
    pub(crate) fn is_given(&self) -> bool {
        self.calib.is_some() || self.overrides() != CalibrationOverrides::default()
    }

    /// The values that replace a recipe's.
    pub(crate) fn overrides(&self) -> CalibrationOverrides {
        CalibrationOverrides {
            dataset: self.calib_dataset.clone(),
            join: self.calib_join,
            windows: self.windows,
            seq_len: self.seq_len,
            seed: self.seed,
        }
    }
}

/// Measure the perplexity of a dense model or a GPTQ checkpoint
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq ppl ./SmolLM2-135M-4bit-128g
  gptq ppl ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --max-windows 8 --json
  gptq ppl ./model --protocol llama-cpp --dataset ./book.txt
  gptq ppl ./SmolLM2-135M-4bit-128g --base ./SmolLM2-135M --per-token losses.csv")]
pub(crate) struct PplArgs {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    pub(crate) model: String,
    /// How the text is cut and scored: paper, llama-cpp or strided
    #[arg(long, default_value = "paper")]
    pub(crate) protocol: Protocol,
    /// Text to score: ORG/NAME:CONFIG:SPLIT, .txt, .jsonl or .parquet
    #[arg(long, default_value = "Salesforce/wikitext:wikitext-2-raw-v1:test")]
    pub(crate) dataset: DatasetSpec,
    /// Tokens of a window [default: 2048 (paper), 512 (llama-cpp), the context (strided)]
    #[arg(long, value_name = "N")]
    pub(crate) seq_len: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N")]
    pub(crate) max_windows: Option<usize>,
    /// Dense model to compare with: adds its perplexity and the KL divergence from it
    #[arg(long, value_name = "MODEL")]
    pub(crate) base: Option<String>,
    /// Also write the loss of every scored token, in nats, to this CSV file (with --base: of both)
    #[arg(long, value_name = "FILE")]
    pub(crate) per_token: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Predict sizes, memory and work of every branch from config.json alone
#[derive(Debug, Args)]
#[command(after_help = "Example:
  gptq plan stabilityai/StableBeluga2 --config configs/stablebeluga2.toml")]
pub(crate) struct PlanArgs {
    /// Folder that holds config.json, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    pub(crate) model: String,
    /// Sweep configuration
    #[arg(long, value_name = "FILE", default_value = gptq_pipeline::sweep::config::BUILT_IN)]
    pub(crate) config: String,
    /// GPU memory to plan for
    #[arg(long, value_name = "SIZE", default_value = "80GB", value_parser = values::parse_bytes)]
    pub(crate) gpu_memory: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what a checkpoint holds
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq inspect ./SmolLM2-135M-4bit-128g
  gptq inspect ./SmolLM2-135M --checksum")]
pub(crate) struct InspectArgs {
    /// Folder of the model or checkpoint, or a Hub id, ORG/NAME or ORG/NAME@REVISION
    pub(crate) checkpoint: String,
    /// Read every value, and print how fast and their SHA-256: equal for equal tensors, whatever
    /// files hold them
    #[arg(long)]
    pub(crate) checksum: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Make and measure every branch of a configuration
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq sweep configs/demo.toml
  gptq sweep configs/stablebeluga2.toml --out ./branches --dry-run
  gptq sweep configs/stablebeluga2.toml --out ./branches --jobs 2/4

An interrupted sweep goes on where it was when the same command is run again: branches whose files
and inputs are unchanged are reused.")]
pub(crate) struct SweepArgs {
    /// Sweep configuration
    pub(crate) config: String,
    /// Folder for the branches, one folder each
    #[arg(long, value_name = "DIR", default_value = "branches")]
    pub(crate) out: PathBuf,
    /// Only this branch; may be repeated
    #[arg(long, value_name = "BRANCH")]
    pub(crate) only: Vec<String>,
    /// Only the branches of job I of N; the jobs together make all, each once
    #[arg(long, value_name = "I/N")]
    pub(crate) jobs: Option<Share>,
    /// Branches that each device makes at the same time, from one reading of the model
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = values::parse_count)]
    pub(crate) together: usize,
    /// Print what would be made and what is reused, with sizes and work; change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Dense model instead of the configuration's
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Type in which its weights are quantised, fp16 or fp32, instead of the configuration's
    #[arg(long, value_name = "TYPE")]
    pub(crate) source_dtype: Option<SourceDtype>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    /// Treat as errors: warnings about the source, and a Hessian that needs more damping, or f64 on
    /// a GPU
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the table as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Measure this machine on a synthetic block
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq bench
  gptq bench --width 70b --windows 128 --seq-len 4096 --device cuda --recipe autogptq")]
pub(crate) struct BenchArgs {
    /// Shapes of the block: tiny, smollm2, 7b, 13b or 70b
    #[arg(long, default_value = "smollm2")]
    pub(crate) width: gptq_pipeline::bench::Width,
    /// Calibration windows
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = values::parse_count)]
    pub(crate) windows: usize,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = values::parse_count)]
    pub(crate) seq_len: usize,
    /// Solver choices: best or autogptq; 4 bits, group size 128, act-order
    #[arg(long, value_name = "RECIPE", default_value = "best", value_parser = values::parse_calibrated)]
    pub(crate) recipe: Recipe,
    /// Change one choice of the recipe, as for gptq quantize; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what this machine has for GPU runs, and what it lacks
#[derive(Debug, Args)]
#[command(after_help = "Example:
  gptq doctor")]
pub(crate) struct DoctorArgs {
    /// Print the facts as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
