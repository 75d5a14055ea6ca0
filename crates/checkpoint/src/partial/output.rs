//! Whether a finished folder can get its name: asked before the work, not after it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use super::parent_of;
use crate::{Error, OutputError, Result};

/// The place of an output, which must not exist or be an empty folder. Links are followed: a folder
/// can be renamed onto an empty folder, but not onto a link to one.
pub(super) fn resolved(out: &Path) -> Result<PathBuf> {
    let occupied = || Err(OutputError::Exists { path: out.to_owned() }.into());
    let found = fs::canonicalize(out).and_then(|path| {
        let is_empty = fs::read_dir(&path)?.next().is_none();
        Ok((is_empty, path))
    });
    match found {
        Ok((true, path)) => Ok(path),
        Ok((false, _)) => occupied(),
        // It is a file itself, or lies in what is one.
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => match fs::symlink_metadata(out) {
            Ok(_) => occupied(),
            Err(_) => Err(Error::io("create", out)(e)),
        },
        // With a slash at its end, a link is not seen as one.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            match fs::read_link(out.components().as_path()) {
                Ok(target) => Err(OutputError::DeadLink { path: out.to_owned(), target }.into()),
                Err(_) => Ok(out.to_owned()),
            }
        }
        Err(e) => Err(Error::io("inspect", out)(e)),
    }
}

/// Whether a checkpoint can be made at `out`, as far as can be seen without making anything.
///
/// # Errors
/// [`OutputError::Exists`], [`OutputError::DeadLink`] and [`Error::Io`].
pub fn check_output(out: &Path) -> Result<()> {
    let out = resolved(out)?;
    check_folder(parent_of(&out))
}

/// Whether files can be made in a folder, or the folder itself where it is not there.
///
/// # Errors
/// [`Error::Io`].
pub fn check_folder(folder: &Path) -> Result<()> {
    let here = Path::new(".");
    let named = |f| if f == Path::new("") { here } else { f };
    let there = folder.ancestors().map(named).find(|f| f.exists()).unwrap_or(here);
    let writable = match there.is_dir() {
        true => access(there, Access::WRITE_OK | Access::EXEC_OK).map_err(io::Error::from),
        false => Err(io::ErrorKind::NotADirectory.into()),
    };
    writable.map_err(Error::io("write into", folder))
}

/// Replaces an empty output folder by a new one, as `Partial::publish` will: what the system would
/// refuse then, it refuses now.
pub(super) fn prove_replaceable(out: &Path, current: Option<&Path>) -> Result<()> {
    let permissions = match fs::metadata(out) {
        Ok(meta) => meta.permissions(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("inspect", out)(e)),
    };
    if current == Some(out) {
        // The relative paths of this run would lead nowhere.
        return Err(OutputError::CurrentFolder { path: out.to_owned() }.into());
    }
    fs::remove_dir(out).map_err(|e| match e.kind() {
        io::ErrorKind::ResourceBusy => OutputError::MountPoint { path: out.to_owned() }.into(),
        _ => Error::io("replace", out)(e),
    })?;
    fs::create_dir(out).map_err(Error::io("create", out))?;
    fs::set_permissions(out, permissions).map_err(Error::io("create", out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partial::Partial;

    #[test]
    fn occupied_outputs_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        for out in [dir.path().to_owned(), dir.path().join("file"), PathBuf::from("/")] {
            let error = Partial::create(&out).unwrap_err();
            assert!(matches!(error, Error::Output(OutputError::Exists { .. })), "{error}");
        }
    }

    #[test]
    fn a_place_is_looked_at_without_making_anything() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("file"), "x").unwrap();
        fs::create_dir(path("empty")).unwrap();
        for out in ["new", "a/b/new", "empty"] {
            check_output(&path(out)).unwrap();
            check_folder(&path(out)).unwrap();
        }
        check_folder(Path::new("relative")).unwrap();
        check_folder(Path::new("")).unwrap();
        let error = check_output(&path("file")).unwrap_err();
        assert!(matches!(error, Error::Output(OutputError::Exists { .. })), "{error}");
        for error in [check_output(&path("file/new")), check_folder(&path("file/new"))] {
            let Error::Io { source, .. } = error.unwrap_err() else {
                panic!("no error of the system")
            };
            assert_eq!(source.kind(), io::ErrorKind::NotADirectory);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn links_are_followed_and_must_lead_somewhere() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("m"), dir.path().join("disk/m"));
        std::os::unix::fs::symlink("disk/m", &link).unwrap();
        for out in [link.clone(), link.join("")] {
            let message = Partial::create(&out).unwrap_err().to_string();
            assert!(message.contains("`disk/m`") && message.contains("link"), "{message}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        fs::create_dir_all(&target).unwrap();
        let partial = Partial::create(&link).unwrap();
        partial.write(Path::new("a"), b"x").unwrap();
        partial.publish().unwrap();
        assert_eq!(fs::read(target.join("a")).unwrap(), b"x");
        assert!(link.is_symlink());
        // Through the link it is as occupied as by its name.
        let error = Partial::create(&link).unwrap_err();
        assert!(matches!(error, Error::Output(OutputError::Exists { .. })), "{error}");
    }

    /// Only a privileged user can mount something.
    #[test]
    fn a_mount_point_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk");
        fs::create_dir(&out).unwrap();
        let mount = ["-t", "tmpfs", "tmpfs"];
        let mounted = std::process::Command::new("mount").args(mount).arg(&out).output();
        if !mounted.is_ok_and(|done| done.status.success()) {
            crate::needs::Need::Mount.is_missing("not permitted to mount a tmpfs");
            return;
        }
        let created = Partial::create(&out);
        let inside = Partial::create(&out.join("m")).and_then(Partial::publish);
        std::process::Command::new("umount").arg(&out).status().unwrap();
        let error = created.unwrap_err();
        assert!(error.to_string().contains("mount point"), "{error}");
        assert!(error.hint().unwrap().contains("inside"), "{error}");
        inside.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_empty_output_keeps_its_mode_and_may_not_be_the_current_folder() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let message = prove_replaceable(dir.path(), Some(dir.path())).unwrap_err().to_string();
        assert!(message.contains("current folder"), "{message}");
        let out = dir.path().join("m");
        fs::create_dir(&out).unwrap();
        fs::set_permissions(&out, fs::Permissions::from_mode(0o2750)).unwrap();
        drop(Partial::create(&out).unwrap());
        assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o7777, 0o2750);
    }
}
