//! `gptq man`: manual pages, made of the same definitions as help.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::Man;
use gptq_records::atomic_file::replace;

use super::print_as_it_is;
use crate::args::definition;
use crate::hint::advised;
use crate::printer::Printer;

/// Print the manual page of gptq or of a command, for man
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  gptq man quantize | man -l -
  gptq man --out ~/.local/share/man/man1")]
pub(crate) struct Args {
    /// The command; without one, the page of gptq itself
    #[arg(conflicts_with = "out")]
    command: Option<String>,
    /// Write the pages of gptq and of all commands into this folder, which must exist
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, printer: &Printer) -> Result<()> {
    let pages = pages();
    if let Some(out) = &args.out {
        return write(out, &pages, printer);
    }
    let wanted = args.command.as_ref().map_or("gptq".to_owned(), |name| format!("gptq-{name}"));
    let Some(page) = pages.iter().find(|page| name(page) == wanted) else {
        let unknown = wanted.trim_start_matches("gptq-");
        return Err(advised(format!("`{unknown}` is no command"), "gptq --help lists them"));
    };
    print_as_it_is(&text(page)?)
}

/// gptq and its commands, which know by now what they are called together.
fn pages() -> Vec<Command> {
    let mut gptq = definition().disable_help_subcommand(true);
    gptq.build();
    let commands: Vec<Command> = gptq.get_subcommands().cloned().collect();
    std::iter::once(gptq).chain(commands).collect()
}

/// `gptq-quantize`: what man looks for.
fn name(page: &Command) -> &str {
    page.get_display_name().unwrap_or(page.get_name())
}

fn text(page: &Command) -> Result<String> {
    let man = Man::new(page.clone()).source(concat!("gptq ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    let mut render = || -> std::io::Result<()> {
        man.render_title(&mut text)?;
        man.render_name_section(&mut text)?;
        man.render_synopsis_section(&mut text)?;
        man.render_description_section(&mut text)?;
        man.render_options_section(&mut text)?;
        if page.has_subcommands() {
            man.render_subcommands_section(&mut text)?;
        }
        Ok(())
    };
    render().context("Cannot render the page")?;
    if let Some(help) = page.get_after_help() {
        text.extend(examples(&help.to_string()).bytes());
    }
    Ok(String::from_utf8(text)?)
}

/// What help says at its end, line by line: a command that is filled like prose cannot be copied.
fn examples(help: &str) -> String {
    let mut text = ".SH EXAMPLES\n.nf\n".to_owned();
    for line in help.lines().filter(|line| !matches!(*line, "Examples:" | "Example:")) {
        let escaped = line.replace('\\', "\\e").replace('-', "\\-");
        // What begins so is a request to roff.
        let mark = if escaped.starts_with(['.', '\'']) { "\\&" } else { "" };
        text.push_str(&format!("{mark}{escaped}\n"));
    }
    text + ".fi\n"
}

fn write(out: &Path, pages: &[Command], printer: &Printer) -> Result<()> {
    for page in pages {
        replace(&out.join(format!("{}.1", name(page))), text(page)?.as_bytes())?;
    }
    printer.note(&format!("wrote {} pages into {}", pages.len(), out.display()));
    Ok(())
}
