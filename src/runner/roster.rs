//! The agents and capabilities of a run, and the indices that stand for them everywhere in the runner.

use std::sync::Arc;

use crate::units::JobsPerMinute;

/// An agent's index in the [`Roster`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AgentIndex(pub usize);

/// A capability's index in the [`Roster`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CapabilityIndex(pub usize);

/// The agents and capabilities of a run.
#[derive(Debug, Clone)]
pub(crate) struct Roster {
    /// The agents' names; more may join.
    pub agents: Vec<Arc<str>>,
    /// The capabilities' names.
    pub capabilities: Vec<Arc<str>>,
    /// Each agent's rate at full uptime.
    pub base_rate: JobsPerMinute,
}

impl Roster {
    /// An agent's name.
    #[must_use]
    pub(crate) fn agent(&self, index: AgentIndex) -> &str {
        &self.agents[index.0]
    }

    /// A capability's name.
    #[must_use]
    pub(crate) fn capability(&self, index: CapabilityIndex) -> &str {
        &self.capabilities[index.0]
    }
}
