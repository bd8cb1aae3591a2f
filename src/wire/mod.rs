//! What crosses the network: types, how they are read and written, and their limits. No I/O.

pub mod agent;
pub mod coverage;
pub mod event_stream;
pub mod gateway;
pub mod ping_system;
