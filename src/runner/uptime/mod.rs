//! From a ping system's answers and events to an agent's uptime.

pub mod client;
pub mod estimate;
pub mod subscription;
