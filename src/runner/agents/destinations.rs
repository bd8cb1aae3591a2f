//! The destinations of a run's jobs, from its configuration: the gateway, and the orchestrators of live runners.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use futures_util::future::{join, join_all};
use reqwest::Url;
use rustls::ClientConfig;
use tokio_rustls::TlsConnector;

use crate::net;
use crate::net::dial::Dialer;
use crate::net::endpoint::with_path;
use crate::net::fingerprint::Fingerprint;
use crate::net::job_client::JobClient;
use crate::runner::config::{AgentSettings, RunnerAddress, RunnerConfig};
use crate::runner::send::capability::Capability;
use crate::runner::send::destination::Destination;
use crate::runner::send::gateway::{Gateway, Route, Site, SiteHealth};
use crate::runner::send::live_runner::{LiveRunner, Orchestrator, RunnerRoute};
use crate::wire::live_runner::orchestrator_of;

/// All destinations of a run. Agents at the same orchestrator share its connections.
#[derive(Debug)]
pub(crate) struct Destinations {
    gateway: Arc<Gateway>,
    uses_gateway: bool,
    /// By agent.
    runners: BTreeMap<String, Arc<LiveRunner>>,
    orchestrators: Vec<Arc<Orchestrator>>,
}

impl Destinations {
    /// Those of all agents that are configured; others go to the gateway.
    ///
    /// # Errors
    /// When TLS is wanted and cannot be set up.
    pub(crate) fn new(config: &RunnerConfig) -> anyhow::Result<Self> {
        let gateway = gateway(config).context("the way to the gateway cannot be set up")?;
        let capabilities = &config.gateway.capabilities;
        let routes: Arc<[RunnerRoute]> = capabilities.iter().map(RunnerRoute::new).collect();
        let mut orchestrators = BTreeMap::new();
        let mut runners = BTreeMap::new();
        for agent in &config.agents.configured {
            let Some(address) = &agent.runner else {
                continue;
            };
            let key = (orchestrator_of(&address.url), address.fingerprint);
            let orchestrator = if let Some(known) = orchestrators.get(&key) {
                Arc::clone(known)
            } else {
                let new = orchestrator(config, address).with_context(|| {
                    format!("the way to the runner of {} cannot be set up", agent.id)
                })?;
                Arc::clone(orchestrators.entry(key).or_insert(Arc::new(new)))
            };
            let uris = capabilities.iter().map(|capability| {
                let route = capability.route.trim_start_matches('/');
                with_path(&address.url, route).as_str().parse()
            });
            let uris = uris.collect::<Result<_, _>>()?;
            let runner = LiveRunner::new(orchestrator, uris, Arc::clone(&routes));
            runners.insert(agent.id.clone(), Arc::new(runner));
        }
        Ok(Self {
            gateway: Arc::new(gateway),
            uses_gateway: config.uses_gateway(),
            runners,
            orchestrators: orchestrators.into_values().collect(),
        })
    }

    /// Where an agent's jobs go.
    #[must_use]
    pub(crate) fn of(&self, agent: &AgentSettings) -> Destination {
        match self.runners.get(&agent.id) {
            Some(runner) => Destination::LiveRunner(Arc::clone(runner)),
            None => Destination::Gateway(Arc::clone(&self.gateway)),
        }
    }

    /// The orchestrators of live runners.
    pub(crate) fn orchestrators(&self) -> impl Iterator<Item = &Arc<Orchestrator>> {
        self.orchestrators.iter()
    }

    /// Keeps all of them usable. Never returns.
    pub(crate) async fn tend(&self) {
        let gateway = async {
            if self.uses_gateway {
                self.gateway.tend().await;
            }
        };
        let orchestrators = self.orchestrators.iter().map(|each| each.tend());
        join(gateway, join_all(orchestrators)).await;
        std::future::pending::<()>().await;
    }
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
        Some(connector(net::tls::trusting(config.extra_roots.clone())?))
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
    Ok(Gateway::new(
        gateway.urls().map(site).collect::<Result<_, _>>()?,
        gateway.capabilities.iter().map(Route::new).collect(),
        gateway.endpoint.token.clone(),
    ))
}

/// The orchestrator of a live runner.
///
/// # Errors
/// When TLS is wanted and cannot be set up.
pub(crate) fn orchestrator(
    config: &RunnerConfig,
    runner: &RunnerAddress,
) -> anyhow::Result<Orchestrator> {
    let url = orchestrator_of(&runner.url);
    let tls = if url.scheme() == "https" {
        Some(connector(orchestrator_tls(config, runner.fingerprint)?))
    } else {
        None
    };
    let client = JobClient::new(Dialer::new(&url, tls)?);
    Orchestrator::new(url, client)
}

/// Orchestrators show certificates that nobody vouches for: a fingerprint beats all else.
fn orchestrator_tls(
    config: &RunnerConfig,
    fingerprint: Option<Fingerprint>,
) -> anyhow::Result<ClientConfig> {
    let verifier = match fingerprint {
        Some(fingerprint) => net::tls::pinned(fingerprint),
        None if config.insecure_orchestrators => net::tls::accept_any(),
        None => return net::tls::trusting(config.extra_roots.clone()),
    };
    Ok(net::tls::client_config(verifier)?.with_no_client_auth())
}

fn connector(config: ClientConfig) -> TlsConnector {
    TlsConnector::from(Arc::new(config))
}
