//! A ping system of ours in a process of its own.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::agents::Agents;
use super::served::Served;
use super::{binary, wait_until_or};

pub(crate) struct PingSystemProcess(Served);

impl PingSystemProcess {
    /// In a folder, on a free port.
    pub(crate) fn start(folder: &Path, arguments: &[&str]) -> Self {
        let mut command = binary();
        command
            .args(["ping-system", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .current_dir(folder);
        Self::spawn(command)
    }

    pub(crate) fn spawn(command: Command) -> Self {
        Self(Served::spawn(command))
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The answer to a request with a JSON body.
    pub(crate) fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let (status, answer) = self.request(method, path, "", &body.to_string());
        let answer = serde_json::from_str(&answer)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}: {answer}"));
        (status, answer)
    }

    pub(crate) fn register(&self, agent_id: &str, agent_url: &str) -> Value {
        let body = json!({ "agent_id": agent_id, "agent_url": agent_url });
        let (status, agent) = self.call("POST", "/ping-system/agents/register", &body);
        assert_eq!(status, 200, "{agent}");
        agent
    }

    /// An agent that is known, and was pinged for the first time.
    pub(crate) fn with_agent(&self, agent_id: &str, agents: &Agents) -> Value {
        self.register(agent_id, &agents.url(agent_id));
        self.wait_for_pings(agent_id, 1)
    }

    pub(crate) fn agent(&self, agent_id: &str) -> Value {
        self.ask(&format!("/ping-system/agents/{agent_id}"))
    }

    /// The agent, once it has so many pings.
    pub(crate) fn wait_for_pings(&self, agent_id: &str, pings: u64) -> Value {
        let enough = || {
            let agent = self.agent(agent_id);
            (agent["total_pings"].as_u64().unwrap() >= pings).then_some(agent)
        };
        wait_until_or(enough, || {
            let agents = self.ask("/ping-system/agents");
            format!(
                "{pings} pings of {agent_id} did not come: {agents}\n{}",
                self.log()
            )
        })
    }

    pub(crate) fn history(&self, agent_id: &str) -> Vec<Value> {
        let history = self.ask(&format!("/ping-system/agents/{agent_id}/history?hours=24"));
        let pings = history["pings"].as_array().unwrap().clone();
        assert_eq!(history["count"], pings.len());
        pings
    }

    /// A ping now, whatever the schedule says.
    pub(crate) fn ping(&self, agent_id: &str) -> Value {
        let path = format!("/ping-system/agents/{agent_id}/ping");
        let (status, ping) = self.call("POST", &path, &Value::Null);
        assert_eq!(status, 200, "{ping}");
        ping
    }
}

impl Deref for PingSystemProcess {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.0
    }
}

impl DerefMut for PingSystemProcess {
    fn deref_mut(&mut self) -> &mut Served {
        &mut self.0
    }
}

/// Whether a ping in a history is one that was told before. A failed one may have been superseded since, or found to have
/// been unobserved.
pub(crate) fn is_same_ping(kept: &Value, told: &Value) -> bool {
    let fields = ["timestamp", "success", "error", "covers_from"];
    kept == told
        || told["success"] == false
            && (kept["observed"] == false || fields.iter().all(|field| kept[field] == told[field]))
            && kept["timestamp"] == told["timestamp"]
}
