//! The functions of `hub_on` in a build without the Hub: what the cache lacks stays lacking.

use std::borrow::Cow;
use std::path::PathBuf;

use anyhow::Result;
use gptq_checkpoint::{Checkpoint, Error};
use gptq_text::dataset::DatasetSpec;

use crate::commands::source::Part;
use crate::hint::advised;
use crate::printer::Printer;

/// Runs what needs the Hub.
pub(crate) fn refuse<A>(_: &A, _: &Printer) -> Result<()> {
    Err(no_hub())
}

fn no_hub() -> anyhow::Error {
    advised("This build has no Hub access", "build it without --no-default-features")
}

pub(crate) fn hint<'a>(_: &'a (dyn std::error::Error + 'static)) -> Option<Cow<'a, str>> {
    None
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

pub(crate) fn arriving(_: &str, _: &Printer) -> Result<(Checkpoint, String)> {
    Err(no_hub())
}
