//! From an agent's uptime to the rate at which it is sent jobs.

pub(crate) mod allocation;
pub(crate) mod claims;
pub(crate) mod controller;
pub(crate) mod decision;
pub(crate) mod job_stats;
pub(crate) mod pause;
pub(crate) mod policy;
pub(crate) mod refusals;
