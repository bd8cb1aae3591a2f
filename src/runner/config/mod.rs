//! Options from flags, environment and the TOML file to one checked value. Flag beats environment
//! beats file beats default (CONTRACT.md section 1).

mod checks;
mod file;
pub mod options;
pub mod shard;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Certificate;

use crate::net::endpoint::Endpoint;

use self::shard::Shard;
use crate::money::{Wei, WeiPerSecond};
use crate::option_values::OutputFormat;
use crate::runner::events::require::Requirement;
use crate::runner::rate::controller::Sharing;
use crate::runner::rate::policy::Policy;
use crate::runner::send::capability::Capability;
use crate::units::JobsPerMinute;

/// Everything that a run of the job runner needs, checked.
#[derive(Debug, Clone)]
pub struct RunnerConfig {
    /// Whom to follow, each once; none where all fall to other shards. With `all_agents`, how to follow
    /// them if they are listed.
    pub agents: Vec<AgentConfig>,
    /// Whether whoever the ping system lists is followed.
    pub all_agents: bool,
    /// Which agents fall to this runner; all of them where there is only one.
    pub shard: Option<Shard>,
    /// Whether each agent has its own rate, or all share one.
    pub sharing: Sharing,
    /// What a second of compute costs, where an agent has no price of its own.
    pub price: Option<WeiPerSecond>,
    /// What all agents' jobs may cost together.
    pub budget: Option<Wei>,
    /// Each agent's rate at full uptime.
    pub base_rate: JobsPerMinute,
    /// What to ask for; at least one.
    pub capabilities: Vec<Capability>,
    /// The ping system.
    pub ping: Endpoint,
    /// The gateway, prefix included.
    pub gateway: Endpoint,
    /// Further roots for https.
    pub extra_roots: Vec<Certificate>,
    /// How often to ask for the uptime.
    pub uptime_interval: Duration,
    /// How much history counts.
    pub uptime_window: Duration,
    /// How the rate follows from it.
    pub policy: Policy,
    /// How long the last known uptime may be acted on.
    pub stale_after: Duration,
    /// The longest wait for one job's answer, in place of the capability's own.
    pub timeout: Option<Duration>,
    /// The bound on jobs waiting for an answer.
    pub max_in_flight: usize,
    /// When to stop.
    pub duration: Option<Duration>,
    /// After how many jobs to stop.
    pub max_jobs: Option<u64>,
    /// The form of the results.
    pub output: OutputFormat,
    /// Jobs between blocks of statistics; 0 for none.
    pub stats_every: u64,
    /// What makes the random choices repeatable.
    pub random_seed: Option<u64>,
    /// What must hold at the end.
    pub requirements: Vec<Requirement>,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
    /// The file in which everything is recorded.
    pub record: Option<PathBuf>,
}

impl RunnerConfig {
    /// Whom to follow from the start.
    #[must_use]
    pub fn agents_at_start(&self) -> &[AgentConfig] {
        if self.all_agents { &[] } else { &self.agents }
    }

    /// How to follow an agent that is listed.
    #[must_use]
    pub fn agent(&self, id: &str) -> AgentConfig {
        let configured = self.agents.iter().find(|agent| agent.id == id);
        configured.cloned().unwrap_or_else(|| AgentConfig {
            id: id.to_owned(),
            ..AgentConfig::default()
        })
    }

    /// Whether an agent falls to this runner.
    #[must_use]
    pub fn is_ours(&self, id: &str) -> bool {
        self.shard.is_none_or(|shard| shard.holds(id))
    }

    /// What a second of an agent's compute costs, where that is known.
    #[must_use]
    pub fn price<'a>(&'a self, agent: &'a AgentConfig) -> Option<&'a WeiPerSecond> {
        agent.price.as_ref().or(self.price.as_ref())
    }

    /// Whether spending is bounded.
    #[must_use]
    pub fn has_budgets(&self) -> bool {
        self.budget.is_some() || self.agents.iter().any(|agent| agent.budget.is_some())
    }
}

/// An agent to follow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentConfig {
    /// Its name.
    pub id: String,
    /// Who may do its jobs; empty for anybody.
    pub orchestrators: Vec<String>,
    /// Its rate at full uptime, in place of the common one.
    pub base_rate: Option<JobsPerMinute>,
    /// What it is asked for, in place of all that is asked for.
    pub capabilities: Option<Vec<String>>,
    /// What a second of its compute costs, in place of the common price.
    pub price: Option<WeiPerSecond>,
    /// What its jobs may cost.
    pub budget: Option<Wei>,
    /// Whether no other agent shares one of its orchestrators, so that what becomes of its jobs says
    /// something of it.
    pub is_tied: bool,
}

impl AgentConfig {
    /// Whether it is asked for this.
    #[must_use]
    pub fn does(&self, capability: &str) -> bool {
        let names = self.capabilities.as_ref();
        names.is_none_or(|names| names.iter().any(|name| name == capability))
    }
}
