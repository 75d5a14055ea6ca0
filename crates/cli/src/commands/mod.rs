//! One file a command: from checked arguments to printed results.

mod bench;
mod card;
mod check;
mod doctor;
mod inspect;
mod plan;
mod ppl;
mod quantize;
mod report;
pub(crate) mod source;
mod sweep;
pub(crate) mod table;
mod verify;

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::args::Command;
use crate::hub;
use crate::plain::plain;
use crate::printer::Printer;
pub(crate) use table::gigabytes;

/// Runs a command.
pub(crate) fn run(command: Command, printer: &Printer) -> Result<()> {
    match command {
        Command::Quantize(args) => quantize::run(&args, printer),
        Command::Ppl(args) => ppl::run(&args, printer),
        Command::Plan(args) => plan::run(&args, printer),
        Command::Inspect(args) => inspect::run(&args, printer),
        Command::Verify(args) => verify::run(&args, printer),
        Command::Sweep(args) => sweep::run(&args, printer),
        Command::Report(args) => report::run(&args, printer),
        Command::Check(args) => check::run(&args, printer),
        Command::Card(args) => card::run(&args),
        Command::Bench(args) => bench::run(&args, printer),
        Command::Doctor(args) => doctor::run(&args),
        Command::Fetch(args) => hub::fetch_command(&args, printer),
        Command::Push(args) => hub::push_command(&args, printer),
    }
}

/// Writes a result for people to stdout.
pub(crate) fn print_result(text: &str) -> Result<()> {
    print_as_it_is(&plain(text))
}

/// Writes to stdout. That nobody reads on is the reader's choice and changes nothing else: not what is
/// written after it, nor the exit code.
fn print_as_it_is(text: &str) -> Result<()> {
    match write_stdout(text) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn write_stdout(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Writes a result to stdout as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print_as_it_is(&serde_json::to_string_pretty(value)?)
}
