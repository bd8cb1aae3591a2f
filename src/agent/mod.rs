//! The agent: checks the GPU, keeps the ledger of its uptime, and answers the ping system. It never decides
//! on rates or payment.

pub(crate) mod api;
pub(crate) mod application;
pub(crate) mod checkpoint;
pub(crate) mod known_gpus;
pub(crate) mod ledger;
pub(crate) mod monitor;
pub(crate) mod options;
pub mod probe;
pub(crate) mod registration;
pub(crate) mod tracker;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use chrono::Utc;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpListener;
use tokio::time::timeout;
use url::Url;
use uuid::Uuid;

use self::application::ApplicationHealth;
use self::checkpoint::CheckpointFile;
use self::monitor::AgentState;
use self::probe::prober::Prober;
use self::probe::source::GpuSource;
use self::registration::RegistrationConfig;
use self::tracker::{TrackerConfig, UptimeTracker};
use crate::clock::BootInstant;
use crate::net;
use crate::net::credentials::Token;
use crate::net::server::ServerSettings;
use crate::shutdown::Shutdown;
use crate::wire::agent::is_agent_id;

/// How long the first probe may take before requests are answered without it.
const FIRST_PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The checked configuration of an agent.
#[derive(Debug)]
pub struct AgentConfig {
    /// How the GPUs are checked.
    pub rules: TrackerConfig,
    /// What is probed.
    pub gpu: GpuSource,
    /// The address to listen on.
    pub listen: SocketAddr,
    /// Where it registers itself.
    pub registration: Option<RegistrationConfig>,
    /// Where the application that uses the GPUs tells whether it is healthy.
    pub ready_also: Option<Url>,
    /// Further roots for the ping system and the application at https.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// The bearer token that requests must carry.
    pub token: Option<Token>,
    pub server: ServerSettings,
    /// The file that survives a restart.
    pub checkpoint: CheckpointFile,
    /// Checks between two whole checkpoints.
    pub checkpoint_every: u64,
}

/// Checks the GPU and serves until the first signal.
///
/// # Errors
/// When it cannot listen, or its checkpoint can neither be used nor set aside.
pub async fn run(config: AgentConfig, shutdown: &Shutdown) -> anyhow::Result<()> {
    let listener = net::server::listen("--listen", config.listen).await?;
    run_at(listener, config, shutdown).await
}

/// The same, where it listens already.
///
/// # Errors
/// When its checkpoint can neither be used nor set aside.
pub async fn run_at(
    listener: TcpListener,
    config: AgentConfig,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let path = config.checkpoint.path().display().to_string();
    let restored = config
        .checkpoint
        .read()
        .with_context(|| format!("--checkpoint {path}: cannot be set aside"))?;
    let agent_id = config.rules.agent_id.clone();
    if !is_agent_id(&agent_id) {
        tracing::warn!(
            "--agent-id '{}' has characters that ids may no longer have: choose another one, and register it",
            agent_id.escape_unicode()
        );
    }
    let check_interval = config.rules.check_interval;
    let (tracker, since_first_start) = UptimeTracker::begin(
        config.rules,
        Uuid::new_v4(),
        Utc::now(),
        BootInstant::now(),
        restored,
    );
    let shared = Arc::new(AgentState::new(tracker, since_first_start));
    let scheme = config.server.scheme();
    tracing::info!(
        "agent {agent_id} answers at {scheme}://{}",
        listener.local_addr()?
    );

    let registering = match config.registration {
        Some(registration) => {
            let agent_url = match &registration.advertise {
                Some(url) => url.clone(),
                None => format!("{scheme}://{}", listener.local_addr()?).parse()?,
            };
            let with_tls = registration.ping_system.scheme() == "https";
            let client = net::client::new(with_tls, config.extra_roots.clone())
                .context("--register-at: the HTTP client cannot be set up")?;
            let stop = shutdown.gently.clone();
            let agent_id = agent_id.clone();
            let run = registration::run(registration, client, agent_id, agent_url, stop);
            Some(Box::pin(run))
        }
        None => None,
    };
    let application = config
        .ready_also
        .map(|url| Arc::new(ApplicationHealth::new(url)));
    let watching = match application.clone() {
        Some(application) => {
            let client = net::client::new(application.is_https(), config.extra_roots)
                .context("--ready-also: the HTTP client cannot be set up")?;
            let stop = shutdown.gently.clone();
            Some(Box::pin(
                async move { application.watch(client, stop).await },
            ))
        }
        None => None,
    };
    let routes = api::routes(Arc::clone(&shared), application, agent_id, config.token);
    // The routes answer until the last checkpoint is written, and not before the first probe has ended: a
    // ping during the start must not read as if there were no GPU.
    let served = async {
        let _ = timeout(FIRST_PROBE_TIMEOUT, shared.first_probe.notified()).await;
        net::server::serve(listener, routes, config.server, shutdown.at_once.clone()).await;
    };
    let watched = monitor::run(
        &shared,
        Prober::new(config.gpu).context("no thread can be started")?,
        check_interval,
        config.checkpoint_every,
        config.checkpoint,
        shutdown.gently.clone(),
    );
    tokio::select! {
        () = served => {}
        () = watched => {}
        () = beside(registering) => {}
        () = beside(watching) => {}
    }
    Ok(())
}

/// Does what is wanted, if anything is; ends only when something else has ended the agent.
async fn beside<F: Future<Output = ()>>(wanted: Option<F>) {
    if let Some(wanted) = wanted {
        wanted.await;
    }
    std::future::pending::<()>().await;
}
