//! The functions of `hub_on` in a build without the Hub: what the cache lacks stays lacking.

use std::path::PathBuf;

use anyhow::{Result, bail};
use gptq_checkpoint::{Checkpoint, Error};
use gptq_text::dataset::DatasetSpec;

use crate::args::{FetchArgs, PushArgs};
use crate::commands::source::Part;
use crate::printer::Printer;

const NO_HUB: &str = "This build has no Hub access; build it without --no-default-features";

pub(crate) fn fetch_command(_: &FetchArgs, _: &Printer) -> Result<()> {
    bail!("{NO_HUB}")
}

pub(crate) fn push_command(_: &PushArgs, _: &Printer) -> Result<()> {
    bail!("{NO_HUB}")
}

pub(crate) fn is_internal(_: &anyhow::Error) -> bool {
    false
}

pub(crate) fn model(_: &str, _: Part, error: Error, _: &Printer) -> Result<PathBuf> {
    Err(error.into())
}

#[expect(clippy::unnecessary_wraps, reason = "with the Hub it may fail")]
pub(crate) fn text(_: &DatasetSpec, _: &Printer) -> Result<()> {
    Ok(())
}

pub(crate) fn arriving(_: &str, _: &Printer) -> Result<Checkpoint> {
    bail!("{NO_HUB}")
}
