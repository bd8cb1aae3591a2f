//! What an agent earned in a period, for its owner: all that both need to come to the same amount from
//! the same records (`.github/docs/money.md`).

pub(crate) mod jobs;
mod read;
mod sums;
pub mod verify;

use std::collections::BTreeMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

pub(crate) use self::read::{StatementFile, StatementQuery, read};
use super::timeline::Micros;
use crate::money::Wei;
use crate::units::{JobsPerMinute, Percent};

/// The format of the JSON.
const FORMAT: u32 = 1;

/// Statements of a period.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statements {
    pub statement: Head,
    pub agents: Vec<AgentStatement>,
    /// The hash of the list of jobs, if one was written.
    pub jobs_sha256: Option<String>,
}

/// What a statement is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Head {
    pub format: u32,
    /// RFC 3339 in UTC, like all times here.
    pub from: String,
    pub until: String,
    pub generated_at: String,
    pub software: String,
    pub complete: bool,
    pub incomplete_because: Vec<String>,
    pub runs: Vec<RunStatement>,
    /// The times without a run.
    pub gaps: Vec<Gap>,
}

/// A run that took part in the period.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunStatement {
    pub run: String,
    pub from: String,
    pub until: String,
    pub ended: Ended,
    pub policy: String,
    pub uptime_window: Option<String>,
    pub stale_after: Option<String>,
    pub ping_urls: Vec<String>,
    pub gateway_urls: Vec<String>,
    pub version: String,
    pub records_dropped: u64,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    Asked,
    Killed,
    Running,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gap {
    pub from: String,
    pub until: String,
}

/// What an agent earned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AgentStatement {
    pub agent_id: String,
    pub uptime_percent: Option<Percent>,
    pub slots: SlotSums,
    pub jobs: JobSums,
    pub withheld: Vec<WithheldInterval>,
    pub charged: Vec<ChargedAt>,
    pub days: Vec<Day>,
    pub amount_wei: Wei,
    pub amount_eth: String,
    pub amount_from: AmountSource,
    pub balances: Option<BalancesSpent>,
}

/// `asked` is the sum of all others.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SlotSums {
    pub asked: u64,
    pub sent: u64,
    /// By reason.
    pub withheld: BTreeMap<String, u64>,
    /// By reason.
    pub dropped: BTreeMap<String, u64>,
    /// Jobs that were sent and are not in the records.
    pub unaccounted: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct JobSums {
    pub sent: u64,
    pub succeeded: u64,
    /// In flight when the runner was killed.
    pub unknown: u64,
    pub outcomes: BTreeMap<String, OutcomeSum>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct OutcomeSum {
    pub jobs: u64,
    pub seconds: u64,
    pub amount_wei: Wei,
}

/// A time in which slots were withheld.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WithheldInterval {
    pub from: String,
    pub until: String,
    pub reason: String,
    /// In jobs per minute.
    pub rate: JobsPerMinute,
    /// The rate that full uptime would have earned.
    pub base_rate: JobsPerMinute,
    pub slots: u64,
}

/// Jobs of a capability that were charged by the same price.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChargedAt {
    pub capability: String,
    pub price_wei: String,
    pub per: &'static str,
    pub from: String,
    pub until: String,
    pub jobs: u64,
    pub seconds: u64,
    pub amount_wei: Wei,
}

/// A day in UTC.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Day {
    pub day: String,
    pub jobs: u64,
    pub succeeded: u64,
    pub amount_wei: Wei,
}

/// From what an amount is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AmountSource {
    Price,
    Balance,
    None,
}

/// What went from the balances that answers told.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BalancesSpent {
    pub spent_wei: Wei,
    /// By how much that is more than the amount.
    pub differs_by_wei: Wei,
}

/// An instant as RFC 3339 in UTC, exactly.
#[must_use]
pub(crate) fn instant(at: Micros) -> String {
    DateTime::<Utc>::from_timestamp_micros(at).map_or_else(
        || at.to_string(),
        |at| at.to_rfc3339_opts(SecondsFormat::Micros, true),
    )
}

/// The day in UTC.
#[must_use]
pub(crate) fn day(at: Micros) -> String {
    DateTime::<Utc>::from_timestamp_micros(at)
        .map_or_else(|| at.to_string(), |at| at.format("%Y-%m-%d").to_string())
}
