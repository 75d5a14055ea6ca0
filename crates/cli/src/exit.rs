//! How errors are shown and which exit code they get.

use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::commands;
use crate::hint;
use crate::hub;
use crate::launch;
use crate::printer::write_stderr;

const USER: u8 = 1;
const INTERNAL: u8 = 2;

/// What `gptq` says without a command: no line is longer than 40 letters.
const START: &str = "\
gptq quantizes Llama-family models
with GPTQ and proves the result.

Where to start:

  gptq doctor
    what this machine can do
  gptq plan MODEL
    size, memory, time of nine branches
  gptq quantize MODEL --out DIR
    4 bits, group size 128, act-order

MODEL is a folder or a Hub id, such as
HuggingFaceTB/SmolLM2-135M.

All commands: gptq --help
";

/// clap's own messages: help and version are no errors; a wrong command line is the user's.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // Nobody asked for anything; all of clap's help would not say where to begin.
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        write_stderr(START.trim_end());
        return ExitCode::from(USER);
    }
    match commands::written(error.print()) {
        // Where its message cannot be shown, neither can another.
        _ if error.use_stderr() => ExitCode::from(USER),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

/// The program's own fault, which the panic's message has described.
pub(crate) fn panicked() -> ExitCode {
    ExitCode::from(INTERNAL)
}

/// Prints `error: …` with its causes and with what to do about it, each on a line of its own.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let rank = launch::follower().map_or_else(String::new, |rank| format!("rank {rank}: "));
    write_stderr(&format!("{rank}{}", shown(error)));
    ExitCode::from(code(error))
}

fn shown(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        text.push_str(&format!("\nCaused by: {cause}"));
    }
    for hint in hint::hints(error) {
        text.push_str(&format!("\nhint: {hint}"));
    }
    text
}

fn code(error: &anyhow::Error) -> u8 {
    if is_internal(error) { INTERNAL } else { USER }
}

fn is_internal(error: &anyhow::Error) -> bool {
    hub::is_internal(error) || error.chain().any(is_internal_link)
}

/// One link of a chain. An error that only hands on another is one link with it, which is asked for
/// both.
fn is_internal_link(link: &(dyn std::error::Error + 'static)) -> bool {
    macro_rules! any_of {
        ($($library:ident),*) => {
            $(link.downcast_ref::<$library::Error>().is_some_and($library::Error::is_internal))||*
        };
    }
    any_of!(gptq_compute, gptq_generate, gptq_model, gptq_quant, gptq_pipeline)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use gptq_compute::Error;

    use super::*;

    #[test]
    fn causes_and_hints_have_lines_of_their_own() {
        let lost = || Error::RankLost { rank: Some(1) };
        let error = Err::<(), _>(lost()).context("Cannot go on").unwrap_err();
        assert_eq!(
            shown(&error),
            "error: Cannot go on\nCaused by: Rank 1 was lost before the run was over\n\
             hint: see its own message, and start the run again"
        );
        // Through an error that only hands on another, and from the command itself.
        let error = gptq_pipeline::Error::Compute(lost()).into();
        assert!(shown(&error).ends_with("\nhint: see its own message, and start the run again"));
        let error = hint::advised("no GPU was found", "see gptq doctor").context("Cannot open it");
        let text = "error: Cannot open it\nCaused by: no GPU was found\nhint: see gptq doctor";
        assert_eq!(shown(&error), text);
        assert_eq!(shown(&anyhow::anyhow!("no such file")), "error: no such file");
    }

    #[test]
    fn a_fault_of_ours_has_a_code_of_its_own() {
        let ours = || Error::RowOutOfRange { row: 3, rows: 2 };
        for error in [ours().into(), Err::<(), _>(ours()).context("Cannot go on").unwrap_err()] {
            assert_eq!(code(&error), INTERNAL, "{error:#}");
        }
        // Through errors that only hand on another, and as one of a sweep's branches.
        let model = || gptq_model::Error::from(ours());
        let names = String::new();
        for error in [
            gptq_pipeline::Error::from(ours()),
            model().into(),
            gptq_pipeline::Error::Spec(ours().into()),
            gptq_pipeline::Error::Branches { failed: 1, of: 2, names, internal: true },
        ] {
            assert_eq!(code(&error.into()), INTERNAL);
        }
        assert_eq!(code(&model().into()), INTERNAL);
        let theirs = Error::NoSuchDevice { ordinal: 9, count: 0 };
        for error in [theirs.into(), anyhow::anyhow!("no such file")] {
            assert_eq!(code(&error), USER, "{error:#}");
        }
    }
}
