//! The agents of a run: one monitor and one submitter for each, and the fleet that adds and removes them.

pub(crate) mod destinations;
pub(crate) mod fleet;
pub(crate) mod monitor;
pub(crate) mod setup;
pub(crate) mod submitter;
