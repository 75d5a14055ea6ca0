//! Arguments of `gptq check`.

use std::path::PathBuf;

use clap::Args;

/// Compare a sweep's accuracy with accepted values, and fail where it is worse
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 1 means worse, missing, changed, or not comparable. A folder of one
checkpoint is checked alone; of a sweep, every branch of the baseline must be there.

Examples:
  gptq check branches --baseline tests/baselines/demo.json
  gptq check branches --baseline tests/baselines/demo.json --update"
)]
pub(crate) struct CheckArgs {
    /// Sweep folder, checkpoint folder, or a file that gptq report --json printed
    pub(crate) report: PathBuf,
    /// Accepted values and tolerances, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) baseline: PathBuf,
    /// Write the report's values into the baseline; tolerances in it are kept
    #[arg(long)]
    pub(crate) update: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
