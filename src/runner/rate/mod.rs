//! From an agent's uptime to the rate at which it is sent jobs.

pub mod allocation;
pub mod claims;
pub mod controller;
pub mod decision;
pub mod job_stats;
pub mod policy;
