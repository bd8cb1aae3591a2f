//! Pings the agents that are due, with bounded concurrency; each ping has its own deadline, and each answer
//! or failure is stored once.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use tokio::sync::broadcast::Receiver;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{AgentClient, Attempt, FailureKind};
use super::clock::PingClock;
use super::evaluate::{PingAttempt, PingOutcome, PingPolicy};
use super::feed::{Feed, FeedEvent, Topic};
use super::gpu_owners::GpuOwners;
use super::mass_failure;
use super::metrics::PingMetrics;
use super::observer::{Judgment, Observer};
use super::store::{AgentPage, AgentRecord, Claim, Claimed, Lease, Store, StoreError};
use super::void_queue::{VOIDED_PINGS, VoidEntry, VoidQueue};
use super::warnings;
use super::writer::{NotStored, PingWriter};
use crate::units::saturating_add;
use crate::wire::ping_system::served::{Agent, Ping};

/// Agents that become due within this time are claimed together: a claim is a write to the store.
const TOGETHER: Duration = Duration::from_millis(25);
/// How often the schedule is read when nothing is known to be due: other ping systems may have changed it.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// Pauses between retries while the store fails.
const MIN_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// The pause before a failed ping is retried.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How much longer than the last retry a lease lasts, so that the ping can be judged and stored.
const TIME_TO_STORE: Duration = Duration::from_secs(7);
/// What an agent calls GPUs that are none, and why they are refused.
const SIMULATED: &str = "simulated";
const SIMULATED_REFUSED: &str = "its GPUs are simulated, which needs --allow-simulated";
/// Agents that are read at once.
const STORE_PAGE: usize = 1000;
/// How often the clock is set by the database's.
const CLOCK_CHECK: Duration = Duration::from_secs(5);
/// How often the schedule is searched for times that lie absurdly ahead, by another clock or an earlier process.
const SCHEDULE_CHECK: Duration = Duration::from_secs(30);
/// A clock that is moved by more was set.
const CLOCK_STEP: TimeDelta = TimeDelta::seconds(1);
/// How much later than the longest of its own a lease may end before it is taken for an error of a clock.
const LEASE_SLACK: Duration = Duration::from_secs(20);

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
    /// How often a failed ping is retried before it counts.
    pub retries: u32,
    /// The bound on concurrent pings.
    pub permits: Arc<Semaphore>,
    /// Pings in progress.
    pub under_way: TaskTracker,
    /// Wakes the schedule: a new agent may be due.
    pub wake: Notify,
    pub metrics: Arc<PingMetrics>,
    pub clock: Arc<PingClock>,
    /// Judges failed pings.
    pub observer: Arc<Observer>,
    /// Failures that were stored before it was known that they are not the agents'.
    pub voiding: VoidQueue,
    pub gpu_owners: GpuOwners,
    /// Whether agents may simulate their GPUs.
    pub allow_simulated: bool,
}

/// When the clock and the schedule are looked at next.
struct ClockChecks {
    clock_at: Instant,
    schedule_at: Instant,
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
        let mut checks = ClockChecks {
            clock_at: Instant::now(),
            schedule_at: Instant::now(),
        };
        let mut backoff = MIN_BACKOFF;
        let mut failing = false;
        let mut is_first = true;
        while !stop.is_cancelled() {
            let looked_at = Instant::now();
            self.void_failures().await;
            // For the log.
            self.observer.hindrances();
            let delay = match self.ask_due(&mut checks).await {
                Ok(delay) => {
                    backoff = MIN_BACKOFF;
                    if std::mem::take(&mut is_first) {
                        self.say_what_is_not_seen().await;
                        // Without them a shared GPU shows a ping later.
                        let _ = self.read_gpu_owners().await;
                    }
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

    /// Mass failures only show where several agents are pinged within a minute.
    async fn say_what_is_not_seen(&self) {
        let Ok(totals) = self.store.totals(self.clock.now()).await else {
            return;
        };
        let seconds = self.rules.interval.base.as_secs().max(1);
        let enough = (mass_failure::MIN_FAILING * seconds).div_ceil(mass_failure::PERIOD.as_secs());
        if !self.observer.has_references() && enough > 1 && totals.agents < enough {
            tracing::info!(
                "with fewer than {enough} agents at this interval an outage of this machine's own network counts as theirs, unless \
                 --reference names something that answers whenever it works"
            );
        }
    }

    /// Starts the pings that are due, and returns how long nothing more will be due.
    async fn ask_due(self: &Arc<Self>, checks: &mut ClockChecks) -> Result<Duration, StoreError> {
        self.check_clock(checks).await?;
        // With all permits taken nothing can be started before one is free.
        let mut permits = vec![self.permit().await];
        let Some(due_at) = self.store.next_due_at(self.clock.now()).await? else {
            return Ok(MAX_DELAY);
        };
        if let Ok(wait) = (due_at - self.clock.now()).to_std()
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

    /// Sets the clock by the database's, and makes due what a clock that was ahead has put off.
    async fn check_clock(&self, checks: &mut ClockChecks) -> Result<(), StoreError> {
        let now = Instant::now();
        if now >= checks.clock_at {
            let moved = self.clock.set(self.store.now().await?);
            checks.clock_at = now + CLOCK_CHECK;
            if moved.abs() > CLOCK_STEP {
                tracing::info!(
                    "the clock was set by {:.1} s: pings go on, and cover as much time as has passed",
                    moved.as_seconds_f64()
                );
                checks.schedule_at = now;
            }
        }
        if now >= checks.schedule_at {
            let lease = self.lease();
            let latest_lease_end = saturating_add(lease.until, LEASE_SLACK);
            self.store
                .reschedule_overdue(lease.now, latest_lease_end)
                .await?;
            checks.schedule_at = now + SCHEDULE_CHECK;
        }
        Ok(())
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
        let late = (self.clock.now() - agent.next_ping_at).to_std();
        self.metrics.begin(late.unwrap_or_default());
        let attempt = self.attempt(&claim.known).await;
        self.metrics.end();
        warn_of_clock(agent, attempt.clock_offset_seconds);
        let new = self.rules.evaluate(&claim.known, attempt, fastrand::f64());
        let ping = new.ping.clone();
        if let Some(reason) = &ping.error {
            tracing::debug!(agent = agent.agent_id, reason, "no answer");
        }
        match self.writer.store(claim, new).await {
            Ok(true) => {
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
        let now = self.clock.now();
        let retry = self.timeout.saturating_add(RETRY_PAUSE);
        let asking = self
            .timeout
            .saturating_add(retry.saturating_mul(self.retries));
        Lease {
            now,
            until: saturating_add(now, asking.saturating_add(TIME_TO_STORE)),
        }
    }

    /// Asks an agent, again if it fails, and judges the last failure.
    async fn attempt(&self, known: &AgentRecord) -> PingAttempt {
        let mut retries = self.retries;
        let attempt = loop {
            let attempt = self.client.ask(known, &self.clock).await;
            let is_final = match &attempt.answer {
                Ok(_) => true,
                Err(failure) => failure.kind == FailureKind::OwnRules,
            };
            if is_final || retries == 0 {
                break attempt;
            }
            retries -= 1;
            tokio::time::sleep(RETRY_PAUSE).await;
        };
        let Attempt {
            at,
            began,
            took,
            clock_offset_seconds,
            answer,
        } = attempt;
        let mut also_reported = Vec::new();
        let outcome = match answer {
            Ok(reported) => {
                self.observer.reached(known);
                if reported.source.as_deref() == Some(SIMULATED) {
                    if self.allow_simulated {
                        PingOutcome::Answered(reported)
                    } else {
                        PingOutcome::Failed(SIMULATED_REFUSED.to_owned())
                    }
                } else {
                    also_reported = self.also_reported(&known.agent, &reported.gpu_uuids);
                    PingOutcome::Answered(reported)
                }
            }
            Err(failure) => match self.observer.judge(known, &failure, began.since_boot).await {
                Judgment::Observed => {
                    self.voiding.failed(&known.agent.agent_id, failure.kind);
                    PingOutcome::Failed(failure.reason)
                }
                Judgment::Unobserved {
                    obstacle,
                    also_earlier,
                } => {
                    self.observer.hindered(obstacle, at);
                    if also_earlier {
                        self.voiding.begin(at, failure.kind, &obstacle.to_string());
                    }
                    PingOutcome::Unobserved(format!("{obstacle}: {}", failure.reason))
                }
            },
        };
        PingAttempt {
            at,
            began,
            took,
            clock_offset_seconds,
            also_reported,
            outcome,
        }
    }

    /// The GPUs that an agent shares with another, which is logged when it begins.
    fn also_reported(&self, agent: &Agent, uuids: &[String]) -> Vec<(String, String)> {
        let shared = self.gpu_owners.report(&agent.agent_id, uuids);
        for (uuid, other) in &shared {
            let warning = warnings::shared_gpu(uuid, other);
            if !agent.warnings.contains(&warning) {
                tracing::warn!(agent = agent.agent_id, "{warning}");
            }
        }
        shared
    }

    /// What the agents reported before this process began.
    async fn read_gpu_owners(&self) -> Result<(), StoreError> {
        let mut after = String::new();
        loop {
            let page = AgentPage {
                after: &after,
                due_at: None,
                limit: STORE_PAGE,
            };
            let page = self.store.agents(page).await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after.clone_from(&last.agent.agent_id);
            for AgentRecord { agent, .. } in &page {
                if agent.source.as_deref() != Some(SIMULATED) {
                    self.gpu_owners.report(&agent.agent_id, &agent.gpu_uuids);
                }
            }
        }
    }

    /// Makes failures unobserved that turned out not to be the agents'. An agent that is being asked, or whose failure
    /// is being stored, has its turn later.
    async fn void_failures(&self) {
        for entry in self.voiding.take() {
            match self.void_failures_of(&entry).await {
                Ok(Claimed::Unknown | Claimed::Ours(_)) => {}
                Ok(Claimed::Taken) => self.voiding.put_back(entry),
                Err(error) => {
                    tracing::debug!(agent = entry.agent_id, "not yet voided: {error}");
                    self.voiding.put_back(entry);
                }
            }
        }
    }

    async fn void_failures_of(&self, entry: &VoidEntry) -> Result<Claimed, StoreError> {
        let claimed = self.store.claim(self.lease(), &entry.agent_id).await?;
        let Claimed::Ours(claim) = &claimed else {
            return Ok(claimed);
        };
        let latest = self.store.latest(claim.known.key, VOIDED_PINGS).await?;
        let now = self.clock.now();
        let after =
            self.rules
                .without_failures(&claim.known, &latest, entry.since, now, &entry.reason);
        self.store
            .void_failures(claim, entry.since, &entry.reason, &after)
            .await?;
        // Subscribers know the failures as they were.
        self.feed.resync();
        Ok(claimed)
    }
}

fn warn_of_clock(agent: &Agent, offset_seconds: Option<f64>) {
    let is_far_off = |offset: &f64| warnings::is_far_off(*offset);
    let was_far_off = agent.clock_offset_seconds.as_ref().is_some_and(is_far_off);
    if let Some(offset) = offset_seconds.filter(is_far_off)
        && !was_far_off
    {
        tracing::warn!(
            agent = agent.agent_id,
            "{}: no figure depends on it",
            warnings::clock_offset(offset)
        );
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
