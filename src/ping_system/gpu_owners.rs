//! Which agents report which GPUs: one GPU that serves under two names is paid twice.

use std::collections::HashMap;

use parking_lot::Mutex;

/// GPUs that are remembered.
const MAX_GPUS: usize = 1_000_000;

/// By UUID, the agents that reported it last; most are one.
#[derive(Debug, Default)]
pub(crate) struct GpuOwners {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    owners: HashMap<String, Vec<String>>,
    gpus: HashMap<String, Vec<String>>,
}

impl GpuOwners {
    /// An agent reports these GPUs. Returns those that another agent reports, too, each with one of these.
    pub(crate) fn report(&self, agent_id: &str, uuids: &[String]) -> Vec<(String, String)> {
        let mut inner = self.inner.lock();
        inner.forget(agent_id);
        let mut shared = Vec::new();
        for uuid in uuids {
            if let Some(other) = inner.owners.get(uuid).and_then(|owners| owners.first()) {
                shared.push((uuid.clone(), other.clone()));
            }
            if inner.owners.len() < MAX_GPUS {
                let owners = inner.owners.entry(uuid.clone()).or_default();
                owners.push(agent_id.to_owned());
            }
        }
        inner.gpus.insert(agent_id.to_owned(), uuids.to_vec());
        shared
    }

    /// An agent was removed.
    pub(crate) fn forget(&self, agent_id: &str) {
        self.inner.lock().forget(agent_id);
    }
}

impl Inner {
    fn forget(&mut self, agent_id: &str) {
        for uuid in self.gpus.remove(agent_id).unwrap_or_default() {
            if let Some(owners) = self.owners.get_mut(&uuid) {
                owners.retain(|owner| owner != agent_id);
                if owners.is_empty() {
                    self.owners.remove(&uuid);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_two_agents_report_is_told() {
        let owners = GpuOwners::default();
        let gpus =
            |names: &[&str]| -> Vec<String> { names.iter().map(ToString::to_string).collect() };
        assert_eq!(owners.report("a", &gpus(&["1", "2"])), []);
        assert_eq!(owners.report("a", &gpus(&["1", "2"])), []);
        let shared = [("2".to_owned(), "a".to_owned())];
        assert_eq!(owners.report("b", &gpus(&["2", "3"])), shared);
        assert_eq!(owners.report("a", &gpus(&["1", "2"])).len(), 1);
        // It moved.
        assert_eq!(owners.report("a", &gpus(&["1"])), []);
        assert_eq!(owners.report("b", &gpus(&["2", "3"])), []);
        owners.forget("b");
        assert_eq!(owners.report("a", &gpus(&["2"])), []);
    }
}
