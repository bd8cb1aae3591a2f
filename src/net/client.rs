//! The HTTP client of all parts: it connects only to the given address, and bounds what it reads.

use std::error::Error;
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::header::DATE;
use reqwest::{Client, ClientBuilder, Response, redirect, retry};
use rustls::pki_types::CertificateDer;

use super::tls;
use crate::text::foreign;

/// Shorter than the shortest keep-alive time of the servers that stand before gateways (uvicorn
/// and Node: 5 s), so that a job does not leave on a connection that is just being closed.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// How much is told of an error: it may quote what the other side sent, such as the names in a certificate.
const MAX_CAUSE_CHARS: usize = 300;
/// The timeout of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A client that sends each request once, to the address that it is given and no other: it follows
/// no redirect, uses no proxy and does not try again. `with_tls` loads the system's roots, to which
/// `extra_roots` are added.
///
/// # Errors
/// When TLS is wanted and no roots can be loaded.
pub fn new(with_tls: bool, extra_roots: Vec<CertificateDer<'static>>) -> anyhow::Result<Client> {
    Ok(builder(with_tls, extra_roots)?.build()?)
}

/// The builder of [`new`]'s client, for callers with further settings.
///
/// # Errors
/// When TLS is wanted and no roots can be loaded.
pub fn builder(
    with_tls: bool,
    extra_roots: Vec<CertificateDer<'static>>,
) -> anyhow::Result<ClientBuilder> {
    // An error means that a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        .user_agent(concat!("uptime-runner/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .no_proxy()
        // Header names as gateways and the tools before them spell them.
        .http1_title_case_headers()
        .pool_idle_timeout(IDLE_TIMEOUT)
        .connect_timeout(CONNECT_TIMEOUT);
    // A machine without root certificates must still be able to speak plain http.
    Ok(if with_tls {
        builder.tls_backend_preconfigured(tls::trusting(extra_roots)?)
    } else {
        builder.tls_certs_only([])
    })
}

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection was lost.
    #[error("{}", root_cause(.0))]
    Lost(#[from] reqwest::Error),
    /// The body is over the bound.
    #[error("answer over {0} bytes")]
    TooLong(usize),
}

/// Reads a body of at most `max_bytes`.
///
/// # Errors
/// A lost connection, or a longer body.
pub async fn read_body(mut response: Response, max_bytes: usize) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if body.len() + piece.len() > max_bytes {
            return Err(BodyError::TooLong(max_bytes));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

/// The `Date` of an answer, by the server's clock.
#[must_use]
pub(crate) fn date_of(response: &Response) -> Option<DateTime<Utc>> {
    let date = response.headers().get(DATE)?.to_str().ok()?;
    Some(DateTime::parse_from_rfc2822(date).ok()?.to_utc())
}

/// The innermost error, without the layers around it.
#[must_use]
pub fn root_cause(error: &reqwest::Error) -> String {
    cause_of(error)
}

/// The same of any error.
#[must_use]
pub(crate) fn cause_of(error: &(dyn Error + 'static)) -> String {
    let mut cause: &dyn Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    foreign(&cause.to_string(), MAX_CAUSE_CHARS)
}
