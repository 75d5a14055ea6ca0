//! What to do about an error, which every library says apart from the error's message.

use std::borrow::Cow;
use std::error::Error;
use std::io;

use crate::hub;

/// An error of the command itself, with what to do about it.
#[derive(Debug)]
struct Advised {
    message: String,
    hint: Option<String>,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl std::fmt::Display for Advised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Advised {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as _)
    }
}

/// An error with what to do about it.
pub(crate) fn advised(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    let hint = Some(hint.into());
    anyhow::Error::new(Advised { message: message.into(), hint, cause: None })
}

/// A checkpoint's error whose own cause is the attempt to mend it by a download, which it can no longer
/// advise.
#[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "downloads alone mend"))]
pub(crate) fn caused(
    error: &gptq_checkpoint::Error,
    cause: impl Error + Send + Sync + 'static,
) -> anyhow::Error {
    let advised = hub::hint(&cause).is_some();
    let hint = (!advised).then(|| "check the name, or give the folder of a model".to_owned());
    anyhow::Error::new(Advised { message: error.to_string(), hint, cause: Some(Box::new(cause)) })
}

/// What the error and its causes say to do, each once, the outermost first.
pub(crate) fn hints(error: &anyhow::Error) -> Vec<Cow<'_, str>> {
    let mut hints: Vec<Cow<'_, str>> = Vec::new();
    for hint in error.chain().filter_map(of) {
        // What lacks a text says how to fetch it better than what lacks its repository.
        let fetches = |hint: &str| hint.contains("`gptq fetch ");
        let said = |earlier: &Cow<'_, str>| *earlier == hint || fetches(earlier) && fetches(&hint);
        if !hints.iter().any(said) {
            hints.push(hint);
        }
    }
    if hints.is_empty() {
        hints.extend(of_system(error));
    }
    hints
}

/// What to do about what the system refuses, whatever was done with the file.
fn of_system(error: &anyhow::Error) -> Option<Cow<'_, str>> {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>())?;
    Some(match io.kind() {
        // Most often it is one of another folder.
        io::ErrorKind::NotFound => {
            let here = std::env::current_dir().ok()?;
            return Some(format!("check the name; paths count from {}", here.display()).into());
        }
        io::ErrorKind::NotADirectory => "a part of the path is a file: name a folder there".into(),
        io::ErrorKind::IsADirectory => "it is a folder: name a file".into(),
        io::ErrorKind::PermissionDenied => {
            "see with `ls -ld` who may do so, or choose another".into()
        }
        io::ErrorKind::ReadOnlyFilesystem => "choose a folder that can be written".into(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space or choose another disk".into()
        }
        io::ErrorKind::FileTooLarge => "raise the limit that `ulimit -f` shows".into(),
        _ => return None,
    })
}

/// What one link of the chain says to do.
fn of<'a>(cause: &'a (dyn Error + 'static)) -> Option<Cow<'a, str>> {
    if let Some(hint) = gptq_pipeline::hint_of(cause) {
        return Some(hint);
    }
    if let Some(error) = cause.downcast_ref::<gptq_generate::Error>() {
        return error.hint();
    }
    #[cfg(feature = "serve")]
    if let Some(error) = cause.downcast_ref::<gptq_serve::Error>() {
        return error.hint();
    }
    match cause.downcast_ref::<Advised>() {
        Some(error) => error.hint.as_deref().map(Into::into),
        None => hub::hint(cause),
    }
}
