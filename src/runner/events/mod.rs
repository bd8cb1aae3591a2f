//! What happens in a run, and all that is fed by it: accounts, metrics, output and records.

pub(crate) mod accounts;
pub(crate) mod database;
pub(crate) mod dispatcher;
pub(crate) mod event;
pub(crate) mod metrics;
pub(crate) mod output;
pub(crate) mod recorder;
pub(crate) mod require;
pub(crate) mod run_clock;
mod runner_metrics;
pub(crate) mod worker;
