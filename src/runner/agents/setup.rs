//! What the agents of a run share, from its configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use reqwest::Client;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::submitter::{JobCount, Shared};
use crate::net;
use crate::net::endpoint::with_path;
use crate::runner::config::RunnerConfig;
use crate::runner::events::recorder::Recorder;
use crate::runner::rate::controller::RateController;
use crate::runner::send::budget::Budgets;
use crate::runner::send::gateway::Gateway;
use crate::runner::send::in_flight::Places;
use crate::runner::uptime::client::PingSystem;

/// The longest wait for an answer of the ping system (CONTRACT.md section 1).
const LONGEST_QUESTION: Duration = Duration::from_secs(10);
/// Questions to the ping system at once, over all agents.
const QUESTIONS_AT_ONCE: usize = 8;
/// The client that reaches ping system and gateway.
///
/// # Errors
/// When TLS is wanted and no roots can be loaded.
pub fn client(config: &RunnerConfig) -> anyhow::Result<Client> {
    let with_tls = [&config.ping.endpoint.url, &config.gateway.endpoint.url]
        .iter()
        .any(|u| u.scheme() == "https");
    net::client::new(with_tls, config.extra_roots.clone())
        .context("the HTTP client cannot be set up")
}

/// The ping system, as it is asked by all agents.
#[must_use]
pub fn ping_system(config: &RunnerConfig, client: Client) -> PingSystem {
    PingSystem {
        client,
        url: config.ping.endpoint.url.clone(),
        authorization: config.ping.endpoint.authorization.clone(),
        window: config.ping.window,
        patience: config.ping.interval.min(LONGEST_QUESTION),
        places: Semaphore::new(QUESTIONS_AT_ONCE),
        last_look: Mutex::default(),
    }
}

/// Gateway, limits and rates, for no agent yet.
#[must_use]
pub fn shared(
    config: &RunnerConfig,
    client: Client,
    recorder: &Arc<Recorder>,
    stop: CancellationToken,
) -> Shared<Gateway> {
    Shared {
        gateway: gateway(config, client),
        timeouts: config
            .gateway
            .capabilities
            .iter()
            .map(|capability| config.gateway.timeout.unwrap_or(capability.patience()))
            .collect(),
        places: Arc::new(Places::new(config.limits.max_in_flight)),
        job_count: JobCount::new(config.limits.max_jobs),
        budgets: config
            .has_budgets()
            .then(|| Budgets::new(config.limits.budget.clone())),
        recorder: Arc::clone(recorder),
        rates: Arc::new(RateController::new(
            config.rate.policy.clone(),
            config.rate.sharing,
        )),
        jobs: TaskTracker::new(),
        stop,
    }
}

fn gateway(config: &RunnerConfig, client: Client) -> Gateway {
    let routes = config.gateway.capabilities.iter().map(|capability| {
        let route = capability.route.trim_start_matches('/');
        with_path(
            &config.gateway.endpoint.url,
            &format!("process/request/{route}"),
        )
    });
    Gateway::new(
        client,
        routes.collect(),
        config.gateway.endpoint.authorization.clone(),
    )
}
