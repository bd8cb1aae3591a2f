//! Warnings about valid options that will surprise.

use std::collections::BTreeSet;

use super::{AgentSettings, RunnerConfig};
use crate::runner::rate::allocation;
use crate::runner::rate::controller::Sharing;
use crate::units::JobsPerMinute;
use crate::wire::agent::is_agent_id;

/// What an orchestrator wants to be paid ahead.
const TICKET_SECONDS: u32 = 60;

impl RunnerConfig {
    /// Logs all of them.
    pub fn warn(&self) {
        warn_of_short_timeouts(self);
        warn_of_short_tickets(self);
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
    let listed_later = config.agents.agent("");
    let agents = config.agents.configured.iter();
    let agents = agents.chain(config.agents.all.then_some(&listed_later));
    // A live runner's place is free again when its job is given up.
    let agents = agents.filter(|agent| agent.runner.is_none());
    let Some(tried) = agents.map(AgentSettings::orchestrators_tried).max() else {
        return;
    };
    for capability in &config.gateway.capabilities {
        let enough = capability.default_timeout(tried);
        if timeout < enough {
            tracing::warn!(
                capability = capability.name,
                "--timeout {timeout:?} is shorter than the gateway may take ({enough:?}): a job given up early never frees its place at the orchestrator",
            );
        }
    }
}

/// A gateway buys tickets for `timeout_seconds`, an orchestrator asks for those of 60 s.
fn warn_of_short_tickets(config: &RunnerConfig) {
    let agents = config.agents.configured.iter();
    let mut agents = agents.filter(|agent| agent.runner.is_none());
    let is_paid = config.uses_gateway() && config.limits.price.is_some()
        || agents.any(|agent| agent.price.is_some());
    let capabilities = config.gateway.capabilities.iter();
    for capability in capabilities.filter(|each| is_paid && each.timeout_seconds < TICKET_SECONDS) {
        tracing::warn!(
            capability = capability.name,
            "timeout_seconds {} is less than the {TICKET_SECONDS} s for which an orchestrator wants to be paid ahead: its first jobs, and those after 10 idle minutes, will be unpaid",
            capability.timeout_seconds,
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
