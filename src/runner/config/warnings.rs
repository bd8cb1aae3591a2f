//! Warnings about valid options that will surprise.

use std::collections::BTreeSet;

use super::RunnerConfig;
use crate::runner::rate::allocation;
use crate::runner::rate::controller::Sharing;
use crate::units::JobsPerMinute;
use crate::wire::agent::is_agent_id;

impl RunnerConfig {
    /// Logs all of them.
    pub fn warn(&self) {
        warn_of_short_timeouts(self);
        warn_of_empty_tiers(self);
        for agent in self.agents.at_start() {
            if !is_agent_id(&agent.id) {
                tracing::warn!(
                    "the id '{}' has characters that ids may no longer have: register the agent under another one",
                    agent.id.escape_unicode()
                );
            }
        }
    }
}

fn warn_of_short_timeouts(config: &RunnerConfig) {
    let Some(timeout) = config.gateway.timeout else {
        return;
    };
    for capability in config
        .gateway
        .capabilities
        .iter()
        .filter(|c| timeout < c.default_timeout())
    {
        tracing::warn!(
            capability = capability.name,
            "--timeout {timeout:?} is shorter than the job's timeout_seconds + 10 s ({:?}): a job given up early never frees its place at the orchestrator",
            capability.default_timeout(),
        );
    }
}

fn warn_of_empty_tiers(config: &RunnerConfig) {
    let rates = match config.rate.sharing {
        Sharing::Own => config
            .agents
            .at_start()
            .iter()
            .map(|agent| config.base_rate(agent))
            .collect(),
        Sharing::Total { rate, split, .. } => {
            let weights = vec![None; config.agents.at_start().len()];
            allocation::base_rates(rate, split, &weights)
        }
    };
    let rates: BTreeSet<JobsPerMinute> = rates.into_iter().collect();
    for base_rate in rates {
        for uptime in config.rate.policy.tiers_without_jobs(base_rate) {
            tracing::warn!(
                "--policy: the share of {base_rate} jobs/min that an uptime of {} % earns is less than one job a minute: nothing is sent",
                uptime.get()
            );
        }
    }
}
