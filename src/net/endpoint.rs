//! Addresses of HTTP servers that this program calls.

use url::Url;

use super::credentials::Token;

/// An HTTP server that this program calls.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its base URL.
    pub url: Url,
    /// The bearer token.
    pub token: Option<Token>,
}

/// `base` with `path` added by exactly one slash: a gateway redirects what has two of them, or none
/// at the end.
#[must_use]
pub(crate) fn with_path(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let before = base.path().trim_end_matches('/');
    let slash = if path.trim_matches('/').is_empty() {
        ""
    } else {
        "/"
    };
    let after = path.trim_start_matches('/');
    url.set_path(&format!(
        "{before}{slash}{}",
        if slash.is_empty() { "" } else { after }
    ));
    url
}
