//! Asks the agents that are due: so many at once, each with its own deadline, and each answer or
//! failure is stored once.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::Caller;
use super::evaluate::Rules;
use super::feed::{Feed, Topic};
use super::metrics::Metrics;
use super::store::{Claim, Claimed, Lease, Store, StoreError};
use super::writer::{Journal, NotStored};
use crate::units::saturating_add;
use crate::wire::ping_system::served::Ping;

/// Agents that become due within so long are taken together: a claim is a write to the store.
const TOGETHER: Duration = Duration::from_millis(25);
/// How often the schedule is looked at where nothing is known to be due: others may have changed it.
const LONGEST_NAP: Duration = Duration::from_secs(1);
/// Pauses while the store does not work.
const SHORTEST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// What a lease gives beyond the answer's deadline, for storing it.
const TIME_TO_STORE: Duration = Duration::from_secs(5);
/// A clock that falls behind by more than this was set back.
const CLOCK_SLACK: TimeDelta = TimeDelta::seconds(60);

/// Asks agents, on schedule or at once.
#[derive(Debug)]
pub struct Pinger {
    /// Knows who is due.
    pub store: Arc<dyn Store>,
    /// Reaches agents.
    pub caller: Caller,
    /// Takes what came of it.
    pub journal: Journal,
    /// Tells of what others asked.
    pub feed: Arc<Feed>,
    /// Judges it.
    pub rules: Rules,
    /// The longest wait for an answer.
    pub patience: Duration,
    /// How many agents can be asked at once.
    pub places: Arc<Semaphore>,
    /// Pings under way.
    pub under_way: TaskTracker,
    /// Wakes the schedule: somebody new may be due.
    pub wake: Notify,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Why there is no ping now.
#[derive(Debug, thiserror::Error)]
pub enum NoPing {
    /// There is no such agent.
    #[error("no agent of that name")]
    Unknown,
    /// Somebody else asks it, and did not tell what came of it.
    #[error("the agent is being asked at this moment")]
    Taken,
    /// The agent was removed, or taken over, while it was asked.
    #[error("the agent was removed or taken over while it was asked")]
    Lost,
    /// It was asked, but that could not be stored.
    #[error(transparent)]
    NotStored(#[from] NotStored),
    /// The store does not work.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Pinger {
    /// Asks whoever is due, until `stop`; pings under way go on.
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) {
        let mut clock = Clock::start();
        let mut backoff = SHORTEST_BACKOFF;
        let mut pull_in = true;
        while !stop.is_cancelled() {
            pull_in |= clock.was_set_back();
            let looked_at = Instant::now();
            let nap = match self.ask_due(&mut pull_in).await {
                Ok(nap) => {
                    backoff = SHORTEST_BACKOFF;
                    nap.max(TOGETHER)
                }
                Err(error) => {
                    // Whoever listens must not take silence for good news.
                    self.feed.interrupt();
                    tracing::warn!(
                        "the schedule cannot be read, trying again in {backoff:?}: {error}"
                    );
                    let nap = backoff;
                    backoff = (backoff * 2).min(LONGEST_BACKOFF);
                    nap
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(looked_at + nap) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// Begins what is due, and tells for how long nothing more will be.
    async fn ask_due(self: &Arc<Self>, pull_in: &mut bool) -> Result<Duration, StoreError> {
        if *pull_in {
            self.store.pull_in(Utc::now()).await?;
            *pull_in = false;
        }
        // With all places taken there is nothing to look for before one is free.
        let mut places = vec![self.place().await];
        let Some(due_at) = self.store.next_due_at(Utc::now()).await? else {
            return Ok(LONGEST_NAP);
        };
        if let Ok(wait) = (due_at - Utc::now()).to_std()
            && !wait.is_zero()
        {
            return Ok(wait.min(LONGEST_NAP));
        }
        while let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            places.push(place);
        }
        let claims = self.store.claim_due(self.lease(), places.len()).await?;
        for (claim, place) in claims.into_iter().zip(places) {
            let pinger = Arc::clone(self);
            self.under_way.spawn(async move {
                let stored = pinger.ping(claim).await;
                drop(place);
                if let Err(error @ NoPing::Lost) = stored {
                    tracing::debug!("{error}");
                }
            });
        }
        Ok(Duration::ZERO)
    }

    /// Asks an agent now, due or not; where it is being asked at this moment, what comes of that.
    ///
    /// Cancelled, the ping goes on.
    ///
    /// # Errors
    /// When there is no such agent, or no ping of it could be stored.
    pub async fn ping_now(self: &Arc<Self>, agent_id: &str) -> Result<Ping, NoPing> {
        // Before the claim is tried, so that no ping is missed between the two.
        let mut told = self.feed.listen(Topic::Agent(agent_id.to_owned()));
        let place = self.place().await;
        let lease = self.lease();
        let claim = match self.store.claim(lease, agent_id).await? {
            Claimed::Ours(claim) => *claim,
            Claimed::Unknown => return Err(NoPing::Unknown),
            Claimed::Taken => {
                drop(place);
                let wait = (lease.until - lease.now).to_std().unwrap_or_default();
                return match tokio::time::timeout(wait, told.recv()).await {
                    Ok(Ok(event)) => Ok(event.ping.clone()),
                    _ => Err(NoPing::Taken),
                };
            }
        };
        let pinger = Arc::clone(self);
        let asked = self.under_way.spawn(async move {
            let ping = pinger.ping(claim).await;
            drop(place);
            ping
        });
        // The runtime ends: so does everything.
        asked.await.unwrap_or(Err(NoPing::Lost))
    }

    async fn ping(&self, claim: Claim) -> Result<Ping, NoPing> {
        let agent = &claim.known.agent;
        let late = (Utc::now() - agent.next_ping_at).to_std();
        self.metrics.begin(late.unwrap_or_default());
        let asked = self.caller.ask(agent).await;
        self.metrics.end();
        let new = self.rules.judge(&claim.known, asked, fastrand::f64());
        let ping = new.ping.clone();
        if let Some(reason) = &ping.error {
            tracing::debug!(agent = agent.agent_id, reason, "no answer");
        }
        match self.journal.store(claim, new).await {
            Ok(true) => {
                self.metrics.stored(&ping);
                Ok(ping)
            }
            Ok(false) => Err(NoPing::Lost),
            Err(error) => {
                self.metrics.not_stored();
                // Its agent is due again at once: not so fast that a full disk is all we do.
                tokio::time::sleep(SHORTEST_BACKOFF).await;
                Err(error.into())
            }
        }
    }

    async fn place(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.places)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed")
    }

    fn lease(&self) -> Lease {
        let now = Utc::now();
        Lease {
            now,
            until: saturating_add(now, self.patience.saturating_add(TIME_TO_STORE)),
        }
    }
}

/// The wall clock, watched by one that cannot be set.
struct Clock {
    wall: DateTime<Utc>,
    steady: Instant,
}

impl Clock {
    fn start() -> Self {
        Self {
            wall: Utc::now(),
            steady: Instant::now(),
        }
    }

    /// Whether the wall clock fell behind since the last time it was asked.
    fn was_set_back(&mut self) -> bool {
        let expected = saturating_add(self.wall, self.steady.elapsed());
        *self = Self::start();
        expected - self.wall > CLOCK_SLACK
    }
}
