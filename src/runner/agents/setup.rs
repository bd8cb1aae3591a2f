//! What the agents of a run share, from its configuration.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use reqwest::{Client, Url};
use tokio::sync::{Mutex, Semaphore};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::submitter::{JobCount, SubmitterContext};
use crate::clock::AgeClock;
use crate::net;
use crate::net::dial::Dialer;
use crate::net::endpoint::with_path;
use crate::net::job_client::JobClient;
use crate::runner::config::RunnerConfig;
use crate::runner::events::dispatcher::EventDispatcher;
use crate::runner::rate::controller::RateController;
use crate::runner::send::budget::Budgets;
use crate::runner::send::capability::Capability;
use crate::runner::send::gateway::{Gateway, Route, Site, SiteHealth};
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
        authorization: config.ping.endpoint.authorization.clone(),
        window: config.ping.window,
        timeout: config.ping.interval.min(MAX_POLL_TIMEOUT),
        permits: Semaphore::new(MAX_CONCURRENT_POLLS),
        cached_list: Mutex::default(),
        clock: AgeClock::start(),
        outages: OutageLog::new(config.ping.stale_after),
        clocks_differ: AtomicBool::new(false),
    }
}

/// Gateway, limits and rates, for no agent yet.
///
/// # Errors
/// When TLS is wanted and cannot be set up.
pub(crate) fn shared(
    config: &RunnerConfig,
    events: &Arc<EventDispatcher>,
    stop: CancellationToken,
) -> anyhow::Result<SubmitterContext<Gateway>> {
    Ok(SubmitterContext {
        gateway: gateway(config).context("the way to the gateway cannot be set up")?,
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
    })
}

/// Where the jobs of a capability go at a gateway's address, prefix included.
#[must_use]
pub(crate) fn job_url(gateway: &Url, capability: &Capability) -> Url {
    let route = capability.route.trim_start_matches('/');
    with_path(gateway, &format!("process/request/{route}"))
}

fn gateway(config: &RunnerConfig) -> anyhow::Result<Gateway> {
    let gateway = &config.gateway;
    let is_https = gateway.urls().any(|url| url.scheme() == "https");
    let tls = if is_https {
        let tls = net::tls::trusting(config.extra_roots.clone())?;
        Some(TlsConnector::from(Arc::new(tls)))
    } else {
        None
    };
    let site = |url: &Url| -> anyhow::Result<Site> {
        let capabilities = gateway.capabilities.iter();
        let uris = capabilities.map(|capability| job_url(url, capability).as_str().parse());
        Ok(Site {
            client: JobClient::new(Dialer::new(url, tls.clone())?),
            uris: uris.collect::<Result<_, _>>()?,
            health: SiteHealth::default(),
        })
    };
    let routes = gateway.capabilities.iter().map(Route::new);
    Ok(Gateway::new(
        gateway.urls().map(site).collect::<Result<_, _>>()?,
        routes.collect(),
        gateway.endpoint.authorization.clone(),
    ))
}
