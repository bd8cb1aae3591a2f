//! The ping system's history: agents, their schedule and their pings, in SQLite or PostgreSQL. A ping that
//! [`Store::record`] has reported as stored survives `kill -9` and power loss.

pub mod postgres;
mod rows;
mod schema;
mod sql;
pub mod sqlite;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ping_system::interval::Streak;
use crate::ping_system::stretch::PingMarks;
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping, PingEvent, Status};

/// The longest that an operation takes, retries included; afterwards it fails.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest wait for an answer about the store's health.
const HEALTH_TIMEOUT: Duration = Duration::from_millis(800);

/// Agents, their pings, and the leases by which several ping systems share them.
///
/// Every operation ends within 10 s, whatever the database does. Dropping its future abandons the wait; a
/// write may still take effect.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync + 'static {
    /// Adds an agent that is due at `new.at`, or updates an agent's URL, capabilities and metadata; its history
    /// stays, and its schedule unless the URL is new: then it is due at `new.at`.
    async fn register(&self, new: &Registration) -> Result<AgentRecord, StoreError>;

    /// Removes an agent at `at`; `false` if there is none of that name. What is known of it is kept for the retention, and
    /// for an agent that is registered under the same name, unless it is to be forgotten. Its pings are deleted later by
    /// [`prune`](Self::prune).
    async fn remove(
        &self,
        agent_id: &str,
        at: DateTime<Utc>,
        forget: bool,
    ) -> Result<bool, StoreError>;

    async fn agent(&self, agent_id: &str) -> Result<Option<AgentRecord>, StoreError>;

    /// One page of agents, ordered by id.
    async fn agents(&self, page: AgentPage<'_>) -> Result<Vec<AgentRecord>, StoreError>;

    /// Counts over all agents; `due` is as of `now`.
    async fn totals(&self, now: DateTime<Utc>) -> Result<Totals, StoreError>;

    /// Leases up to `limit` due agents that nobody else has leased, the longest overdue first. Nobody else gets
    /// them until they are recorded or released, or the lease ends.
    async fn claim_due(&self, lease: Lease, limit: usize) -> Result<Vec<Claim>, StoreError>;

    /// Leases one agent, due or not.
    async fn claim(&self, lease: Lease, agent_id: &str) -> Result<Claimed, StoreError>;

    /// Ends leases without a ping.
    async fn release(&self, claims: &[Claim]) -> Result<(), StoreError>;

    /// When the next agent that nobody has leased is due.
    async fn next_due_at(&self, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError>;

    /// Stores pings in one transaction, and ends their claims. `false` for a ping whose claim was no longer
    /// valid: the agent was removed, or leased by another ping system.
    async fn record(&self, pings: Arc<[(Claim, PingRecord)]>) -> Result<Vec<bool>, StoreError>;

    /// Up to `limit` of an agent's pings after a cursor, oldest first.
    async fn history(
        &self,
        agent_key: i64,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, Ping)>, StoreError>;

    /// The newest `limit` of an agent's pings, oldest first.
    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError>;

    /// Sums over the pings of these agents, or of all, since an instant; exact to the ping. An agent may occur
    /// several times: its sums add up.
    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError>;

    /// The time of the database, which all ping systems on it share.
    async fn now(&self) -> Result<DateTime<Utc>, StoreError>;

    /// Makes due those agents whose next ping is further away than their interval, and ends leases that would end after
    /// `latest_lease_end`: a clock was set back since, or was ahead.
    async fn reschedule_overdue(
        &self,
        now: DateTime<Utc>,
        latest_lease_end: DateTime<Utc>,
    ) -> Result<(), StoreError>;

    /// Makes the failed pings since `since` of an agent unobserved for `reason`, replaces the agent by `after`, and ends
    /// the claim; `false` if that was no longer valid.
    async fn void_failures(
        &self,
        claim: &Claim,
        since: DateTime<Utc>,
        reason: &str,
        after: &AgentRecord,
    ) -> Result<bool, StoreError>;

    /// The time that was stored last by [`set_retention_now`](Self::set_retention_now).
    async fn retention_now(&self) -> Result<Option<DateTime<Utc>>, StoreError>;

    /// Stores up to when time has passed for the retention.
    async fn set_retention_now(&self, now: DateTime<Utc>) -> Result<(), StoreError>;

    /// Deletes some of what is older than `before`, or belongs to removed agents.
    async fn prune(&self, before: DateTime<Utc>, from: PruneCursor) -> Result<Pruned, StoreError>;

    /// Writes once, to find out whether the store works. Answers within 0.8 s.
    async fn health(&self) -> Result<StoreHealth, StoreError>;
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The database refused, or cannot be reached; the same may succeed later.
    #[error("database: {0}")]
    Unavailable(String),
    /// The program cannot work with this database until somebody changes it or the configuration.
    #[error("database: {0}")]
    Unusable(String),
    /// A row holds what this program never writes.
    #[error("database: agent '{agent_id}' has {what} that cannot be read: {error}")]
    Corrupt {
        agent_id: String,
        what: &'static str,
        error: String,
    },
}

impl StoreError {
    fn no_answer(within: Duration) -> Self {
        Self::Unavailable(format!("no answer within {} s", within.as_secs_f64()))
    }
}

/// What a working store says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoreHealth {
    /// `sqlite` or `postgresql`.
    pub kind: &'static str,
    /// The server's host and port; `None` for SQLite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// `None` for SQLite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<Replication>,
    /// The version of the tables.
    pub schema_version: i64,
}

/// Whether an acknowledged ping survives the loss of the PostgreSQL primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Replication {
    /// It does: a commit waits for a standby.
    Synchronous,
    /// There are standbys, which may lack the latest pings.
    Asynchronous,
    /// There is no standby.
    None,
}

/// Which agents a page holds.
#[derive(Debug, Clone, Copy)]
pub struct AgentPage<'a> {
    /// Only agents whose id is greater than this; empty for the first page.
    pub after: &'a str,
    /// Only agents that are due at this instant.
    pub due_at: Option<DateTime<Utc>>,
    /// The size of the page.
    pub limit: usize,
}

/// Counts over all agents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub agents: u64,
    pub unreachable: u64,
    pub no_gpu: u64,
    pub unobserved: u64,
    pub unknown: u64,
    pub due: u64,
    /// Agents with a count of poor pings.
    pub poor: u64,
    /// Pings of all agents.
    pub pings: u64,
}

impl Totals {
    /// The number of agents of a status.
    #[must_use]
    pub fn of(&self, status: Status) -> u64 {
        match status {
            Status::Unreachable => self.unreachable,
            Status::NoGpu => self.no_gpu,
            Status::Unobserved => self.unobserved,
            Status::Unknown => self.unknown,
            Status::Active => [self.unreachable, self.no_gpu, self.unobserved, self.unknown]
                .into_iter()
                .fold(self.agents, u64::saturating_sub),
        }
    }
}

/// What is said of an agent when it is registered.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration {
    pub agent_id: String,
    /// Where it answers.
    pub agent_url: String,
    /// Those that are known stay if this is `None`.
    pub capabilities: Option<Vec<String>>,
    /// As for the capabilities.
    pub metadata: Option<Map<String, Value>>,
    /// When it is registered.
    pub at: DateTime<Utc>,
    /// The interval that a new agent begins with.
    pub interval: Duration,
}

/// An agent as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentRecord {
    /// Never used twice: an agent that was removed and registered again has another one.
    pub key: i64,
    /// The part that the API shows.
    pub agent: Agent,
    /// What its ping interval follows from.
    pub streak: Streak,
    /// When it was last pinged with an answer. Of an agent that does not answer now it is known only once the agent is
    /// claimed.
    pub last_answered_at: Option<DateTime<Utc>>,
    /// The streak after that ping.
    pub answered_streak: Streak,
    /// When its last pings were, by a clock that cannot be set.
    pub marks: Option<PingMarks>,
    /// Its failed pings since it answered last.
    pub failures: Option<Failures>,
    /// Pings in a row that were not observed.
    pub unobserved_in_a_row: u32,
}

/// The failed pings of an agent since it answered last: what an answer supersedes. A clock may be set meanwhile, so that
/// instants alone do not tell their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// The earliest of their instants.
    pub from: DateTime<Utc>,
    /// The number of the agent's pings before the first of them.
    pub after_seq: u64,
}

impl AgentRecord {
    /// When the time begins that the next answer covers: at the end of what was answered for last.
    #[must_use]
    pub fn unanswered_since(&self) -> Option<DateTime<Utc>> {
        self.last_answered_at.or(self.agent.last_ping_at)
    }
}

impl Failures {
    /// All that follow an answered ping, where a release up to 0.1.0 stored them.
    #[must_use]
    pub(crate) fn since(answered_at: DateTime<Utc>) -> Self {
        Self {
            from: answered_at,
            after_seq: 0,
        }
    }
}

/// A lease from `now` to `until`.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    pub now: DateTime<Utc>,
    /// When others may take over.
    pub until: DateTime<Utc>,
}

/// An agent that this ping system has leased.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The agent as it was when it was claimed.
    pub known: AgentRecord,
    /// Identifies the lease.
    pub(super) token: String,
}

/// The result of an attempt to claim one agent.
#[derive(Debug)]
pub enum Claimed {
    Ours(Box<Claim>),
    /// Another lease of the agent is valid.
    Taken,
    /// There is no agent of that name.
    Unknown,
}

/// A ping to be stored, and the agent after it.
#[derive(Debug, Clone, PartialEq)]
pub struct PingRecord {
    pub ping: Ping,
    /// Its weight in a mean.
    pub covered_seconds: f64,
    /// The failed pings that this one supersedes.
    pub supersedes: Option<Failures>,
    pub after: AgentRecord,
}

impl From<&PingRecord> for PingEvent {
    fn from(new: &PingRecord) -> Self {
        Self {
            agent: new.after.agent.clone(),
            ping: new.ping.clone(),
        }
    }
}

/// A position in an agent's history: after the ping of this instant and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    at_micros: i64,
    seq: i64,
}

impl Cursor {
    /// Before the first ping at or after an instant.
    #[must_use]
    pub fn before(instant: DateTime<Utc>) -> Self {
        Self {
            at_micros: instant.timestamp_micros(),
            seq: -1,
        }
    }

    /// After the last ping at an instant.
    #[must_use]
    pub fn after(instant: DateTime<Utc>) -> Self {
        Self {
            at_micros: instant.timestamp_micros(),
            seq: i64::MAX,
        }
    }
}

/// The time that pings cover, and how much of it was up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sum {
    pub up_seconds: f64,
    pub covered_seconds: f64,
}

impl Sum {
    /// The mean uptime; `None` if no time is covered.
    #[must_use]
    pub fn uptime(self) -> Option<Percent> {
        if self.covered_seconds <= 0.0 {
            return None;
        }
        let percent = self.up_seconds / self.covered_seconds * 100.0;
        Percent::new(percent.min(100.0))
            .map(Percent::to_a_billionth)
            .ok()
    }
}

/// Where pruning goes on: with agents whose key is greater.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PruneCursor(i64);

/// The result of one step of pruning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// The number of deleted pings.
    pub pings: u64,
    /// Where the next step goes on; `None` after the last agent.
    pub next: Option<PruneCursor>,
    /// Whether some of these agents have more to be deleted.
    pub more: bool,
}

/// Rounds to the precision in which instants are stored, so that a time that is reported equals the stored one.
#[must_use]
pub fn whole_micros(at: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(at.timestamp_micros()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_that_cover_no_time_make_no_mean() {
        let uptime = |up_seconds, covered_seconds| {
            let sum = Sum {
                up_seconds,
                covered_seconds,
            };
            sum.uptime().map(f64::from)
        };
        assert_eq!(uptime(0.0, 0.0), None);
        assert_eq!(uptime(0.0, 10.0), Some(0.0));
        assert_eq!(uptime(9.9, 10.0), Some(99.0));
        // By a rounding error of many additions.
        assert_eq!(uptime(10.000_000_001, 10.0), Some(100.0));
    }
}
