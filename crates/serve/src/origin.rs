//! Pages in a browser that ask.
//!
//! A page may send requests anywhere that its reader's machine reaches, this server on loopback among
//! them. Browsers say with every such request where the page is from; programs that are no browsers
//! say nothing.

use std::net::IpAddr;

use axum::http::{HeaderMap, header};

/// The origin of a page that is not this server's own; `None` where no page asks.
///
/// Its own is one of the host that the request is to. Without a key that has to be a name of this
/// machine itself: a page's own name may be made to point here after it was read.
pub(crate) fn foreign(headers: &HeaderMap, has_key: bool) -> Option<String> {
    let origin = headers.get(header::ORIGIN)?;
    let origin = String::from_utf8_lossy(origin.as_bytes()).into_owned();
    let place = ["http://", "https://"].iter().find_map(|scheme| origin.strip_prefix(scheme));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let own = match (place, host) {
        (Some(place), Some(host)) => {
            place.eq_ignore_ascii_case(host) && (has_key || is_this_machine(place))
        }
        _ => false,
    };
    (!own).then_some(origin)
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

    fn is_foreign(origin: &str, host: &str, has_key: bool) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        assert_eq!(foreign(&headers, has_key), None, "no page asks");
        headers.insert(header::ORIGIN, origin.parse().unwrap());
        foreign(&headers, has_key).is_some()
    }

    #[test]
    fn only_pages_of_the_server_itself_may_ask() {
        for host in ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "127.9.0.1"] {
            assert!(!is_foreign(&format!("http://{host}"), host, false), "{host}");
            assert!(is_foreign("http://example.org", host, false));
            assert!(is_foreign("http://127.0.0.1:1", host, true));
            assert!(is_foreign("null", host, true) && is_foreign("file://", host, true));
        }
        // A name of another's that points here, and one that a key stands before.
        assert!(is_foreign("http://example.org:8080", "example.org:8080", false));
        assert!(is_foreign("http://localhost.example.org", "localhost.example.org", false));
        assert!(!is_foreign("https://model.example.org", "model.example.org", true));
    }
}
