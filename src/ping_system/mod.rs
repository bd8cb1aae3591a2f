//! The ping system: registers agents, pings them at intervals that depend on their uptime, stores their
//! answers, and serves the history. It only coordinates: no jobs, no rates, no payments.

pub(crate) mod address_policy;
pub(crate) mod api;
pub(crate) mod client;
pub mod evaluate;
pub(crate) mod feed;
pub(crate) mod interval;
pub(crate) mod metrics;
pub(crate) mod options;
pub(crate) mod pinger;
pub(crate) mod retention;
pub mod store;
#[cfg(test)]
mod testing;
pub(crate) mod writer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use reqwest::header::HeaderValue;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::address_policy::AddressPolicy;
use self::api::Tokens;
use self::api::state::AppState;
use self::client::AgentClient;
use self::evaluate::PingPolicy;
use self::feed::Feed;
use self::metrics::PingMetrics;
use self::pinger::Pinger;
use self::store::{Store, postgres, sqlite};
use self::writer::PingWriter;
use crate::net;
use crate::shutdown::Shutdown;

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
    /// How many agents it asks at once.
    pub max_concurrent: usize,
    /// How long it remembers.
    pub retention: Duration,
    /// Who may do what.
    pub tokens: Tokens,
    /// What agents are shown.
    pub agent_authorization: Option<HeaderValue>,
    /// Where agents may be; anywhere, where this is empty.
    pub allowed: Vec<IpNet>,
}

/// Where the ping system remembers. The URL may hold a password and is never shown.
#[derive(Clone)]
pub enum Database {
    Sqlite(String),
    Postgres(String),
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Sqlite(_) => "Sqlite",
            Self::Postgres(_) => "Postgres",
        })
    }
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

    let (store, _owner) = open_store(&config.database, &feed, &helpers_stop, &mut helpers).await?;
    let (writer, writer_task) = writer::new();
    // It ends when the last ping is stored, not before.
    let stored = tokio::spawn(writer_task.run(Arc::clone(&store), Arc::clone(&feed)));
    helpers.spawn(retention::run(
        Arc::clone(&store),
        config.retention,
        helpers_stop,
    ));
    let tokens = config.tokens.clone();
    let state = Arc::new(state(config, address, store, feed, writer)?);
    let pinger = Arc::clone(&state.pinger);
    tracing::info!("the ping system answers at http://{address}");
    let served = net::server::serve(
        listener,
        api::routes(state, tokens),
        shutdown.at_once.clone(),
    );
    let pinging = async {
        pinger.run(shutdown.gently.clone()).await;
        pinger.under_way.close();
        pinger.under_way.wait().await;
    };
    tokio::select! {
        () = served => {}
        () = pinging => {}
    }
    if shutdown.at_once.is_cancelled() {
        return Ok(());
    }
    helpers.shutdown().await;
    drop(pinger);
    // The routes, which hold the other end of the writer's channel, are dropped by now.
    let _ = stored.await;
    Ok(())
}

/// Pinger and routes' state, on a database and what follows it.
fn state(
    config: PingSystemConfig,
    address: SocketAddr,
    store: Arc<dyn Store>,
    feed: Arc<Feed>,
    writer: PingWriter,
) -> anyhow::Result<AppState> {
    let address_policy = AddressPolicy::new(&config.allowed, address);
    let client = AgentClient::new(
        address_policy.clone(),
        config.agent_authorization,
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
        permits: Arc::new(Semaphore::new(config.max_concurrent)),
        under_way: TaskTracker::new(),
        wake: Notify::new(),
        metrics: Arc::clone(&metrics),
    });
    Ok(AppState {
        store,
        pinger,
        feed,
        address_policy,
        metrics,
        rules: config.rules,
        retention: config.retention,
        streams: Arc::new(Semaphore::new(api::MAX_STREAMS)),
    })
}

/// Opens the database. A file is ours for as long as its owner lives; of a server, `helpers` follows what
/// other ping systems store there.
async fn open_store(
    database: &Database,
    feed: &Arc<Feed>,
    stop: &CancellationToken,
    helpers: &mut JoinSet<()>,
) -> anyhow::Result<(Arc<dyn Store>, Option<sqlite::Owner>)> {
    match database {
        Database::Sqlite(url) => {
            let (store, owner) = sqlite::open(url)
                .await
                .context("--database: the SQLite file cannot be used")?;
            Ok((Arc::new(store), Some(owner)))
        }
        Database::Postgres(url) => {
            let store = postgres::open(url)
                .await
                .context("--database: PostgreSQL cannot be used")?;
            let (url, origin) = (url.clone(), store.origin());
            let (feed, stop) = (Arc::clone(feed), stop.clone());
            helpers.spawn(async move { postgres::follow(&url, origin, &feed, stop).await });
            Ok((Arc::new(store), None))
        }
    }
}
