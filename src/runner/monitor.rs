//! Follows one agent's uptime and publishes what it earns on a watch channel.

use std::pin::pin;
use std::time::Duration;

use chrono::Utc;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::event::{AgentIndex, Event, RateReason, UptimePolled};
use super::ping_client::{AskError, AskUptime};
use super::policy;
use super::recorder::Recorder;
use super::uptime::{Knowledge, Reading, Standing, State};
use crate::units::{JobsPerMinute, Percent};

/// What an agent's uptime earns it now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Jobs at a rate, which may be 0.
    Earns {
        /// The uptime.
        uptime: Percent,
        /// The rate that the policy gives for it.
        rate: JobsPerMinute,
    },
    /// No jobs, since nothing is known of now.
    Suspended {
        /// The last known uptime.
        last_uptime: Option<Percent>,
        /// Why nothing is known.
        reason: RateReason,
    },
}

impl Verdict {
    /// The rate at which jobs are to be sent.
    #[must_use]
    pub fn rate(self) -> JobsPerMinute {
        match self {
            Self::Earns { rate, .. } => rate,
            Self::Suspended { .. } => JobsPerMinute::ZERO,
        }
    }

    /// The last known uptime.
    #[must_use]
    pub fn uptime(self) -> Option<Percent> {
        match self {
            Self::Earns { uptime, .. } => Some(uptime),
            Self::Suspended { last_uptime, .. } => last_uptime,
        }
    }

    /// Why the rate is what it is.
    #[must_use]
    pub fn reason(self) -> RateReason {
        match self {
            Self::Earns { .. } => RateReason::Uptime,
            Self::Suspended { reason, .. } => reason,
        }
    }
}

/// One agent's monitor.
#[derive(Debug)]
pub struct Monitor<'a> {
    /// Whose uptime.
    pub agent: AgentIndex,
    /// That agent's name.
    pub agent_id: &'a str,
    /// The rate at full uptime.
    pub base_rate: JobsPerMinute,
    /// The time between questions.
    pub uptime_interval: Duration,
    /// How long the last known uptime may be acted on.
    pub stale_after: Duration,
    /// Is told each answer.
    pub recorder: &'a Recorder,
}

impl Monitor<'_> {
    /// Asks `source` and publishes on `verdicts`, where nothing stands until a first uptime is
    /// known, until `stop`.
    pub async fn run(
        self,
        source: &impl AskUptime,
        verdicts: watch::Sender<Option<Verdict>>,
        stop: CancellationToken,
    ) {
        let mut ticks = tokio::time::interval(self.uptime_interval);
        // After an answer that took longer than the interval, the next question is a whole
        // interval later: a ping system that is slow is not helped by more questions.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut knowledge = Knowledge::new(self.stale_after);
        let mut standing = Standing::default();
        loop {
            let mut answer = pin!(next_answer(&mut ticks, source, self.agent_id));
            let answer = loop {
                let (state, _) = knowledge.at(Instant::now().into_std());
                let stale_at = knowledge.stale_at().filter(|_| state == State::Fresh);
                tokio::select! {
                    () = stop.cancelled() => return,
                    answer = &mut answer => break answer,
                    // While a question is still waiting for its answer, too.
                    () = until(stale_at) => self.publish(&knowledge, &verdicts),
                }
            };
            self.take_in(answer, &mut knowledge, &mut standing);
            self.publish(&knowledge, &verdicts);
        }
    }

    fn take_in(
        &self,
        answer: Result<Reading, AskError>,
        knowledge: &mut Knowledge,
        standing: &mut Standing,
    ) {
        let now = Instant::now().into_std();
        let answered = answer.is_ok();
        let pings = match answer {
            Ok(reading) => {
                if reading.uptime.is_none() {
                    tracing::warn!(
                        agent = self.agent_id,
                        "the ping system lists the agent, but has no ping that covers now: no job is sent"
                    );
                }
                knowledge.answered(reading.uptime, now);
                *standing = reading.standing;
                reading.pings
            }
            Err(error) => {
                self.warn(&error, knowledge.at(now));
                0
            }
        };
        let (state, uptime) = knowledge.at(now);
        self.recorder.record(&Event::Uptime(UptimePolled {
            ts: Utc::now(),
            agent: self.agent,
            state,
            uptime,
            answered,
            pings,
            standing: *standing,
        }));
    }

    fn warn(&self, error: &AskError, (state, uptime): (State, Option<Percent>)) {
        let agent = self.agent_id;
        if let (State::Fresh, Some(uptime)) = (state, uptime) {
            tracing::warn!(
                agent,
                "no good answer from the ping system, going on with {}% for at most {:?} since it was told: {error}",
                uptime.floored(2),
                self.stale_after,
            );
        } else {
            tracing::warn!(
                agent,
                "no good answer from the ping system, no job is sent until there is one: {error}"
            );
        }
    }

    fn publish(&self, knowledge: &Knowledge, verdicts: &watch::Sender<Option<Verdict>>) {
        let verdict = match knowledge.at(Instant::now().into_std()) {
            (State::Fresh, Some(uptime)) => Verdict::Earns {
                uptime,
                rate: policy::job_rate(self.base_rate, uptime),
            },
            (state, last_uptime) => Verdict::Suspended {
                last_uptime,
                reason: state.into(),
            },
        };
        verdicts.send_if_modified(|published| {
            // The accounts begin with the first known uptime.
            let begins = matches!(verdict, Verdict::Earns { .. });
            let modified = (published.is_some() || begins) && *published != Some(verdict);
            if modified {
                *published = Some(verdict);
            }
            modified
        });
    }
}

async fn next_answer(
    ticks: &mut Interval,
    source: &impl AskUptime,
    agent_id: &str,
) -> Result<Reading, AskError> {
    ticks.tick().await;
    source.ask(agent_id).await
}

async fn until(instant: Option<std::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}
