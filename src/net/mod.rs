//! One way to do HTTP for all parts: the client, the server, and the credentials of both.

pub mod client;
pub mod credentials;
pub mod endpoint;
pub mod metrics;
pub mod server;
