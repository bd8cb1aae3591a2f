//! Follows one agent's uptime, and reports it to the rate controller.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::clock::{AgeClock, JumpDetector};
use crate::runner::deadline;
use crate::runner::events::dispatcher::EventDispatcher;
use crate::runner::events::event::{
    ClaimChecked, Event, Freshness, PingStats, PolledPings, UptimePolled,
};
use crate::runner::rate::controller::RateController;
use crate::runner::rate::decision::ClaimChange;
use crate::runner::roster::AgentIndex;
use crate::runner::uptime::client::{PollError, UptimeSource};
use crate::runner::uptime::estimate::{AgentSnapshot, UptimeEstimate, UptimeFreshness};
use crate::runner::uptime::outage::OutageLog;
use crate::runner::uptime::subscription::{StreamEvent, follow};
use crate::units::Percent;
use crate::wire::ping_system::{HistoryPing, ListedAgent};

/// Pings of the event stream that wait to be applied.
const STREAM_BUFFER: usize = 64;
/// How often the clocks are compared: timers stand still while the machine is suspended.
const CLOCK_CHECK: Duration = Duration::from_secs(5);

/// One agent's monitor.
#[derive(Debug)]
pub(crate) struct Monitor<'a> {
    pub agent: AgentIndex,
    pub agent_id: &'a str,
    /// The time between two polls.
    pub uptime_interval: Duration,
    /// How much history counts.
    pub uptime_window: Duration,
    /// How long the last known uptime may be used without a newer one.
    pub stale_after: Duration,
    pub events: &'a EventDispatcher,
    pub rates: &'a RateController,
    /// Tells of outages of the ping system.
    pub outages: &'a OutageLog,
}

/// What is known of the agent.
struct MonitorState {
    freshness: UptimeFreshness,
    snapshot: Option<AgentSnapshot>,
    ping_stats: PingStats,
    /// Whether the event stream is open: each new ping arrives by itself, and polls are rare.
    live: bool,
    /// Pings that arrived since the poll under way began: its answer may lack them.
    pending: Vec<(ListedAgent, HistoryPing)>,
    /// By `clock`.
    last_answer: std::time::Instant,
    clock: AgeClock,
    jumps: JumpDetector,
    /// Whether the last answer could not be used, or told no uptime, which was warned about.
    warned: bool,
}

impl MonitorState {
    fn answered(&mut self, estimate: &UptimeEstimate) {
        self.last_answer = self.clock.now();
        self.freshness.answered(estimate, self.last_answer);
        self.ping_stats = estimate.ping_stats;
    }

    /// The pings behind the estimate, for the record.
    fn told(&self) -> Option<Arc<PolledPings>> {
        let snapshot = self.snapshot.as_ref()?;
        Some(Arc::new(PolledPings {
            ping_time: snapshot.time.at(self.clock.now()),
            pings: snapshot.history.clone(),
        }))
    }
}

impl Monitor<'_> {
    /// Polls `source`, subscribes to its events if it has any, and reports each change to the controller,
    /// until `stop`.
    pub(crate) async fn run(self, source: &impl UptimeSource, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.uptime_interval);
        // After an answer that took longer than the interval, the next poll comes a whole interval later:
        // more polls do not help a slow ping system.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let clock = source.clock().clone();
        let mut state = MonitorState {
            freshness: UptimeFreshness::new(self.stale_after),
            snapshot: None,
            ping_stats: PingStats::default(),
            live: false,
            pending: Vec::new(),
            last_answer: clock.now(),
            jumps: JumpDetector::start(&clock),
            clock,
            warned: false,
        };
        let mut clock_checks = tokio::time::interval(CLOCK_CHECK);
        clock_checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let poll_again = || Some(Box::pin(source.poll(self.agent_id)));
        let mut poll = None;
        let (sender, mut stream) = mpsc::channel(STREAM_BUFFER);
        let mut following = pin!(follow(source, self.agent_id, self.uptime_interval, sender));
        let mut observe_again_at = None;
        loop {
            let (freshness, _) = state.freshness.at(state.clock.now());
            let stale_at = state
                .freshness
                .stale_at()
                .filter(|_| freshness == Freshness::Fresh)
                .map(|stale_at| state.clock.timer(stale_at));
            tokio::select! {
                () = stop.cancelled() => return,
                // Only once the agent is known there: an unknown agent has no events.
                () = &mut following, if state.snapshot.is_some() => return,
                _ = ticks.tick(), if poll.is_none() => {
                    if self.must_poll(&state, freshness) {
                        poll = poll_again();
                    } else {
                        self.reestimate(&mut state);
                    }
                }
                answer = poll_answer(&mut poll), if poll.is_some() => {
                    poll = None;
                    self.apply_answer(answer, &mut state);
                }
                Some(event) = stream.recv() => match event {
                    // The answer of a poll that began before may lack pings since: poll again.
                    StreamEvent::Opened => {
                        state.live = true;
                        state.pending.clear();
                        poll = poll_again();
                    }
                    StreamEvent::Ping(ping) => {
                        let missing = self.apply_ping(*ping, poll.is_some(), &mut state);
                        if missing {
                            poll = poll.or_else(poll_again);
                        }
                    }
                    StreamEvent::Closed => {
                        if std::mem::take(&mut state.live) {
                            poll = poll.or_else(poll_again);
                        }
                    }
                },
                // These take effect also while a poll awaits its answer.
                () = deadline::reached(stale_at) => {}
                _ = clock_checks.tick() => {
                    if state.jumps.has_jumped(&state.clock) {
                        poll = poll.or_else(poll_again);
                    }
                }
                () = deadline::reached(observe_again_at) => {}
            }
            observe_again_at = self.observe(&state);
        }
    }

    /// With an open event stream a poll only makes sure that the ping system is still there: long before
    /// the known uptime would be stale.
    fn must_poll(&self, state: &MonitorState, freshness: Freshness) -> bool {
        !state.live
            || freshness != Freshness::Fresh
            || state
                .clock
                .now()
                .saturating_duration_since(state.last_answer)
                >= self.stale_after / 2
    }

    fn apply_answer(&self, answer: Result<AgentSnapshot, PollError>, state: &mut MonitorState) {
        let mut pings = 0;
        let answered = answer.is_ok();
        match answer {
            Ok(mut snapshot) => {
                self.outages.answered();
                let now = state.clock.now();
                for (agent, ping) in state.pending.drain(..) {
                    snapshot.add(agent, ping, now, self.uptime_window);
                }
                let estimate = state
                    .snapshot
                    .insert(snapshot)
                    .estimate(now, self.uptime_window);
                let warned = std::mem::replace(&mut state.warned, estimate.uptime.is_none());
                if estimate.uptime.is_none() && !warned {
                    tracing::warn!(
                        agent = self.agent_id,
                        "the ping system lists the agent, but has no ping that covers now: no job is sent"
                    );
                }
                pings = estimate.pings;
                state.answered(&estimate);
            }
            Err(error) if error.is_outage() => self.outages.failed(&error),
            Err(error) => {
                if !std::mem::replace(&mut state.warned, true) {
                    self.warn(&error, state.freshness.at(state.clock.now()));
                }
            }
        }
        let told = state.told().filter(|_| answered);
        self.record(state, answered, pings, told);
    }

    /// Returns whether pings before it are missing.
    fn apply_ping(
        &self,
        (agent, ping): (ListedAgent, HistoryPing),
        polling: bool,
        state: &mut MonitorState,
    ) -> bool {
        if polling && state.pending.len() < STREAM_BUFFER {
            state.pending.push((agent.clone(), ping.clone()));
        }
        let Some(snapshot) = &mut state.snapshot else {
            return false;
        };
        let now = state.clock.now();
        let missing = snapshot.add(agent, ping, now, self.uptime_window);
        let estimate = snapshot.estimate(now, self.uptime_window);
        let pings = estimate.pings;
        state.answered(&estimate);
        let told = state.told();
        self.record(state, true, pings, told);
        missing
    }

    /// Estimates the uptime again from the known pings: some have left the window.
    fn reestimate(&self, state: &mut MonitorState) {
        let Some(snapshot) = &state.snapshot else {
            return;
        };
        let estimate = snapshot.estimate(state.clock.now(), self.uptime_window);
        state.freshness.reestimated(estimate.uptime);
        self.record(state, false, estimate.pings, None);
    }

    fn record(
        &self,
        state: &MonitorState,
        answered: bool,
        pings: usize,
        told: Option<Arc<PolledPings>>,
    ) {
        let (freshness, uptime) = state.freshness.at(state.clock.now());
        self.events.record(&Event::Uptime(UptimePolled {
            ts: self.events.now(),
            agent: self.agent,
            state: freshness,
            uptime,
            answered,
            pings,
            told,
            ping_stats: state.ping_stats,
        }));
    }

    fn warn(&self, error: &PollError, (state, uptime): (Freshness, Option<Percent>)) {
        let agent = self.agent_id;
        if let (Freshness::Fresh, Some(uptime)) = (state, uptime) {
            tracing::warn!(
                agent,
                "no good answer from the ping system, going on with {}% for at most {:?} since it was received: {error}",
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

    /// Reports the uptime as it is known now, and returns when the controller must be asked again.
    fn observe(&self, state: &MonitorState) -> Option<Instant> {
        let now = Instant::now().into_std();
        let (state, uptime) = state.freshness.at(state.clock.now());
        let observed = self.rates.observe(self.agent, state, uptime, now);
        if let Some(ClaimChange {
            uptime,
            contradiction,
        }) = observed.claim
        {
            self.events.record(&Event::Claim(ClaimChecked {
                ts: self.events.now(),
                agent: self.agent,
                uptime,
                contradiction,
            }));
        }
        observed.again_at.map(Instant::from_std)
    }
}

/// Cancel-safe: the poll stays in its place, and goes on when this is called again.
async fn poll_answer<Q: Future<Output = Result<AgentSnapshot, PollError>>>(
    poll: &mut Option<Pin<Box<Q>>>,
) -> Result<AgentSnapshot, PollError> {
    match poll {
        Some(poll) => poll.as_mut().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use std::cell::RefCell;
    use std::sync::LazyLock;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::runner::events::event::{JobAnswer, RateReason};
    use crate::runner::rate::controller::Sharing;
    use crate::runner::rate::job_stats::JobStats;
    use crate::runner::rate::policy::Policy;
    use crate::runner::testing::{PollResult, ScriptedPings, ToldPing, percent, recorder};
    use crate::units::JobsPerMinute;
    use crate::wire::outcome::Outcome;

    const INTERVAL: Duration = Duration::from_secs(10);
    const STALE_AFTER: Duration = Duration::from_secs(25);

    /// What is published over time, as (seconds after the start, rate of 60, reason), and the states of
    /// the `uptime` events.
    async fn published(
        script: &[PollResult],
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
        let job_stats = Arc::new(JobStats::new(0, INTERVAL));
        let mut target = rates.add(AgentIndex(0), JobsPerMinute::new(60), job_stats);
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

    fn monitor<'a>(events: &'a EventDispatcher, rates: &'a RateController) -> Monitor<'a> {
        static OUTAGES: LazyLock<OutageLog> = LazyLock::new(|| OutageLog::new(STALE_AFTER));
        Monitor {
            outages: &OUTAGES,
            agent: AgentIndex(0),
            agent_id: "agent-001",
            uptime_interval: INTERVAL,
            uptime_window: Duration::from_hours(1),
            stale_after: STALE_AFTER,
            events,
            rates,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_uptime_is_published_within_one_poll() {
        let script = [99.5, 96.2, 92.0, 85.0, 99.0].map(PollResult::Uptime);
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
        use PollResult::{Error, Uptime};
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
        let (seen, states) = published(&[PollResult::Uptime(96.0), PollResult::Nothing], 60).await;
        assert_eq!(
            seen,
            [(0, 30, RateReason::Uptime), (25, 0, RateReason::Stale)]
        );
        assert_eq!(states, ["fresh"]);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_published_before_the_first_uptime_is_known() {
        use PollResult::{Error, NothingOfNow, Uptime};
        let (seen, states) = published(&[Error, NothingOfNow, Error, Uptime(85.0)], 35).await;
        assert_eq!(seen, [(30, 0, RateReason::Uptime)]);
        assert_eq!(states, ["unknown", "unknown", "unknown", "fresh"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_without_a_ping_that_covers_now_is_suspended_at_once() {
        use PollResult::{NothingOfNow, Uptime};
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
        let script = [99.5, 99.5, 85.0].map(PollResult::Uptime);
        let pending = [
            ToldPing::Ping(seconds(3), 96.2),
            ToldPing::Ping(seconds(2), 85.0),
        ];
        let source = ScriptedPings::telling(script, pending);
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
        let script = [99.5, 99.5, 92.0, 96.0].map(PollResult::Uptime);
        let source = ScriptedPings::telling(script, [ToldPing::End(seconds(3))]);
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
    async fn it_polls_at_once_when_pings_may_have_been_missed() {
        let script = [99.5, 99.5, 92.0].map(PollResult::Uptime);
        let source = ScriptedPings::telling(script, [ToldPing::Resync(seconds(3))]);
        let (seen, _) = published_from(&source, 9).await;
        assert_eq!(
            seen,
            [(0, 60, RateReason::Uptime), (3, 6, RateReason::Uptime)]
        );
        assert_eq!(source.asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn it_polls_at_once_when_the_number_of_pings_shows_that_some_are_missing() {
        let script = [99.5, 99.5, 92.0].map(PollResult::Uptime);
        for (number, asked) in [(2, 2), (3, 3)] {
            let told = [ToldPing::PingNumber(seconds(3), 99.5, number)];
            let source = ScriptedPings::telling(script, told);
            published_from(&source, 9).await;
            assert_eq!(source.asked.load(Ordering::Relaxed), asked);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_jumps_makes_it_poll_and_forget_nothing() {
        let forever = [ToldPing::Ping(seconds(1_000_000), 99.5)];
        for step in [TimeDelta::seconds(4000), TimeDelta::seconds(-4000)] {
            let script = [PollResult::Uptime(85.0)];
            let source = ScriptedPings::telling(script, forever);
            let clock = source.clock.clone();
            let stepping = async {
                tokio::time::sleep(seconds(2)).await;
                *clock.test.wall_step.lock() = step;
                tokio::time::sleep(seconds(6)).await;
                source.asked.load(Ordering::Relaxed)
            };
            let ((seen, _), asked) = tokio::join!(published_from(&source, 9), stepping);
            // At the start, when the stream opened, and after the step.
            assert_eq!(asked, 3);
            assert_eq!(seen, [(0, 0, RateReason::Uptime)]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_the_machine_is_suspended_makes_an_uptime_stale() {
        let forever = [ToldPing::Ping(seconds(1_000_000), 99.5)];
        let script = [
            PollResult::Uptime(99.5),
            PollResult::Uptime(99.5),
            PollResult::Nothing,
        ];
        let source = ScriptedPings::telling(script, forever);
        let clock = source.clock.clone();
        let suspending = async {
            tokio::time::sleep(seconds(2)).await;
            *clock.test.suspended.lock() = STALE_AFTER;
        };
        let ((seen, _), ()) = tokio::join!(published_from(&source, 9), suspending);
        // It is noticed when the clocks are compared, and asked at once.
        assert_eq!(
            seen,
            [(0, 60, RateReason::Uptime), (5, 0, RateReason::Stale)]
        );
        assert_eq!(source.asked.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_rises_only_after_good_uptime_has_lasted() {
        let policy = "tiers:99=100,95=50 recover_after=15s".parse().unwrap();
        let script = [99.5, 96.0, 99.5, 99.5, 99.5].map(PollResult::Uptime);
        let (seen, _) = published_by(&policy, &ScriptedPings::new(script), 45).await;
        assert_eq!(
            seen,
            [
                (0, 60, RateReason::Uptime),
                (10, 30, RateReason::Uptime),
                // It earns more from now on, and has for long enough when no poll is asked.
                (20, 30, RateReason::Uptime),
                (35, 60, RateReason::Uptime)
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_only_lives_keeps_no_uptime_fresh() {
        use PollResult::{Error, Uptime};
        let forever = [ToldPing::Ping(seconds(1_000_000), 99.5)];
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
            let job_stats = Arc::new(JobStats::new(1, window));
            for n in 0..100 {
                let outcome = if n % 12 == 0 {
                    Outcome::Timeout
                } else {
                    Outcome::Success
                };
                let answer = JobAnswer::failure(outcome, String::new());
                let now = Instant::now().into_std();
                let sent = job_stats.sent(Some(0), now);
                job_stats.ended(&sent, &answer, INTERVAL, now);
            }
            let rates = RateController::new(policy.parse().unwrap(), Sharing::Own);
            let mut target = rates.add(AgentIndex(0), JobsPerMinute::new(60), job_stats);
            let stop = CancellationToken::new();
            let source = ScriptedPings::new([PollResult::Uptime(99.5)]);
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
