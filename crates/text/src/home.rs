//! `~/` at the beginning of a path.
//!
//! Shells expand it, but not in quotes, not behind `--out=`, and not in a configuration file. Nobody
//! who writes it means a folder called `~`.

use std::borrow::Cow;
use std::path::Path;

/// A path that begins with `~` where the environment names no home.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{path}` cannot be found: HOME is not set")]
pub struct HomeError {
    path: String,
}

impl HomeError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        format!("write the path in full, or `./{}`", self.path)
    }
}

/// A path with a leading `~/`, or a `~` alone, replaced by the home folder. Anything else, `~user`
/// too, is itself.
///
/// # Errors
/// [`HomeError`].
pub fn expand_home(path: &str) -> Result<Cow<'_, str>, HomeError> {
    expand(path, std::env::var("HOME").ok().filter(|home| Path::new(home).is_absolute()).as_deref())
}

fn expand<'a>(path: &'a str, home: Option<&str>) -> Result<Cow<'a, str>, HomeError> {
    let rest = match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        _ => return Ok(path.into()),
    };
    match home {
        Some(home) => Ok(format!("{}{rest}", home.trim_end_matches('/')).into()),
        None => Err(HomeError { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_put_in_the_place_of_a_leading_tilde() {
        for (path, found) in [
            ("~/a/b", "/home/me/a/b"),
            ("~", "/home/me"),
            ("~you/a", "~you/a"),
            ("a/~/b", "a/~/b"),
            ("", ""),
        ] {
            assert_eq!(expand(path, Some("/home/me")).unwrap(), found);
            assert_eq!(expand(path, Some("/home/me/")).unwrap(), found);
        }
        assert_eq!(expand("a", None).unwrap(), "a");
        let error = expand("~/a", None).unwrap_err().to_string();
        assert!(error.contains("`~/a`") && error.contains("HOME"), "{error}");
    }
}
