//! What crosses the network: types, how they are read and written, and their limits. No I/O.

pub mod agent;
pub mod charge;
pub(crate) mod coverage;
pub(crate) mod event_stream;
pub mod expectation;
pub mod gateway;
pub mod gateway_probe;
pub mod job_stream;
pub mod live_runner;
pub mod outcome;
pub mod ping_system;
#[cfg(test)]
mod recorded;
