//! What a build with the Hub can do for other commands: bring what they lack.
//!
//! `hub_off.rs` has the same functions for a build without.

mod transfer;

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use gptq_checkpoint::{Checkpoint, Error};
use gptq_hub::{Hub, Source, Stream};
use gptq_text::dataset::DatasetSpec;

use crate::args::values::RETRIES;
use crate::commands::source::{Part, split_revision};
use crate::hint::{advised, caused};
use crate::printer::Printer;

pub(crate) use transfer::Transfer;

/// What an error of the Hub says to do.
pub(crate) fn hint<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<Cow<'a, str>> {
    // One step of an upload is the cause of another, and comes in its box.
    let error = cause.downcast_ref::<gptq_hub::Error>();
    error.or_else(|| cause.downcast_ref::<Box<gptq_hub::Error>>().map(AsRef::as_ref))?.hint()
}

/// Whether an error is this program's fault.
pub(crate) fn is_internal(error: &anyhow::Error) -> bool {
    let panicked = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(gptq_hub::Error::Panicked { .. }))
    };
    error.chain().any(panicked)
}

/// Downloads a model that opening failed for; that is what is wrong where this fails, too.
pub(crate) fn model(model: &str, part: Part, error: Error, printer: &Printer) -> Result<PathBuf> {
    let (id, revision) = split_revision(model);
    let source = match part {
        Part::All => Source::Model(id.to_owned()),
        Part::Config => Source::Config(id.to_owned()),
        Part::Settings => Source::Settings(id.to_owned()),
    };
    match fetch(&source, revision.unwrap_or("main"), model, printer)? {
        Some(Ok(folder)) => Ok(folder),
        Some(Err(failure)) => Err(caused(&error, failure)),
        None => Err(error.into()),
    }
}

/// Downloads a split. Where the network is forbidden, reading it says what to do.
pub(crate) fn text(dataset: &DatasetSpec, printer: &Printer) -> Result<()> {
    let source = split_source(dataset)?;
    let name = dataset.to_string();
    match fetch(&source, "main", &name, printer)? {
        Some(Err(failure)) => {
            Err(failure).context(format!("Dataset `{dataset}` is not in the Hub cache"))
        }
        Some(Ok(_)) | None => Ok(()),
    }
}

/// Opens a model that arrives while it is read; says, too, of which commit it is.
pub(crate) fn arriving(model: &str, printer: &Printer) -> Result<(Checkpoint, String)> {
    let (id, revision) = split_revision(model);
    let hub = Hub::from_env(RETRIES, gptq_checkpoint::hub_token_file())?;
    let cache = cache_root()?;
    let progress = Arc::new(Transfer::new(printer.clone()));
    let stream = Stream::start(hub, id, revision.unwrap_or("main"), &cache, progress)?;
    let (folder, origin) = (stream.folder().to_owned(), stream.origin());
    let bring = Box::new(move |shard: &str| Ok(stream.wait(shard)?));
    Ok((Checkpoint::open_arriving(&folder, bring)?, origin))
}

/// `None` where there is no network or no cache to use.
fn fetch(
    source: &Source,
    revision: &str,
    name: &str,
    printer: &Printer,
) -> Result<Option<Result<PathBuf, gptq_hub::Error>>> {
    let hub = Hub::from_env(RETRIES, gptq_checkpoint::hub_token_file())?;
    let Some(cache) = gptq_checkpoint::hub_cache_root().filter(|_| !hub.is_offline()) else {
        return Ok(None);
    };
    printer.note(&format!("{name} is not in the Hub cache: downloading it"));
    let progress = Transfer::new(printer.clone());
    let fetched = gptq_hub::fetch(&hub, source, revision, &cache, false, &progress);
    Ok(Some(fetched.map(|fetched| fetched.folder)))
}

/// The folder of all repositories.
pub(crate) fn cache_root() -> Result<PathBuf> {
    gptq_checkpoint::hub_cache_root()
        .ok_or_else(|| advised("No place for the cache is known", "set HF_HOME to a folder"))
}

/// A dataset's split as what the Hub has.
pub(crate) fn split_source(dataset: &DatasetSpec) -> Result<Source> {
    let Some(hub) = dataset.hub() else {
        return Err(advised(
            format!("`{dataset}` is no dataset on the Hub"),
            "name a dataset on the Hub as ORG/NAME:CONFIG:SPLIT",
        ));
    };
    Ok(Source::Dataset {
        id: hub.repo.clone(),
        config: hub.config.clone(),
        split: hub.split.clone(),
    })
}
