//! What happened: the one thing that accounts, text, JSON and metrics are fed with, so that they
//! cannot disagree.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use crate::money::Wei;
use crate::runner::roster::{AgentIndex, CapabilityIndex};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::gateway::Outcome;

/// Something that happened in a run.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// The run began.
    Started { ts: DateTime<Utc> },
    /// An agent is followed from now on.
    AgentJoined(AgentJoined),
    /// An agent is not followed any more.
    AgentLeft {
        ts: DateTime<Utc>,
        agent: AgentIndex,
    },
    /// The ping system was asked.
    Uptime(UptimePolled),
    /// Another rate took hold.
    RateChanged(RateChanged),
    /// The rate stays as it is, but other slots are accounted for.
    BaseChanged(RateChanged),
    /// What an agent's jobs say began to contradict what it claims, or no longer does.
    Claim(ClaimChecked),
    /// A job left.
    Sent,
    /// A job was answered, or given up.
    Job(JobDone),
    /// The policy withheld a slot of the base rate.
    Delayed(AgentIndex, CapabilityIndex),
    /// A slot found no place for a job, or was overdue.
    Dropped(AgentIndex, CapabilityIndex),
}

/// An agent that is followed from now on.
#[derive(Debug, Clone)]
pub(crate) struct AgentJoined {
    pub ts: DateTime<Utc>,
    /// Its place: one of those that were there before, or the next one.
    pub agent: AgentIndex,
    pub id: Arc<str>,
}

/// What an agent claims, beside what its jobs say.
#[derive(Debug, Clone)]
pub(crate) struct ClaimChecked {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// The uptime that it reports.
    pub uptime: Percent,
    /// What contradicts it, if anything does.
    pub contradiction: Option<Contradiction>,
}

/// Jobs that say something of their agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evidence {
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub good: u64,
}

/// A claim that the evidence contradicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Contradiction {
    /// The uptime at which what is claimed begins.
    pub claimed_tier: Percent,
    /// What contradicts it.
    pub evidence: Evidence,
    /// The share of jobs that succeeded.
    pub success: Percent,
    /// The chance of so few successes at most, if the claim were true.
    pub chance: f64,
}

/// What is known of an agent after asking the ping system.
#[derive(Debug, Clone)]
pub(crate) struct UptimePolled {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// How far it can be trusted.
    pub state: Freshness,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    /// Whether this question brought a good answer.
    pub answered: bool,
    /// How many pings the window holds.
    pub pings: usize,
    /// What else the ping system told, last it did.
    pub ping_stats: PingStats,
}

/// How far what is known of an agent's uptime can be trusted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// Known, and recently enough to be acted on.
    Fresh,
    /// Known once, but no good answer came for too long.
    Stale,
    /// Never known, or the ping system answers that it knows nothing of now.
    Unknown,
}

impl Freshness {
    /// As it stands in JSON and in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Stale => "stale",
            Self::Unknown => "unknown",
        }
    }
}

/// What the ping system tells of an agent beside its uptime; only shown.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PingStats {
    /// Poor pings in a row.
    pub consecutive_poor: Option<u64>,
    /// Minutes between pings.
    pub ping_interval_minutes: Option<f64>,
    /// Pings so far.
    pub total_pings: Option<u64>,
}

/// Why a rate changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RateReason {
    /// The uptime earns it.
    Uptime,
    /// The last known uptime became too old.
    Stale,
    /// The ping system knows of no uptime now.
    Unknown,
    /// The agent's jobs contradict the uptime that it reports.
    Evidence,
    /// The agent's part of a total rate is another one.
    Allotment,
    /// The agent's budget is spent.
    Budget,
}

impl RateReason {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Uptime,
        Self::Stale,
        Self::Unknown,
        Self::Evidence,
        Self::Allotment,
        Self::Budget,
    ];

    /// The reason of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// As it stands in JSON and in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uptime => "uptime",
            Self::Stale => "stale",
            Self::Unknown => "unknown",
            Self::Evidence => "evidence",
            Self::Allotment => "allotment",
            Self::Budget => "budget",
        }
    }
}

impl From<Freshness> for RateReason {
    fn from(state: Freshness) -> Self {
        match state {
            Freshness::Fresh => Self::Uptime,
            Freshness::Stale => Self::Stale,
            Freshness::Unknown => Self::Unknown,
        }
    }
}

/// Another rate of an agent.
#[derive(Debug, Clone)]
pub(crate) struct RateChanged {
    /// When it took hold.
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// The rate before.
    pub from: JobsPerMinute,
    /// The rate now.
    pub to: JobsPerMinute,
    /// The slots that are accounted for now: what full uptime would earn.
    pub base: JobsPerMinute,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    pub reason: RateReason,
}

/// A job and what came of it.
#[derive(Debug, Clone)]
pub(crate) struct JobDone {
    /// When it was sent.
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// Its name in both nodes' logs.
    pub job_id: Uuid,
    /// What it was.
    pub capability: CapabilityIndex,
    /// From its slot to the answer's last byte, so that a stalled client cannot hide.
    pub latency: Duration,
    /// How long after its slot it was sent.
    pub send_lag: Duration,
    /// The agent's rate when it was sent.
    pub rate: JobsPerMinute,
    /// The agent's uptime when it was sent.
    pub uptime: Percent,
    /// What it cost, where there is a price.
    pub cost: Option<Wei>,
    /// What came of it.
    pub answer: JobAnswer,
}

/// What a gateway answered, or why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JobAnswer {
    pub outcome: Outcome,
    /// The HTTP status, where one came.
    pub status: Option<u16>,
    /// Who did the job.
    pub orchestrator: Option<String>,
    /// The wei left with that orchestrator; may be negative.
    pub balance_wei: Option<String>,
    /// What the orchestrator added.
    pub metadata: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

impl JobAnswer {
    /// No answer, and why.
    #[must_use]
    pub(crate) fn failure(outcome: Outcome, error: String) -> Self {
        Self {
            outcome,
            status: None,
            orchestrator: None,
            balance_wei: None,
            metadata: None,
            error: Some(error),
        }
    }
}
