//! A batch of pings in the form in which one statement stores it.

use deadpool_postgres::Client;
use tokio_postgres::Error;
use uuid::Uuid;

use super::super::rows::{AgentDetails, count, interval_micros, json, last_success};
use super::super::{Claim, PingRecord};
use super::listen;

const RECORD: &str = include_str!("record.sql");

/// The columns of a batch of pings, as `record.sql` takes them.
#[derive(Default)]
pub(super) struct Batch {
    key: Vec<i64>,
    lease: Vec<String>,
    next_ping_at: Vec<i64>,
    ping_interval_us: Vec<i64>,
    total_pings: Vec<i64>,
    consecutive_poor: Vec<i64>,
    good_in_a_row: Vec<i64>,
    at: Vec<i64>,
    last_ping_at: Vec<Option<i64>>,
    last_success: Vec<Option<i64>>,
    last_uptime_percent: Vec<Option<f64>>,
    success: Vec<i64>,
    uptime_percent: Vec<Option<f64>>,
    window_seconds: Vec<Option<f64>>,
    gpu_available: Vec<Option<i64>>,
    first_ping: Vec<i64>,
    response_time_ms: Vec<Option<f64>>,
    error: Vec<Option<String>>,
    covered_seconds: Vec<f64>,
    event: Vec<String>,
    covers_from: Vec<Option<i64>>,
    supersedes_from: Vec<Option<i64>>,
    supersedes_after_seq: Vec<Option<i64>>,
    answered_poor: Vec<i64>,
    answered_good: Vec<i64>,
    observed: Vec<i64>,
    status: Vec<&'static str>,
    details: Vec<String>,
}

impl Batch {
    pub(super) fn new(origin: Uuid, pings: &[(Claim, PingRecord)]) -> Self {
        let mut batch = Self::default();
        for (claim, new) in pings {
            let (agent, ping) = (&new.after.agent, &new.ping);
            batch.key.push(claim.known.key);
            batch.lease.push(claim.token.clone());
            batch
                .next_ping_at
                .push(agent.next_ping_at.timestamp_micros());
            batch
                .ping_interval_us
                .push(interval_micros(agent.ping_interval_minutes));
            batch.total_pings.push(count(agent.total_pings));
            batch
                .consecutive_poor
                .push(new.after.streak.consecutive_poor.into());
            batch
                .good_in_a_row
                .push(new.after.streak.good_in_a_row.into());
            batch.at.push(ping.timestamp.timestamp_micros());
            batch
                .last_ping_at
                .push(agent.last_ping_at.map(|at| at.timestamp_micros()));
            batch.last_success.push(last_success(agent.status));
            batch
                .last_uptime_percent
                .push(agent.last_uptime_percent.map(f64::from));
            batch.success.push(ping.success.into());
            batch
                .uptime_percent
                .push(ping.uptime_percent.map(f64::from));
            batch.window_seconds.push(ping.window_seconds);
            batch.gpu_available.push(ping.gpu_available.map(i64::from));
            batch.first_ping.push(ping.first_ping.into());
            batch.response_time_ms.push(ping.response_time_ms);
            batch.error.push(ping.error.clone());
            batch.covered_seconds.push(new.covered_seconds);
            batch
                .covers_from
                .push(ping.covers_from.map(|from| from.timestamp_micros()));
            batch.supersedes_from.push(
                new.supersedes
                    .map(|failures| failures.from.timestamp_micros()),
            );
            batch
                .supersedes_after_seq
                .push(new.supersedes.map(|failures| count(failures.after_seq)));
            batch
                .answered_poor
                .push(new.after.answered_streak.consecutive_poor.into());
            batch
                .answered_good
                .push(new.after.answered_streak.good_in_a_row.into());
            batch.observed.push(ping.observed.into());
            batch.status.push(agent.status.name());
            batch.details.push(json(&AgentDetails::of(&new.after)));
            batch.event.push(listen::payload(origin, agent, ping));
        }
        batch
    }

    /// Stores the pings whose claims are valid, and returns the agents' keys and the tokens of those.
    pub(super) async fn store(&self, client: &Client) -> Result<Vec<(i64, String)>, Error> {
        let record = client.prepare_cached(RECORD).await?;
        let rows = client
            .query(
                &record,
                &[
                    &self.key,
                    &self.lease,
                    &self.next_ping_at,
                    &self.ping_interval_us,
                    &self.total_pings,
                    &self.consecutive_poor,
                    &self.good_in_a_row,
                    &self.at,
                    &self.last_ping_at,
                    &self.last_success,
                    &self.last_uptime_percent,
                    &self.success,
                    &self.uptime_percent,
                    &self.window_seconds,
                    &self.gpu_available,
                    &self.first_ping,
                    &self.response_time_ms,
                    &self.error,
                    &self.covered_seconds,
                    &self.event,
                    &self.covers_from,
                    &self.supersedes_from,
                    &self.supersedes_after_seq,
                    &self.answered_poor,
                    &self.answered_good,
                    &self.observed,
                    &self.status,
                    &self.details,
                ],
            )
            .await?;
        rows.iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect()
    }
}
