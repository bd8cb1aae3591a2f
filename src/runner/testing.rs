//! Stand-ins for tests under a paused clock.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::AgeClock;
use crate::runner::events::dispatcher::EventDispatcher;
use crate::runner::events::event::JobAnswer;
use crate::runner::events::output::Output;
use crate::runner::events::output::writer::Writer;
use crate::runner::events::run_clock::RunClock;
use crate::runner::roster::Roster;
use crate::runner::send::destination::{Job, SendJob};
use crate::runner::uptime::client::{PingEvents, PollError, StreamMessage, UptimeSource};
use crate::runner::uptime::estimate::{AgentSnapshot, ServerTime};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::outcome::Outcome;
use crate::wire::ping_system::{HistoryPing, ListedAgent};

pub(crate) fn percent(value: f64) -> Percent {
    Percent::new(value).unwrap()
}

/// Keeps what is written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// The JSON events of a recorder that was closed, of one kind.
    pub(crate) fn events(&self, kind: &str) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let events = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["event"] == kind).collect()
    }
}

/// A recorder of one agent and one capability that writes JSON to a sink.
pub(crate) fn recorder(base_rate: u32) -> (Arc<EventDispatcher>, Sink) {
    let sink = Sink::default();
    let writer = Writer::start(sink.clone(), CancellationToken::new()).unwrap();
    let roster = Roster {
        agents: vec!["agent-001".into()],
        capabilities: vec!["gpu-check".into()],
        base_rate: JobsPerMinute::new(base_rate),
    };
    let recorder =
        EventDispatcher::new(roster, Output::Json, 0, writer, None, RunClock::start()).unwrap();
    (Arc::new(recorder), sink)
}

/// A gateway that takes its time and keeps when jobs came.
#[derive(Debug, Clone)]
pub(crate) struct SlowGateway {
    pub(crate) latency: Duration,
    pub(crate) arrivals: Arc<Mutex<Vec<Instant>>>,
}

impl SlowGateway {
    pub(crate) fn new(latency: Duration) -> Self {
        Self {
            latency,
            arrivals: Arc::default(),
        }
    }

    /// The milliseconds after `start` at which jobs came.
    pub(crate) fn arrivals_ms(&self, start: Instant) -> Vec<u128> {
        self.arrivals
            .lock()
            .unwrap()
            .iter()
            .map(|at| (*at - start).as_millis())
            .collect()
    }
}

impl SendJob for SlowGateway {
    fn abandoned(&self) -> &'static str {
        "abandoned"
    }

    async fn send(&self, _: Job) -> JobAnswer {
        self.arrivals.lock().unwrap().push(Instant::now());
        tokio::time::sleep(self.latency).await;
        JobAnswer {
            status: Some(200),
            error: None,
            ..JobAnswer::failure(Outcome::Success, String::new())
        }
    }
}

/// What a scripted ping system does when it is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PollResult {
    Uptime(f64),
    /// The agent is listed, but no ping covers now.
    NothingOfNow,
    Error,
    /// No answer, ever.
    Nothing,
}

/// A ping system that answers by a script, and with its last line for ever.
#[derive(Debug)]
pub(crate) struct ScriptedPings {
    answers: Mutex<VecDeque<PollResult>>,
    /// How often it was asked.
    pub(crate) asked: AtomicUsize,
    /// What those who listen are told; it tells nothing where there is none.
    told: Mutex<VecDeque<ToldPing>>,
    pub(crate) clock: AgeClock,
}

/// What a scripted ping system tells by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ToldPing {
    /// A new ping with this uptime, so much later.
    Ping(Duration, f64),
    /// The same, of an agent that has so many pings now.
    PingNumber(Duration, f64, u64),
    /// Pings may have been missed, so much later.
    Resync(Duration),
    /// The stream ends, so much later.
    End(Duration),
}

/// An agent and its only ping, which is of now.
fn pinged(agent_id: &str, uptime: f64) -> (ListedAgent, HistoryPing) {
    let uptime_percent = Some(percent(uptime));
    let timestamp = Utc::now();
    let agent = ListedAgent {
        agent_id: agent_id.to_owned(),
        agent_url: None,
        last_ping_at: Some(timestamp),
        total_pings: Some(1),
        consecutive_poor_uptime: Some(0),
        ping_interval_minutes: Some(15.0),
        last_uptime_percent: uptime_percent,
    };
    let ping = HistoryPing {
        timestamp,
        success: true,
        uptime_percent,
        // One that is told later outweighs it by far.
        window_seconds: Some(1.0),
        gpu_available: Some(true),
        first_ping: false,
        covers_from: None,
        is_void: false,
    };
    (agent, ping)
}

impl ScriptedPings {
    pub(crate) fn new(script: impl IntoIterator<Item = PollResult>) -> Self {
        Self::telling(script, [])
    }

    pub(crate) fn telling(
        script: impl IntoIterator<Item = PollResult>,
        told: impl IntoIterator<Item = ToldPing>,
    ) -> Self {
        Self {
            answers: Mutex::new(script.into_iter().collect()),
            asked: AtomicUsize::new(0),
            told: Mutex::new(told.into_iter().collect()),
            clock: AgeClock::start(),
        }
    }
}

impl ScriptedPings {
    fn snapshot(&self, agent: ListedAgent, history: Vec<HistoryPing>) -> AgentSnapshot {
        let time = ServerTime {
            told: Utc::now(),
            told_at: self.clock.now(),
        };
        AgentSnapshot {
            agent,
            history,
            time,
        }
    }
}

/// Tells what is left of a script.
#[derive(Debug)]
pub(crate) struct ScriptedStream {
    agent_id: String,
    told: VecDeque<ToldPing>,
}

impl PingEvents for ScriptedStream {
    async fn next(&mut self) -> Result<StreamMessage, PollError> {
        let told = match self.told.pop_front() {
            Some(ToldPing::Ping(later, uptime)) => Some(ToldPing::PingNumber(later, uptime, 1)),
            told => told,
        };
        match told {
            Some(ToldPing::PingNumber(later, uptime, total_pings)) => {
                tokio::time::sleep(later).await;
                let (mut agent, mut ping) = pinged(&self.agent_id, uptime);
                agent.total_pings = Some(total_pings);
                ping.covers_from = Some(ping.timestamp - TimeDelta::minutes(30));
                Ok(StreamMessage::Ping(Box::new((agent, ping))))
            }
            Some(ToldPing::Resync(later)) => {
                tokio::time::sleep(later).await;
                Ok(StreamMessage::Resync)
            }
            Some(ToldPing::End(later)) => {
                tokio::time::sleep(later).await;
                Err(PollError::StreamUnsupported(
                    "http://ping.example".to_owned(),
                ))
            }
            Some(ToldPing::Ping(..)) | None => std::future::pending().await,
        }
    }
}

impl UptimeSource for ScriptedPings {
    type Events = ScriptedStream;

    async fn listen(&self, agent_id: &str) -> Result<ScriptedStream, PollError> {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        if told.is_empty() {
            return Err(PollError::StreamUnsupported(
                "http://ping.example".to_owned(),
            ));
        }
        let agent_id = agent_id.to_owned();
        Ok(ScriptedStream { agent_id, told })
    }

    fn clock(&self) -> &AgeClock {
        &self.clock
    }

    async fn poll(&self, agent_id: &str) -> Result<AgentSnapshot, PollError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let said = {
            let mut script = self.answers.lock().unwrap();
            let first = *script.front().unwrap();
            if script.len() > 1 {
                script.pop_front();
            }
            first
        };
        match said {
            PollResult::Uptime(uptime) => {
                let (agent, ping) = pinged(agent_id, uptime);
                Ok(self.snapshot(agent, vec![ping]))
            }
            PollResult::NothingOfNow => {
                let (mut agent, _) = pinged(agent_id, 0.0);
                (agent.last_ping_at, agent.last_uptime_percent) = (None, None);
                Ok(self.snapshot(agent, Vec::new()))
            }
            PollResult::Error => Err(PollError::NotListed {
                url: "http://ping.example".to_owned(),
                agent_id: agent_id.to_owned(),
                listed: 0,
            }),
            PollResult::Nothing => std::future::pending().await,
        }
    }
}
