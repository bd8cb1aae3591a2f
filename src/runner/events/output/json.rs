//! One JSON object per line (`.github/docs/protocol.md` section 5.2).

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Serialize, Serializer};
use uuid::Uuid;

use crate::money::Wei;
use crate::runner::events::accounts::Statistics;
use crate::runner::events::event::Freshness;
use crate::runner::events::event::{
    ClaimChecked, Event, JobDone, RateChanged, RateReason, RunnerDiscovered, UptimePolled,
};
use crate::runner::rate::pause::PauseChange;
use crate::runner::roster::Roster;
use crate::units::{JobsPerMinute, Percent, milliseconds, serialize_timestamp};
use crate::wire::live_runner::ListedPrice;
use crate::wire::outcome::Outcome;

/// The format of these lines; a change of meaning raises it.
const FORMAT: u32 = 1;

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum JsonEvent<'a> {
    Started {
        format: u32,
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agents: &'a [Arc<str>],
        base_rate: JobsPerMinute,
        capabilities: &'a [Arc<str>],
        version: &'static str,
    },
    AgentJoined {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
    },
    AgentLeft {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
    },
    Alias {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        orchestrator: &'a str,
        name: &'a str,
    },
    Discovery {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        listed: Option<bool>,
        capacity: Option<u64>,
        in_use: Option<u64>,
        price_wei: Option<&'a str>,
        unit: Option<&'a str>,
    },
    Paused {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        jobs: u64,
        outcome: Outcome,
    },
    Resumed {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
    },
    Claim {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        uptime_percent: Percent,
        contradicted: bool,
        claimed_tier_percent: Option<Percent>,
        jobs: Option<u64>,
        successful: Option<u64>,
        success_rate_percent: Option<Percent>,
        chance: Option<f64>,
    },
    Uptime {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        uptime_percent: Option<Percent>,
        state: Freshness,
        pings: usize,
        consecutive_poor: Option<u64>,
        ping_interval_minutes: Option<f64>,
        total_pings: Option<u64>,
    },
    RateChanged {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        from: JobsPerMinute,
        to: JobsPerMinute,
        uptime_percent: Option<Percent>,
        reason: RateReason,
    },
    Job {
        #[serde(serialize_with = "serialize_timestamp")]
        ts: DateTime<Utc>,
        agent: &'a str,
        job_id: Uuid,
        capability: &'a str,
        outcome: Outcome,
        status: Option<u16>,
        #[serde(serialize_with = "as_milliseconds")]
        latency_ms: Duration,
        connect_ms: Option<f64>,
        #[serde(serialize_with = "as_milliseconds")]
        send_lag_ms: Duration,
        rate: JobsPerMinute,
        uptime_percent: Percent,
        orchestrator: Option<&'a str>,
        balance_wei: Option<&'a str>,
        error: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        cost_wei: Option<&'a Wei>,
        #[serde(skip_serializing_if = "Option::is_none")]
        metadata: Option<&'a str>,
    },
}

#[derive(Serialize)]
struct StatisticsLine<'a> {
    event: &'static str,
    #[serde(flatten)]
    statistics: &'a Statistics,
}

/// Appends the line of an event, where it has one.
pub(crate) fn event(event: &Event, roster: &Roster, lines: &mut Vec<u8>) {
    let line = match event {
        Event::Started { ts } => JsonEvent::Started {
            format: FORMAT,
            ts: *ts,
            agents: &roster.agents,
            base_rate: roster.base_rate,
            capabilities: &roster.capabilities,
            version: env!("CARGO_PKG_VERSION"),
        },
        Event::AgentJoined(joined) => JsonEvent::AgentJoined {
            ts: joined.ts,
            agent: roster.agent(joined.agent),
        },
        Event::AgentLeft { ts, agent } => JsonEvent::AgentLeft {
            ts: *ts,
            agent: roster.agent(*agent),
        },
        Event::Alias(alias) => JsonEvent::Alias {
            ts: alias.ts,
            agent: roster.agent(alias.agent),
            orchestrator: &alias.orchestrator,
            name: &alias.name,
        },
        Event::Discovery(discovered) if discovered.is_new => discovery(discovered, roster),
        Event::Claim(checked) => claim(checked, roster),
        Event::Pause(pause) => {
            let (ts, agent) = (pause.ts, roster.agent(pause.agent));
            match pause.change {
                PauseChange::Paused(jobs) => JsonEvent::Paused {
                    ts,
                    agent,
                    jobs,
                    outcome: pause.outcome,
                },
                PauseChange::Resumed => JsonEvent::Resumed { ts, agent },
            }
        }
        Event::Uptime(polled) => uptime(polled, roster),
        Event::RateChanged(changed) => rate_changed(changed, roster),
        Event::Job(done) => job(done, roster),
        Event::Sent(_)
        | Event::Stopping { .. }
        | Event::Delayed(..)
        | Event::Dropped(..)
        | Event::Discovery(_)
        | Event::BaseChanged(_) => {
            return;
        }
    };
    append(&line, lines);
}

/// Appends the accounts under the name of `event`.
pub(crate) fn statistics(event: &'static str, statistics: &Statistics, lines: &mut Vec<u8>) {
    append(&StatisticsLine { event, statistics }, lines);
}

fn append(line: &impl Serialize, lines: &mut Vec<u8>) {
    serde_json::to_writer(&mut *lines, line)
        .expect("these structs have text as keys, and a buffer takes whatever is written");
    lines.push(b'\n');
}

fn uptime<'a>(polled: &UptimePolled, roster: &'a Roster) -> JsonEvent<'a> {
    JsonEvent::Uptime {
        ts: polled.ts,
        agent: roster.agent(polled.agent),
        uptime_percent: polled.uptime,
        state: polled.state,
        pings: polled.pings,
        consecutive_poor: polled.ping_stats.consecutive_poor,
        ping_interval_minutes: polled.ping_stats.ping_interval_minutes,
        total_pings: polled.ping_stats.total_pings,
    }
}

fn discovery<'a>(discovered: &'a RunnerDiscovered, roster: &'a Roster) -> JsonEvent<'a> {
    let runner = discovered.listing.runner();
    let price = runner.and_then(|runner| runner.price.as_ref());
    JsonEvent::Discovery {
        ts: discovered.ts,
        agent: roster.agent(discovered.agent),
        listed: discovered.listing.is_listed(),
        capacity: runner.and_then(|runner| runner.capacity),
        in_use: runner.and_then(|runner| runner.in_use),
        price_wei: price.and_then(ListedPrice::wei),
        unit: price.map(|price| price.unit.as_str()),
    }
}

fn claim<'a>(checked: &ClaimChecked, roster: &'a Roster) -> JsonEvent<'a> {
    let found = checked.contradiction;
    JsonEvent::Claim {
        ts: checked.ts,
        agent: roster.agent(checked.agent),
        uptime_percent: checked.uptime,
        contradicted: found.is_some(),
        claimed_tier_percent: found.map(|found| found.claimed_tier),
        jobs: found.map(|found| found.evidence.jobs),
        successful: found.map(|found| found.evidence.good),
        success_rate_percent: found.map(|found| found.success),
        chance: found.map(|found| found.chance),
    }
}

fn rate_changed<'a>(changed: &RateChanged, roster: &'a Roster) -> JsonEvent<'a> {
    JsonEvent::RateChanged {
        ts: changed.ts,
        agent: roster.agent(changed.agent),
        from: changed.from,
        to: changed.to,
        uptime_percent: changed.uptime,
        reason: changed.reason,
    }
}

fn job<'a>(done: &'a JobDone, roster: &'a Roster) -> JsonEvent<'a> {
    let answer = &done.answer;
    JsonEvent::Job {
        ts: done.ts,
        agent: roster.agent(done.agent),
        job_id: done.job_id,
        capability: roster.capability(done.capability),
        outcome: answer.outcome,
        status: answer.status,
        latency_ms: done.latency,
        connect_ms: answer.connect.map(milliseconds),
        send_lag_ms: done.send_lag,
        rate: done.rate,
        uptime_percent: done.uptime,
        orchestrator: answer.orchestrator.as_deref(),
        balance_wei: answer.balance_wei.as_deref(),
        error: answer.error.as_deref(),
        cost_wei: done.cost.as_ref(),
        metadata: answer.metadata.as_deref(),
    }
}

fn as_milliseconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(milliseconds(*duration))
}
