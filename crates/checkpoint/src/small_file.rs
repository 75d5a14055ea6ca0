//! Small files, read whole: configurations, indices, tokenizers.
//!
//! A folder may come from anywhere, so a name in it may lead to a pipe, which nobody writes to, or to
//! a device, which has no end. Every file that is read whole is read here.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use crate::names::{INDEX_END, TOKENIZER_FILE};

/// Largest file that is read whole: more than any configuration has.
const MOST_BYTES: u64 = 64 << 20;
/// The same of files that grow with a vocabulary or with the number of tensors.
const MOST_LISTED: u64 = 1 << 30;

/// The contents of a small file. Links are followed.
///
/// # Errors
/// Those of [`std::fs::read`]; and what is no regular file, or larger than any sound file of its name.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let listed = name == TOKENIZER_FILE || name.ends_with(INDEX_END);
    read_up_to(path, if listed { MOST_LISTED } else { MOST_BYTES })
}

/// As [`read_small`], of a text in UTF-8.
///
/// # Errors
/// Those of [`read_small`], and [`ErrorKind::InvalidData`] for other bytes.
pub fn read_small_text(path: &Path) -> io::Result<String> {
    let invalid = |_| io::Error::new(ErrorKind::InvalidData, "stream did not contain valid UTF-8");
    String::from_utf8(read_small(path)?).map_err(invalid)
}

fn read_up_to(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    let mut bytes = Vec::with_capacity(size.min(most) as usize);
    // It may grow while it is read, and files of /proc have more than they say.
    if size <= most && file.take(most + 1).read_to_end(&mut bytes)? as u64 <= most {
        return Ok(bytes);
    }
    let most = most >> 20;
    Err(io::Error::new(
        ErrorKind::FileTooLarge,
        format!("it has more than {most} MiB, which is the most that is read of such a file"),
    ))
}

/// Opens a file, unless it is of a kind that may keep its reader waiting.
///
/// # Errors
/// Those of [`File::open`], and what is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?;
    if kind.is_dir() {
        return Err(ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    File::open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_end_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "12345").unwrap();
        std::os::unix::fs::symlink("a", path("link")).unwrap();
        assert_eq!(read_up_to(&path("link"), 5).unwrap(), b"12345");
        let error = read_up_to(&path("a"), 4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);

        let grown = File::create(path("b.json")).unwrap();
        grown.set_len(MOST_BYTES + 1).unwrap();
        assert!(read_small(&path("b.json")).unwrap_err().to_string().contains("64 MiB"));
        fs::rename(path("b.json"), path("model.safetensors.index.json")).unwrap();
        assert!(read_small(&path("model.safetensors.index.json")).is_ok());

        let fifo = path("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        std::os::unix::fs::symlink("/dev/zero", path("zero")).unwrap();
        for special in [&fifo, &path("zero")] {
            let error = read_small(special).unwrap_err().to_string();
            assert_eq!(error, "it is no regular file");
        }
        assert_eq!(read_small(dir.path()).unwrap_err().kind(), ErrorKind::IsADirectory);
        assert_eq!(read_small(&path("none")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    /// Files of /proc say that they have no bytes.
    #[test]
    fn files_may_have_more_than_they_say() {
        if Path::new("/proc/self/status").exists() {
            assert!(read_small_text(Path::new("/proc/self/status")).unwrap().contains("Pid"));
        }
    }
}
