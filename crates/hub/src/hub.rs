//! Where the Hub is and who asks: the environment variables of the Hub's own client.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderValue;

use crate::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A connection that brings nothing for so long is given up and made anew, unless
/// `HF_HUB_DOWNLOAD_TIMEOUT` says another time.
const LIMIT: Duration = Duration::from_secs(60);

/// The Hub as this process may use it.
#[derive(Debug)]
pub struct Hub {
    pub(crate) endpoint: Url,
    pub(crate) token: Option<Token>,
    pub(crate) retries: u32,
    /// How long a connection may be silent, in either direction.
    pub(crate) limit: Duration,
    /// `NO_PROXY` excepts every host.
    pub(crate) no_proxy: bool,
    /// It has answered once: a Hub that cannot be reached after that may be reached again.
    pub(crate) answered: AtomicBool,
    /// The variable that forbids the network.
    offline: Option<&'static str>,
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
    /// Reads `HF_ENDPOINT`, `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT`,
    /// `NO_PROXY`, and the token: `HF_TOKEN`, else `HUGGING_FACE_HUB_TOKEN`, else the file
    /// `token_file`, where a login leaves it, else none.
    ///
    /// A transfer gives up after `retries` attempts in a row that brought nothing, and at once where
    /// nobody can be reached at the start.
    ///
    /// # Errors
    /// [`Error::Endpoint`], [`Error::Timeout`], [`Error::MalformedToken`], and [`Error::Io`] for a
    /// token file that is there and cannot be read.
    pub fn from_env(retries: u32, token_file: Option<PathBuf>) -> Result<Self> {
        let get = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        Self::from_variables(retries, token_file.as_deref(), &get)
    }

    fn from_variables(
        retries: u32,
        token_file: Option<&Path>,
        get: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let text = get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = Url::parse(&text)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
            .ok_or(Error::Endpoint { endpoint: text })?;
        // The second is read where the first is not set.
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];
        let offline = offline.into_iter().find(|name| get(name).is_some());
        let offline = offline.filter(|name| get(name).is_some_and(is_true));
        let excepted = ["NO_PROXY", "no_proxy"].into_iter().find_map(get);
        let no_proxy = excepted.is_some_and(|hosts| hosts.split(',').any(|h| h.trim() == "*"));
        Ok(Self {
            endpoint,
            token: token(token_file, get)?,
            retries,
            limit: limit(get)?,
            no_proxy,
            answered: AtomicBool::new(false),
            offline,
        })
    }

    /// The page of a model.
    #[must_use]
    pub fn address(&self, repo: &str) -> String {
        format!("{}/{repo}", self.endpoint.as_str().trim_end_matches('/'))
    }

    /// Whether the user forbade the network.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.offline.is_some()
    }

    /// Refuses to go on where the user forbade the network.
    pub(crate) fn check_online(&self, what: &str) -> Result<()> {
        match self.offline {
            Some(variable) => Err(Error::Offline { what: what.to_owned(), variable }),
            None => Ok(()),
        }
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

/// Whole seconds, as for the Hub's own client; none is the usual time.
fn limit(get: &dyn Fn(&str) -> Option<String>) -> Result<Duration> {
    let Some(text) = get("HF_HUB_DOWNLOAD_TIMEOUT") else { return Ok(LIMIT) };
    match text.trim().parse::<u32>() {
        Ok(0) => Ok(LIMIT),
        Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
        Err(_) => Err(Error::Timeout { value: text }),
    }
}

fn token(file: Option<&Path>, get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Token>> {
    if get("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(is_true) {
        return Ok(None);
    }
    let named = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
    let set = named.into_iter().find_map(|name| Some((get(name)?, name.to_owned())));
    let (secret, origin) = match (set, file) {
        (Some(set), _) => set,
        (None, None) => return Ok(None),
        (None, Some(path)) => match fs::read_to_string(path) {
            Ok(secret) => (secret, format!("`{}`", path.display())),
            // Most people have no token, and need none to read.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(Error::Io {
                    action: "read the token in",
                    path: path.to_owned(),
                    source,
                });
            }
        },
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

/// Owner and name of a model's id, in characters that stay within one folder or address.
pub(crate) fn split_id(id: &str) -> Result<Vec<&str>> {
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() > 2 || !parts.iter().all(|part| gptq_checkpoint::is_hub_name(part)) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub> {
        hub_with(variables, None)
    }

    fn hub_with(variables: &[(&str, &str)], token_file: Option<&Path>) -> Result<Hub> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        Hub::from_variables(3, token_file, &get)
    }

    #[test]
    fn tokens_come_from_the_usual_places_in_the_usual_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        fs::write(&file, "of-file\n").unwrap();
        let all = [("HF_TOKEN", "of-env"), ("HUGGING_FACE_HUB_TOKEN", "of-old-env")];
        for (first, secret) in [(0, "of-env"), (1, "of-old-env"), (2, "of-file")] {
            let hub = hub_with(&all[first..], Some(&file)).unwrap();
            assert_eq!(hub.token.unwrap().secret, secret);
        }
        assert!(hub(&[]).unwrap().token.is_none());
        // Public models need none, whatever a variable says of the place.
        assert!(hub_with(&[], Some(Path::new("/nowhere"))).unwrap().token.is_none());
        assert!(matches!(hub_with(&[], Some(dir.path())), Err(Error::Io { .. })));
        let none = [("HF_TOKEN", "of-env"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert!(hub(&none).unwrap().token.is_none());
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
        for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
            for (value, online) in [("1", false), ("true", false), ("yes", false), ("0", true)] {
                let checked = hub(&[(name, value)]).unwrap().check_online("org/name");
                assert_eq!(checked.is_ok(), online, "{name} {value}");
                let message = checked.map_or_else(|e| e.to_string(), |()| name.to_owned());
                assert!(message.contains(name), "{message}");
            }
        }
        let both = [("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")];
        assert!(!hub(&both).unwrap().is_offline(), "the second is read where the first is not set");
        assert_eq!(hub(&[]).unwrap().endpoint.as_str(), "https://huggingface.co/");
        for wrong in ["huggingface.co", "ftp://host", "http://", "file:///tmp"] {
            assert!(
                matches!(hub(&[("HF_ENDPOINT", wrong)]), Err(Error::Endpoint { .. })),
                "{wrong}"
            );
        }
        for (value, seconds) in [("5", 5), ("0", 60), (" 7 ", 7)] {
            let hub = hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", value)]).unwrap();
            assert_eq!(hub.limit, Duration::from_secs(seconds));
        }
        for wrong in ["soon", "1.5", "-1"] {
            let message = hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", wrong)]).unwrap_err().to_string();
            assert!(message.contains("HF_HUB_DOWNLOAD_TIMEOUT"), "{message}");
        }
        for (value, none) in [("*", true), ("a, *", true), ("*.a", false), ("10.0.0.0/8", false)] {
            assert_eq!(hub(&[("NO_PROXY", value)]).unwrap().no_proxy, none, "{value}");
            assert_eq!(hub(&[("no_proxy", value)]).unwrap().no_proxy, none, "{value}");
        }
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        assert_eq!(split_id("org/name").unwrap(), ["org", "name"]);
        for id in ["", "a/b/c", "../x", "a b", "org/", "/x"] {
            assert!(split_id(id).is_err(), "{id}");
        }
    }
}
