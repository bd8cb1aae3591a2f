//! What our ping system answers, field by field.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::units::Percent;

/// An agent as the ping system knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    /// The agent's name.
    pub agent_id: String,
    /// The agent's own URL.
    pub agent_url: String,
    /// The capabilities that it declares.
    pub capabilities: Vec<String>,
    /// Free metadata, kept as registered; `None` where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    pub status: Status,
    /// When it was first registered.
    pub registered_at: DateTime<Utc>,
    /// The time of its last ping that was observed.
    pub last_ping_at: Option<DateTime<Utc>>,
    /// The time of its next ping.
    pub next_ping_at: DateTime<Utc>,
    /// The number of its pings of all kinds.
    pub total_pings: u64,
    /// Poor pings that have not been made up for by good ones.
    pub consecutive_poor_uptime: u32,
    /// Minutes from the last ping to the next, without jitter.
    pub ping_interval_minutes: f64,
    /// The uptime that the last observed ping reported; null if it failed.
    pub last_uptime_percent: Option<Percent>,
    /// Why the last ping had no answer, or was not observed.
    pub last_error: Option<String>,
    /// How far the agent's clock is ahead of the ping system's; known to about half a second.
    pub clock_offset_seconds: Option<f64>,
    /// Its GPUs, as far as its last answer named them.
    #[serde(default)]
    pub gpu_uuids: Vec<String>,
    /// What looks at them: `nvml`, `simulated`, or what another kind of agent says.
    #[serde(default)]
    pub source: Option<String>,
    #[serde(default)]
    pub agent_version: Option<String>,
    /// What its operator should look at.
    pub warnings: Vec<String>,
}

/// What is known of an agent since its last ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It answered the last observed ping, and has its GPUs.
    Active,
    /// It answered without its GPUs.
    NoGpu,
    /// It did not answer the last observed ping.
    Unreachable,
    /// No ping of it has been observed yet.
    Unknown,
    /// It answered the last observed ping, and none has been observed since.
    Unobserved,
}

impl Status {
    pub const ALL: [Self; 5] = [
        Self::Active,
        Self::NoGpu,
        Self::Unreachable,
        Self::Unknown,
        Self::Unobserved,
    ];

    /// As it is stored and served.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::NoGpu => "no_gpu",
            Self::Unreachable => "unreachable",
            Self::Unknown => "unknown",
            Self::Unobserved => "unobserved",
        }
    }

    /// The status of this name.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }
}

/// One ping of an agent and its result.
#[expect(clippy::struct_excessive_bools, reason = "as it is served")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    /// When the agent was pinged, by the ping system's clock.
    pub timestamp: DateTime<Utc>,
    /// From when to `timestamp` it speaks for the agent; null of a first ping, of one that was not observed, and of pings
    /// of releases up to 0.1.0.
    #[serde(default)]
    pub covers_from: Option<DateTime<Utc>>,
    /// Whether there was a valid answer.
    pub success: bool,
    /// Whether the ping system could see the agent: if not, this says nothing about it, and weighs nothing.
    #[serde(default = "yes")]
    pub observed: bool,
    /// Whether it failed, and a later one that was answered covers the same time: then it weighs nothing.
    #[serde(default)]
    pub superseded: bool,
    /// The uptime that it reported for its window; for a first ping 100 where a GPU is there, or 0.
    pub uptime_percent: Option<Percent>,
    /// The seconds for which it speaks, by which it weighs in a mean.
    pub window_seconds: Option<f64>,
    /// Whether a GPU was there.
    pub gpu_available: Option<bool>,
    /// Whether it was the agent's first one, which only asks whether a GPU is there.
    pub first_ping: bool,
    /// How long the answer took.
    pub response_time_ms: Option<f64>,
    /// Why there was no valid answer, or none could be observed.
    pub error: Option<String>,
}

fn yes() -> bool {
    true
}

/// A new ping as subscribers receive it, with the agent after it.
#[derive(Debug, Clone, PartialEq)]
pub struct PingEvent {
    pub agent: Agent,
    pub ping: Ping,
}

impl Serialize for PingEvent {
    /// With what runners of releases up to 0.1.0 read beside the agent.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Form<'a> {
            agent: &'a Agent,
            ping: &'a Ping,
            #[serde(flatten)]
            legacy: LegacyAgent<'a>,
        }
        let Self { agent, ping } = self;
        let legacy = LegacyAgent::from(agent);
        Form {
            agent,
            ping,
            legacy,
        }
        .serialize(serializer)
    }
}

/// An agent after a ping, as releases up to 0.1.0 were told of it.
#[derive(Debug, Serialize)]
pub(crate) struct LegacyAgent<'a> {
    agent_id: &'a str,
    /// Those know two of them.
    status: &'static str,
    next_ping_at: DateTime<Utc>,
    total_pings: u64,
    consecutive_poor_uptime: u32,
    ping_interval_minutes: f64,
}

impl<'a> From<&'a Agent> for LegacyAgent<'a> {
    fn from(agent: &'a Agent) -> Self {
        let status = match agent.status {
            Status::Unreachable => Status::Unreachable,
            _ => Status::Active,
        };
        Self {
            agent_id: &agent.agent_id,
            status: status.name(),
            next_ping_at: agent.next_ping_at,
            total_pings: agent.total_pings,
            consecutive_poor_uptime: agent.consecutive_poor_uptime,
            ping_interval_minutes: agent.ping_interval_minutes,
        }
    }
}
