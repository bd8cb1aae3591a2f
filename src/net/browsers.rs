//! Keeps pages in somebody's browser from using our servers in that person's name: through a name that leads here (DNS
//! rebinding), or by requests that another site's page makes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;

use super::server::error;

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Which names of a server requests may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedHosts {
    names: Vec<String>,
    /// Whether other names than these are refused.
    is_strict: bool,
}

impl AllowedHosts {
    /// Names, beside localhost and IP addresses, of a server that listens at an address. Others are refused if some are
    /// given, or on loopback without a token: there nothing else tells who asks.
    #[must_use]
    pub(crate) fn new(names: Vec<String>, listen: SocketAddr, has_tokens: bool) -> Self {
        let is_strict = !names.is_empty() || (listen.ip().is_loopback() && !has_tokens);
        Self { names, is_strict }
    }

    /// Whether a request may use the name in its `Host`, which has a port or not.
    fn allows(&self, host: &str) -> bool {
        let name = without_port(host);
        !self.is_strict
            || name.eq_ignore_ascii_case("localhost")
            || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
            || self.names.iter().any(|allowed| {
                allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host)
            })
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Checks each request of a server's routes.
pub(crate) fn guard_against_pages(router: Router, hosts: AllowedHosts) -> Router {
    router.layer(middleware::from_fn_with_state(Arc::new(hosts), check))
}

async fn check(State(hosts): State<Arc<AllowedHosts>>, request: Request, next: Next) -> Response {
    match refusal(&hosts, request.method(), request.headers()) {
        None => next.run(request).await,
        Some(text) => error(StatusCode::FORBIDDEN, text),
    }
}

fn refusal(hosts: &AllowedHosts, method: &Method, headers: &HeaderMap) -> Option<&'static str> {
    let host = headers.get(header::HOST).map(|host| host.to_str());
    if host.is_some_and(|host| !host.is_ok_and(|host| hosts.allows(host))) {
        Some("Host: expected localhost, an IP address or one of --allowed-hosts")
    } else if !method.is_safe() && is_of_another_page(headers) {
        Some("a page of another origin may not change anything here")
    } else {
        None
    }
}

/// Whether a page of another origin makes a request.
#[must_use]
pub(crate) fn is_of_another_page(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let site = headers
        .get(SEC_FETCH_SITE)
        .map(header::HeaderValue::as_bytes);
    let is_foreign_site = site.is_some_and(|site| ![&b"same-origin"[..], b"none"].contains(&site));
    let origin = headers.get(header::ORIGIN).map(|origin| {
        let origin = origin.to_str().unwrap_or("null");
        origin
            .split_once("://")
            .map_or("", |(_, authority)| authority)
    });
    let is_foreign_origin =
        origin.is_some_and(|origin| host.is_none_or(|host| !origin.eq_ignore_ascii_case(host)));
    is_foreign_site || is_foreign_origin
}

/// Whether a browser makes a request: it tells from which page.
#[must_use]
pub(crate) fn is_of_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(header::ORIGIN) || headers.contains_key(SEC_FETCH_SITE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &str)| {
            (
                name.parse::<header::HeaderName>().unwrap(),
                value.parse().unwrap(),
            )
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn on_loopback_without_a_token_only_its_own_names_are_accepted() {
        let loopback: SocketAddr = "127.0.0.1:8000".parse().unwrap();
        let open = AllowedHosts::new(vec!["Ping.example".to_owned()], loopback, false);
        for (host, allowed) in [
            ("localhost:8000", true),
            ("LOCALHOST", true),
            ("127.0.0.1:8000", true),
            ("[::1]:8000", true),
            ("192.0.2.7", true),
            ("ping.example:8000", true),
            ("evil.example:8000", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example:8000", false),
            ("", false),
        ] {
            assert_eq!(open.allows(host), allowed, "{host}");
        }
        let beyond = "0.0.0.0:8000".parse().unwrap();
        assert!(AllowedHosts::new(Vec::new(), loopback, true).allows("evil.example"));
        assert!(AllowedHosts::new(Vec::new(), beyond, false).allows("evil.example"));
        assert!(!AllowedHosts::new(vec!["a".to_owned()], beyond, true).allows("b"));
    }

    #[test]
    fn pages_of_other_origins_change_nothing() {
        let hosts = AllowedHosts::default();
        let host = ("host", "localhost:8000");
        for (pairs, refused) in [
            (&[host][..], false),
            (&[host, ("origin", "http://localhost:8000")], false),
            (&[host, ("origin", "http://LOCALHOST:8000")], false),
            (&[host, ("origin", "http://localhost:9000")], true),
            (&[host, ("origin", "https://evil.example")], true),
            (&[host, ("origin", "null")], true),
            (&[("origin", "http://localhost:8000")], true),
            (&[host, ("sec-fetch-site", "same-origin")], false),
            (&[host, ("sec-fetch-site", "none")], false),
            (&[host, ("sec-fetch-site", "cross-site")], true),
            (&[host, ("sec-fetch-site", "same-site")], true),
        ] {
            let headers = headers(pairs);
            for method in [Method::POST, Method::DELETE, Method::PUT] {
                let got = super::refusal(&hosts, &method, &headers);
                assert_eq!(got.is_some(), refused, "{method} {pairs:?}");
            }
            assert_eq!(super::refusal(&hosts, &Method::GET, &headers), None);
        }
    }
}
