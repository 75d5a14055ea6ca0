//! The key that clients show.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

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
        let text = std::fs::read_to_string(path)
            .map_err(|source| Error::ReadKey { path: path.to_owned(), source })?;
        let none = |reason| Err(Error::NoKey { path: path.to_owned(), reason });
        match text.trim() {
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
