//! From a ping system's answers and events to an agent's uptime.

pub(crate) mod client;
pub(crate) mod estimate;
pub(crate) mod outage;
pub(crate) mod subscription;
