//! How errors are shown and which exit code they get.

use std::process::ExitCode;

use crate::launch;
use crate::printer::write_stderr;

const USER: u8 = 1;
const INTERNAL: u8 = 2;

/// clap's own messages: help and version are no errors; a wrong command line is the user's.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // A closed pipe is the reader's choice, not a failure of ours.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(USER) } else { ExitCode::SUCCESS }
}

/// The program's own fault, which the panic's message has told.
pub(crate) fn panicked() -> ExitCode {
    ExitCode::from(INTERNAL)
}

/// Prints `error: …` with its causes, and a hint where one is known.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let rank = launch::follower().map_or_else(String::new, |rank| format!("rank {rank}: "));
    let mut message = format!("{rank}error: {error}");
    for cause in error.chain().skip(1) {
        message.push_str(&format!("\nCaused by: {cause}"));
    }
    write_stderr(&message);
    ExitCode::from(if is_internal(error) { INTERNAL } else { USER })
}

/// Shapes are checked where files are read, so a mismatch inside a device operation is our fault.
fn is_internal(error: &anyhow::Error) -> bool {
    #[cfg(feature = "hub")]
    if matches!(error.downcast_ref(), Some(gptq_hub::Error::Panicked { .. })) {
        return true;
    }
    error.chain().any(|cause| {
        matches!(
            cause.downcast_ref::<gptq_compute::Error>(),
            Some(
                gptq_compute::Error::ShapeMismatch { .. }
                    | gptq_compute::Error::RowOutOfRange { .. }
            )
        )
    })
}
