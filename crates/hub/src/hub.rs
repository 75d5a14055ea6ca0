//! Where the Hub is and who asks: the environment variables of the Hub's own client.

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use reqwest::Url;
use reqwest::header::HeaderValue;

use crate::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// The Hub as this process may use it.
#[derive(Debug)]
pub struct Hub {
    pub(crate) endpoint: Url,
    pub(crate) token: Option<Token>,
    pub(crate) retries: u32,
    /// It has answered once: whoever cannot be reached after that may be reached again.
    pub(crate) answered: AtomicBool,
    offline: bool,
}

/// A secret that is never shown, and the place that it came from.
pub(crate) struct Token {
    pub(crate) secret: String,
    pub(crate) origin: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Token of {}", self.origin)
    }
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the token: `HF_TOKEN`, else the file
    /// `HF_TOKEN_PATH`, else `token` in `HF_HOME` (`~/.cache/huggingface`), else none.
    ///
    /// A transfer gives up after `retries` attempts in a row that brought nothing, and at once where
    /// nobody can be reached at the start.
    ///
    /// # Errors
    /// [`Error::Endpoint`], [`Error::MalformedToken`], and [`Error::Io`] for a token file that is
    /// there and cannot be read.
    pub fn from_env(retries: u32) -> Result<Self> {
        Self::from_variables(retries, &|name| env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from_variables(retries: u32, get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let text = get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = Url::parse(&text)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or(Error::Endpoint { endpoint: text })?;
        let token = token(get)?;
        let offline = get("HF_HUB_OFFLINE").is_some_and(is_true);
        Ok(Self { endpoint, token, retries, answered: AtomicBool::new(false), offline })
    }

    /// The page of a model.
    #[must_use]
    pub fn address(&self, repo: &str) -> String {
        format!("{}/{repo}", self.endpoint.as_str().trim_end_matches('/'))
    }

    /// Whether the user forbade the network.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Refuses to go on where the user forbade the network.
    pub(crate) fn check_online(&self, what: &str) -> Result<()> {
        if self.offline { Err(Error::Offline { what: what.to_owned() }) } else { Ok(()) }
    }

    /// A text from elsewhere without the token, which a server may have sent back.
    pub(crate) fn redacted(&self, text: &str) -> String {
        match &self.token {
            Some(token) => text.replace(&token.secret, "[token]"),
            None => text.to_owned(),
        }
    }
}

/// As the Hub's own client reads its switches.
fn is_true(value: String) -> bool {
    matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

fn token(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Token>> {
    if get("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_true) {
        return Ok(None);
    }
    let (secret, origin) = if let Some(secret) = get("HF_TOKEN") {
        (secret, "HF_TOKEN".to_owned())
    } else {
        let named = get("HF_TOKEN_PATH").map(PathBuf::from);
        let Some(path) = named.clone().or_else(|| Some(home(get)?.join("token"))) else {
            return Ok(None);
        };
        match fs::read_to_string(&path) {
            Ok(secret) => (secret, format!("`{}`", path.display())),
            // Most people have no token, and need none to read.
            Err(e) if named.is_none() && e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(source) => return Err(Error::Io { action: "read the token in", path, source }),
        }
    };
    let secret = secret.trim().to_owned();
    if secret.is_empty() {
        return Ok(None);
    }
    if HeaderValue::from_str(&secret).is_err() {
        return Err(Error::MalformedToken { source_name: origin });
    }
    Ok(Some(Token { secret, origin }))
}

/// The folder that holds the token and, unless told otherwise, the cache.
fn home(get: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    get("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(get("XDG_CACHE_HOME")?).join("huggingface")))
        .or_else(|| Some(PathBuf::from(get("HOME")?).join(".cache/huggingface")))
}

/// Owner and name of a model's id, in characters that stay within one folder or address.
pub(crate) fn split_id(id: &str) -> Result<Vec<&str>> {
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() > 2 || !parts.iter().all(|part| is_plain(part)) {
        return Err(Error::InvalidId { id: id.to_owned() });
    }
    Ok(parts)
}

/// Owner and name of a repository that can be written to, which has both.
pub(crate) fn split_repo(id: &str) -> Result<(&str, &str)> {
    match split_id(id)?.as_slice() {
        &[owner, name] => Ok((owner, name)),
        _ => Err(Error::InvalidId { id: id.to_owned() }),
    }
}

/// A revision or branch in characters that stay within a folder.
pub(crate) fn check_revision(revision: &str) -> Result<()> {
    if revision.split('/').all(is_plain) {
        return Ok(());
    }
    Err(Error::InvalidRevision { revision: revision.to_owned() })
}

/// A name in the Hub's characters that is no hidden or parent folder.
pub(crate) fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        Hub::from_variables(3, &get)
    }

    #[test]
    fn tokens_come_from_the_usual_places_in_the_usual_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir_all(dir.path().join(".cache/huggingface")).unwrap();
        fs::write(path(".cache/huggingface/token"), "of-user\n").unwrap();
        fs::write(path("token"), "of-home\n").unwrap();
        fs::write(path("file"), "of-file\n").unwrap();
        let (home, file) = (path(""), path("file"));
        let all = [("HF_TOKEN", "of-env"), ("HF_TOKEN_PATH", &file), ("HF_HOME", &home)];
        for (first, secret) in [(0, "of-env"), (1, "of-file"), (2, "of-home")] {
            assert_eq!(hub(&all[first..]).unwrap().token.unwrap().secret, secret);
        }
        assert_eq!(hub(&[("HOME", &home)]).unwrap().token.unwrap().secret, "of-user");
        assert!(hub(&[("HOME", "/nowhere")]).unwrap().token.is_none());
        let none = [("HF_TOKEN", "of-env"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert!(hub(&none).unwrap().token.is_none());
        assert!(matches!(hub(&[("HF_TOKEN_PATH", "/nowhere")]), Err(Error::Io { .. })));
        let error = hub(&[("HF_TOKEN", "of\nenv")]).unwrap_err();
        assert!(matches!(error, Error::MalformedToken { .. }), "{error}");
    }

    #[test]
    fn tokens_are_not_shown() {
        let hub = hub(&[("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{hub:?}").contains("hf_secret"));
        assert_eq!(hub.redacted("who is hf_secret?"), "who is [token]?");
    }

    #[test]
    fn switches_and_addresses_are_read_as_the_hubs_client_reads_them() {
        for (value, online) in [("1", false), ("true", false), ("yes", false), ("0", true)] {
            let hub = hub(&[("HF_HUB_OFFLINE", value)]).unwrap();
            assert_eq!(hub.check_online("org/name").is_ok(), online, "{value}");
        }
        assert_eq!(hub(&[]).unwrap().endpoint.as_str(), "https://huggingface.co/");
        for wrong in ["huggingface.co", "ftp://host", "http://", "file:///tmp"] {
            assert!(
                matches!(hub(&[("HF_ENDPOINT", wrong)]), Err(Error::Endpoint { .. })),
                "{wrong}"
            );
        }
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        assert_eq!(split_id("org/name").unwrap(), ["org", "name"]);
        for id in ["", "a/b/c", "../x", "a b", "org/", "/x"] {
            assert!(split_id(id).is_err(), "{id}");
        }
        assert!(check_revision("refs/pr/1").is_ok());
        for revision in ["", "../x", "a//b", ".x"] {
            assert!(check_revision(revision).is_err(), "{revision}");
        }
    }
}
