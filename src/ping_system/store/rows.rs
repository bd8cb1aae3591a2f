//! From the columns of a row to values; the same for both databases.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{AgentRecord, Cursor, Failures, StoreError};
use crate::ping_system::interval::Streak;
use crate::ping_system::stretch::PingMarks;
use crate::ping_system::warnings;
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping, Status};

/// The columns of [`AGENT_COLUMNS`](super::sql::AGENT_COLUMNS). Instants are microseconds since 1970.
pub(super) struct AgentRow {
    pub(super) key: i64,
    pub(super) agent_id: String,
    pub(super) agent_url: String,
    /// A JSON array.
    pub(super) capabilities: String,
    /// A JSON object.
    pub(super) metadata: String,
    pub(super) registered_at: i64,
    pub(super) next_ping_at: i64,
    pub(super) ping_interval_us: i64,
    pub(super) total_pings: i64,
    pub(super) consecutive_poor: i64,
    pub(super) good_in_a_row: i64,
    pub(super) last_ping_at: Option<i64>,
    pub(super) last_success: Option<i64>,
    pub(super) last_uptime_percent: Option<f64>,
    pub(super) answered_poor: Option<i64>,
    pub(super) answered_good: Option<i64>,
    pub(super) status: Option<String>,
    pub(super) status_seq: Option<i64>,
    /// [`AgentDetails`].
    pub(super) details: Option<String>,
}

/// What the last ping told of an agent, beyond what the database counts or sorts by.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct AgentDetails {
    last_error: Option<String>,
    clock_offset_seconds: Option<f64>,
    gpu_uuids: Vec<String>,
    source: Option<String>,
    agent_version: Option<String>,
    warnings: Vec<String>,
    marks: Option<PingMarks>,
    last_answered_at: Option<DateTime<Utc>>,
    failures: Option<Failures>,
    unobserved_in_a_row: u32,
}

impl AgentDetails {
    pub(super) fn of(record: &AgentRecord) -> Self {
        Self {
            last_error: record.agent.last_error.clone(),
            clock_offset_seconds: record.agent.clock_offset_seconds,
            gpu_uuids: record.agent.gpu_uuids.clone(),
            source: record.agent.source.clone(),
            agent_version: record.agent.agent_version.clone(),
            warnings: record.agent.warnings.clone(),
            marks: record.marks.clone(),
            last_answered_at: record.last_answered_at,
            failures: record.failures,
            unobserved_in_a_row: record.unobserved_in_a_row,
        }
    }
}

/// Whether an agent answered its last observed ping, as releases up to 0.1.0 store it: null before the first one.
pub(super) fn last_success(status: Status) -> Option<i64> {
    match status {
        Status::Unknown => None,
        Status::Unreachable => Some(0),
        Status::Active | Status::NoGpu | Status::Unobserved => Some(1),
    }
}

impl TryFrom<AgentRow> for AgentRecord {
    type Error = StoreError;

    fn try_from(row: AgentRow) -> Result<Self, StoreError> {
        let AgentRow { agent_id, .. } = row;
        let corrupt = |what, error: &dyn std::fmt::Display| StoreError::Corrupt {
            agent_id: agent_id.clone(),
            what,
            error: error.to_string(),
        };
        let count = |count: i64, what| u32::try_from(count).map_err(|error| corrupt(what, &error));
        let streak = Streak {
            consecutive_poor: count(row.consecutive_poor, "consecutive_poor")?,
            good_in_a_row: count(row.good_in_a_row, "good_in_a_row")?,
        };
        let is_failing = row.last_success == Some(0);
        let answered_streak = match (row.answered_poor, row.answered_good) {
            (Some(poor), Some(good)) if is_failing => Streak {
                consecutive_poor: count(poor, "answered_poor")?,
                good_in_a_row: count(good, "answered_good")?,
            },
            _ => streak,
        };
        let is_current = row.status_seq == Some(row.total_pings);
        let status = match (row.last_ping_at, is_failing) {
            (None, _) => Status::Unknown,
            (Some(_), true) => Status::Unreachable,
            (Some(_), false) => row
                .status
                .as_deref()
                .filter(|_| is_current)
                .and_then(Status::of_name)
                .unwrap_or(Status::Active),
        };
        let details: AgentDetails = match row.details.filter(|_| is_current) {
            Some(json) => {
                serde_json::from_str(&json).map_err(|error| corrupt("details", &error))?
            }
            None => AgentDetails::default(),
        };
        let agent = Agent {
            agent_url: row.agent_url,
            capabilities: serde_json::from_str(&row.capabilities)
                .map_err(|error| corrupt("capabilities", &error))?,
            metadata: Some(
                serde_json::from_str(&row.metadata).map_err(|error| corrupt("metadata", &error))?,
            ),
            status,
            registered_at: instant(row.registered_at),
            last_ping_at: row.last_ping_at.map(instant),
            next_ping_at: instant(row.next_ping_at),
            total_pings: u64::try_from(row.total_pings)
                .map_err(|error| corrupt("total_pings", &error))?,
            consecutive_poor_uptime: streak.consecutive_poor,
            ping_interval_minutes: minutes(row.ping_interval_us),
            last_uptime_percent: percent(row.last_uptime_percent)
                .map_err(|error| corrupt("last_uptime_percent", &error))?,
            last_error: details.last_error,
            clock_offset_seconds: details.clock_offset_seconds,
            gpu_uuids: details.gpu_uuids,
            source: details.source,
            agent_version: details.agent_version,
            warnings: if is_current {
                details.warnings
            } else {
                warnings::of_agent(&agent_id, None, &[])
            },
            agent_id: agent_id.clone(),
        };
        Ok(Self {
            key: row.key,
            last_answered_at: if is_failing {
                details.last_answered_at
            } else {
                agent.last_ping_at
            },
            answered_streak,
            agent,
            streak,
            marks: details.marks,
            failures: details.failures,
            unobserved_in_a_row: details.unobserved_in_a_row,
        })
    }
}

/// The columns of [`PING_COLUMNS`](super::sql::PING_COLUMNS).
pub(super) struct PingRow {
    pub(super) at: i64,
    pub(super) seq: i64,
    pub(super) success: i64,
    pub(super) uptime_percent: Option<f64>,
    pub(super) window_seconds: Option<f64>,
    pub(super) gpu_available: Option<i64>,
    pub(super) first_ping: i64,
    pub(super) response_time_ms: Option<f64>,
    pub(super) error: Option<String>,
    pub(super) covers_from: Option<i64>,
    pub(super) superseded: i64,
    pub(super) observed: i64,
}

impl TryFrom<PingRow> for (Cursor, Ping) {
    type Error = StoreError;

    fn try_from(row: PingRow) -> Result<Self, StoreError> {
        let ping = Ping {
            timestamp: instant(row.at),
            success: row.success != 0,
            uptime_percent: percent(row.uptime_percent).map_err(|error| {
                StoreError::Unavailable(format!("a ping at {} has {error}", instant(row.at)))
            })?,
            window_seconds: row.window_seconds,
            gpu_available: row.gpu_available.map(|gpu| gpu != 0),
            first_ping: row.first_ping != 0,
            response_time_ms: row.response_time_ms,
            error: row.error,
            covers_from: row.covers_from.map(instant),
            superseded: row.superseded != 0,
            observed: row.observed != 0,
        };
        let cursor = Cursor {
            at_micros: row.at,
            seq: row.seq,
        };
        Ok((cursor, ping))
    }
}

fn percent(stored: Option<f64>) -> Result<Option<Percent>, String> {
    stored
        .map(Percent::new)
        .transpose()
        .map_err(|error| error.to_string())
}

pub(super) fn instant(micros: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(micros).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

fn minutes(micros: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 285 years")]
    let micros = micros as f64;
    micros / 60e6
}

/// The stored form of an interval.
pub(super) fn interval_micros(minutes: f64) -> i64 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "saturates, far beyond any interval"
    )]
    let micros = (minutes * 60e6).round() as i64;
    micros
}

/// The stored form of a count or a page size.
pub(super) fn count(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// The stored form of names and JSON values, which can always be serialized.
pub(super) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
