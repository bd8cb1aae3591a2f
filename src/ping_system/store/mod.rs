//! What the ping system remembers. A ping that [`Store::record`] has said to be stored survives
//! `kill -9` and power loss.

pub mod postgres;
mod rows;
pub(crate) mod sql;
pub mod sqlite;

use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};

use crate::ping_system::interval::Streak;
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping};

/// Agents, their pings and who is asking which of them now.
#[async_trait]
pub trait Store: std::fmt::Debug + Send + Sync + 'static {
    /// Adds an agent that is due at `now`, or updates what was said of it at an earlier
    /// registration: its history and its place in the schedule stay.
    async fn register(&self, new: &Registration) -> Result<AgentRecord, StoreError>;

    /// Forgets an agent; `false` where there is none of that name.
    async fn remove(&self, agent_id: &str) -> Result<bool, StoreError>;

    async fn agent(&self, agent_id: &str) -> Result<Option<AgentRecord>, StoreError>;

    /// All agents by name, or those whose next ping is due at `due_at`.
    async fn agents(&self, due_at: Option<DateTime<Utc>>) -> Result<Vec<AgentRecord>, StoreError>;

    /// Takes up to `limit` due agents that nobody is asking, those first that are due for the
    /// longest. Nobody else gets them before they are recorded or released, or the lease ends.
    async fn claim_due(&self, lease: Lease, limit: usize) -> Result<Vec<Claim>, StoreError>;

    /// Takes one agent, due or not.
    async fn claim(&self, lease: Lease, agent_id: &str) -> Result<Claimed, StoreError>;

    /// Gives agents back without a ping.
    async fn release(&self, claims: &[Claim]) -> Result<(), StoreError>;

    /// When the next agent that nobody is asking is due.
    async fn next_due_at(&self, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError>;

    /// Stores pings all at once, and ends their claims. `false` for a ping whose claim was no
    /// longer good: the agent is gone, or was taken over by somebody else.
    async fn record(&self, pings: &[(Claim, PingRecord)]) -> Result<Vec<bool>, StoreError>;

    /// Up to `limit` of an agent's pings behind a cursor, oldest first.
    async fn history(
        &self,
        agent_key: i64,
        behind: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, Ping)>, StoreError>;

    /// The last `limit` of an agent's pings, oldest first.
    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError>;

    /// What each of these agents, or all, summed up since an instant: exact to the ping.
    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError>;

    /// Makes those agents due whose next ping is further off than their interval: the clock was set
    /// back since it was planned.
    async fn reschedule_overdue(&self, now: DateTime<Utc>) -> Result<(), StoreError>;

    /// Deletes a little of what is older than `before`, or belongs to agents that were removed.
    async fn prune(&self, before: DateTime<Utc>, from: PruneCursor) -> Result<Pruned, StoreError>;

    /// Whether it can be written to.
    async fn check(&self) -> Result<(), StoreError>;
}

/// Why something was not read or not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refused, or cannot be reached.
    #[error("database: {0}")]
    Database(#[from] sqlx::Error),
    /// It did not answer in time.
    #[error("database: no answer in {}s", .0.as_secs())]
    Timeout(Duration),
    /// It holds what this program never writes.
    #[error("database: agent '{agent_id}' has {what} that cannot be read: {error}")]
    Corrupt {
        agent_id: String,
        what: &'static str,
        /// What is wrong.
        error: String,
    },
}

/// What is said of an agent when it is registered.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration {
    pub agent_id: String,
    /// Where it answers.
    pub agent_url: String,
    /// What it can do.
    pub capabilities: Vec<String>,
    /// Whatever else is to be kept.
    pub metadata: Map<String, Value>,
    /// When this is said.
    pub at: DateTime<Utc>,
    /// The interval that a new agent begins with.
    pub interval: Duration,
}

/// All that is known of an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct AgentRecord {
    /// Another for each agent, and for one that was removed and came back.
    pub key: i64,
    /// What is told.
    pub agent: Agent,
    /// What its interval follows from.
    pub streak: Streak,
}

/// Who asks from now until when.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    pub now: DateTime<Utc>,
    /// When others may take over.
    pub until: DateTime<Utc>,
}

/// An agent that is ours to ask.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The agent, as it was when it was claimed.
    pub known: AgentRecord,
    /// What proves that it is still ours.
    pub(super) token: String,
}

/// What came of an attempt to claim one agent.
#[derive(Debug)]
pub enum Claimed {
    /// It is ours.
    Ours(Box<Claim>),
    /// Somebody is asking it at this moment.
    Taken,
    /// There is no agent of that name.
    Unknown,
}

/// A ping that is to be kept, and what it makes of its agent.
#[derive(Debug, Clone, PartialEq)]
pub struct PingRecord {
    pub ping: Ping,
    /// What it weighs in a mean.
    pub covered_seconds: f64,
    /// The agent after it.
    pub after: AgentRecord,
}

/// A cursor in an agent's history: behind the ping of this instant and number.
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
}

/// Seconds up of seconds that pings speak for.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sum {
    pub up_seconds: f64,
    pub covered_seconds: f64,
}

impl Sum {
    /// The mean uptime; `None` where no ping speaks for any time.
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

/// What one step of pruning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pruned {
    /// Pings that are gone.
    pub pings: u64,
    /// Where the next step goes on; `None` when all agents had their turn.
    pub next: Option<PruneCursor>,
    /// Whether some of these agents have more to be deleted.
    pub more: bool,
}

/// As exact as instants are stored, so that a time that is told is the time that was stored.
#[must_use]
pub fn whole_micros(at: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(at.timestamp_micros()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_that_speak_for_no_time_make_no_mean() {
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
