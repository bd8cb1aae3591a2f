//! Stores pings.

use sqlx::{Any, Transaction};
use uuid::Uuid;

use super::super::rows::interval_micros;
use super::super::{Claim, PingRecord, StoreError};
use super::{MICROS_PER_HOUR, SqlStore};
use crate::wire::ping_system::served::{PingEvent, Status};

/// A ping that other processes on the same database are told of.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(in crate::ping_system::store) struct Notification {
    pub(in crate::ping_system::store) origin: Uuid,
    pub(in crate::ping_system::store) event: PingEvent,
}

impl From<&PingRecord> for PingEvent {
    fn from(new: &PingRecord) -> Self {
        let agent = &new.after.agent;
        Self {
            agent_id: agent.agent_id.clone(),
            status: agent.status,
            next_ping_at: agent.next_ping_at,
            total_pings: agent.total_pings,
            consecutive_poor_uptime: agent.consecutive_poor_uptime,
            ping_interval_minutes: agent.ping_interval_minutes,
            ping: new.ping.clone(),
        }
    }
}

impl SqlStore {
    /// Stores one ping and ends its claim; `false` where that was no longer good.
    pub(super) async fn store_ping(
        &self,
        transaction: &mut Transaction<'static, Any>,
        claim: &Claim,
        new: &PingRecord,
    ) -> Result<bool, StoreError> {
        let (agent, ping) = (&new.after.agent, &new.ping);
        let at = ping.timestamp.timestamp_micros();
        let seq = count(agent.total_pings);
        let updated = sqlx::query(
            "UPDATE agents SET next_ping_at = $1, ping_interval_us = $2, total_pings = $3, \
             consecutive_poor = $4, good_in_a_row = $5, last_ping_at = $6, last_success = $7, \
             last_uptime_percent = NULLIF($8, -1.0), lease = NULL, lease_until = NULL \
             WHERE key = $9 AND lease = $10",
        )
        .bind(agent.next_ping_at.timestamp_micros())
        .bind(interval_micros(agent.ping_interval_minutes))
        .bind(seq)
        .bind(i64::from(new.after.streak.consecutive_poor))
        .bind(i64::from(new.after.streak.good_in_a_row))
        .bind(at)
        .bind(i64::from(agent.status == Status::Active))
        .bind(or_nothing(agent.last_uptime_percent.map(f64::from)))
        .bind(claim.known.key)
        .bind(claim.token.as_str())
        .execute(&mut **transaction)
        .await?;
        if updated.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "INSERT INTO pings (agent_key, at, seq, success, uptime_percent, window_seconds, \
             gpu_available, first_ping, response_time_ms, error, covered_seconds) \
             VALUES ($1, $2, $3, $4, NULLIF($5, -1.0), NULLIF($6, -1.0), $7, $8, \
             NULLIF($9, -1.0), $10, $11)",
        )
        .bind(claim.known.key)
        .bind(at)
        .bind(seq)
        .bind(i64::from(ping.success))
        .bind(or_nothing(ping.uptime_percent.map(f64::from)))
        .bind(or_nothing(ping.window_seconds))
        .bind(ping.gpu_available.map(i64::from))
        .bind(i64::from(ping.first_ping))
        .bind(or_nothing(ping.response_time_ms))
        .bind(ping.error.clone())
        .bind(new.covered_seconds)
        .execute(&mut **transaction)
        .await?;
        if new.covered_seconds > 0.0 {
            let uptime = ping.uptime_percent.map_or(0.0, f64::from);
            sqlx::query(
                "INSERT INTO hours (agent_key, hour, up_seconds, covered_seconds) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (agent_key, hour) DO UPDATE SET \
                 up_seconds = hours.up_seconds + excluded.up_seconds, \
                 covered_seconds = hours.covered_seconds + excluded.covered_seconds",
            )
            .bind(claim.known.key)
            .bind(at.div_euclid(MICROS_PER_HOUR))
            .bind(new.covered_seconds * uptime / 100.0)
            .bind(new.covered_seconds)
            .execute(&mut **transaction)
            .await?;
        }
        if let Some(notify) = self.dialect.notify {
            let event = Notification {
                origin: self.origin,
                event: PingEvent::from(new),
            };
            if let Ok(event) = serde_json::to_string(&event) {
                sqlx::query(notify)
                    .bind(event)
                    .execute(&mut **transaction)
                    .await?;
            }
        }
        Ok(true)
    }
}

/// Stands for no number where all numbers are from 0, and becomes NULL in the statement: sqlx's Any
/// binds the lack of an f64 as that of an f32, which PostgreSQL keeps to for all later uses.
fn or_nothing(number: Option<f64>) -> f64 {
    number.unwrap_or(-1.0)
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
