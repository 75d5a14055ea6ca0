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

use std::ffi::OsString;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::commands::Command;

pub(crate) use calibration::{CalibrationArgs, RecipeChanges};
pub(crate) use device::{DeviceArgs, names as device_names};
pub(crate) use sampling::SamplingArgs;
pub(crate) use typed::typed;

/// Where help shows options that every command has: behind its own, before `--help`.
const LAST: usize = 900;

/// Quantize Llama models with GPTQ and prove the result.
#[derive(Debug, Parser)]
#[command(name = "gptq", version, propagate_version = true)]
pub(crate) struct Cli {
    /// Print warnings, errors and results only
    #[arg(short, long, global = true, display_order = LAST)]
    pub(crate) quiet: bool,
    /// Print lines instead of progress bars, on a terminal too
    #[arg(long, global = true, display_order = LAST + 1)]
    pub(crate) no_progress: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Reads the words of the command line.
///
/// # Errors
/// clap's, and its answers to `--help` and `--version`.
pub(crate) fn parse(words: Vec<OsString>) -> Result<Cli, clap::Error> {
    let mut definition = definition();
    let matches = definition.try_get_matches_from_mut(words).map_err(without_wrong_tips)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut definition))
}

/// What the command line may hold. A negative number is taken as the value of the option before it,
/// whose own message then says what the option takes.
pub(crate) fn definition() -> clap::Command {
    let numbers = |arg: clap::Arg| match !arg.is_positional() && arg.get_action().takes_values() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    Cli::command().mut_subcommands(|command| command.mut_args(numbers))
}

/// clap advises to put an option that it does not know behind `--`, where no argument of ours begins
/// with a dash.
fn without_wrong_tips(mut error: clap::Error) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument {
        return error;
    }
    let given = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let unknown = given(ContextKind::InvalidArg);
    let mut tips = match error.remove(ContextKind::Suggested) {
        Some(ContextValue::StyledStrs(tips)) => tips,
        _ => Vec::new(),
    };
    tips.retain(|tip| !tip.to_string().contains("as a value"));
    if unknown.starts_with('-') && !unknown.starts_with("--") {
        tips.push(StyledStr::from("options are written out, as `--help` lists them"));
    }
    if !tips.is_empty() {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        definition().debug_assert();
    }

    /// What clap and the standard library say of a value that is none, without what would be one.
    const UNCLEAR: [&str; 5] =
        ["invalid digit", "invalid float", "is not in", "number too", "cannot parse"];

    #[test]
    fn wrong_values_are_told_what_would_be_right() {
        let mut refused = 0;
        for command in definition().get_subcommands() {
            let options = command.get_arguments().filter(|arg| {
                arg.get_action().takes_values()
                    && !arg.is_positional()
                    && !arg.is_require_equals_set()
            });
            for option in options.filter_map(clap::Arg::get_long) {
                for value in ["?", "-1", "-1.5", "1.5", "99999999999999999999999"] {
                    let words = ["gptq", command.get_name(), &format!("--{option}"), value];
                    let Err(error) = parse(words.map(OsString::from).to_vec()) else { continue };
                    let text = error.to_string();
                    assert_ne!(error.kind(), ErrorKind::UnknownArgument, "{words:?}: {text}");
                    assert!(UNCLEAR.iter().all(|words| !text.contains(words)), "{words:?}: {text}");
                    refused += usize::from(error.kind() == ErrorKind::ValueValidation);
                }
            }
        }
        assert!(refused > 150, "{refused}");
    }

    #[test]
    fn an_unknown_option_is_no_value() {
        for (words, tip) in [
            (&["quantize", "m", "-o", "q"][..], Some("options are written out")),
            (&["quantize", "m", "--zzz", "1"], None),
            (&["quantize", "m", "--output", "q"], Some("'--out'")),
            (&["--out", "q", "quantize"], Some("'quantize --out' exists")),
        ] {
            let words = std::iter::once("gptq").chain(words.iter().copied());
            let text = parse(words.map(OsString::from).collect()).unwrap_err().to_string();
            assert!(text.contains("unexpected argument") && !text.contains("as a value"), "{text}");
            assert!(tip.map_or(!text.contains("tip:"), |tip| text.contains(tip)), "{text}");
        }
    }
}
