//! What happens in a run, and all that is fed by it: accounts, metrics, output and records.

pub mod accounts;
pub mod database;
pub mod event;
pub mod metrics;
pub mod output;
pub mod recorder;
pub mod require;
pub mod worker;
