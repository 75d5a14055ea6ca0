//! Small files that are there whole or not at all.
//!
//! That takes a rename, which must never be done to what is no regular file: a device, a pipe or what
//! a program has open would be gone, with a file in its place. Such a thing is written into.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Links that are followed before a name counts as a circle, as Linux has it.
const MOST_LINKS: usize = 40;

/// Folders below one that is read whose files are read, too: a sweep's are its branches.
const DEPTH: usize = 1;

/// Refuses a target that is one of the files that are read, or lies in one of the folders, under any
/// name: what the command was given would be gone.
///
/// # Errors
/// [`Error::Overwrites`].
pub fn refuse_inputs<'a>(target: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    // A new file replaces nothing.
    if !target.is_file() {
        return Ok(());
    }
    match inputs.into_iter().find(|input| is_read(target, input, DEPTH)) {
        Some(input) => Err(Error::Overwrites { path: target.to_owned(), input: input.to_owned() }),
        None => Ok(()),
    }
}

/// Whether a file is `input` or one of its files; what cannot be listed is not read either.
fn is_read(target: &Path, input: &Path, depth: usize) -> bool {
    if !input.is_dir() {
        return is_same(target, input);
    }
    let entries = fs::read_dir(input).into_iter().flatten().flatten();
    let mut files = entries.map(|entry| entry.path());
    files.any(|path| {
        (depth > 0 || !path.is_dir()) && is_read(target, &path, depth.saturating_sub(1))
    })
}

/// Whether both lead to one file.
fn is_same(target: &Path, input: &Path) -> bool {
    let (Ok(target), Ok(input)) = (fs::metadata(target), fs::metadata(input)) else {
        return false;
    };
    // What is no regular file is written into, and may well be read before.
    target.is_file() && input.is_file() && same_file(&target, &input)
}

#[cfg(unix)]
fn same_file(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;

    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(not(unix))]
fn same_file(_: &fs::Metadata, _: &fs::Metadata) -> bool {
    false
}

/// Refuses a target that [`replace`] could not write, before there is anything to write.
///
/// # Errors
/// [`Error::Io`], which names the file.
pub fn check_target(path: &Path) -> Result<()> {
    let found = match Target::of(path) {
        Ok(Target::File(file)) if file.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(Target::File(file)) => match fs::metadata(folder_of(&file)) {
            Ok(_) => return Ok(gptq_checkpoint::check_folder(folder_of(&file))?),
            Err(e) => Err(e),
        },
        other => other.map(drop),
    };
    found.map_err(Error::io("write", path))
}

/// Writes a file by one rename, over one that is there: a reader, and a run that is interrupted,
/// find the old contents or the new. A link stays, and what it leads to is replaced. A pipe, a
/// device, or a file that this process has open by a name such as `/dev/stdout`, is written into.
///
/// # Errors
/// [`Error::Io`], which names the file.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, working_file)
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
    put(path, bytes, |_| Some(working.to_owned()))
}

/// Writes to what a name leads to; `working` names the new file of one that is renamed over.
fn put(path: &Path, bytes: &[u8], working: impl Fn(&Path) -> Option<PathBuf>) -> Result<()> {
    let written = Target::of(path).and_then(|target| match target {
        Target::Stdout => {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush())
        }
        Target::Open(stream) => OpenOptions::new().append(true).open(stream)?.write_all(bytes),
        Target::File(file) => {
            let working = working(&file).ok_or(io::ErrorKind::IsADirectory)?;
            rename_over(&working, &file, bytes)
        }
    });
    written.map_err(Error::io("write", path))
}

/// What a name leads to.
enum Target {
    /// A regular file, or nothing yet.
    File(PathBuf),
    /// What is there to be written into.
    Open(PathBuf),
    /// What this process prints to, whatever it is called: what is printed must follow, not overlap.
    Stdout,
}

impl Target {
    /// Follows links, one by one: the last may lead to nothing yet.
    fn of(path: &Path) -> io::Result<Self> {
        if is_stdout(path) {
            return Ok(Self::Stdout);
        }
        let mut path = path.to_owned();
        for _ in 0..MOST_LINKS {
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::File(path)),
                Err(e) => return Err(e),
            };
            let kind = meta.file_type();
            if kind.is_file() || kind.is_dir() {
                return Ok(Self::File(path));
            }
            // Links of /proc lead to what is open, which need not have the name that they show.
            if !kind.is_symlink() || folder_of(&path).canonicalize()?.starts_with("/proc") {
                return Ok(Self::Open(path));
            }
            path = folder_of(&path).join(fs::read_link(&path)?);
        }
        Err(io::Error::other("too many links lead from one to the next"))
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(unix)]
fn is_stdout(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let Ok(there) = fs::metadata(path) else { return false };
    let open = ["/proc/self/fd/1", "/dev/fd/1"].iter().find_map(|name| fs::metadata(name).ok());
    open.is_some_and(|open| (open.dev(), open.ino()) == (there.dev(), there.ino()))
}

#[cfg(not(unix))]
fn is_stdout(_: &Path) -> bool {
    false
}

fn rename_over(working: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let renamed = write(working, bytes)
        .and_then(|()| keep_permissions(working, path))
        .and_then(|()| fs::rename(working, path));
    if renamed.is_err() {
        // What is left of a failed write has no use; that it cannot be removed changes nothing.
        drop(fs::remove_file(working));
    }
    renamed
}

/// Gives a new file the permissions of the one that it replaces.
fn keep_permissions(working: &Path, path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => fs::set_permissions(working, meta.permissions()),
        _ => Ok(()),
    }
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
        fs::write(dir.path().join("file"), "x").unwrap();
        for place in [nowhere, dir.path().to_owned(), dir.path().join("file/report")] {
            for told in [replace(&place, b"").unwrap_err(), check_target(&place).unwrap_err()] {
                let named = told.to_string().contains(&place.display().to_string());
                assert!(named, "{told}");
            }
        }
        check_target(&dir.path().join("new")).unwrap();
        check_target(&dir.path().join("file")).unwrap();
        fs::remove_file(dir.path().join("file")).unwrap();
        // A folder in the file's place stays, and so does nothing of ours.
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        assert!(replace(&folder, b"x").is_err());
        assert!(replace(Path::new("/"), b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    mod unix {
        use std::io::Read;
        use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
        use std::process::Command;

        use super::*;

        #[test]
        fn a_link_stays_and_its_target_is_replaced() {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            fs::create_dir(path("there")).unwrap();
            fs::write(path("there/report"), "old").unwrap();
            fs::set_permissions(path("there/report"), fs::Permissions::from_mode(0o640)).unwrap();
            symlink("there/report", path("one")).unwrap();
            symlink("one", path("two")).unwrap();
            symlink("there/new", path("dangling")).unwrap();
            symlink("circle", path("circle")).unwrap();
            for (name, target) in [("two", "there/report"), ("dangling", "there/new")] {
                replace(&path(name), b"text").unwrap();
                assert!(fs::symlink_metadata(path(name)).unwrap().is_symlink());
                assert_eq!(fs::read_to_string(path(target)).unwrap(), "text");
            }
            let mode = fs::metadata(path("there/report")).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o640);
            assert!(replace(&path("circle"), b"text").unwrap_err().to_string().contains("circle"));
            assert_eq!(fs::read_dir(path("there")).unwrap().count(), 2);
        }

        #[test]
        fn a_pipe_is_written_into() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("pipe");
            assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
            let reader = path.clone();
            let reading = std::thread::spawn(move || {
                let mut text = String::new();
                File::open(reader).unwrap().read_to_string(&mut text).map(|_| text)
            });
            replace(&path, b"text").unwrap();
            assert_eq!(reading.join().unwrap().unwrap(), "text");
            assert!(fs::symlink_metadata(&path).unwrap().file_type().is_fifo());
        }

        #[test]
        fn what_is_read_is_not_written_over() {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            fs::write(path("one"), "x").unwrap();
            fs::write(path("copy"), "x").unwrap();
            symlink("one", path("link")).unwrap();
            fs::hard_link(path("one"), path("hard")).unwrap();
            let refused = |target: &Path, input: &Path| refuse_inputs(target, [input]).is_err();
            for name in ["one", "link", "hard"] {
                assert!(refused(&path(name), &path("one")), "{name}");
                assert!(refused(&path(name), dir.path()), "{name}");
            }
            for other in [path("copy"), path("none"), dir.path().to_owned()] {
                assert!(!refused(&other, &path("one")), "{}", other.display());
            }
            assert!(!refused(Path::new("/dev/null"), Path::new("/dev/null")));
            // Reports of a sweep lie in folders of its folder.
            fs::create_dir_all(path("sweep/branch/deeper")).unwrap();
            for name in ["sweep/branch/report", "sweep/branch/deeper/file"] {
                fs::write(path(name), "x").unwrap();
            }
            assert!(refused(&path("sweep/branch/report"), &path("sweep")));
            assert!(!refused(&path("sweep/branch/deeper/file"), &path("sweep")));
        }

        #[cfg(target_os = "linux")]
        #[test]
        fn a_device_and_an_open_file_are_written_into() {
            replace(Path::new("/dev/null"), b"text").unwrap();
            let error = replace(Path::new("/dev/full"), b"text").unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(
                error.to_string().contains("/dev/full") && source.contains("space"),
                "{source}"
            );
            for device in ["/dev/null", "/dev/full"] {
                let kind = fs::symlink_metadata(device).unwrap().file_type();
                assert!(kind.is_char_device(), "{device}");
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("open");
            let mut file = File::create(&path).unwrap();
            file.write_all(b"one ").unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            replace(&PathBuf::from(format!("/dev/fd/{fd}")), b"two").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "one two");
            assert!(fs::symlink_metadata("/dev/fd").unwrap().is_symlink());
        }
    }
}
