//! The id by which runs at one port are distinguished.
//!
//! A launcher that gives its job an id gives it to all ranks. Without one, rank 0 draws a random id
//! and leaves it in a file that only the same user of the same host can read, while it waits for the
//! others. The file's name is that of the port: who listens there has it to itself.
//!
//! An id says who belongs together. It is no protection of what travels: that goes in the clear, and
//! a launcher's id is often known to every user of a cluster.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};
use crate::hex::hex;

/// Letters of a drawn id.
const LETTERS: usize = 64;

/// Where rank 0 of a run leaves its id, and whose file that has to be.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    owner: u32,
}

/// A drawn id, and the file that holds it as long as this lives.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) id: String,
    path: PathBuf,
}

impl Drop for Published {
    fn drop(&mut self) {
        // What stays is replaced by the next run at this port.
        let _ = fs::remove_file(&self.path);
    }
}

impl Place {
    /// The place of runs of this user at a port.
    ///
    /// # Errors
    /// [`Error::Ranks`] where no file can be made.
    pub(super) fn new(port: u16) -> Result<Self> {
        let dir = std::env::temp_dir();
        match owner(&dir) {
            Ok(owner) => Ok(Self { path: dir.join(format!("gptq-run-{owner}-{port}")), owner }),
            Err(error) => Err(no_place(&dir, &error)),
        }
    }

    /// Draws an id and leaves it here.
    ///
    /// # Errors
    /// [`Error::Ranks`] where the file cannot be written.
    pub(super) fn publish(&self) -> Result<Published> {
        let written = || -> io::Result<String> {
            let id = draw()?;
            // Written beside it and renamed: no rank sees half of an id, nor follows a link laid
            // here.
            let (working, mut file) = private_file(&self.path)?;
            let renamed =
                file.write_all(id.as_bytes()).and_then(|()| fs::rename(&working, &self.path));
            if renamed.is_err() {
                let _ = fs::remove_file(&working);
            }
            renamed.map(|()| id)
        };
        match written() {
            Ok(id) => Ok(Published { id, path: self.path.clone() }),
            Err(error) => Err(no_place(&self.path, &error)),
        }
    }

    /// The id that rank 0 has left here; or why there is none, which may change.
    pub(super) fn find(&self) -> std::result::Result<String, String> {
        let unusable = |what: &dyn std::fmt::Display| {
            format!("no id of a run in `{}`: {what}", self.path.display())
        };
        // Neither a link nor a pipe that somebody else has laid there is opened or waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, Mode::empty());
        let file = File::from(file.map_err(|e| unusable(&io::Error::from(e)))?);
        let meta = file.metadata().map_err(|e| unusable(&e))?;
        if !meta.is_file() || meta.uid() != self.owner || meta.mode() & 0o077 != 0 {
            return Err(unusable(&"it is not a private file of this user"));
        }
        let mut id = String::new();
        file.take(LETTERS as u64 + 1).read_to_string(&mut id).map_err(|e| unusable(&e))?;
        match id.len() == LETTERS {
            true => Ok(id),
            false => Err(unusable(&"it was written by something else")),
        }
    }
}

fn no_place(path: &Path, error: &io::Error) -> Error {
    let place = path.display();
    Error::Ranks {
        message: format!(
            "The ranks cannot leave the run's id in `{place}` for each other: {error}"
        ),
        advice: Some("set GPTQ_RUN_ID to the same text for all ranks"),
    }
}

/// A new file beside `path` that only this user may read.
fn private_file(path: &Path) -> io::Result<(PathBuf, File)> {
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let working = path.with_extension(format!("{}-{number}.new", std::process::id()));
    // What a killed process of this number has left.
    let _ = fs::remove_file(&working);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&working)?;
    Ok((working, file))
}

/// Whose files this process makes.
fn owner(dir: &Path) -> io::Result<u32> {
    let (working, file) = private_file(&dir.join("gptq-run"))?;
    let owner = file.metadata().map(|meta| meta.uid());
    fs::remove_file(&working)?;
    owner
}

fn draw() -> io::Result<String> {
    let mut bytes = [0; LETTERS / 2];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn place(&self, name: &str) -> Place {
            Place { path: self.0.join(name), owner: owner(&self.0).unwrap() }
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_id_is_found_while_its_run_waits() {
        let folder = Folder::new("gptq-run-id");
        let place = folder.place("id");
        assert!(place.find().unwrap_err().contains("id`: No such file"));
        // What a killed run has left is replaced.
        fs::write(&place.path, "old").unwrap();
        let published = place.publish().unwrap();
        assert_eq!(place.find().unwrap(), published.id);
        assert_eq!(fs::metadata(&place.path).unwrap().mode() & 0o777, 0o600);
        assert_ne!(folder.place("other").publish().unwrap().id, published.id);
        drop(published);
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0);
    }

    #[test]
    fn files_that_others_may_have_laid_there_are_not_believed() {
        let folder = Folder::new("gptq-foreign-id");
        let place = folder.place("id");
        let published = place.publish().unwrap();
        symlink(&place.path, folder.0.join("link")).unwrap();
        assert!(folder.place("link").find().is_err());
        let foreign = Place { path: place.path.clone(), owner: place.owner + 1 };
        assert!(foreign.find().unwrap_err().contains("not a private file"));
        fs::set_permissions(&place.path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(place.find().unwrap_err().contains("not a private file"));
        fs::write(&place.path, "short").unwrap();
        fs::set_permissions(&place.path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(place.find().unwrap_err().contains("something else"));
        drop(published);
    }
}
