//! `uptime-runner` sends paced jobs to a Livepeer BYOC gateway at the rate that a GPU agent's uptime
//! has earned, and accounts for every one.
//!
//! In the order in which data flows:
//! - [`wire`]: what crosses the network, with its limits; no I/O.
//! - [`runner`]: the job runner: pings → uptime → rate → paced jobs → outcomes → accounts → output.
//! - [`agent`]: the agent container: GPU checks → ledger → answers to pings.
//! - [`ping_system`]: the ping monitoring system: agents → pings → history → answers.
//! - [`records`]: the file that a recorded run leaves.
//! - [`report`]: what recorded runs say.
//! - [`sim`]: scripted counterparts, for `mock` and `demo`.
//!
//! Around them: [`cli`] turns what was typed into one checked value, [`units`] and
//! [`money`] are values that carry their unit, [`net`], [`open_files`],
//! [`shutdown`], [`telemetry`] and [`terminal`] are the edges.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        clippy::duration_suboptimal_units,
        clippy::float_cmp,
        clippy::needless_pass_by_value,
        clippy::unchecked_time_subtraction,
        reason = "a test's small, exact numbers, written as its table needs them"
    )
)]

pub mod agent;
pub mod cli;
pub mod money;
#[cfg(test)]
mod mutation;
pub mod net;
pub mod open_files;
pub mod option_values;
pub mod ping_system;
pub mod records;
pub mod report;
pub mod runner;
pub mod shutdown;
pub mod sim;
pub mod telemetry;
pub mod terminal;
pub mod text;
pub mod units;
pub mod wire;
