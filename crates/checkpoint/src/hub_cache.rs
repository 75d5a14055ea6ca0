//! Models and datasets by Hub id, from the standard Hugging Face cache, without a network.
//!
//! `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub` holds
//! `models--ORG--NAME/refs/REVISION`, a file with a commit, and `snapshots/COMMIT/`, the files.
//! Nothing is downloaded here, so `HF_HUB_OFFLINE` is honored by construction. The variables are
//! read as the Hub's own client reads them: `~` and `$NAME` in them are expanded, and an older name
//! of one counts where the newer is not set.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::names::is_hub_name;
use crate::small_file::read_small_text;
use crate::{Error, Result};

/// A model's folder: `id_or_path` itself where it exists, else the snapshot of that Hub id at
/// `revision` (`main` if none is given).
///
/// # Errors
/// [`Error::InvalidHubId`], [`Error::InvalidRevision`], and [`Error::NotInHubCache`], which says
/// where was looked and what to do.
pub fn resolve_model(id_or_path: &str, revision: Option<&str>) -> Result<PathBuf> {
    resolve("models", id_or_path, revision, hub_cache_root().as_deref())
}

/// A dataset's folder: `repo` itself where it exists, else the snapshot of that Hub id at
/// `revision` (`main` if none is given).
///
/// # Errors
/// As [`resolve_model`].
pub fn resolve_dataset(repo: &str, revision: Option<&str>) -> Result<PathBuf> {
    resolve("datasets", repo, revision, hub_cache_root().as_deref())
}

/// The folder that holds all repositories, by the rules of the Hub's own client; `None` where no
/// environment variable leads to one.
#[must_use]
pub fn hub_cache_root() -> Option<PathBuf> {
    cache_root(&variable)
}

/// The file that a login leaves its token in, by the same rules; it need not exist.
#[must_use]
pub fn hub_token_file() -> Option<PathBuf> {
    token_file(&variable)
}

/// An environment variable; an empty one counts as none.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

fn cache_root(get: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let named = get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE"));
    named.map(|path| expanded(&path, get)).or_else(|| Some(hub_home(get)?.join("hub")))
}

fn token_file(get: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let named = get("HF_TOKEN_PATH").map(|path| expanded(&path, get));
    named.or_else(|| Some(hub_home(get)?.join("token")))
}

fn hub_home(get: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    get("HF_HOME")
        .map(|path| expanded(&path, get))
        .or_else(|| Some(expanded(&get("XDG_CACHE_HOME")?, get).join("huggingface")))
        .or_else(|| Some(PathBuf::from(get("HOME")?).join(".cache/huggingface")))
}

/// A path with `~`, `$NAME` and `${NAME}` replaced, as Python's `expanduser` and `expandvars` do it:
/// a variable that is not set stays as it is written, as does another user's `~name`.
fn expanded(path: &OsStr, get: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let bytes = path.as_bytes();
    let mut out = Vec::new();
    let mut rest = bytes;
    if let (true, Some(home)) = (bytes == b"~" || bytes.starts_with(b"~/"), get("HOME")) {
        let home = home.as_bytes();
        out.extend_from_slice(home.strip_suffix(b"/").unwrap_or(home));
        rest = &bytes[1..];
    }
    // The home folder's name is expanded as well.
    let whole = [&out[..], rest].concat();
    let (mut out, mut rest) = (Vec::new(), &whole[..]);
    while let Some((&first, tail)) = rest.split_first() {
        let found = (first == b'$').then(|| name_of(tail)).flatten();
        let value = found.and_then(|(name, after)| Some((get(name)?, after)));
        if let Some((value, after)) = value {
            out.extend_from_slice(value.as_bytes());
            rest = after;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// The variable's name after a `$`, and what follows it.
fn name_of(tail: &[u8]) -> Option<(&str, &[u8])> {
    let (name, after) = if let Some(braced) = tail.strip_prefix(b"{") {
        let end = braced.iter().position(|&b| b == b'}')?;
        (&braced[..end], &braced[end + 1..])
    } else {
        let is_name = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        let end = tail.iter().position(|b| !is_name(b)).unwrap_or(tail.len());
        tail.split_at(end)
    };
    std::str::from_utf8(name).ok().filter(|name| !name.is_empty()).map(|name| (name, after))
}

fn resolve(kind: &str, id: &str, revision: Option<&str>, root: Option<&Path>) -> Result<PathBuf> {
    if !id.is_empty() && Path::new(id).exists() {
        return Ok(PathBuf::from(id));
    }
    // Parts become folder names, so nothing may pass that could leave the cache.
    if id.split('/').count() > 2 || !id.split('/').all(is_hub_name) {
        return Err(Error::InvalidHubId { id: id.to_owned() });
    }
    let revision = revision.unwrap_or("main");
    if !revision.split('/').all(stays_below) {
        return Err(Error::InvalidRevision { revision: revision.to_owned() });
    }
    let root = root.ok_or_else(|| Error::NoHubCache { id: id.to_owned() })?;
    let repository = root.join(format!("{kind}--{}", id.replace('/', "--")));
    let reference = repository.join("refs").join(revision);
    let commit = if reference.is_file() {
        let text = read_small_text(&reference).map_err(Error::io("read", &reference))?;
        text.trim().to_owned()
    } else {
        revision.to_owned()
    };
    let folder = repository.join("snapshots").join(&commit);
    if is_hub_name(&commit) && folder.is_dir() {
        return Ok(folder);
    }
    let request = match (kind, revision) {
        ("models", "main") => id.to_owned(),
        ("models", other) => format!("{id} --revision {other}"),
        _ => format!("--dataset {id}:CONFIG:SPLIT"),
    };
    let (id, revision) = (id.to_owned(), revision.to_owned());
    Err(Error::NotInHubCache { id, revision, looked_in: repository, request })
}

/// A part of a revision's name that leads to a file below its folder. What git allows beyond that
/// is for the Hub to say.
fn stays_below(part: &str) -> bool {
    !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_lead_to_snapshots() {
        let root = tempfile::tempdir().unwrap();
        let repository = root.path().join("models--org--name");
        std::fs::create_dir_all(repository.join("refs/pr")).unwrap();
        std::fs::create_dir_all(repository.join("snapshots/abc123")).unwrap();
        std::fs::write(repository.join("refs/main"), "abc123\n").unwrap();
        std::fs::write(repository.join("refs/pr/1"), "abc123").unwrap();
        std::fs::write(repository.join("refs/evil"), "../../x").unwrap();
        let find = |revision| resolve("models", "org/name", revision, Some(root.path()));
        std::fs::write(repository.join("refs/v1+x"), "abc123").unwrap();
        for revision in [None, Some("abc123"), Some("pr/1"), Some("v1+x")] {
            assert_eq!(find(revision).unwrap(), repository.join("snapshots/abc123"));
        }
        let error = find(Some("v2")).unwrap_err();
        for part in ["v2", "models--org--name"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        let hint = error.hint().unwrap();
        for part in ["HF_HOME", "`gptq fetch org/name --revision v2`", "local folder"] {
            assert!(hint.contains(part), "{hint}");
        }
        assert!(find(Some("evil")).is_err());
        assert!(resolve("datasets", "org/name", None, Some(root.path())).is_err());
        assert!(matches!(resolve("models", "org/name", None, None), Err(Error::NoHubCache { .. })));
    }

    #[test]
    fn existing_paths_win() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve("models", path, None, None).unwrap(), dir.path());
    }

    #[test]
    fn ids_cannot_leave_the_cache() {
        let root = tempfile::tempdir().unwrap();
        for id in ["../../nowhere", "a/b/c", "/nowhere", "a/..", "", "a b", "a//b", "./x"] {
            let error = resolve("models", id, None, Some(root.path())).unwrap_err();
            assert!(matches!(error, Error::InvalidHubId { .. }), "{id}: {error}");
        }
        for revision in ["../x", "", "a/../b", "/x"] {
            assert!(resolve("models", "org/name", Some(revision), Some(root.path())).is_err());
        }
    }

    /// What `os.path.expandvars(os.path.expanduser(text))` gives in Python with these variables.
    #[test]
    fn paths_are_expanded_as_python_expands_them() {
        let get = |name: &str| match name {
            "HOME" => Some(OsString::from("/home/me")),
            "A" => Some("x".into()),
            "B_1" => Some("$A".into()),
            _ => None,
        };
        for (text, path) in [
            ("~", "/home/me"),
            ("~/a", "/home/me/a"),
            ("~other/a", "~other/a"),
            ("a/~", "a/~"),
            ("$A/b", "x/b"),
            ("/${A}b$A", "/xbx"),
            ("$B_1", "$A"),
            ("$C/${C}/$", "$C/${C}/$"),
            ("${A", "${A"),
            ("$$A", "$x"),
        ] {
            assert_eq!(expanded(text.as_ref(), &get), Path::new(path), "{text}");
        }
    }

    #[test]
    fn places_are_named_by_new_variables_and_old_ones() {
        let all: [(&str, &str); 5] = [
            ("HF_HUB_CACHE", "~/new"),
            ("HUGGINGFACE_HUB_CACHE", "$HOME/old"),
            ("HF_HOME", "~/hf"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("HOME", "/me"),
        ];
        let of = |first: usize| {
            let set = &all[first..];
            let get = move |name: &str| {
                let home = (name == "HOME").then_some("/me");
                let found = set.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
                found.or(home).map(OsString::from)
            };
            (cache_root(&get).unwrap(), token_file(&get).unwrap())
        };
        for (first, cache, token) in [
            (0, "/me/new", "/me/hf/token"),
            (1, "/me/old", "/me/hf/token"),
            (2, "/me/hf/hub", "/me/hf/token"),
            (3, "/xdg/huggingface/hub", "/xdg/huggingface/token"),
            (4, "/me/.cache/huggingface/hub", "/me/.cache/huggingface/token"),
        ] {
            assert_eq!(of(first), (PathBuf::from(cache), PathBuf::from(token)), "{first}");
        }
        let get = |name: &str| match name {
            "HF_TOKEN_PATH" => Some(OsString::from("$HOME/t")),
            "HOME" => Some("/me".into()),
            _ => None,
        };
        assert_eq!(token_file(&get), Some(PathBuf::from("/me/t")));
        assert_eq!(cache_root(&|_: &str| None), None);
    }
}
