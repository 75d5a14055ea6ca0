//! Small files that are there whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a file by one rename, over one that is there: a reader, and a run that is interrupted,
/// find the old contents or the new.
///
/// # Errors
/// [`Error::WriteReport`], which names the file.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some(working) = working_file(path) else {
        let source = io::Error::from(io::ErrorKind::IsADirectory);
        return Err(Error::WriteReport { path: path.to_owned(), source });
    };
    replace_through(&working, path, bytes)
}

/// A name beside a file. By its beginning a sweep knows what an interrupted run leaves in a branch's
/// folder as this program's own; by the process two writers, which nothing keeps apart, have one each.
fn working_file(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(".gptq-");
    name.push(path.file_name()?);
    name.push(format!(".{}", std::process::id()));
    Some(path.with_file_name(name))
}

/// As [`replace`], with a working file of the caller's choice on the same file system, which only one
/// process may use at a time. One that an interrupted run left is overwritten.
pub(crate) fn replace_through(working: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let written = write(working, bytes).and_then(|()| fs::rename(working, path));
    if written.is_err() {
        // What is left of a failed write has no use; that it cannot be removed changes nothing.
        drop(fs::remove_file(working));
    }
    written.map_err(|source| Error::WriteReport { path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::is_extra;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.html");
        for text in ["one", "two"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_sweep_knows_left_overs_as_its_own() {
        let working = working_file(Path::new("branch/README.md")).unwrap();
        assert_eq!(working.parent(), Some(Path::new("branch")));
        assert!(is_extra(working.file_name().unwrap().to_str().unwrap()));
    }

    #[test]
    fn what_an_interrupted_write_left_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let (working, path) = (dir.path().join("new"), dir.path().join("README.md"));
        fs::write(&working, "half of a longer text").unwrap();
        replace_through(&working, &path, b"card").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "card");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = dir.path().join("missing/report.html");
        let error = replace(&nowhere, b"").unwrap_err().to_string();
        assert!(error.contains("missing/report.html"), "{error}");
        // A folder in the file's place stays, and so does nothing of ours.
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        assert!(replace(&folder, b"x").is_err());
        assert!(replace(Path::new("/"), b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
