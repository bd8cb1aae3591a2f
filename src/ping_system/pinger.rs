//! Pings the agents that are due, with bounded concurrency; each ping has its own deadline, and each answer
//! or failure is stored once.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::broadcast::Receiver;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::AgentClient;
use super::evaluate::PingPolicy;
use super::feed::{Feed, FeedEvent, Topic};
use super::metrics::PingMetrics;
use super::store::{Claim, Claimed, Lease, Store, StoreError};
use super::stretch::StretchClock;
use super::writer::{NotStored, PingWriter};
use crate::units::saturating_add;
use crate::wire::ping_system::served::Ping;

/// Agents that become due within this time are claimed together: a claim is a write to the store.
const TOGETHER: Duration = Duration::from_millis(25);
/// How often the schedule is read when nothing is known to be due: other ping systems may have changed it.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// Pauses between retries while the store fails.
const MIN_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How much longer than the ping's deadline a lease lasts, so that the ping can be stored.
const TIME_TO_STORE: Duration = Duration::from_secs(5);
/// A clock that falls behind by more than this was set back.
const CLOCK_SLACK: TimeDelta = TimeDelta::seconds(60);

/// Pings agents, on schedule or on request.
#[derive(Debug)]
pub(crate) struct Pinger {
    /// Holds the schedule.
    pub store: Arc<dyn Store>,
    pub client: AgentClient,
    /// Stores the results.
    pub writer: PingWriter,
    /// Publishes pings, also those of other ping systems on the same database.
    pub feed: Arc<Feed>,
    pub rules: PingPolicy,
    /// The longest wait for an answer.
    pub timeout: Duration,
    /// The bound on concurrent pings.
    pub permits: Arc<Semaphore>,
    /// Pings in progress.
    pub under_way: TaskTracker,
    /// Wakes the schedule: a new agent may be due.
    pub wake: Notify,
    pub metrics: Arc<PingMetrics>,
    /// Measures the time between pings.
    pub stretches: StretchClock,
}

/// Why an agent was not pinged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PingError {
    /// The agent does not exist.
    #[error("no agent of that name")]
    Unknown,
    /// Another ping of the agent is in progress, and its result did not arrive in time.
    #[error("the agent is being asked at this moment")]
    Taken,
    /// The agent was removed, or taken over by another ping system, during the ping.
    #[error("the agent was removed or taken over while it was asked")]
    Lost,
    /// The ping could not be stored.
    #[error(transparent)]
    NotStored(#[from] NotStored),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Pinger {
    /// Pings the agents that are due, until `stop`; pings in progress go on.
    pub(crate) async fn run(self: &Arc<Self>, stop: CancellationToken) {
        let mut clock = WallClockCheck::start();
        let mut backoff = MIN_BACKOFF;
        let mut failing = false;
        let mut reschedule_overdue = true;
        while !stop.is_cancelled() {
            reschedule_overdue |= clock.was_set_back();
            let looked_at = Instant::now();
            let delay = match self.ask_due(&mut reschedule_overdue).await {
                Ok(delay) => {
                    backoff = MIN_BACKOFF;
                    if std::mem::take(&mut failing) {
                        tracing::info!("the schedule is read again");
                        // What other ping systems stored meanwhile was not seen.
                        self.feed.resync();
                    }
                    delay.max(TOGETHER)
                }
                Err(error) => {
                    // One outage is one warning.
                    if !std::mem::replace(&mut failing, true) {
                        // Subscribers must not mistake silence for good news.
                        self.feed.resync();
                        tracing::warn!("the schedule cannot be read, trying again: {error}");
                    }
                    let delay = backoff;
                    backoff = (backoff * 2).min(MAX_BACKOFF);
                    delay
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(looked_at + delay) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// Starts the pings that are due, and returns how long nothing more will be due.
    async fn ask_due(
        self: &Arc<Self>,
        reschedule_overdue: &mut bool,
    ) -> Result<Duration, StoreError> {
        if *reschedule_overdue {
            self.store.reschedule_overdue(Utc::now()).await?;
            *reschedule_overdue = false;
        }
        // With all permits taken nothing can be started before one is free.
        let mut permits = vec![self.permit().await];
        let Some(due_at) = self.store.next_due_at(Utc::now()).await? else {
            return Ok(MAX_DELAY);
        };
        if let Ok(wait) = (due_at - Utc::now()).to_std()
            && !wait.is_zero()
        {
            return Ok(wait.min(MAX_DELAY));
        }
        while let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            permits.push(permit);
        }
        let claims = self.store.claim_due(self.lease(), permits.len()).await?;
        for (claim, permit) in claims.into_iter().zip(permits) {
            let pinger = Arc::clone(self);
            self.under_way.spawn(async move {
                let stored = pinger.ping(claim).await;
                drop(permit);
                if let Err(error @ PingError::Lost) = stored {
                    tracing::debug!("{error}");
                }
            });
        }
        Ok(Duration::ZERO)
    }

    /// Asks an agent now, due or not; if a ping of it is under way, returns that one.
    ///
    /// Cancelled, the ping goes on.
    ///
    /// # Errors
    /// When there is no such agent, or no ping of it could be stored.
    pub(crate) async fn ping_now(self: &Arc<Self>, agent_id: &str) -> Result<Ping, PingError> {
        // Before the claim is tried, so that no ping is missed between the two.
        let mut told = self.feed.listen(Topic::Agent(agent_id.to_owned()));
        let permit = self.permit().await;
        let lease = self.lease();
        let claim = match self.store.claim(lease, agent_id).await? {
            Claimed::Ours(claim) => *claim,
            Claimed::Unknown => return Err(PingError::Unknown),
            Claimed::Taken => {
                drop(permit);
                let wait = (lease.until - lease.now).to_std().unwrap_or_default();
                let ping = tokio::time::timeout(wait, next_ping(&mut told)).await;
                return ping.ok().flatten().ok_or(PingError::Taken);
            }
        };
        let pinger = Arc::clone(self);
        let attempt = self.under_way.spawn(async move {
            let ping = pinger.ping(claim).await;
            drop(permit);
            ping
        });
        // The runtime ends: so does everything.
        attempt.await.unwrap_or(Err(PingError::Lost))
    }

    async fn ping(&self, claim: Claim) -> Result<Ping, PingError> {
        let agent = &claim.known.agent;
        let late = (Utc::now() - agent.next_ping_at).to_std();
        self.metrics.begin(late.unwrap_or_default());
        let began = self.stretches.now();
        let measured = self.stretches.measure(&claim.known, began);
        let attempt = self.client.ask(&claim.known, measured).await;
        self.metrics.end();
        let new = self.rules.evaluate(&claim.known, attempt, fastrand::f64());
        let ping = new.ping.clone();
        if let Some(reason) = &ping.error {
            tracing::debug!(agent = agent.agent_id, reason, "no answer");
        }
        let after = new.after.clone();
        match self.writer.store(claim, new).await {
            Ok(true) => {
                self.stretches.remember(&after, began);
                self.metrics.stored(&ping);
                Ok(ping)
            }
            Ok(false) => Err(PingError::Lost),
            Err(error) => {
                self.metrics.not_stored();
                // Its agent is due again at once: not so fast that a full disk is all we do.
                tokio::time::sleep(MIN_BACKOFF).await;
                Err(error.into())
            }
        }
    }

    async fn permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed")
    }

    fn lease(&self) -> Lease {
        let now = Utc::now();
        Lease {
            now,
            until: saturating_add(now, self.timeout.saturating_add(TIME_TO_STORE)),
        }
    }
}

/// The next ping that a subscriber receives; `None` if some may have been missed.
async fn next_ping(subscriber: &mut Receiver<FeedEvent>) -> Option<Ping> {
    loop {
        match subscriber.recv().await.ok()? {
            FeedEvent::Ping(event) => return Some(event.ping.clone()),
            FeedEvent::Resync => {}
        }
    }
}

/// The wall clock, watched by one that cannot be set.
struct WallClockCheck {
    wall: DateTime<Utc>,
    steady: Instant,
}

impl WallClockCheck {
    fn start() -> Self {
        Self {
            wall: Utc::now(),
            steady: Instant::now(),
        }
    }

    /// Whether the wall clock fell behind since the last call.
    fn was_set_back(&mut self) -> bool {
        let expected = saturating_add(self.wall, self.steady.elapsed());
        *self = Self::start();
        expected - self.wall > CLOCK_SLACK
    }
}
