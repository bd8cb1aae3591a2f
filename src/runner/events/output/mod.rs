//! The forms of output.

pub(crate) mod json;
pub(crate) mod text;
pub(crate) mod writer;

use std::sync::Arc;
use std::time::Duration;

use self::text::TextOutput;
use crate::runner::events::accounts::Statistics;
use crate::runner::events::event::Event;
use crate::runner::roster::Roster;
use crate::units::Percent;

/// How results are written.
#[derive(Debug)]
pub(crate) enum Output {
    Text(TextOutput),
    /// For programs: one object a line.
    Json,
}

impl Output {
    /// Appends the lines of an event, often none.
    pub(crate) fn event(&self, event: &Event, roster: &Roster, lines: &mut Vec<u8>) {
        match self {
            Self::Text(text) => text.event(event, roster, lines),
            Self::Json => json::event(event, roster, lines),
        }
    }

    /// Appends the accounts in the middle of a run.
    pub(crate) fn statistics(&self, statistics: &Statistics, lines: &mut Vec<u8>) {
        match self {
            Self::Text(text) => text.statistics(statistics, lines),
            Self::Json => json::statistics("statistics", statistics, lines),
        }
    }

    /// Appends the accounts at the end.
    pub(crate) fn summary(&self, statistics: &Statistics, lines: &mut Vec<u8>) {
        match self {
            Self::Text(text) => text.statistics(statistics, lines),
            Self::Json => json::statistics("summary", statistics, lines),
        }
    }
}

/// The state of a run, for the status line of a terminal.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    /// Jobs per minute now, over all agents.
    pub rate: u64,
    /// What is known of each agent.
    pub agents: Vec<AgentProgress>,
    /// Jobs waiting for an answer.
    pub in_flight: usize,
    /// Jobs that left.
    pub sent: u64,
    /// The median and the 99th percentile of latencies, in milliseconds.
    pub p50_p99_ms: Option<(f64, f64)>,
    /// What is left of `--duration`.
    pub left: Option<Duration>,
}

/// What is known of an agent between jobs.
#[derive(Debug, Clone)]
pub(crate) struct AgentProgress {
    pub id: Arc<str>,
    /// Its uptime and the age of that; `None` if it is not known.
    pub uptime: Option<(Percent, Duration)>,
    /// What the orchestrator of its live runner lists, if it has one.
    pub listing: Option<&'static str>,
}
