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

#[cfg(test)]
mod tests {
    use super::super::testing::{Said, ScriptedPings, percent, recorder};
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const STALE_AFTER: Duration = Duration::from_secs(25);

    /// What is published over time, as (seconds after the start, rate, reason), and the states of
    /// the `uptime` events.
    async fn published(
        script: &[Said],
        seconds: u64,
    ) -> (Vec<(u64, u32, RateReason)>, Vec<String>) {
        let (recorder, sink) = recorder(60);
        let (sender, mut receiver) = watch::channel(None);
        let stop = CancellationToken::new();
        let monitor = Monitor {
            agent: AgentIndex(0),
            agent_id: "agent-001",
            base_rate: JobsPerMinute::new(60),
            uptime_interval: INTERVAL,
            stale_after: STALE_AFTER,
            recorder: &recorder,
        };
        let start = Instant::now();
        let source = ScriptedPings::new(script.iter().copied());
        let mut seen = Vec::new();
        let watching = async {
            while receiver.changed().await.is_ok() {
                let verdict: Verdict = receiver.borrow_and_update().unwrap();
                seen.push((
                    start.elapsed().as_secs(),
                    verdict.rate().get(),
                    verdict.reason(),
                ));
            }
        };
        let ending = async {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            stop.cancel();
        };
        tokio::join!(monitor.run(&source, sender, stop.clone()), watching, ending);
        recorder.close().await.unwrap();
        let events = sink.events("uptime");
        let states = events
            .iter()
            .map(|event| event["state"].as_str().unwrap().to_owned());
        (seen, states.collect())
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_uptime_is_published_within_one_poll() {
        let script = [99.5, 96.2, 92.0, 85.0, 99.0].map(Said::Uptime);
        let (seen, states) = published(&script, 45).await;
        let expected = [(0, 60), (10, 30), (20, 6), (30, 0), (40, 60)];
        assert_eq!(
            seen,
            expected.map(|(at, rate)| (at, rate, RateReason::Uptime))
        );
        assert_eq!(states, ["fresh"; 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn bad_answers_change_nothing_until_the_last_good_one_is_stale() {
        use Said::{Error, Uptime};
        let script = [Uptime(99.5), Error, Error, Error, Error, Uptime(99.5)];
        let (seen, states) = published(&script, 55).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (25, 0, RateReason::Stale),
                (50, 60, RateReason::Uptime)
            ]
        );
        assert_eq!(
            states,
            ["fresh", "fresh", "fresh", "stale", "stale", "fresh"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn staleness_takes_hold_while_a_question_hangs() {
        let (seen, states) = published(&[Said::Uptime(96.0), Said::Nothing], 60).await;
        assert_eq!(
            seen,
            [(0, 30, RateReason::Uptime), (25, 0, RateReason::Stale)]
        );
        assert_eq!(states, ["fresh"]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_published_before_the_first_uptime_is_known() {
        use Said::{Error, NothingOfNow, Uptime};
        let (seen, states) = published(&[Error, NothingOfNow, Error, Uptime(85.0)], 35).await;
        assert_eq!(seen, [(30, 0, RateReason::Uptime)]);
        assert_eq!(states, ["unknown", "unknown", "unknown", "fresh"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_without_a_ping_that_covers_now_is_suspended_at_once() {
        use Said::{NothingOfNow, Uptime};
        let (seen, _) = published(&[Uptime(100.0), NothingOfNow, Uptime(100.0)], 25).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (10, 0, RateReason::Unknown),
                (20, 60, RateReason::Uptime)
            ]
        );
    }

    #[test]
    fn a_verdict_knows_its_rate_and_why() {
        let earns = Verdict::Earns {
            uptime: percent(96.0),
            rate: JobsPerMinute::new(30),
        };
        assert_eq!(
            (earns.rate().get(), earns.reason()),
            (30, RateReason::Uptime)
        );
        let suspended = Verdict::Suspended {
            last_uptime: Some(percent(96.0)),
            reason: RateReason::Stale,
        };
        assert_eq!(
            (suspended.rate().get(), suspended.uptime()),
            (0, Some(percent(96.0)))
        );
    }
}
