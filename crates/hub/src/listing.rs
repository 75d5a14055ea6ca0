//! What the Hub says that a repository holds: pages of entries, each of which is data to be checked.

use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde::Deserialize;

use crate::hash::Digest;

/// The longest path that is taken from a listing, and its longest part: what file systems can hold.
const PATH_BYTES: usize = 1024;
const PART_BYTES: usize = 255;

/// A file of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path within the repository; stays within it.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// What it hashes to.
    pub digest: Digest,
    /// Git's name of it, which for a large file is that of a pointer.
    pub blob: String,
    /// Its name in the Hub's Xet storage, for other programs that share the cache.
    pub xet: Option<String>,
}

/// A page of a listing, or all of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The files that have a name which can be used.
    pub files: Vec<RemoteFile>,
    /// Files with names that would leave the repository's folder, or that no file system holds.
    /// They are left out, as most are of no use here.
    pub odd: usize,
}

/// An entry as the Hub sends it.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    oid: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
    #[serde(rename = "xetHash")]
    xet: Option<String>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl RemoteFile {
    /// A file as it is described: `blob` is git's hash, `lfs` hash and size of a large one.
    ///
    /// Hashes become file names, so they are not taken on trust.
    pub(crate) fn checked(
        path: String,
        size: u64,
        blob: String,
        lfs: Option<(String, u64)>,
        xet: Option<String>,
    ) -> Result<Self, String> {
        let (oid, bytes) = lfs.unwrap_or_else(|| (blob.clone(), size));
        let Some(digest) = Digest::parse(&oid) else {
            let oid: String = oid.chars().take(64).collect();
            return Err(format!("`{oid}` is no hash of `{path}`"));
        };
        let xet = xet.filter(|hash| matches!(Digest::parse(hash), Some(Digest::Sha256(_))));
        Ok(Self { path, bytes, digest, blob, xet })
    }

    #[cfg(test)]
    pub(crate) fn test(path: &str, bytes: u64, digest: &str) -> Self {
        let lfs = (digest.len() == 64).then(|| (digest.to_owned(), bytes));
        Self::checked(path.to_owned(), bytes, digest.to_owned(), lfs, None).unwrap()
    }
}

impl Listing {
    /// Reads the body of a listing's page.
    ///
    /// # Errors
    /// What is wrong with it, in words: it is no listing, or a file's hash is none.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        let entries: Vec<Entry> = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        let mut listing = Self::default();
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            if is_usable(&entry.path) {
                let lfs = entry.lfs.map(|lfs| (lfs.oid, lfs.size));
                let (path, size, blob) = (entry.path, entry.size, entry.oid);
                listing.files.push(RemoteFile::checked(path, size, blob, lfs, entry.xet)?);
            } else {
                listing.odd += 1;
            }
        }
        Ok(listing)
    }

    pub(crate) fn append(&mut self, page: Self) {
        self.files.extend(page.files);
        self.odd += page.odd;
    }
}

/// Whether a path can be one below a folder. A backslash is a letter as any other, as git has it.
pub(crate) fn is_usable(path: &str) -> bool {
    let usable = |part: &str| {
        !matches!(part, "" | "." | "..") && part.len() <= PART_BYTES && !part.contains('\0')
    };
    path.len() <= PATH_BYTES && path.split('/').all(usable)
}

/// A path that is a file's and that of a folder with files: no file system holds both.
pub(crate) fn clash(files: &[RemoteFile]) -> Option<&str> {
    let names: std::collections::BTreeSet<&str> = files.iter().map(|f| f.path.as_str()).collect();
    let folders = |path: &'_ str| path.match_indices('/').map(|(at, _)| at).collect::<Vec<_>>();
    files
        .iter()
        .flat_map(|file| folders(&file.path).into_iter().map(|at| &file.path[..at]))
        .find(|folder| names.contains(folder))
}

/// The next page of a listing, or why there is none although there should be.
///
/// It is asked for at the endpoint, whatever host it is said to be on: a mirror passes on the links
/// of the Hub behind it, a proxy may have changed the scheme, and the token goes to nobody else.
pub(crate) fn next_page(
    headers: &HeaderMap,
    current: &Url,
    endpoint: &Url,
) -> Result<Option<Url>, String> {
    let values =
        headers.get_all(LINK).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let links = values.collect::<Vec<_>>().join(", ");
    // An address may hold the comma that parts the links, but no `<`.
    let address = links.split('<').find_map(|link| {
        let (address, parameters) = link.split_once('>')?;
        parameters.replace('"', "").contains("rel=next").then_some(address)
    });
    let Some(address) = address else { return Ok(None) };
    let named = current.join(address).ok().filter(Url::has_host);
    let named = named.ok_or_else(|| format!("`{address}` is no address of a next page"))?;
    let next = on_endpoint(&named, endpoint);
    if next == *current {
        return Err(format!("the page after `{address}` is the same one"));
    }
    Ok(Some(next))
}

/// An address of the Hub, at the endpoint that was asked.
pub(crate) fn on_endpoint(named: &Url, endpoint: &Url) -> Url {
    let mut url = endpoint.clone();
    let root = endpoint.path().trim_end_matches('/');
    let below = named.path().starts_with(&format!("{root}/"));
    url.set_path(&format!("{}{}", if below { "" } else { root }, named.path()));
    url.set_query(named.query());
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_on_the_endpoint() {
        let hub = |endpoint: &str, link: &str| {
            let endpoint = Url::parse(endpoint).unwrap();
            let current = endpoint.join("api/tree?cursor=0").unwrap();
            let headers = HeaderMap::from_iter([(LINK, link.parse().unwrap())]);
            next_page(&headers, &current, &endpoint).map(|next| next.map(String::from))
        };
        let page = |link: &str| hub("http://hub:80/", link);
        let expected = Ok(Some("http://hub/api/tree?cursor=x,y".to_owned()));
        for link in [
            "<http://hub/api/tree?cursor=x,y>; rel=\"next\"",
            "</other>; rel=\"prev\", <?cursor=x,y>; rel=\"next\"",
            "<https://hub/api/tree?cursor=x,y>; rel=\"next\"",
            "<https://other:8080/api/tree?cursor=x,y>; rel=next",
        ] {
            assert_eq!(page(link), expected, "{link}");
        }
        for path in ["/api/tree", "/mirror/api/tree"] {
            let link = format!("<https://other{path}?cursor=x>; rel=\"next\"");
            let expected = Ok(Some("http://hub/mirror/api/tree?cursor=x".to_owned()));
            assert_eq!(hub("http://hub/mirror/", &link), expected);
        }
        assert_eq!(page("</other>; rel=\"prev\""), Ok(None));
        for link in ["<http://:0>; rel=\"next\"", "<?cursor=0>; rel=\"next\""] {
            assert!(page(link).is_err(), "{link}");
        }
    }

    fn parse(path: &str, oid: &str) -> Result<Listing, String> {
        let entry = serde_json::json!({"type": "file", "oid": oid, "path": path, "size": 1});
        Listing::parse(serde_json::json!([entry]).to_string().as_bytes())
    }

    #[test]
    fn listings_cannot_name_files_outside() {
        let oid = "a".repeat(40);
        for path in ["LLAMA 2 LICENSE/LICENSE.txt", "a\\b.json", "a\\..\\b"] {
            assert_eq!(parse(path, &oid).unwrap().files[0].path, path);
        }
        let (long, deep) = ("a".repeat(256), "a/".repeat(600) + "a");
        for path in ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".", "a\0b", &long, &deep] {
            let listing = parse(path, &oid).unwrap();
            assert_eq!((listing.files.len(), listing.odd), (0, 1), "{path}");
        }
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        assert!(parse("config.json", "../x").unwrap_err().contains("config.json"));
        for body in ["{}", "[1]", "[{}]", "<html>", "", "[{\"type\": \"file\", \"size\": -1}]"] {
            assert!(Listing::parse(body.as_bytes()).is_err(), "{body}");
        }
        assert_eq!(Listing::parse(b"[]").unwrap(), Listing::default());
    }

    #[test]
    fn a_file_and_a_folder_of_one_name_are_distinguished() {
        let files = |paths: &[&str]| -> Vec<RemoteFile> {
            let oid = "a".repeat(40);
            paths.iter().flat_map(|path| parse(path, &oid).unwrap().files).collect()
        };
        assert_eq!(clash(&files(&["a/b", "a.json", "a/b/c"])), Some("a/b"));
        assert_eq!(clash(&files(&["a/b", "a/c", "ab"])), None);
    }
}
