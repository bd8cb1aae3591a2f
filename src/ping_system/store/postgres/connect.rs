//! Connections to whichever server of a database can be written to.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::Connect;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Config, Error, NoTls, Notification, Socket};
use tokio_util::task::AbortOnDropHandle;

use super::super::StoreError;
use super::failure::store_error;
use super::options::{PostgresOptions, Server};
use super::tls::Tls;

/// What every connection begins with. A server gives up a statement that takes longer than our own wait; a
/// transaction that we left open, stopped in a debugger, must not hold its locks for ever. A commit that is
/// acknowledged before it is on disk would be no commit.
const SETTINGS: &str = "SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '15s'; \
    SELECT set_config('synchronous_commit', 'on', false) \
    WHERE current_setting('synchronous_commit') = 'off';";

/// Notifications that wait to be handled; more wait in the connection.
pub(super) const NOTIFICATIONS: usize = 1024;

/// The servers of a database, and what is known of them.
#[derive(Debug)]
pub(super) struct Servers {
    options: PostgresOptions,
    /// The index of the server that was connected to last.
    connected: AtomicUsize,
    /// The index of the server that is tried next: the one that was connected to last, or the one after those that
    /// failed since, also if the attempt was given up.
    next: AtomicUsize,
    last_failure: Mutex<Option<StoreError>>,
}

/// A connection, and the task that serves it.
type Connected = (Client, AbortOnDropHandle<()>);

impl Servers {
    pub(super) fn new(options: PostgresOptions) -> Self {
        Self {
            options,
            connected: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            last_failure: Mutex::default(),
        }
    }

    /// The longest that an attempt to connect takes.
    pub(super) fn timeout(&self) -> Duration {
        self.options.servers.iter().map(Server::timeout).sum()
    }

    /// The server that was connected to last.
    pub(super) fn current(&self) -> String {
        let index = self.connected.load(Ordering::Relaxed);
        self.options.servers[index].name()
    }

    /// Why the last attempt to connect failed; `None` if it succeeded.
    pub(super) fn last_failure(&self) -> Option<StoreError> {
        self.last_failure.lock().clone()
    }

    /// Connects to the first server that answers and can be written to. Notifications go to `notified`.
    ///
    /// # Errors
    /// The error of the last server that gave one; `None` if none of them answered. All their reasons are in
    /// [`last_failure`](Self::last_failure).
    pub(super) async fn connect(
        &self,
        notified: Option<&mpsc::Sender<Notification>>,
    ) -> Result<Connected, Option<Error>> {
        let servers = &self.options.servers;
        let first = self.next.load(Ordering::Relaxed);
        let mut last = None;
        let mut failures = Vec::new();
        for index in (0..servers.len()).map(|n| (first + n) % servers.len()) {
            let server = &servers[index];
            self.next.store(index + 1, Ordering::Relaxed);
            // A server that accepts connections and says nothing must not keep us from the next one.
            let connecting = tokio::time::timeout(server.timeout(), server.connect(notified));
            let failure = match connecting.await {
                Ok(Ok(connected)) => {
                    self.next.store(index, Ordering::Relaxed);
                    self.connected.store(index, Ordering::Relaxed);
                    *self.last_failure.lock() = None;
                    return Ok(connected);
                }
                Ok(Err(error)) => {
                    let failure = store_error(&error);
                    last = Some(error);
                    failure
                }
                Err(_) => StoreError::no_answer(server.timeout()),
            };
            failures.push((server.name(), failure));
        }
        *self.last_failure.lock() = Some(summary(&failures));
        Err(last)
    }
}

/// The reasons of all servers. It is of no use to try again only if that holds for each of them.
fn summary(failures: &[(String, StoreError)]) -> StoreError {
    let reasons = failures.iter().map(|(name, failure)| {
        let reason = match failure {
            StoreError::Unavailable(reason) | StoreError::Unusable(reason) => reason.clone(),
            StoreError::Corrupt { .. } => failure.to_string(),
        };
        format!("{name}: {reason}")
    });
    let text = reasons.collect::<Vec<_>>().join("; ");
    let unusable = |(_, failure): &(String, StoreError)| matches!(failure, StoreError::Unusable(_));
    if failures.iter().all(unusable) {
        StoreError::Unusable(text)
    } else {
        StoreError::Unavailable(text)
    }
}

impl Server {
    async fn connect(
        &self,
        notified: Option<&mpsc::Sender<Notification>>,
    ) -> Result<Connected, Error> {
        match &self.tls {
            Tls::None => connect(&self.config, NoTls, notified).await,
            Tls::Rustls(tls) => connect(&self.config, tls.clone(), notified).await,
        }
    }
}

async fn connect<T>(
    config: &Config,
    tls: T,
    notified: Option<&mpsc::Sender<Notification>>,
) -> Result<Connected, Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, mut connection) = config.connect(tls).await?;
    let notified = notified.cloned();
    let task = tokio::spawn(async move {
        let mut messages = std::pin::pin!(stream::poll_fn(
            move |context| connection.poll_message(context)
        ));
        // An error ends the connection, and with it every operation on the client.
        while let Some(Ok(message)) = messages.next().await {
            if let (AsyncMessage::Notification(notification), Some(notified)) = (message, &notified)
                && notified.send(notification).await.is_err()
            {
                return;
            }
        }
    });
    let task = AbortOnDropHandle::new(task);
    client.batch_execute(SETTINGS).await?;
    Ok((client, task))
}

/// Connects for the pool.
pub(super) struct PoolConnect(pub(super) Arc<Servers>);

impl Connect for PoolConnect {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + '_>> {
        Box::pin(async {
            match self.0.connect(None).await {
                Ok((client, task)) => Ok((client, task.detach())),
                Err(Some(error)) => Err(error),
                // Only tokio-postgres can make an error: the pool's own timeout, which is no longer, ends this.
                Err(None) => pending().await,
            }
        })
    }
}
