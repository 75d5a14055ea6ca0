//! The command line as typed, and the checks that turn it into what the pipeline takes.
//!
//! Options that other GPTQ programs have under another name (`--desc-act`, `--groupsize`,
//! `--nsamples` and so on) are taken by that name, too, so that nobody is led to a wrong one by clap's
//! guess. Help shows one name of each.

mod calibration;
mod device;
mod sampling;
mod typed;
pub(crate) mod values;

use clap::Parser;

use crate::commands::Command;

pub(crate) use calibration::{CalibrationArgs, RecipeChanges};
pub(crate) use device::DeviceArgs;
pub(crate) use sampling::SamplingArgs;
pub(crate) use typed::typed;

/// Quantize Llama models with GPTQ and prove the result.
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
