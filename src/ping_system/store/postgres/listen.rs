//! Follows the pings that other ping systems store in the same database.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::rows::json;
use super::super::{Store, StoreError};
use super::connect::NOTIFICATIONS;
use super::{PostgresStore, failure};
use crate::ping_system::feed::Feed;
use crate::wire::ping_system::served::{Agent, LegacyAgent, Ping, PingEvent};

/// The channel of pings, and that of heartbeats, which releases up to 0.1.0 do not listen to.
const PINGS: &str = "uptime_runner_pings";
const SUBSCRIBE: &str = "LISTEN uptime_runner_pings; LISTEN uptime_runner_heartbeats";
pub(super) const SEND_HEARTBEAT: &str = "SELECT pg_notify('uptime_runner_heartbeats', '')";

/// The pause before a lost connection is replaced.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// A heartbeat takes the way of a ping: through the pool into the database, and back on the listening connection.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// Without any notification for so long the connection is dead, or leads to a server that is not written to any more.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(25);
/// The longest wait for the server to accept the subscription.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// PostgreSQL takes less than 8000 bytes.
const MAX_NOTIFICATION_BYTES: usize = 7900;

/// The payload of the notification by which other ping systems on the same database are told of a ping. An agent that
/// makes it too long is left out: they read it from the database.
pub(super) fn payload(origin: Uuid, agent: &Agent, ping: &Ping) -> String {
    #[derive(Serialize)]
    struct Notification<'a> {
        origin: Uuid,
        event: Event<'a>,
    }
    #[derive(Serialize)]
    struct Event<'a> {
        /// For releases up to 0.1.0.
        #[serde(flatten)]
        legacy: LegacyAgent<'a>,
        agent: Option<&'a Agent>,
        ping: &'a Ping,
    }
    let text = |agent_if_short| {
        let event = Event {
            legacy: LegacyAgent::from(agent),
            agent: agent_if_short,
            ping,
        };
        json(&Notification { origin, event })
    };
    let payload = text(Some(agent));
    if payload.len() <= MAX_NOTIFICATION_BYTES {
        payload
    } else {
        text(None)
    }
}

/// A notification as it is received; without the agent from releases up to 0.1.0.
#[derive(Debug, Deserialize)]
struct PingNotification {
    origin: Uuid,
    event: NotifiedPing,
}

#[derive(Debug, Deserialize)]
struct NotifiedPing {
    agent_id: String,
    agent: Option<Agent>,
    ping: Ping,
}

impl NotifiedPing {
    /// The event; `None` if the agent was removed meanwhile.
    async fn into_event(self, store: &PostgresStore) -> Result<Option<PingEvent>, StoreError> {
        let agent = match self.agent {
            Some(agent) => Some(agent),
            None => store.agent(&self.agent_id).await?.map(|known| known.agent),
        };
        let ping = self.ping;
        Ok(agent.map(|agent| PingEvent { agent, ping }))
    }
}

/// Publishes the pings of other ping systems on `feed`, until `stop`. Whenever some may have been missed, all
/// subscribers are told to read the history again.
pub(crate) async fn follow(store: Arc<PostgresStore>, feed: &Feed, stop: CancellationToken) {
    let mut warned = false;
    let mut first = true;
    let following = async {
        loop {
            let ended = listen(&store, feed, &mut warned, &mut first).await;
            // One outage is one warning, which the pinger gives.
            if !store.is_away() && !std::mem::replace(&mut warned, true) {
                tracing::warn!(
                    "pings of other ping systems cannot be followed, trying again: {ended}"
                );
            }
            feed.resync();
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    };
    stop.run_until_cancelled(following).await;
}

/// Listens until the connection is lost, or nothing has come through it for too long.
async fn listen(
    store: &PostgresStore,
    feed: &Feed,
    warned: &mut bool,
    first: &mut bool,
) -> StoreError {
    let (notified, mut notifications) = mpsc::channel(NOTIFICATIONS);
    let (client, _connection) = match store.servers.connect(Some(&notified)).await {
        Ok(connected) => connected,
        Err(error) => {
            let failure = error.as_ref().map(failure::store_error);
            let known = store.servers.last_failure().or(failure);
            return known.unwrap_or(StoreError::no_answer(store.servers.timeout()));
        }
    };
    // The connection holds the other end: when it is lost, the channel is closed.
    drop(notified);
    let subscribe = client.batch_execute(SUBSCRIBE);
    match tokio::time::timeout(LISTEN_TIMEOUT, subscribe).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return failure::store_error(&error),
        Err(_) => return StoreError::no_answer(LISTEN_TIMEOUT),
    }
    // What came between two connections is lost.
    if !std::mem::replace(first, false) {
        feed.resync();
    }
    if std::mem::take(warned) {
        tracing::info!("pings of other ping systems are followed again");
    }
    let mut heartbeats = pin!(send_heartbeats(store));
    let mut last_heard = Instant::now();
    loop {
        let notification = tokio::select! {
            notification = notifications.recv() => notification,
            () = tokio::time::sleep_until(last_heard + SILENCE_TIMEOUT) => {
                return StoreError::no_answer(SILENCE_TIMEOUT);
            }
            error = &mut heartbeats => return error,
        };
        let Some(notification) = notification else {
            return StoreError::Unavailable("the connection was lost".to_owned());
        };
        last_heard = Instant::now();
        if notification.channel() != PINGS {
            continue;
        }
        let told = match serde_json::from_str::<PingNotification>(notification.payload()) {
            Ok(told) if told.origin == store.origin => continue,
            Ok(told) => told.event,
            Err(error) => {
                tracing::warn!("a notification of another ping system cannot be read: {error}");
                feed.resync();
                continue;
            }
        };
        match told.into_event(store).await {
            Ok(event) => event.iter().for_each(|event| feed.publish(event)),
            Err(error) => return error,
        }
    }
}

/// Sends heartbeats for as long as they can be sent.
async fn send_heartbeats(store: &PostgresStore) -> StoreError {
    let mut interval = tokio::time::interval(HEARTBEAT_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if let Err(error) = store.send_heartbeat().await {
            return error;
        }
    }
}
