//! Stand-ins for tests under a paused clock.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::event::{Answer, Roster};
use super::gateway::{Job, SendJob};
use super::output::Output;
use super::output::json::JsonOutput;
use super::output::writer::Writer;
use super::ping_client::{AskError, AskUptime};
use super::recorder::Recorder;
use super::uptime::{Reading, Standing};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::gateway::Outcome;

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
pub(crate) fn recorder(base_rate: u32) -> (Arc<Recorder>, Sink) {
    let sink = Sink::default();
    let writer = Writer::start(sink.clone(), CancellationToken::new()).unwrap();
    let roster = Roster {
        agents: vec!["agent-001".into()],
        capabilities: vec!["gpu-check".into()],
        base_rate: JobsPerMinute::new(base_rate),
    };
    let recorder = Recorder::new(Arc::new(roster), Output::Json(JsonOutput), 0, writer).unwrap();
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
    async fn send(&self, _: Job) -> Answer {
        self.arrivals.lock().unwrap().push(Instant::now());
        tokio::time::sleep(self.latency).await;
        Answer {
            status: Some(200),
            error: None,
            ..Answer::failure(Outcome::Success, String::new())
        }
    }
}

/// What a scripted ping system does when it is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Said {
    Uptime(f64),
    /// The agent is listed, but no ping covers now.
    NothingOfNow,
    Error,
    /// No answer, ever.
    Nothing,
}

/// A ping system that answers by a script, and with its last line for ever.
#[derive(Debug)]
pub(crate) struct ScriptedPings(Mutex<VecDeque<Said>>);

impl ScriptedPings {
    pub(crate) fn new(script: impl IntoIterator<Item = Said>) -> Self {
        Self(Mutex::new(script.into_iter().collect()))
    }
}

impl AskUptime for ScriptedPings {
    async fn ask(&self, agent_id: &str) -> Result<Reading, AskError> {
        let said = {
            let mut script = self.0.lock().unwrap();
            let first = *script.front().unwrap();
            if script.len() > 1 {
                script.pop_front();
            }
            first
        };
        let reading = |uptime| {
            Ok(Reading {
                uptime,
                pings: 1,
                standing: Standing::default(),
            })
        };
        match said {
            Said::Uptime(uptime) => reading(Some(percent(uptime))),
            Said::NothingOfNow => reading(None),
            Said::Error => Err(AskError::NotListed {
                url: "http://ping.example".to_owned(),
                agent_id: agent_id.to_owned(),
                listed: 0,
            }),
            Said::Nothing => std::future::pending().await,
        }
    }
}
