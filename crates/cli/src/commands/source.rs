//! Models and texts by name: a local path, what the Hub's cache holds, or else a download into it.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use gptq_checkpoint::{Checkpoint, Error, ModelConfig, TOKENIZER_FILE, TensorSpec, resolve_model};
use gptq_pipeline::progress::Progress;
use gptq_pipeline::sweep::config::{ANY_MODEL, BUILT_IN, SweepConfig};
use gptq_text::dataset::DatasetSpec;

use super::table::{plural, size};
use crate::hint::advised;
use crate::hub;
use crate::printer::Printer;

/// Opens a model or checkpoint by folder or Hub id.
pub(super) fn open_checkpoint(model: &str, printer: &Printer) -> Result<Checkpoint> {
    let opened = find(model).and_then(|dir| Checkpoint::open(&dir));
    let checkpoint = or_download(model, opened, Part::All, printer, Checkpoint::open)?;
    if let Some(quantize) = checkpoint.quantize_config() {
        let warnings = checkpoint.packed_notes().warnings(quantize);
        warnings.iter().for_each(|warning| printer.warn(&format!("`{model}`: {warning}")));
    }
    Ok(checkpoint)
}

/// Says what a checkpoint's reader should know of it; with `strict` that is an error.
pub(super) fn warn_of(checkpoint: &Checkpoint, strict: bool, printer: &Printer) -> Result<()> {
    for warning in checkpoint.warnings()? {
        ensure!(!strict, "{warning} (--strict)");
        printer.warn(&warning);
    }
    Ok(())
}

/// Opens a model on the Hub whose shards are downloaded as they are needed and deleted when they are
/// read; says, too, of which commit it is.
pub(super) fn open_arriving(model: &str, printer: &Printer) -> Result<(Checkpoint, String)> {
    if Path::new(model).exists() {
        return Err(advised(
            format!("`{model}` is a local path"),
            "give a Hub id: --discard-shards deletes what can be downloaded again",
        ));
    }
    hub::arriving(model, printer)
}

/// Reads a model's configuration by folder or Hub id, of which nothing else is downloaded; where it has
/// parts beside a language model, what its weights say of them if they are there.
pub(super) fn open_config(model: &str, printer: &Printer) -> Result<ModelConfig> {
    let opened = find(model).and_then(|dir| load_config(&dir));
    or_download(model, opened, Part::Config, printer, load_config)
}

fn load_config(dir: &Path) -> Result<ModelConfig, Error> {
    let config = ModelConfig::load(dir)?;
    if config.wrapper().is_none() {
        return Ok(config);
    }
    match Checkpoint::open(dir) {
        Ok(checkpoint) => Ok(checkpoint.config().clone()),
        Err(Error::NoWeights { .. } | Error::MissingShard { .. }) => Ok(config),
        Err(error) => Err(error),
    }
}

/// Says which part of a model is quantized, where that is not all of it.
pub(super) fn note_parts(checkpoint: &Checkpoint, printer: &Printer) {
    let config = checkpoint.config();
    if let Some(whole) = config.wrapper() {
        let carried = config.carried().unwrap_or_default();
        printer.note(&format!(
            "of this {whole} model the language model, {}, is quantized; {} of other parts ({}) are carried \
             unchanged",
            config.family,
            plural(carried.len(), "tensor"),
            size(carried.iter().map(TensorSpec::bytes).sum())
        ));
    }
}

/// The folder of a model's configuration and tokenizer, by folder or Hub id, of which no weights are
/// downloaded; and the configuration.
pub(super) fn open_settings(model: &str, printer: &Printer) -> Result<(PathBuf, ModelConfig)> {
    let read = |dir: &Path| Ok((dir.to_owned(), ModelConfig::load(dir)?));
    let whole = |dir: PathBuf| {
        // The cache may hold a configuration alone, which is what `gptq plan` brings.
        let tokenizer = dir.join(TOKENIZER_FILE);
        match std::fs::metadata(&tokenizer) {
            Err(source) if !Path::new(model).exists() => {
                Err(Error::Io { action: "read", path: tokenizer, source })
            }
            _ => read(&dir),
        }
    };
    or_download(model, find(model).and_then(whole), Part::Settings, printer, read)
}

/// Reads a sweep's configuration by file, or by name where it is built in.
pub(super) fn open_sweep(name_or_path: &str) -> Result<SweepConfig> {
    let built_in = [ANY_MODEL, BUILT_IN];
    if !built_in.contains(&name_or_path) && !Path::new(name_or_path).exists() {
        return Err(advised(
            format!("There is no configuration `{name_or_path}`"),
            format!("name a file, or one that is built in: {}", built_in.join(" or ")),
        ));
    }
    Ok(SweepConfig::open(name_or_path)?)
}

/// The folder of a checkpoint that may have faults, by folder or Hub id.
pub(super) fn locate(checkpoint: &str, printer: &Printer) -> Result<PathBuf> {
    let found = find(checkpoint);
    or_download(checkpoint, found, Part::All, printer, |dir| Ok(dir.to_owned()))
}

/// Sees to it that a split of the Hub is in the cache; whether it can be read shows later.
pub(super) fn provide_text(dataset: &DatasetSpec, printer: &Printer) -> Result<()> {
    if dataset.is_missing() { hub::text(dataset, printer) } else { Ok(()) }
}

/// What is wanted of a model.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    /// Everything.
    All,
    /// Its configuration.
    Config,
    /// All but its weights.
    Settings,
}

fn find(model: &str) -> Result<PathBuf, Error> {
    let (id, revision) = split_revision(model);
    resolve_model(id, revision)
}

/// `ORG/NAME@REVISION`; a path that exists has no revision, whatever is in its name.
pub(crate) fn split_revision(model: &str) -> (&str, Option<&str>) {
    match model.split_once('@') {
        Some((id, revision)) if !Path::new(model).exists() => (id, Some(revision)),
        _ => (model, None),
    }
}

/// What was opened, or opened again after a download of what the cache lacked.
fn or_download<T>(
    model: &str,
    opened: Result<T, Error>,
    part: Part,
    printer: &Printer,
    open: impl FnOnce(&Path) -> Result<T, Error>,
) -> Result<T> {
    match opened {
        Err(error) if is_incomplete(model, &error) => {
            Ok(open(&hub::model(model, part, error, printer)?)?)
        }
        other => Ok(other?),
    }
}

/// Whether the cache lacks what was opened. It may hold a part of a model: a configuration, or what
/// another program wanted of it.
fn is_incomplete(model: &str, error: &Error) -> bool {
    let lacking = match error {
        Error::NotInHubCache { .. }
        | Error::NoConfig { .. }
        | Error::NoWeights { .. }
        | Error::MissingShard { .. } => true,
        Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    };
    lacking && !Path::new(model).exists()
}
