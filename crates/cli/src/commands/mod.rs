//! One file a command: its arguments, and from them to printed results.
//!
//! A command is its file, `mod` and a row of `commands!`, which names the schema of what it prints
//! with `--json`.

mod bench;
mod calib;
mod card;
mod chat;
mod check;
mod completions;
mod doctor;
mod eval;
mod fetch;
mod generate;
mod inspect;
mod lm_eval;
mod man;
mod plan;
mod ppl;
mod push;
mod quantize;
mod report;
mod schema;
mod serve;
pub(crate) mod source;
mod sweep;
pub(crate) mod table;
mod text_model;
mod verify;

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Subcommand;
use serde::Serialize;

use crate::plain::plain;
use crate::printer::Printer;
pub(crate) use table::gigabytes;

/// Makes the commands' enum, what runs them and their schemas, from a list of names, modules and files.
macro_rules! commands {
    ($($name:ident: $module:ident $(=> $schema:literal)?,)*) => {
        // Undocumented: clap would show the text as help.
        #[derive(Debug, Subcommand)]
        pub(crate) enum Command {
            $($name(Box<$module::Args>),)*
        }

        /// Runs a command.
        pub(crate) fn run(command: Command, printer: &Printer) -> Result<()> {
            match command {
                $(Command::$name(args) => $module::run(&args, printer),)*
            }
        }

        /// Commands that print JSON, and its schema.
        const SCHEMAS: &[(&str, &str)] = &[
            $($((stringify!($module), include_str!(concat!("../../schemas/", $schema))),)?)*
        ];
    };
}

// In the order in which help shows them.
commands! {
    Quantize: quantize => "quantize.json",
    Ppl: ppl => "ppl.json",
    Generate: generate => "generate.json",
    Chat: chat => "chat.json",
    Serve: serve,
    Eval: eval => "eval.json",
    Calib: calib => "calib.json",
    Plan: plan => "plan.json",
    Inspect: inspect => "inspect.json",
    Verify: verify => "verify.json",
    Sweep: sweep => "sweep.json",
    Report: report => "report.json",
    Check: check => "check.json",
    Card: card => "card.json",
    Bench: bench => "bench.json",
    Doctor: doctor => "doctor.json",
    Fetch: fetch => "fetch.json",
    Push: push => "push.json",
    Schema: schema,
    Completions: completions,
    Man: man,
}

/// Writes a result for people to stdout.
pub(crate) fn print_result(text: &str) -> Result<()> {
    print_as_it_is(&plain(text))
}

/// Writes a part of a text to stdout, at once and without a line's end: made plain for a terminal, as
/// it is for all else. False when nobody reads on.
pub(crate) fn print_part(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    let shown = if out.is_terminal() { plain(text) } else { text.into() };
    match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        other => written(other).map(|()| true),
    }
}

fn print_as_it_is(text: &str) -> Result<()> {
    written(write_stdout(text))
}

/// What became of a text for stdout. That nobody reads on is the reader's choice and changes nothing
/// else: not what is written after it, nor the exit code.
pub(crate) fn written(result: std::io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("Cannot write to stdout"),
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
