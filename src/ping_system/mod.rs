//! The ping system: registers agents, pings them at intervals that depend on their uptime, stores their
//! answers, and serves the history. It only coordinates: no jobs, no rates, no payments.

pub(crate) mod address_policy;
pub(crate) mod agent_tokens;
pub(crate) mod api;
pub(crate) mod client;
pub(crate) mod clock;
pub mod evaluate;
pub(crate) mod feed;
pub(crate) mod gpu_owners;
pub(crate) mod interval;
pub(crate) mod mass_failure;
pub(crate) mod metrics;
pub(crate) mod observer;
pub(crate) mod options;
pub(crate) mod pinger;
pub(crate) mod retention;
pub mod store;
pub mod stretch;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod void_queue;
pub(crate) mod warnings;
pub(crate) mod writer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use chrono::Utc;
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::address_policy::AddressPolicy;
use self::api::Tokens;
use self::api::state::AppState;
use self::client::{AgentClient, AgentCredentials};
use self::clock::PingClock;
use self::evaluate::PingPolicy;
use self::feed::Feed;
use self::gpu_owners::GpuOwners;
use self::metrics::PingMetrics;
use self::observer::Observer;
use self::pinger::Pinger;
use self::store::postgres::{self, PostgresOptions};
use self::store::sqlite::{self, Location};
use self::store::{Store, whole_micros};
use self::void_queue::VoidQueue;
use self::writer::PingWriter;
use crate::net;
use crate::net::server::ServerSettings;
use crate::shutdown::Shutdown;

/// How long pings under way are waited for at the end, so that the process is gone within 2 s.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(1500);

/// Everything that a ping system needs, checked.
#[derive(Debug)]
pub struct PingSystemConfig {
    /// Where it answers.
    pub listen: SocketAddr,
    /// What it remembers in.
    pub database: Database,
    /// How it judges pings.
    pub rules: PingPolicy,
    /// The longest wait for an agent's answer.
    pub response_timeout: Duration,
    /// How often a failed ping is retried before it counts.
    pub retries: u32,
    /// Whether agents may simulate their GPUs.
    pub allow_simulated: bool,
    /// Addresses, `HOST:PORT`, that can be connected to whenever its network works.
    pub references: Vec<String>,
    /// How many agents it asks at once.
    pub max_concurrent: usize,
    /// How long it remembers.
    pub retention: Duration,
    /// Who may do what.
    pub tokens: Tokens,
    /// How it treats its clients.
    pub server: ServerSettings,
    /// Further roots for agents at https.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// What agents are shown.
    pub agent_tokens: AgentCredentials,
    /// Where agents may be; anywhere, where this is empty.
    pub allowed: Vec<IpNet>,
}

/// Where the history is stored.
#[derive(Debug, Clone)]
pub enum Database {
    Sqlite(Location),
    Postgres(PostgresOptions),
}

/// Asks and answers until the first signal.
///
/// # Errors
/// When it cannot listen, or its database cannot be used.
pub async fn run(config: PingSystemConfig, shutdown: &Shutdown) -> anyhow::Result<()> {
    let listener = net::server::listen("--listen", config.listen).await?;
    run_at(listener, config, shutdown).await
}

/// The same, where it listens already.
///
/// # Errors
/// When its database cannot be used.
pub async fn run_at(
    listener: TcpListener,
    config: PingSystemConfig,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let address = listener.local_addr()?;
    let feed = Arc::new(Feed::default());
    let helpers_stop = shutdown.gently.child_token();
    let mut helpers = JoinSet::new();

    let open = open_store(config.database.clone(), &feed, &helpers_stop, &mut helpers);
    // A database that says nothing must not delay the end.
    let Some(store) = shutdown.gently.run_until_cancelled(open).await else {
        return Ok(());
    };
    let store = store?;
    let (writer, writer_task) = writer::new();
    // It ends when the last ping is stored, not before.
    let stored = tokio::spawn(writer_task.run(Arc::clone(&store), Arc::clone(&feed)));
    let clock = Arc::new(PingClock::start(whole_micros(Utc::now())));
    let observer = Arc::new(Observer::new(config.references.clone()));
    helpers.spawn(retention::run(
        Arc::clone(&store),
        Arc::clone(&clock),
        config.retention,
        helpers_stop.clone(),
    ));
    let watching = Arc::clone(&observer);
    helpers.spawn(async move { watching.run(helpers_stop).await });
    let tokens = config.tokens.clone();
    let settings = config.server.clone();
    let state = Arc::new(state(
        config, address, store, feed, writer, clock, observer,
    )?);
    let pinger = Arc::clone(&state.pinger);
    let scheme = settings.scheme();
    tracing::info!("the ping system answers at {scheme}://{address}");
    let served = net::server::serve(
        listener,
        api::routes(state, tokens),
        settings,
        shutdown.at_once.clone(),
    );
    let working = async {
        let pinging = async {
            pinger.run(shutdown.gently.clone()).await;
            pinger.under_way.close();
            pinger.under_way.wait().await;
        };
        tokio::select! {
            () = served => {}
            () = pinging => {}
        }
        helpers.shutdown().await;
        drop(pinger);
        // The routes, which hold the other end of the writer's channel, are dropped by now.
        let _ = stored.await;
    };
    // Agents that do not answer, and a database that does not, must not delay the end. A ping that is given up is asked
    // for again, by the ping system that takes over when its lease ends.
    let overdue = async {
        shutdown.gently.cancelled().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    tokio::select! {
        () = working => {}
        () = overdue => tracing::warn!(
            "pings under way are given up: they did not end within {} s",
            DRAIN_TIMEOUT.as_secs_f64()
        ),
        () = shutdown.at_once.cancelled() => {}
    }
    Ok(())
}

/// Pinger and routes' state, on a database and what follows it.
fn state(
    config: PingSystemConfig,
    address: SocketAddr,
    store: Arc<dyn Store>,
    feed: Arc<Feed>,
    writer: PingWriter,
    clock: Arc<PingClock>,
    observer: Arc<Observer>,
) -> anyhow::Result<AppState> {
    let address_policy = AddressPolicy::new(&config.allowed, address);
    let client = AgentClient::new(
        address_policy.clone(),
        config.agent_tokens,
        &config.extra_roots,
        config.response_timeout,
    )
    .context("the HTTP client cannot be set up")?;
    let metrics = Arc::new(PingMetrics::new()?);
    let pinger = Arc::new(Pinger {
        store: Arc::clone(&store),
        client,
        writer,
        feed: Arc::clone(&feed),
        rules: config.rules,
        timeout: config.response_timeout,
        retries: config.retries,
        permits: Arc::new(Semaphore::new(config.max_concurrent)),
        under_way: TaskTracker::new(),
        wake: Notify::new(),
        metrics: Arc::clone(&metrics),
        clock: Arc::clone(&clock),
        observer: Arc::clone(&observer),
        voiding: VoidQueue::default(),
        gpu_owners: GpuOwners::default(),
        allow_simulated: config.allow_simulated,
    });
    Ok(AppState {
        store,
        pinger,
        clock,
        observer,
        feed,
        address_policy,
        metrics,
        rules: config.rules,
        retention: config.retention,
        streams: Arc::new(Semaphore::new(api::MAX_STREAMS)),
    })
}

/// Opens the database. On PostgreSQL a task of `helpers` follows what other ping systems store there.
async fn open_store(
    database: Database,
    feed: &Arc<Feed>,
    stop: &CancellationToken,
    helpers: &mut JoinSet<()>,
) -> anyhow::Result<Arc<dyn Store>> {
    match database {
        Database::Sqlite(location) => {
            let store = sqlite::open(location).await;
            Ok(Arc::new(
                store.context("--database: the SQLite file cannot be used")?,
            ))
        }
        Database::Postgres(options) => {
            let store = postgres::open(options).await;
            let store = Arc::new(store.context("--database: PostgreSQL cannot be used")?);
            let (followed, feed, stop) = (Arc::clone(&store), Arc::clone(feed), stop.clone());
            helpers.spawn(async move { postgres::follow(followed, &feed, stop).await });
            Ok(store)
        }
    }
}
