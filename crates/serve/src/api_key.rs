//! The key that clients show.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Bytes of a key's file, which may be a device without end: no client sends a longer key.
const MOST_BYTES: u64 = 4096;

/// A key, which nothing prints.
#[derive(Clone)]
pub struct ApiKey(Vec<u8>);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// The key in a file, without the white space around it.
    ///
    /// # Errors
    /// [`Error::ReadKey`], and [`Error::NoKey`] for what no client could send in a header.
    pub fn read(path: &Path) -> Result<Self> {
        let mut text = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut text))
            .map_err(|source| Error::ReadKey { path: path.to_owned(), source })?;
        let none = |reason| Err(Error::NoKey { path: path.to_owned(), reason });
        if text.len() as u64 > MOST_BYTES {
            return none("it is longer than a key of 4096 bytes");
        }
        // What is not UTF-8 has no key of ASCII, either.
        match String::from_utf8_lossy(&text).trim() {
            "" => none("it is empty"),
            key if !key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                none("a key has letters, digits and signs of ASCII only, without spaces")
            }
            key => Ok(Self(key.as_bytes().to_vec())),
        }
    }

    /// Whether an `Authorization` header shows the key. How long that takes depends on the length of
    /// what is shown, and not on how much of it is right.
    pub(crate) fn is_shown(&self, header: Option<&[u8]>) -> bool {
        let Some((scheme, shown)) = header.and_then(|header| header.split_at_checked(7)) else {
            return false;
        };
        let mut differs = shown.len() ^ self.0.len();
        for (&byte, &right) in shown.iter().zip(self.0.iter().cycle()) {
            differs |= usize::from(byte ^ right);
        }
        std::hint::black_box(differs) == 0 && scheme.eq_ignore_ascii_case(b"Bearer ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_is_taken() {
        let key = ApiKey(b"sk-abc".to_vec());
        assert!(key.is_shown(Some(b"Bearer sk-abc")));
        assert!(key.is_shown(Some(b"bearer sk-abc")));
        for wrong in [
            &b"Bearer sk-abd"[..],
            b"Bearer sk-ab",
            b"Bearer sk-abcsk-abc",
            b"Bearer ",
            b"Basic  sk-abc",
            b"sk-abc",
            b"",
        ] {
            assert!(!key.is_shown(Some(wrong)), "{wrong:?}");
        }
        assert!(!key.is_shown(None));
        assert_eq!(format!("{key:?}"), "ApiKey(…)");
    }
}
