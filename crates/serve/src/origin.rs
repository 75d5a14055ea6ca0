//! Pages in a browser that ask.
//!
//! A page may send requests anywhere that its reader's machine reaches, this server on loopback among
//! them. Browsers say where the page is from, but for what a page reads from the host that it is of
//! itself; programs that are no browsers say nothing. So a request without a key has to be to a name of
//! this machine: a page's own name may be made to point here after the page was read.

use std::net::IpAddr;

use axum::http::{HeaderMap, header};

/// The origin of a page that is not this server's own; `None` where no page asks.
///
/// Its own is one of the host that the request is to, which [`elsewhere`] looks at.
pub(crate) fn foreign(headers: &HeaderMap) -> Option<String> {
    let origin = headers.get(header::ORIGIN)?;
    let origin = String::from_utf8_lossy(origin.as_bytes()).into_owned();
    let place = ["http://", "https://"].iter().find_map(|scheme| origin.strip_prefix(scheme));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let own = match (place, host) {
        (Some(place), Some(host)) => place.eq_ignore_ascii_case(host),
        _ => false,
    };
    (!own).then_some(origin)
}

/// The host that a request is to, where that is no name of this machine; empty where none is said.
pub(crate) fn elsewhere(headers: &HeaderMap) -> Option<String> {
    let host = headers.get(header::HOST).map_or(&b""[..], |host| host.as_bytes());
    let host = String::from_utf8_lossy(host);
    (!is_this_machine(&host)).then(|| host.into_owned())
}

/// `localhost` or an address of loopback, with a port or without.
fn is_this_machine(place: &str) -> bool {
    let host = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => place.split(':').next().unwrap_or_default(),
    };
    let loopback = host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
    loopback || host.eq_ignore_ascii_case("localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(host: &str, origin: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        headers.extend(origin.map(|origin| (header::ORIGIN, origin.parse().unwrap())));
        headers
    }

    fn is_foreign(origin: &str, host: &str) -> bool {
        foreign(&headers(host, Some(origin))).is_some()
    }

    #[test]
    fn only_pages_of_the_server_itself_may_ask() {
        for host in ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "model.example.org"] {
            assert_eq!(foreign(&headers(host, None)), None, "no page asks");
            assert!(!is_foreign(&format!("http://{host}"), host), "{host}");
            assert!(!is_foreign(&format!("https://{host}"), host), "{host}");
            assert!(is_foreign("http://example.org", host));
            assert!(is_foreign("http://127.0.0.1:1", host));
            assert!(is_foreign("null", host) && is_foreign("file://", host));
        }
    }

    #[test]
    fn names_of_this_machine_are_known() {
        for host in ["127.0.0.1:8080", "LocalHost:8080", "[::1]:8080", "127.9.0.1", "localhost"] {
            assert_eq!(elsewhere(&headers(host, None)), None, "{host}");
        }
        for host in ["example.org:8080", "localhost.example.org", "127.0.0.1.example.org", "x", ""]
        {
            assert_eq!(elsewhere(&headers(host, None)).as_deref(), Some(host));
        }
        assert_eq!(elsewhere(&HeaderMap::new()).as_deref(), Some(""));
    }
}
