//! Agents that answer as they are told.

use std::collections::HashMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::{RawServer, respond};

/// What an agent does with a connection on which it is asked.
pub(crate) type Answer = Arc<dyn Fn(&mut TcpStream, &str) + Send + Sync>;

/// Any number of agents behind one address, each under a path of its own; all answer with
/// an uptime of 99.5 % until they are told otherwise.
pub(crate) struct Agents {
    server: RawServer,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
}

impl Agents {
    pub(crate) fn start() -> Self {
        let answers: Arc<Mutex<HashMap<String, Answer>>> = Arc::default();
        let told = Arc::clone(&answers);
        let server = RawServer::start(move |stream, head| {
            let agent_id = head.split('/').nth(1).unwrap_or_default();
            let answer = told.lock().unwrap().get(agent_id).cloned();
            match answer {
                Some(answer) => answer(stream, agent_id),
                None => respond(stream, 200, "", &report(agent_id, 99.5).to_string()),
            }
        });
        Self { server, answers }
    }

    /// Where an agent answers.
    pub(crate) fn url(&self, agent_id: &str) -> String {
        format!("{}/{agent_id}", self.server.url())
    }

    pub(crate) fn set(
        &self,
        agent_id: &str,
        answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static,
    ) {
        let mut answers = self.answers.lock().unwrap();
        answers.insert(agent_id.to_owned(), Arc::new(answer));
    }

    pub(crate) fn set_uptime(&self, agent_id: &str, uptime: f64) {
        self.set(agent_id, move |stream, agent_id| {
            respond(stream, 200, "", &report(agent_id, uptime).to_string());
        });
    }

    /// It closes the next connection without an answer, and then answers as before.
    pub(crate) fn fail_once(&self, agent_id: &str) {
        let before = self
            .answers
            .lock()
            .unwrap()
            .get(agent_id)
            .cloned()
            .expect("it answers");
        let failed = AtomicBool::new(false);
        self.set(agent_id, move |stream, agent_id| {
            if failed.swap(true, Ordering::SeqCst) {
                before(stream, agent_id);
            } else {
                stream.shutdown(Shutdown::Both).unwrap();
            }
        });
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// The first lines and headers of what an agent was asked so far.
    pub(crate) fn asked(&self, agent_id: &str) -> Vec<String> {
        let path = format!("GET /{agent_id}/");
        let requests = self.server.requests.lock().unwrap();
        let heads = requests.iter().map(|(head, _)| head);
        heads
            .filter(|head| head.starts_with(&path))
            .cloned()
            .collect()
    }
}

/// A whole answer, as `.github/docs/protocol.md` section 2.1 has it.
pub(crate) fn report(agent_id: &str, uptime: f64) -> Value {
    json!({
        "agent_id": agent_id,
        "uptime_percent": uptime,
        "window_seconds": 900.0,
        "since": "2026-01-01T00:00:00Z",
        "timestamp": "2026-01-01T00:15:00Z",
        "first_ping": false,
        "gpu_available": true,
        "gpu_count": 1,
        "checks_total": 180,
        "checks_available": 179,
        "boot_id": "acb08027-70a1-4b3b-bd24-661d1c55997e",
    })
}
