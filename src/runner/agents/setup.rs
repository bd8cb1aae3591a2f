//! What the agents of a run share, from its configuration.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use reqwest::Client;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::submitter::{JobCount, SubmitterContext};
use crate::clock::AgeClock;
use crate::net;
use crate::runner::config::RunnerConfig;
use crate::runner::events::dispatcher::EventDispatcher;
use crate::runner::rate::controller::RateController;
use crate::runner::send::budget::Budgets;
use crate::runner::send::in_flight::InFlightLimit;
use crate::runner::uptime::client::PingSystem;
use crate::runner::uptime::outage::OutageLog;

/// The longest wait for an answer of the ping system.
const MAX_POLL_TIMEOUT: Duration = Duration::from_secs(10);
/// Concurrent polls of the ping system, over all agents.
const MAX_CONCURRENT_POLLS: usize = 8;

/// The HTTP client for all but jobs.
///
/// # Errors
/// When TLS is wanted and no roots can be loaded.
pub(crate) fn client(config: &RunnerConfig) -> anyhow::Result<Client> {
    let mut urls = config.gateway.urls().chain([&config.ping.endpoint.url]);
    let with_tls = urls.any(|url| url.scheme() == "https");
    net::client::new(with_tls, config.extra_roots.clone())
        .context("the HTTP client cannot be set up")
}

/// The ping system, as it is asked by all agents.
#[must_use]
pub(crate) fn ping_system(config: &RunnerConfig, client: Client) -> PingSystem {
    PingSystem {
        client,
        url: config.ping.endpoint.url.clone(),
        token: config.ping.endpoint.token.clone(),
        window: config.ping.window,
        timeout: config.ping.interval.min(MAX_POLL_TIMEOUT),
        permits: Semaphore::new(MAX_CONCURRENT_POLLS),
        cached_list: Mutex::default(),
        clock: AgeClock::start(),
        outages: OutageLog::new(config.ping.stale_after),
        clocks_differ: AtomicBool::new(false),
    }
}

/// Limits and rates, for no agent yet.
#[must_use]
pub(crate) fn shared(
    config: &RunnerConfig,
    events: &Arc<EventDispatcher>,
    stop: CancellationToken,
) -> SubmitterContext {
    SubmitterContext {
        in_flight: Arc::new(InFlightLimit::new(config.limits.max_in_flight)),
        job_count: JobCount::new(config.limits.max_jobs),
        budgets: config
            .has_budgets()
            .then(|| Budgets::new(config.limits.budget.clone())),
        events: Arc::clone(events),
        rates: Arc::new(RateController::new(
            config.rate.policy.clone(),
            config.rate.sharing,
        )),
        jobs: TaskTracker::new(),
        stop,
        abandon: CancellationToken::new(),
    }
}
