//! The one HTTP client for ping system and gateway.

use std::time::Duration;

use reqwest::tls::Certificate;
use reqwest::{Client, redirect, retry};

/// Shorter than the shortest keep-alive time of the servers that stand before gateways (uvicorn
/// and Node: 5 s), so that a job does not leave on a connection that is just being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a connection may take; longer is no connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A client that sends each request once, to the address that it is given and no other: it follows
/// no redirect, uses no proxy and does not try again. `with_tls` loads the system's roots, to which
/// `extra_roots` are added.
///
/// # Errors
/// When TLS is wanted and no roots can be loaded.
pub fn new(with_tls: bool, extra_roots: Vec<Certificate>) -> reqwest::Result<Client> {
    // An error here says that somebody chose a provider before, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        .user_agent(concat!("uptime-runner/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .no_proxy()
        // Names of headers as the contract and every tool on the way spell them.
        .http1_title_case_headers()
        .pool_idle_timeout(IDLE_TIMEOUT)
        .connect_timeout(CONNECT_TIMEOUT);
    // A machine without any roots must still be able to speak plain http.
    if with_tls {
        builder.tls_certs_merge(extra_roots)
    } else {
        builder.tls_certs_only(extra_roots)
    }
    .build()
}
