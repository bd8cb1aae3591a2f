//! HTTP as all parts use it: the client, the server, and the credentials of both.

pub mod client;
pub(crate) mod credentials;
pub(crate) mod dial;
pub(crate) mod endpoint;
pub(crate) mod fingerprint;
pub(crate) mod job_client;
pub(crate) mod metrics;
pub mod server;
pub(crate) mod tls;
