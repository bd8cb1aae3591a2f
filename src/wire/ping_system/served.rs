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
    /// Where it answers.
    pub agent_url: String,
    /// What it says it can do.
    pub capabilities: Vec<String>,
    /// Whatever else whoever registered it wanted to be kept.
    pub metadata: Map<String, Value>,
    /// Whether it answered the last ping.
    pub status: Status,
    /// When it was first registered.
    pub registered_at: DateTime<Utc>,
    /// When it was last asked.
    pub last_ping_at: Option<DateTime<Utc>>,
    /// When it will be asked next.
    pub next_ping_at: DateTime<Utc>,
    /// How often it was asked.
    pub total_pings: u64,
    /// How many poor pings have not been made good by good ones.
    pub consecutive_poor_uptime: u32,
    /// Minutes from the last ping to the next, without their spread.
    pub ping_interval_minutes: f64,
    /// What the last ping said; null where it had no answer.
    pub last_uptime_percent: Option<Percent>,
}

/// Whether an agent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It answered the last ping, or was not asked yet.
    Active,
    /// It did not.
    Unreachable,
}

/// One question to an agent and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    /// When the agent was asked, by the ping system's clock.
    pub timestamp: DateTime<Utc>,
    /// Whether there was an answer that counts.
    pub success: bool,
    /// The uptime that it reported for its window; for a first ping 100 where a GPU is there, or 0.
    pub uptime_percent: Option<Percent>,
    /// The seconds that the report covers.
    pub window_seconds: Option<f64>,
    /// Whether a GPU was there.
    pub gpu_available: Option<bool>,
    /// Whether it was the agent's first one, which only asks whether a GPU is there.
    pub first_ping: bool,
    /// How long the answer took.
    pub response_time_ms: Option<f64>,
    /// Why there was no answer that counts.
    pub error: Option<String>,
}

/// A new ping, as it is told to those who listen: with what it changed about the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingEvent {
    /// Who was asked.
    pub agent_id: String,
    /// As in [`Agent`].
    pub status: Status,
    /// As in [`Agent`].
    pub next_ping_at: DateTime<Utc>,
    /// As in [`Agent`].
    pub total_pings: u64,
    /// As in [`Agent`].
    pub consecutive_poor_uptime: u32,
    /// As in [`Agent`].
    pub ping_interval_minutes: f64,
    pub ping: Ping,
}
