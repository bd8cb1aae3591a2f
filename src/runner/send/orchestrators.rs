//! The orchestrators of an agent, among which its jobs take turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::wire::gateway::same_orchestrator_form;

/// An agent's orchestrators and whose turn it is.
///
/// Each job names exactly one of them, byte for byte as the operator wrote it, since the gateway compares bytes. A job that
/// may choose goes on to the next orchestrator after each failure, and after each stream.
#[derive(Debug)]
pub(crate) struct OrchestratorTurns {
    /// Empty if the gateway may choose among all that it knows.
    own: Vec<Arc<OwnOrchestrator>>,
    next: usize,
}

/// One that an agent is tied to.
#[derive(Debug)]
pub(crate) struct OwnOrchestrator {
    /// Its place in the agent's list.
    index: usize,
    address: String,
    /// The job header's `parameters` that name it.
    parameters: String,
    is_alias_told: AtomicBool,
}

impl OrchestratorTurns {
    #[must_use]
    pub(crate) fn new(addresses: &[String]) -> Self {
        let own = addresses.iter().enumerate();
        let own = own.map(|(index, address)| OwnOrchestrator {
            index,
            address: address.clone(),
            parameters: json!({ "orchestrators": { "include": [address] } }).to_string(),
            is_alias_told: AtomicBool::new(false),
        });
        Self {
            own: own.map(Arc::new).collect(),
            next: 0,
        }
    }

    /// Whom the next job goes to, if it is tied.
    pub(crate) fn next(&mut self) -> Option<Arc<OwnOrchestrator>> {
        let next = self.own.get(self.next).map(Arc::clone);
        self.next = (self.next + 1) % self.own.len().max(1);
        next
    }
}

impl OwnOrchestrator {
    /// The job header's `parameters` of a job that goes to it, or to any.
    #[must_use]
    pub(crate) fn parameters(this: Option<&Self>) -> &str {
        this.map_or("{}", |own| &own.parameters)
    }

    #[must_use]
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Its address as the operator wrote it.
    #[must_use]
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Whether it calls itself by another name than the one by which the gateway knows it, and this is the first time.
    pub(crate) fn is_new_alias(&self, name: &str) -> bool {
        self.is_alias(name) && !self.is_alias_told.swap(true, Ordering::Relaxed)
    }

    fn is_alias(&self, name: &str) -> bool {
        same_orchestrator_form(name) != same_orchestrator_form(&self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_names_one_orchestrator_as_it_was_written() {
        let parameters = |turns: &mut OrchestratorTurns| {
            OwnOrchestrator::parameters(turns.next().as_deref()).to_owned()
        };
        let mut any = OrchestratorTurns::new(&[]);
        assert_eq!([(); 2].map(|()| parameters(&mut any)), ["{}", "{}"]);
        let addresses = ["https://orch-1.example:8935/", "HTTPS://orch-2"].map(str::to_owned);
        let mut turns = OrchestratorTurns::new(&addresses);
        let first = r#"{"orchestrators":{"include":["https://orch-1.example:8935/"]}}"#;
        let second = r#"{"orchestrators":{"include":["HTTPS://orch-2"]}}"#;
        assert_eq!(
            [(); 3].map(|()| parameters(&mut turns)),
            [first, second, first]
        );
    }

    #[test]
    fn only_another_name_is_an_alias() {
        let mut turns = OrchestratorTurns::new(&["https://orch/".to_owned()]);
        let own = turns.next().unwrap();
        assert!(!own.is_alias("https://orch:443"));
        assert!(own.is_alias("https://10.0.0.7:8935"));
    }
}
