//! HTTP as all parts use it: the client, the server, and the credentials of both.

pub(crate) mod browsers;
pub mod client;
mod connections;
pub(crate) mod credentials;
pub(crate) mod dial;
pub(crate) mod endpoint;
pub(crate) mod fingerprint;
pub(crate) mod job_client;
pub(crate) mod metrics;
pub mod server;
pub(crate) mod server_tls;
pub(crate) mod tls;
pub(crate) mod watched_file;
pub(crate) mod wrong_tokens;
