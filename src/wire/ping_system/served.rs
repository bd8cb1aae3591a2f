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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// Whether it answered the last ping.
    pub status: Status,
    /// When it was first registered.
    pub registered_at: DateTime<Utc>,
    /// The time of its last ping.
    pub last_ping_at: Option<DateTime<Utc>>,
    /// The time of its next ping.
    pub next_ping_at: DateTime<Utc>,
    /// The number of its pings.
    pub total_pings: u64,
    /// Poor pings that have not been made up for by good ones.
    pub consecutive_poor_uptime: u32,
    /// Minutes from the last ping to the next, without jitter.
    pub ping_interval_minutes: f64,
    /// The uptime that the last ping reported; null if it failed.
    pub last_uptime_percent: Option<Percent>,
}

/// Whether an agent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It answered the last ping, or has not been pinged yet.
    Active,
    /// It did not answer the last ping.
    Unreachable,
}

/// One ping of an agent and its result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ping {
    /// When the agent was pinged, by the ping system's clock.
    pub timestamp: DateTime<Utc>,
    /// Whether there was a valid answer.
    pub success: bool,
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
    /// Why there was no valid answer.
    pub error: Option<String>,
    /// From when to `timestamp` it speaks for the agent; null of a first ping, and of pings of releases up to 0.1.0.
    #[serde(default)]
    pub covers_from: Option<DateTime<Utc>>,
    /// Whether it failed, and a later one that was answered covers the same time: then it weighs nothing.
    #[serde(default)]
    pub superseded: bool,
}

/// A new ping as subscribers receive it, with the agent's state after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingEvent {
    /// The agent that was pinged.
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
