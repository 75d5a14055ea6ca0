//! Arguments of `gptq report`.

use std::path::PathBuf;

use clap::Args;

/// Show what a sweep gave, as Markdown, JSON or a page with charts
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gptq report branches
  gptq report branches --html report.html --previous last-release.json
  gptq report branches --json > this-release.json")]
pub(crate) struct ReportArgs {
    /// Sweep folders, checkpoint folders, or files that gptq report --json printed
    #[arg(required = true, value_name = "DIR|FILE")]
    pub(crate) paths: Vec<PathBuf>,
    /// Compare with an earlier report: a folder or file as above
    #[arg(long, value_name = "DIR|FILE")]
    pub(crate) previous: Option<PathBuf>,
    /// Write a page with charts, too: one file that needs nothing else
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Print JSON instead of Markdown
    #[arg(long)]
    pub(crate) json: bool,
}
