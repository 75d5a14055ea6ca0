//! What an earlier run left of each branch of a sweep, and whose turn a branch is.
//!
//! # What a killed run costs
//!
//! A branch appears under its name when it is made, measured and listed in its [`Manifest`], by one
//! rename. A run that finds it checks every file against the manifest and does nothing. Before that
//! it lies in `NAME.partial`. Once its files are listed there, which happens beside the measurement,
//! a killed measurement is only measured again. Before that the branch starts over, so that a kill
//! costs half a branch on average; the steps of `tuned` come after the last block and count as others do.
//!
//! Going on in the middle of a branch would need the hidden states of all windows on disk, for every
//! block. At 70B with 128 windows × 4096 these are 17 GB, and 34 GB for `best`, which walks two
//! streams: 9 to 17 s at 2 GB/s, beside blocks that take 4 s on an H100. Saving them after every tenth
//! block would make each run a fifth to two fifths longer, for a killed one to lose 20 s on average
//! instead of half of the five minutes or so that a branch takes. (A CPU's blocks are so slow that
//! the states would cost next to nothing beside them. For it this choice is wrong: a killed CPU run
//! of a large model loses hours.)

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use gptq_checkpoint::{PARTIAL_END, REPORT_FILE};
use gptq_records::branch_report::BranchReport;
use gptq_records::manifest::{MadeFrom, Manifest};

use crate::error::{Error, Result};

/// What there is of a branch.
#[derive(Clone, Debug)]
pub enum State {
    /// Nothing, or an unfinished checkpoint.
    New,
    /// All of its files, complete but for the measurement, by a run that ended there.
    Made(Box<Left>),
    /// A finished branch that was measured on something else.
    Remeasure(Box<Left>),
    /// A finished branch that is not what would be made now, and why.
    Stale(String),
    /// The branch.
    Finished(Box<BranchReport>),
}

impl State {
    /// The report of what is reused.
    pub(crate) fn report(&self) -> Option<&BranchReport> {
        match self {
            Self::New | Self::Stale(_) => None,
            Self::Made(left) | Self::Remeasure(left) => Some(&left.report),
            Self::Finished(report) => Some(report),
        }
    }
}

/// A branch that is to be measured.
#[derive(Clone, Debug)]
pub struct Left {
    pub(crate) manifest: Manifest,
    /// Without evaluations.
    pub(crate) report: BranchReport,
}

/// Looks at the folder of a branch that should be made from `made_from` and measured on
/// `measured_on`. Changes nothing.
///
/// # Errors
/// [`Error::ForeignBranch`] and [`Error::StrayFile`] for a folder that this program must not
/// replace.
pub(crate) fn look(dir: &Path, made_from: &MadeFrom, measured_on: Option<&str>) -> Result<State> {
    if is_empty(dir)? {
        return Ok(look_at_partial(&partial_path(dir), made_from));
    }
    let Some(manifest) = Manifest::read(dir)? else {
        return Err(Error::ForeignBranch(dir.to_owned()));
    };
    let damage = |file: &str| format!("`{file}` is not as it was made");
    let stale =
        manifest.changes(made_from).or_else(|| manifest.damaged(dir).map(|file| damage(&file)));
    let why = match (stale, manifest.final_report(dir), manifest.made_report(dir)) {
        (Some(why), ..) => why,
        (None, Some(report), _) if manifest.measured_on.as_deref() == measured_on => {
            return Ok(State::Finished(Box::new(report)));
        }
        (None, _, Some(report)) => {
            return Ok(State::Remeasure(Box::new(Left { manifest, report })));
        }
        (None, _, None) => damage(REPORT_FILE),
    };
    match manifest.stray(dir)? {
        Some(file) => Err(Error::StrayFile { dir: dir.to_owned(), file }),
        None => Ok(State::Stale(why)),
    }
}

/// A working folder is resumed if it was complete; it is replaced otherwise.
fn look_at_partial(dir: &Path, made_from: &MadeFrom) -> State {
    // Whatever cannot be read is refused or replaced by the writer.
    let Ok(Some(manifest)) = Manifest::read(dir) else { return State::New };
    if manifest.changes(made_from).is_some() || manifest.damaged(dir).is_some() {
        return State::New;
    }
    match manifest.made_report(dir) {
        Some(report) => State::Made(Box::new(Left { manifest, report })),
        None => State::New,
    }
}

/// Removes the links that lead to a branch which was moved away, so that another can be made in its
/// place: renaming or filling what they lead to would change a folder that somebody put elsewhere.
/// The working folder of a branch is such a link if a run was killed while it measured it again.
/// Says whether there were any.
///
/// # Errors
/// [`gptq_records::Error::Io`].
pub(crate) fn unlink_moved(dir: &Path) -> Result<bool> {
    let mut unlinked = false;
    for path in [dir.to_owned(), partial_path(dir)] {
        let is_link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink());
        // Of a link to anything else nothing is known: the writer refuses it.
        if is_link && Manifest::read(&path)?.is_some() {
            fs::remove_file(&path).map_err(gptq_records::Error::io("unlink", &path))?;
            unlinked = true;
        }
    }
    Ok(unlinked)
}

fn partial_path(dir: &Path) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(PARTIAL_END);
    PathBuf::from(name)
}

/// Whether there is nothing under a name, or an empty folder.
fn is_empty(dir: &Path) -> Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            Err(Error::ForeignBranch(dir.to_owned()))
        }
        Err(source) => Err(gptq_records::Error::io("list", dir)(source).into()),
    }
}
