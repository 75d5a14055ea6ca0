//! Models and datasets by Hub id, from the standard Hugging Face cache, without a network.
//!
//! `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub` holds
//! `models--ORG--NAME/refs/REVISION`, a file with a commit, and `snapshots/COMMIT/`, the files.
//! Nothing is downloaded here, so `HF_HUB_OFFLINE` is honoured by construction.

use std::env;
use std::path::{Path, PathBuf};

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
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

fn resolve(kind: &str, id: &str, revision: Option<&str>, root: Option<&Path>) -> Result<PathBuf> {
    if !id.is_empty() && Path::new(id).exists() {
        return Ok(PathBuf::from(id));
    }
    // Parts become folder names, so nothing may pass that could leave the cache.
    if id.split('/').count() > 2 || !id.split('/').all(is_plain) {
        return Err(Error::InvalidHubId { id: id.to_owned() });
    }
    let revision = revision.unwrap_or("main");
    if !revision.split('/').all(is_plain) {
        return Err(Error::InvalidRevision { revision: revision.to_owned() });
    }
    let root = root.ok_or_else(|| Error::NoHubCache { id: id.to_owned() })?;
    let repository = root.join(format!("{kind}--{}", id.replace('/', "--")));
    let reference = repository.join("refs").join(revision);
    let commit = if reference.is_file() {
        let text = std::fs::read_to_string(&reference).map_err(Error::io("read", &reference))?;
        text.trim().to_owned()
    } else {
        revision.to_owned()
    };
    let folder = repository.join("snapshots").join(&commit);
    if is_plain(&commit) && folder.is_dir() {
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

/// A name in the Hub's characters that is no hidden or parent folder.
fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
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
        for revision in [None, Some("abc123"), Some("pr/1")] {
            assert_eq!(find(revision).unwrap(), repository.join("snapshots/abc123"));
        }
        let message = find(Some("v2")).unwrap_err().to_string();
        let fetch = "`gptq fetch org/name --revision v2`";
        for part in ["HF_HOME", "v2", fetch, "models--org--name", "local folder"] {
            assert!(message.contains(part), "{message}");
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
}
