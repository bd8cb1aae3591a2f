//! Follows one agent's uptime and publishes what it earns.

use std::pin::{Pin, pin};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::runner::deadline;
use crate::runner::events::event::{ClaimChecked, Event, Standing, State, UptimePolled};
use crate::runner::events::recorder::Recorder;
use crate::runner::rate::controller::RateController;
use crate::runner::rate::decision::ClaimChange;
use crate::runner::roster::AgentIndex;
use crate::runner::uptime::client::{AskError, AskUptime};
use crate::runner::uptime::estimate::{Knowledge, Picture, Reading};
use crate::runner::uptime::subscription::{Heard, follow};
use crate::units::Percent;
use crate::wire::ping_system::{Agent, Ping};

/// Pings that were heard, but not yet taken in.
const HEARD_AHEAD: usize = 64;

/// One agent's monitor.
#[derive(Debug)]
pub struct Monitor<'a> {
    /// Whose uptime.
    pub agent: AgentIndex,
    /// That agent's name.
    pub agent_id: &'a str,
    /// The time between questions.
    pub uptime_interval: Duration,
    /// How much history counts.
    pub uptime_window: Duration,
    /// How long the last known uptime may be acted on.
    pub stale_after: Duration,
    /// Is told each answer.
    pub recorder: &'a Recorder,
    /// Decides the rate by it.
    pub rates: &'a RateController,
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
    /// Asks `source`, listens to it where it tells new pings by itself, and tells the controller what is
    /// known of the uptime at each change, until `stop`.
    pub async fn run(self, source: &impl AskUptime, stop: CancellationToken) {
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
        let mut observe_again_at = None;
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
                () = deadline::reached(stale_at.map(Instant::from_std)) => {}
                () = deadline::reached(observe_again_at) => {}
            }
            observe_again_at = self.observe(&known.knowledge);
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

    /// Tells the controller what is known now, and returns when it wants to be told again.
    fn observe(&self, knowledge: &Knowledge) -> Option<Instant> {
        let now = Instant::now().into_std();
        let (state, uptime) = knowledge.at(now);
        let observed = self.rates.observe(self.agent, state, uptime, now);
        if let Some(ClaimChange {
            uptime,
            contradiction,
        }) = observed.claim
        {
            self.recorder.record(&Event::Claim(ClaimChecked {
                ts: Utc::now(),
                agent: self.agent,
                uptime,
                contradiction,
            }));
        }
        observed.again_at.map(Instant::from_std)
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::runner::events::event::{Answer, RateReason};
    use crate::runner::rate::controller::Sharing;
    use crate::runner::rate::job_stats::TrackRecord;
    use crate::runner::rate::policy::Policy;
    use crate::runner::testing::{Said, ScriptedPings, Told, percent, recorder};
    use crate::units::JobsPerMinute;
    use crate::wire::gateway::Outcome;

    const INTERVAL: Duration = Duration::from_secs(10);
    const STALE_AFTER: Duration = Duration::from_secs(25);

    /// What is published over time, as (seconds after the start, rate of 60, reason), and the states of
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
        let rates = RateController::new(policy.clone(), Sharing::Own);
        let track_record = Arc::new(TrackRecord::new(None, INTERVAL));
        let mut target = rates.add(AgentIndex(0), JobsPerMinute::new(60), track_record);
        let stop = CancellationToken::new();
        let monitor = monitor(&recorder, &rates);
        let start = Instant::now();
        let seen = RefCell::new(Vec::new());
        let seeing = async {
            while target.changed().await.is_ok() {
                let target = target.borrow_and_update().unwrap();
                let at = start.elapsed().as_secs();
                let rate = target.rate.get();
                seen.borrow_mut().push((at, rate, target.reason));
            }
        };
        let ending = async {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            stop.cancel();
            rates.remove(AgentIndex(0));
        };
        tokio::join!(monitor.run(source, stop.clone()), seeing, ending);
        recorder.close().await.unwrap();
        let events = sink.events("uptime");
        let states = events
            .iter()
            .map(|event| event["state"].as_str().unwrap().to_owned());
        (seen.into_inner(), states.collect())
    }

    fn monitor<'a>(recorder: &'a Recorder, rates: &'a RateController) -> Monitor<'a> {
        Monitor {
            agent: AgentIndex(0),
            agent_id: "agent-001",
            uptime_interval: INTERVAL,
            uptime_window: Duration::from_hours(1),
            stale_after: STALE_AFTER,
            recorder,
            rates,
        }
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

    #[tokio::test(start_paused = true)]
    async fn jobs_that_contradict_a_claim_count_where_the_policy_says_so() {
        for (policy, expected, reason) in [
            ("tiers:99=100,90=10", 60, RateReason::Uptime),
            ("tiers:99=100,90=10 trust=verified", 6, RateReason::Evidence),
        ] {
            let (recorder, sink) = recorder(60);
            let window = Duration::from_hours(1);
            let track_record = Arc::new(TrackRecord::new(Some(Vec::new()), window));
            for n in 0..100 {
                let outcome = if n % 12 == 0 {
                    Outcome::Timeout
                } else {
                    Outcome::Success
                };
                let answer = Answer::failure(outcome, String::new());
                track_record.job(&answer, INTERVAL, Instant::now().into_std());
            }
            let rates = RateController::new(policy.parse().unwrap(), Sharing::Own);
            let mut target = rates.add(AgentIndex(0), JobsPerMinute::new(60), track_record);
            let stop = CancellationToken::new();
            let source = ScriptedPings::new([Said::Uptime(99.5)]);
            let ending = async {
                target.changed().await.unwrap();
                stop.cancel();
            };
            tokio::join!(
                monitor(&recorder, &rates).run(&source, stop.clone()),
                ending
            );
            recorder.close().await.unwrap();
            let target = target.borrow().unwrap();
            assert_eq!(target.rate.get(), expected);
            assert_eq!(
                (target.uptime, target.reason),
                (Some(percent(99.5)), reason)
            );
            let claim = sink.events("claim").remove(0);
            assert_eq!(claim["contradicted"], true);
            assert_eq!(claim["successful"], 91);
        }
    }
}
