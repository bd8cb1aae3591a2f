//! The agents of a run. Each has a monitor, a target rate and a submitter of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::destinations::Destinations;
use super::monitor::Monitor;
use super::submitter::{Submitter, SubmitterContext};
use crate::runner::config::{AgentSettings, RunnerConfig};
use crate::runner::discovery::{Discovery, FollowedRunner};
use crate::runner::events::database::AgentTerms;
use crate::runner::rate::controller::RateController;
use crate::runner::rate::job_stats::JobStats;
use crate::runner::roster::AgentIndex;
use crate::runner::send::capability::{Capability, JobPicker};
use crate::runner::send::destination::Destination;
use crate::runner::send::orchestrators::OrchestratorTurns;
use crate::runner::send::timer::PreciseTimer;
use crate::runner::uptime::client::PingSystem;
use crate::wire::agent::is_agent_id;
use crate::wire::ping_system::ListedAgent;

/// The agents that a ping system lists, by name.
pub(crate) type Listed = Arc<BTreeMap<String, ListedAgent>>;

/// The agents of a run.
#[derive(Debug)]
pub(crate) struct Fleet {
    config: Arc<RunnerConfig>,
    shared: Arc<SubmitterContext>,
    ping_system: Arc<PingSystem>,
    destinations: Arc<Destinations>,
    discovery: Arc<Discovery>,
    seed: u64,
    /// By id. An agent that leaves and comes back keeps its index.
    indices: BTreeMap<String, AgentIndex>,
    /// Listed ids that are not valid, which were warned about.
    invalid: BTreeSet<String>,
    /// Ends monitor and submitter of each agent that is followed.
    followed: BTreeMap<String, CancellationToken>,
    /// Monitors and submitters; they end when their token is cancelled.
    pub tasks: JoinSet<()>,
}

impl Fleet {
    /// A fleet without agents.
    #[must_use]
    pub(crate) fn new(
        config: Arc<RunnerConfig>,
        shared: Arc<SubmitterContext>,
        ping_system: Arc<PingSystem>,
        destinations: Arc<Destinations>,
        discovery: Arc<Discovery>,
    ) -> Self {
        Self {
            seed: config
                .gateway
                .random_seed
                .unwrap_or_else(|| fastrand::u64(..)),
            config,
            shared,
            ping_system,
            destinations,
            discovery,
            indices: BTreeMap::new(),
            invalid: BTreeSet::new(),
            followed: BTreeMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Adds the agents that the roster begins with.
    pub(crate) fn follow_configured(&mut self) {
        let config = Arc::clone(&self.config);
        for agent in config.agents.at_start() {
            self.follow(agent);
        }
        self.shared.rates.rebalance();
    }

    /// Adds agents that are listed and removes those that are not any more.
    pub(crate) fn follow_listed(&mut self, listed: &Listed) {
        let config = Arc::clone(&self.config);
        for id in listed.keys().filter(|id| !is_agent_id(id)) {
            if self.invalid.insert(id.clone()) {
                tracing::warn!(
                    "--all-agents: the ping system lists '{}', which is no agent id: it is left out",
                    id.escape_unicode()
                );
            }
        }
        let is_wanted =
            |id: &str| is_agent_id(id) && listed.contains_key(id) && config.agents.is_ours(id);
        let gone: Vec<String> = self.followed.keys().cloned().collect();
        for id in gone.into_iter().filter(|id| !is_wanted(id)) {
            self.remove(&id);
        }
        for id in listed.keys().filter(|id| is_wanted(id)) {
            if self.followed.contains_key(id) {
                continue;
            }
            let agent = config.agents.agent(id);
            let index = self.next_index(id);
            self.shared.events.add_agent(index, terms(&agent, &config));
            self.follow(&agent);
        }
        self.shared.rates.rebalance();
    }

    fn next_index(&self, id: &str) -> AgentIndex {
        let next = AgentIndex(self.indices.len());
        self.indices.get(id).copied().unwrap_or(next)
    }

    fn remove(&mut self, id: &str) {
        let Some(stop) = self.followed.remove(id) else {
            return;
        };
        // Its submitter emits that it left, after its last slot.
        stop.cancel();
        self.discovery.unfollow(self.indices[id]);
        self.shared.rates.remove(self.indices[id]);
    }

    fn follow(&mut self, agent: &AgentSettings) {
        let index = self.next_index(&agent.id);
        self.indices.insert(agent.id.clone(), index);
        let stop = self.shared.stop.child_token();
        self.followed.insert(agent.id.clone(), stop.clone());
        self.shared.in_flight.add_agent(index);
        if let Some(budgets) = &self.shared.budgets {
            budgets.open(index, agent.budget.clone());
        }
        let agent_id: Arc<str> = agent.id.as_str().into();
        let addresses = agent.addresses();
        let own_orchestrators = if agent.is_tied { addresses.len() } else { 0 };
        let job_stats = JobStats::new(own_orchestrators, self.config.ping.window);
        let job_stats = Arc::new(job_stats.pausing_after(self.config.limits.pause_after));
        let base_rate = self.config.base_rate(agent);
        let target = self
            .shared
            .rates
            .add(index, base_rate, Arc::clone(&job_stats));

        let weights = self.config.gateway.capabilities.iter().map(|capability| {
            if agent.does(&capability.name) {
                capability.weight
            } else {
                0.0
            }
        });
        let capabilities = &self.config.gateway.capabilities;
        let timeouts = capabilities
            .iter()
            .map(|capability| self.config.timeout(agent, capability));
        let destination = self.destinations.of(agent);
        if let (Destination::LiveRunner(runner), Some(address)) = (&destination, &agent.runner) {
            let followed =
                FollowedRunner::new(&address.url, Arc::clone(runner), Arc::clone(&job_stats));
            self.discovery.follow(index, followed);
        }
        let submitter = Submitter {
            agent: index,
            agent_id: Arc::clone(&agent_id),
            templates: capabilities.iter().map(Capability::prepare).collect(),
            timeouts: timeouts.collect(),
            destination,
            orchestrators: OrchestratorTurns::new(&addresses),
            price: self.config.price(agent),
            job_stats: Arc::clone(&job_stats),
            stop: stop.clone(),
            picker: JobPicker::new(weights, self.seed.wrapping_add(index.0 as u64)),
            timer: PreciseTimer::precise(),
            shared: Arc::clone(&self.shared),
        };
        self.tasks.spawn(submitter.run(target));
        self.tasks.spawn(monitor(
            index,
            agent_id,
            Arc::clone(&self.config),
            Arc::clone(&self.ping_system),
            (Arc::clone(&self.shared), stop),
        ));
    }
}

/// The orchestrators, or the live runner, that do this agent's jobs and no other agent's.
fn own_orchestrators(agent: &AgentSettings) -> Option<Vec<String>> {
    agent.is_tied.then(|| agent.destinations().collect())
}

/// The terms on which an agent is followed, for the record.
#[must_use]
pub(crate) fn terms(agent: &AgentSettings, config: &RunnerConfig) -> AgentTerms {
    AgentTerms {
        id: agent.id.as_str().into(),
        price: config.price(agent),
        own_orchestrators: own_orchestrators(agent),
    }
}

async fn monitor(
    agent: AgentIndex,
    agent_id: Arc<str>,
    config: Arc<RunnerConfig>,
    source: Arc<PingSystem>,
    (shared, stop): (Arc<SubmitterContext>, CancellationToken),
) {
    let monitor = Monitor {
        agent,
        agent_id: &agent_id,
        uptime_interval: config.ping.interval,
        uptime_window: config.ping.window,
        stale_after: config.ping.stale_after,
        events: &shared.events,
        rates: &shared.rates,
        outages: &source.outages,
    };
    monitor.run(source.as_ref(), stop).await;
}

/// Sends the list of agents to `listed` at each `interval`.
pub(crate) async fn watch_list(
    ping_system: Arc<PingSystem>,
    interval: Duration,
    listed: mpsc::Sender<Listed>,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_empty = false;
    loop {
        ticks.tick().await;
        match ping_system.agents().await {
            Ok(agents) => {
                ping_system.outages.answered();
                let was_empty = std::mem::replace(&mut is_empty, agents.is_empty());
                if is_empty && !was_empty {
                    tracing::warn!("--all-agents: the ping system lists no agent yet");
                }
                if listed.send(agents).await.is_err() {
                    return;
                }
            }
            Err(error) if error.is_outage() => ping_system.outages.failed(&error),
            Err(error) => tracing::warn!(
                "--all-agents: no list of agents, known agents stay followed: {error}"
            ),
        }
    }
}

/// Computes the parts of a total rate again at each `interval`.
pub(crate) async fn rebalance(rates: Arc<RateController>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        rates.rebalance();
    }
}
