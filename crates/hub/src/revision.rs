//! Names of revisions and branches, by git's own rules.

use crate::{Error, Result};

/// Refuses what git does not allow as the name of a branch or tag (`git check-ref-format`). Such a
/// name stays within a folder, too.
pub(crate) fn check_revision(revision: &str) -> Result<()> {
    let forbidden = |c: char| c.is_ascii_control() || " ~^:?*[\\".contains(c);
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock");
    let valid = revision.split('/').all(is_part)
        && !revision.contains("..")
        && !revision.contains("@{")
        && !revision.contains(forbidden)
        && !revision.ends_with('.')
        && revision != "@"
        && revision.len() <= 255;
    if valid { Ok(()) } else { Err(Error::InvalidRevision { revision: revision.to_owned() }) }
}

/// As [`check_revision`], for a branch that is to be written: git makes none that reads as an option,
/// as `HEAD` or as a full reference.
pub(crate) fn check_branch(branch: &str) -> Result<()> {
    check_revision(branch)?;
    if branch.starts_with('-') || branch == "HEAD" || branch.starts_with("refs/") {
        return Err(Error::InvalidRevision { revision: branch.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `git check-ref-format --allow-onelevel NAME` and `git check-ref-format --branch NAME` say.
    #[test]
    fn names_are_those_that_git_allows() {
        for name in ["main", "v1+x", "refs/pr/1", "a/b", "4bit-32g", "é", "a@b", "x.locked"] {
            assert!(check_revision(name).is_ok(), "{name}");
        }
        let wrong = [
            "", "/", "a/", "/a", "a//b", "..", "../x", "a..b", ".x", "a/.x", "x.lock", "x.lock/y",
            "x.", "@", "a@{b", "a b", "a~", "a^", "a:b", "a?", "a*", "a[", "a\\b", "a\tb",
            "a\u{7f}",
        ];
        for name in wrong {
            assert!(check_revision(name).is_err(), "{name:?}");
        }
        for name in ["HEAD", "-x", "refs/heads/x"] {
            assert!(check_revision(name).is_ok(), "{name}");
            assert!(check_branch(name).is_err(), "{name}");
        }
        assert!(check_branch("4bit-128g").is_ok());
    }
}
