//! From rows to values.

use std::error::Error;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use sqlx::Row;
use sqlx::any::AnyRow;

use super::{AgentRecord, Cursor, StoreError};
use crate::ping_system::interval::Streak;
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping, Status};

/// The columns that [`known`] reads, by their places: looking for names takes longer than all else.
pub(super) const AGENT_COLUMNS: &str = "key, agent_id, agent_url, capabilities, metadata, \
    registered_at, next_ping_at, ping_interval_us, total_pings, consecutive_poor, good_in_a_row, \
    last_ping_at, last_success, last_uptime_percent";

pub(super) fn known(row: &AnyRow) -> Result<AgentRecord, StoreError> {
    let agent_id: String = row.try_get(1)?;
    let corrupt = |what: &'static str, error: String| StoreError::Corrupt {
        agent_id: agent_id.clone(),
        what,
        error,
    };
    let count = |column: usize, name: &'static str| -> Result<u32, StoreError> {
        let count: i64 = row.try_get(column)?;
        u32::try_from(count).map_err(|error| corrupt(name, error.to_string()))
    };
    let streak = Streak {
        consecutive_poor: count(9, "consecutive_poor")?,
        good_in_a_row: count(10, "good_in_a_row")?,
    };
    let last_success: Option<i64> = row.try_get(12)?;
    let interval_us: i64 = row.try_get(7)?;
    let total_pings: i64 = row.try_get(8)?;
    let last_ping_at: Option<i64> = row.try_get(11)?;
    let last_uptime: Option<f64> = row.try_get(13)?;
    let agent = Agent {
        agent_url: row.try_get(2)?,
        capabilities: serde_json::from_str(row.try_get(3)?)
            .map_err(|error| corrupt("capabilities", error.to_string()))?,
        metadata: serde_json::from_str(row.try_get(4)?)
            .map_err(|error| corrupt("metadata", error.to_string()))?,
        status: if last_success == Some(0) {
            Status::Unreachable
        } else {
            Status::Active
        },
        registered_at: instant(row.try_get(5)?),
        last_ping_at: last_ping_at.map(instant),
        next_ping_at: instant(row.try_get(6)?),
        total_pings: u64::try_from(total_pings)
            .map_err(|error| corrupt("total_pings", error.to_string()))?,
        consecutive_poor_uptime: streak.consecutive_poor,
        ping_interval_minutes: minutes(interval_us),
        last_uptime_percent: percent(last_uptime)
            .map_err(|error| corrupt("last_uptime_percent", error))?,
        agent_id: agent_id.clone(),
    };
    Ok(AgentRecord {
        key: row.try_get(0)?,
        agent,
        streak,
    })
}

/// What [`pings`] reads, as the elements of a JSON array. Fractions come as whole numbers of the
/// unit that they were rounded to before they were stored: databases write no fraction exactly.
pub(super) const PING_ELEMENTS: &str = "at, seq, success, \
    CAST(ROUND(uptime_percent * 1e9) AS BIGINT), CAST(ROUND(window_seconds * 1e6) AS BIGINT), \
    gpu_available, first_ping, CAST(ROUND(response_time_ms * 1e3) AS BIGINT), error";

/// One of them.
#[derive(Deserialize)]
struct Elements(
    i64,
    i64,
    u8,
    Option<i64>,
    Option<i64>,
    Option<u8>,
    u8,
    Option<i64>,
    Option<String>,
);

/// Pings out of the one JSON text that holds them all: for each row by itself the thread of the
/// database would have to wake ours.
pub(super) fn pings(text: Option<&str>) -> Result<Vec<(Cursor, Ping)>, StoreError> {
    let corrupt =
        |error: Box<dyn Error + Send + Sync>| StoreError::from(sqlx::Error::Decode(error));
    let rows: Vec<Elements> =
        serde_json::from_str(text.unwrap_or("[]")).map_err(|error| corrupt(error.into()))?;
    #[expect(clippy::cast_precision_loss, reason = "as exact as what was stored")]
    let fraction = |units: Option<i64>, a_whole: f64| units.map(|units| units as f64 / a_whole);
    let ping = |row: Elements| {
        let Elements(at_micros, seq, success, uptime, window, gpu, first, response_time, error) =
            row;
        let ping = Ping {
            timestamp: instant(at_micros),
            success: success != 0,
            uptime_percent: percent(fraction(uptime, 1e9))
                .map_err(|error| corrupt(error.into()))?,
            window_seconds: fraction(window, 1e6),
            gpu_available: gpu.map(|gpu| gpu != 0),
            first_ping: first != 0,
            response_time_ms: fraction(response_time, 1e3),
            error,
        };
        Ok((Cursor { at_micros, seq }, ping))
    };
    rows.into_iter().map(ping).collect()
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

/// Minutes of an interval that was stored in microseconds, as they were told before.
pub(super) fn minutes(micros: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 285 years")]
    let micros = micros as f64;
    micros / 60e6
}

/// The other way round.
pub(super) fn interval_micros(minutes: f64) -> i64 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "saturates, far beyond any interval"
    )]
    let micros = (minutes * 60e6).round() as i64;
    micros
}
