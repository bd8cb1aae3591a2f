//! Follows one agent's uptime and publishes what it earns on a watch channel.

use std::pin::{Pin, pin};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::event::{AgentIndex, Event, RateReason, UptimePolled};
use super::follower::{Heard, follow};
use super::ping_client::{AskError, AskUptime};
use super::policy::{Policy, Recovery};
use super::recorder::Recorder;
use super::uptime::{Knowledge, Picture, Reading, Standing, State};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::ping_system::{Agent, Ping};

/// Pings that were heard, but not yet taken in.
const HEARD_AHEAD: usize = 64;

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
    /// How much history counts.
    pub uptime_window: Duration,
    /// How the rate follows from it.
    pub policy: &'a Policy,
    /// How long the last known uptime may be acted on.
    pub stale_after: Duration,
    /// Is told each answer.
    pub recorder: &'a Recorder,
}

/// What a monitor knows.
struct Known {
    knowledge: Knowledge,
    picture: Option<Picture>,
    standing: Standing,
    /// Whether each new ping is told, so that there is little to ask for.
    live: bool,
    /// Pings that were told since the question under way was asked: its answer may lack them.
    told: Vec<(Agent, Ping)>,
    last_answer: Instant,
}

impl Known {
    fn answered(&mut self, reading: &Reading) {
        self.last_answer = Instant::now();
        self.knowledge
            .answered(reading.uptime, self.last_answer.into_std());
        self.standing = reading.standing;
    }
}

impl Monitor<'_> {
    /// Asks `source`, listens to it where it tells new pings by itself, and publishes on `verdicts`,
    /// where nothing stands until a first uptime is known, until `stop`.
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
        let mut known = Known {
            knowledge: Knowledge::new(self.stale_after),
            picture: None,
            standing: Standing::default(),
            live: false,
            told: Vec::new(),
            last_answer: Instant::now(),
        };
        let ask = || Some(Box::pin(source.ask(self.agent_id)));
        let mut question = None;
        let (sender, mut heard) = mpsc::channel(HEARD_AHEAD);
        let mut following = pin!(follow(source, self.agent_id, self.uptime_interval, sender));
        let mut recovery = Recovery::new(self.policy);
        loop {
            let (state, _) = known.knowledge.at(Instant::now().into_std());
            let stale_at = known.knowledge.stale_at().filter(|_| state == State::Fresh);
            tokio::select! {
                () = stop.cancelled() => return,
                // Not before the agent is known there: until then there is nothing to listen to.
                () = &mut following, if known.picture.is_some() => return,
                _ = ticks.tick(), if question.is_none() => {
                    if self.must_ask(&known, state) {
                        question = ask();
                    } else {
                        self.reconsider(&mut known);
                    }
                }
                answer = answer_to(&mut question), if question.is_some() => {
                    question = None;
                    self.take_in(answer, &mut known);
                }
                Some(heard) = heard.recv() => match heard {
                    // A question from before may miss the pings in between.
                    Heard::Begun => {
                        known.live = true;
                        known.told.clear();
                        question = ask();
                    }
                    Heard::Ping(told) => self.take_in_ping(*told, question.is_some(), &mut known),
                    Heard::Ended => {
                        if std::mem::take(&mut known.live) {
                            question = question.or_else(ask);
                        }
                    }
                },
                // While a question is still waiting for its answer, too.
                () = until(stale_at) => {}
                () = until(recovery.rises_at()) => {}
            }
            self.publish(&known.knowledge, &mut recovery, &verdicts);
        }
    }

    /// Whoever is told each new ping asks only to be sure that there is still somebody who tells:
    /// long before what is known would be too old.
    fn must_ask(&self, known: &Known, state: State) -> bool {
        !known.live || state != State::Fresh || known.last_answer.elapsed() >= self.stale_after / 2
    }

    fn take_in(&self, answer: Result<Picture, AskError>, known: &mut Known) {
        let mut pings = 0;
        let answered = answer.is_ok();
        match answer {
            Ok(mut picture) => {
                for (agent, ping) in known.told.drain(..) {
                    picture.add(agent, ping, Utc::now(), self.uptime_window);
                }
                let reading = known
                    .picture
                    .insert(picture)
                    .reading(Utc::now(), self.uptime_window);
                if reading.uptime.is_none() {
                    tracing::warn!(
                        agent = self.agent_id,
                        "the ping system lists the agent, but has no ping that covers now: no job is sent"
                    );
                }
                pings = reading.pings;
                known.answered(&reading);
            }
            Err(error) => self.warn(&error, known.knowledge.at(Instant::now().into_std())),
        }
        self.record(known, answered, pings);
    }

    fn take_in_ping(&self, (agent, ping): (Agent, Ping), asking: bool, known: &mut Known) {
        if asking && known.told.len() < HEARD_AHEAD {
            known.told.push((agent.clone(), ping.clone()));
        }
        let Some(picture) = &mut known.picture else {
            return;
        };
        picture.add(agent, ping, Utc::now(), self.uptime_window);
        let reading = picture.reading(Utc::now(), self.uptime_window);
        let pings = reading.pings;
        known.answered(&reading);
        self.record(known, true, pings);
    }

    /// Looks anew at the pings that are known: some have left the window.
    fn reconsider(&self, known: &mut Known) {
        let Some(picture) = &known.picture else {
            return;
        };
        let reading = picture.reading(Utc::now(), self.uptime_window);
        known.knowledge.reconsidered(reading.uptime);
        self.record(known, false, reading.pings);
    }

    fn record(&self, known: &Known, answered: bool, pings: usize) {
        let (state, uptime) = known.knowledge.at(Instant::now().into_std());
        self.recorder.record(&Event::Uptime(UptimePolled {
            ts: Utc::now(),
            agent: self.agent,
            state,
            uptime,
            answered,
            pings,
            standing: known.standing,
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

    fn publish(
        &self,
        knowledge: &Knowledge,
        recovery: &mut Recovery,
        verdicts: &watch::Sender<Option<Verdict>>,
    ) {
        let now = Instant::now().into_std();
        let verdict = match knowledge.at(now) {
            (State::Fresh, Some(uptime)) => Verdict::Earns {
                uptime,
                rate: recovery.allow(self.policy.rate(self.base_rate, uptime), now),
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

/// Cancelled, the question goes on where it is asked again for its answer.
async fn answer_to<Q: Future<Output = Result<Picture, AskError>>>(
    question: &mut Option<Pin<Box<Q>>>,
) -> Result<Picture, AskError> {
    match question {
        Some(question) => question.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn until(instant: Option<std::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::{Said, ScriptedPings, Told, percent, recorder};
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const STALE_AFTER: Duration = Duration::from_secs(25);

    /// What is published over time, as (seconds after the start, rate, reason), and the states of
    /// the `uptime` events.
    async fn published(
        script: &[Said],
        seconds: u64,
    ) -> (Vec<(u64, u32, RateReason)>, Vec<String>) {
        published_from(&ScriptedPings::new(script.iter().copied()), seconds).await
    }

    async fn published_from(
        source: &ScriptedPings,
        seconds: u64,
    ) -> (Vec<(u64, u32, RateReason)>, Vec<String>) {
        published_by(&Policy::default(), source, seconds).await
    }

    async fn published_by(
        policy: &Policy,
        source: &ScriptedPings,
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
            uptime_window: Duration::from_hours(1),
            policy,
            stale_after: STALE_AFTER,
            recorder: &recorder,
        };
        let start = Instant::now();
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
        tokio::join!(monitor.run(source, sender, stop.clone()), watching, ending);
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

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_that_is_told_takes_hold_at_once() {
        let script = [99.5, 99.5, 85.0].map(Said::Uptime);
        let told = [Told::Ping(seconds(3), 96.2), Told::Ping(seconds(2), 85.0)];
        let source = ScriptedPings::telling(script, told);
        let (seen, states) = published_from(&source, 15).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (3, 30, RateReason::Uptime),
                // Both weigh the same: 90.6 %.
                (5, 6, RateReason::Uptime)
            ]
        );
        // At the start, once more when listening has begun, and not at the tick of 10 s.
        assert_eq!(source.asked.load(Ordering::Relaxed), 2);
        assert_eq!(states, ["fresh"; 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn when_nothing_is_told_any_more_it_is_asked_at_once() {
        let script = [99.5, 99.5, 92.0, 96.0].map(Said::Uptime);
        let source = ScriptedPings::telling(script, [Told::End(seconds(3))]);
        let (seen, _) = published_from(&source, 15).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (3, 6, RateReason::Uptime),
                (10, 30, RateReason::Uptime)
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_rises_only_after_good_uptime_has_lasted() {
        let policy = "tiers:99=100,95=50 recover_after=15s".parse().unwrap();
        let script = [99.5, 96.0, 99.5, 99.5, 99.5].map(Said::Uptime);
        let (seen, _) = published_by(&policy, &ScriptedPings::new(script), 45).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (10, 30, RateReason::Uptime),
                // It earns more from now on, and has for long enough when no question is asked.
                (20, 30, RateReason::Uptime),
                (35, 60, RateReason::Uptime)
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_only_lives_keeps_no_uptime_fresh() {
        use Said::{Error, Uptime};
        let forever = [Told::Ping(seconds(1_000_000), 99.5)];
        let source = ScriptedPings::telling([Uptime(99.5), Uptime(99.5), Error], forever);
        let (seen, _) = published_from(&source, 60).await;
        assert_eq!(
            seen,
            [(0, 60, RateReason::Uptime), (25, 0, RateReason::Stale)]
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
