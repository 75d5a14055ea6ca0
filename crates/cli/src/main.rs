//! The `gptq` command: arguments in, one command run, an exit code out.
//!
//! Results go to stdout; progress, warnings and errors to stderr. Exit codes: 0 success, 1 the
//! user's input (or their disk), 2 a fault of the program itself.
//!
//! How to use it is told by [the book](book).

mod args;
#[cfg(any(doc, test))]
mod book;
mod child;
mod commands;
mod exit;
mod hint;
#[cfg(not(feature = "hub"))]
#[path = "hub_off.rs"]
mod hub;
#[cfg(feature = "hub")]
#[path = "hub_on/mod.rs"]
mod hub;
mod interrupt;
mod launch;
mod local_ranks;
mod plain;
mod printer;
mod terminal;

use std::process::ExitCode;

use printer::Printer;

fn main() -> ExitCode {
    // While there is one thread.
    gptq_compute::cuda::prepare_environment();
    interrupt::outlive_limits();
    let words = match args::typed(std::env::args_os()) {
        Ok(words) => words,
        Err(error) => return exit::report(&error),
    };
    let cli = match args::parse(words) {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    // Of several processes the first speaks for all.
    let quiet = cli.quiet || launch::follower().is_some();
    let printer = Printer::new(quiet, cli.no_progress);
    // Nothing is used after a panic but the exit code.
    let run = std::panic::AssertUnwindSafe(|| commands::run(cli.command, &printer));
    match std::panic::catch_unwind(run) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => exit::report(&error),
        Err(_) => exit::panicked(),
    }
}
