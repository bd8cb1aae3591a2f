//! `uptime-runner` sends paced jobs to a Livepeer BYOC gateway at the rate that a GPU agent's uptime has
//! earned, and accounts for every one. `.github/docs/architecture.md` has the map in words.
//!
//! Data flows down this list; an import never points up:
//! - [`cli`]: the commands; each flattens the options of its part.
//! - [`sim`]: scripted counterparts, for `mock` and `demo`.
//! - [`report`]: what recorded runs say.
//! - [`runner`]: the job runner: uptime → rate → paced jobs → outcomes → accounts and output.
//! - [`ping_system`]: the ping monitoring system: agents → pings → history → answers.
//! - [`agent`]: the agent container: GPU probes → ledger → answers to pings.
//! - [`wire`]: what crosses the network, with its limits, and the rules that both ends share; no I/O.
//! - [`net`]: client, server and credentials: one way to do HTTP for all parts.
//! - [`records`]: the file that a recorded run leaves.
//! - [`money`], [`units`], `option_values`: values that carry their unit.
//! - [`shutdown`], [`telemetry`], [`terminal`], `clock`, `open_files`, `text`: the edges.

// What no other crate can reach is `pub(crate)`, so that the compiler finds dead code.
#![warn(unreachable_pub)]
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
mod clock;
pub mod money;
#[cfg(test)]
mod mutation;
pub mod net;
mod open_files;
mod option_values;
pub mod ping_system;
mod private_files;
pub mod records;
pub mod report;
pub mod runner;
pub mod shutdown;
pub mod sim;
pub mod telemetry;
pub mod terminal;
mod text;
pub mod units;
pub mod wire;
