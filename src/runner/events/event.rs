//! What happened: the one thing that accounts, text, JSON and metrics are fed with, so that they
//! cannot disagree.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use crate::money::Wei;
use crate::runner::rate::pause::PauseChange;
use crate::runner::roster::{AgentIndex, CapabilityIndex};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::charge::Work;
use crate::wire::live_runner::ListedRunner;
use crate::wire::outcome::Outcome;
use crate::wire::ping_system::HistoryPing;

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
    /// A poll of the ping system ended, or a ping arrived.
    Uptime(UptimePolled),
    /// The rate changed.
    RateChanged(RateChanged),
    /// The rate is the same, but the base rate changed.
    BaseChanged(RateChanged),
    /// An agent's jobs began to contradict its claim, or no longer do.
    Claim(ClaimChecked),
    /// An agent's jobs stop, or go on, because of `--pause-after`.
    Pause(PauseChanged),
    /// An orchestrator was asked for its live runners.
    Discovery(RunnerDiscovered),
    /// An orchestrator turned out to call itself by another name.
    Alias(AliasLearnt),
    /// A job was sent.
    Sent(JobSent),
    /// A job was answered, or given up.
    Job(JobDone),
    /// The policy withheld a slot of the base rate.
    Delayed(AgentIndex, CapabilityIndex),
    /// There was no permit or no money for a slot, or it was overdue.
    Dropped(AgentIndex, CapabilityIndex, DropReason),
    /// No more jobs are sent; those in flight are waited for.
    Stopping { ts: DateTime<Utc> },
}

/// Why a slot was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// As many jobs as may be were in flight.
    InFlight,
    /// It was so late that sending it would have been a burst.
    Late,
    /// Nothing could be reserved for it just then.
    Budget,
}

impl DropReason {
    /// All of them, in the order of their declaration.
    pub(crate) const ALL: [Self; 3] = [Self::InFlight, Self::Late, Self::Budget];
}

/// A job that left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobSent {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    pub job_id: Uuid,
    pub capability: CapabilityIndex,
}

/// The pings that a ping system told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PolledPings {
    /// The ping system's time when it was asked.
    pub ping_time: DateTime<Utc>,
    /// Oldest first.
    pub pings: Vec<HistoryPing>,
}

/// An agent joined.
#[derive(Debug, Clone)]
pub(crate) struct AgentJoined {
    pub ts: DateTime<Utc>,
    /// An index that it had before, or the next one.
    pub agent: AgentIndex,
    pub id: Arc<str>,
}

/// An agent's jobs stop because none of them does any good, or go on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PauseChanged {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    pub change: PauseChange,
    /// How the job ended that decided.
    pub outcome: Outcome,
}

/// What an orchestrator says of an agent's live runner.
#[derive(Debug, Clone)]
pub(crate) struct RunnerDiscovered {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    pub listing: Listing,
    /// Whether it says something else than before, apart from the places in use.
    pub is_new: bool,
}

/// Whether an orchestrator lists a live runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listing {
    /// It did not answer of late.
    Unknown,
    NotListed,
    Listed(ListedRunner),
}

impl Listing {
    /// Its name in text and records.
    #[must_use]
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::NotListed => "not listed",
            Self::Listed(runner) if runner.is_full() => "full",
            Self::Listed(_) => "listed",
        }
    }

    #[must_use]
    pub(crate) fn is_listed(&self) -> Option<bool> {
        match self {
            Self::Unknown => None,
            Self::NotListed => Some(false),
            Self::Listed(_) => Some(true),
        }
    }

    /// What the orchestrator says of it, if it lists it.
    #[must_use]
    pub(crate) fn runner(&self) -> Option<&ListedRunner> {
        match self {
            Self::Listed(runner) => Some(runner),
            Self::Unknown | Self::NotListed => None,
        }
    }

    /// Whether it says the same, apart from the places in use.
    #[must_use]
    pub(crate) fn says_as(&self, other: &Self) -> bool {
        let terms = |listing: &Self| {
            let runner = listing.runner()?;
            Some((runner.is_single_shot, runner.capacity, runner.price.clone()))
        };
        self.name() == other.name() && terms(self) == terms(other)
    }
}

/// An orchestrator's own name, which is not the one by which the gateway knows it.
#[derive(Debug, Clone)]
pub(crate) struct AliasLearnt {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// As it is in the file.
    pub orchestrator: String,
    pub name: String,
}

/// An agent's claim and the evidence of its jobs.
#[derive(Debug, Clone)]
pub(crate) struct ClaimChecked {
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// The uptime that it reports.
    pub uptime: Percent,
    /// What contradicts it, if anything does.
    pub contradiction: Option<Contradiction>,
}

/// Jobs whose outcomes are evidence about their agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evidence {
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub good: u64,
}

/// A claim that the evidence contradicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Contradiction {
    /// The threshold of the tier that is claimed.
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
    /// Whether the uptime may be used.
    pub state: Freshness,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    /// Whether there was a good answer.
    pub answered: bool,
    /// Pings in the window.
    pub pings: usize,
    /// What was told since the last event.
    pub told: Option<Arc<PolledPings>>,
    /// What else the last good answer said.
    pub ping_stats: PingStats,
}

/// Whether the known uptime of an agent may be used now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// Known, and recent enough.
    Fresh,
    /// Known, but too old: there was no good answer since.
    Stale,
    /// Never known, or the ping system has no ping that covers now.
    Unknown,
}

impl Freshness {
    /// Its name in JSON and in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Stale => "stale",
            Self::Unknown => "unknown",
        }
    }
}

/// What the ping system says of an agent besides its uptime; only displayed.
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
    /// The agent's part of a total rate changed.
    Allotment,
    /// The agent's budget is spent.
    Budget,
    /// The gateway, or a proxy in front of it, asked for patience.
    Throttled,
    /// None of the agent's jobs did any good.
    Paused,
}

impl RateReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Uptime,
        Self::Stale,
        Self::Unknown,
        Self::Evidence,
        Self::Allotment,
        Self::Budget,
        Self::Throttled,
        Self::Paused,
    ];

    /// Whether it holds back what an agent has earned.
    #[must_use]
    pub(crate) fn is_hold(self) -> bool {
        matches!(self, Self::Budget | Self::Throttled | Self::Paused)
    }

    /// The reason of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// Its name in JSON and in records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uptime => "uptime",
            Self::Stale => "stale",
            Self::Unknown => "unknown",
            Self::Evidence => "evidence",
            Self::Allotment => "allotment",
            Self::Budget => "budget",
            Self::Throttled => "throttled",
            Self::Paused => "paused",
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

/// A change of an agent's rate.
#[derive(Debug, Clone)]
pub(crate) struct RateChanged {
    /// When it took effect.
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// The rate before.
    pub from: JobsPerMinute,
    /// The rate now.
    pub to: JobsPerMinute,
    /// The base rate: what full uptime would earn.
    pub base: JobsPerMinute,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    pub reason: RateReason,
}

/// A job and its answer.
#[derive(Debug, Clone)]
pub(crate) struct JobDone {
    /// When it was sent.
    pub ts: DateTime<Utc>,
    pub agent: AgentIndex,
    /// The key by which it is found in both nodes' logs.
    pub job_id: Uuid,
    /// What it was.
    pub capability: CapabilityIndex,
    /// The one orchestrator that could do it, if it was tied.
    pub sent_to: Option<Arc<str>>,
    /// From its slot to the answer's last byte, so that a stalled client cannot hide.
    pub latency: Duration,
    /// How long after its slot it was sent.
    pub send_lag: Duration,
    /// The agent's rate when it was sent.
    pub rate: JobsPerMinute,
    /// The agent's uptime when it was sent.
    pub uptime: Percent,
    /// What it is charged for.
    pub work: Work,
    /// Its cost, if there is a price.
    pub cost: Option<Wei>,
    /// What came of it.
    pub answer: JobAnswer,
}

/// For how long a server asks to be left alone, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RetryAfter {
    pub delay: Duration,
    pub scope: ThrottleScope,
}

/// Whose jobs a server holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThrottleScope {
    /// It does the jobs of all.
    AllAgents,
    /// It does only this agent's.
    OneAgent,
}

/// A job's answer, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct JobAnswer {
    pub outcome: Outcome,
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// The orchestrator that did the job, as a gateway tells.
    pub orchestrator: Option<String>,
    /// The wei left with that orchestrator; may be negative.
    pub balance_wei: Option<String>,
    /// `X-Metadata`.
    pub metadata: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether it is an event stream.
    pub is_stream: bool,
    /// The part of its time that was spent on a new connection.
    pub connect: Option<Duration>,
    pub retry_after: Option<RetryAfter>,
    /// When the money of a stream ran out.
    pub unpaid_since: Option<Instant>,
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
            is_stream: false,
            connect: None,
            retry_after: None,
            unpaid_since: None,
        }
    }
}
