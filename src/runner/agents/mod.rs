//! The agents of a run: one monitor and one submitter for each, and the fleet that adds and removes them.

pub mod fleet;
pub mod monitor;
pub mod setup;
pub mod submitter;
