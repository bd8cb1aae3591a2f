//! What the tests of this room have in common.

use chrono::{DateTime, Utc};
use serde_json::Map;

use super::interval::Streak;
use super::store::AgentRecord;
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping, PingEvent, Status};

pub(super) fn utc(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

/// An agent that was just registered.
pub(crate) fn known(agent_id: &str) -> AgentRecord {
    AgentRecord {
        key: 1,
        agent: Agent {
            agent_id: agent_id.to_owned(),
            agent_url: "http://127.0.0.1:8001".to_owned(),
            capabilities: Vec::new(),
            metadata: Some(Map::new()),
            status: Status::Unknown,
            registered_at: utc("2026-01-01T00:00:00Z"),
            last_ping_at: None,
            next_ping_at: utc("2026-01-01T00:00:00Z"),
            total_pings: 0,
            consecutive_poor_uptime: 0,
            ping_interval_minutes: 15.0,
            last_uptime_percent: None,
            last_error: None,
            clock_offset_seconds: None,
            gpu_uuids: Vec::new(),
            source: None,
            agent_version: None,
            warnings: Vec::new(),
        },
        streak: Streak::default(),
        last_answered_at: None,
        answered_streak: Streak::default(),
        marks: None,
        failures: None,
        unobserved_in_a_row: 0,
    }
}

pub(super) fn event(agent_id: &str) -> PingEvent {
    let timestamp = utc("2026-01-01T00:00:00Z");
    let mut agent = known(agent_id).agent;
    agent.status = Status::Active;
    agent.last_ping_at = Some(timestamp);
    agent.next_ping_at = utc("2026-01-01T00:15:00Z");
    agent.total_pings = 1;
    PingEvent {
        agent,
        ping: Ping {
            timestamp,
            observed: true,
            success: true,
            uptime_percent: Some(Percent::FULL),
            window_seconds: None,
            gpu_available: Some(true),
            first_ping: true,
            response_time_ms: Some(1.5),
            error: None,
            covers_from: None,
            superseded: false,
        },
    }
}
