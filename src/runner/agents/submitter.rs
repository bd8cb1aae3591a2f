//! Sends one agent's jobs at their slots, and never waits for an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::runner::events::dispatcher::EventDispatcher;
use crate::runner::events::event::{
    AliasLearnt, DropReason, Event, JobAnswer, JobDone, JobSent, PauseChanged, RateChanged,
    RateReason, RetryAfter,
};
use crate::runner::rate::controller::{RateController, TargetRate};
use crate::runner::rate::job_stats::JobStats;
use crate::runner::rate::pause::PauseChange;
use crate::runner::roster::AgentIndex;
use crate::runner::send::budget::{Budgets, Grant};
use crate::runner::send::capability::{JobPicker, JobTemplate};
use crate::runner::send::destination::{Job, SendJob};
use crate::runner::send::in_flight::{InFlightLimit, Permit};
use crate::runner::send::orchestrators::{OrchestratorTurns, OwnOrchestrator};
use crate::runner::send::pacer::{Due, Pacer};
use crate::runner::send::template::PlaceholderValues;
use crate::runner::send::timer::PreciseTimer;
use crate::units::{JobsPerMinute, Percent, Share};
use crate::wire::charge::{ChargedPer, Price, Work};
use crate::wire::outcome::Outcome;

/// Slots that are closer than this are sent together: above 2000 jobs per second, a wake-up for each would
/// cost more than it is worth, and starve the other tasks.
const MIN_SLEEP: Duration = Duration::from_micros(500);
/// Withheld slots are counted at least this often.
const MAX_SLEEP: Duration = Duration::from_secs(1);
/// How much earlier a job times out than the money that is left would last.
const TIMER_GRAIN: Duration = Duration::from_millis(100);

/// What the submitters of all agents share.
#[derive(Debug)]
pub(crate) struct SubmitterContext {
    pub in_flight: Arc<InFlightLimit>,
    /// The jobs left of `--max-jobs`.
    pub job_count: JobCount,
    /// The money that is left, if spending is bounded.
    pub budgets: Option<Budgets>,
    pub events: Arc<EventDispatcher>,
    pub rates: Arc<RateController>,
    /// Jobs that await their answers.
    pub jobs: TaskTracker,
    /// No job is sent after this is cancelled.
    pub stop: CancellationToken,
    /// No answer is waited for after this is cancelled.
    pub abandon: CancellationToken,
}

impl SubmitterContext {
    /// Takes in what an answer says of more than its job.
    fn learn(&self, agent: AgentIndex, answer: &JobAnswer, own: Option<&OwnOrchestrator>) {
        if let (Some(own), Some(name)) = (own, &answer.orchestrator)
            && own.is_new_alias(name)
        {
            self.events.record(&Event::Alias(AliasLearnt {
                ts: self.events.now(),
                agent,
                orchestrator: own.address().to_owned(),
                name: name.clone(),
            }));
        }
        if let (Outcome::Throttled, Some(RetryAfter { delay, scope })) =
            (answer.outcome, answer.retry_after)
            && !delay.is_zero()
        {
            let until = Instant::now().into_std() + delay;
            self.rates.throttle_until(agent, scope, until);
        }
    }

    fn pause(&self, agent: AgentIndex, change: PauseChange, outcome: Outcome) {
        self.events.record(&Event::Pause(PauseChanged {
            ts: self.events.now(),
            agent,
            change,
            outcome,
        }));
        self.rates.pause(agent, change != PauseChange::Resumed);
    }
}

/// The number of jobs that may still be sent, if that is bounded.
#[derive(Debug)]
pub(crate) struct JobCount(Option<AtomicU64>);

impl JobCount {
    /// At most `jobs`; any number for `None`.
    #[must_use]
    pub(crate) fn new(jobs: Option<u64>) -> Self {
        Self(jobs.map(AtomicU64::new))
    }

    /// Takes one, and returns how many are left; `None` if there was none.
    fn try_take(&self) -> Option<u64> {
        let Some(left) = &self.0 else {
            return Some(u64::MAX);
        };
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        taken.ok().map(|before| before - 1)
    }
}

/// One agent's submitter.
#[derive(Debug)]
pub(crate) struct Submitter<D> {
    pub agent: AgentIndex,
    pub agent_id: Arc<str>,
    pub destination: D,
    /// By capability.
    pub templates: Vec<JobTemplate>,
    /// By capability: the timeout of a job.
    pub timeouts: Vec<Duration>,
    pub orchestrators: OrchestratorTurns,
    /// What its jobs cost, if it is known.
    pub price: Option<Price>,
    pub job_stats: Arc<JobStats>,
    /// No job of this agent is sent after this is cancelled, which it is with the run's own token too.
    pub stop: CancellationToken,
    pub picker: JobPicker,
    pub timer: PreciseTimer,
    pub shared: Arc<SubmitterContext>,
}

impl<D: SendJob + Clone> Submitter<D> {
    /// Sends jobs at the target rate until `stop`.
    pub(crate) async fn run(mut self, mut target: watch::Receiver<Option<TargetRate>>) {
        let stop = self.stop.clone();
        let mut pacer = Pacer::new(self.phase());
        let mut current: Option<TargetRate> = None;
        let mut awake_at = Instant::now();
        loop {
            let next = pacer
                .next_due()
                .map_or(awake_at + MAX_SLEEP, Instant::from_std);
            let next = next.clamp(awake_at + MIN_SLEEP, awake_at + MAX_SLEEP);
            let stopping = tokio::select! {
                () = stop.cancelled() => true,
                // The controller drops the sender when the agent is removed.
                changed = target.changed() => changed.is_err(),
                () = self.timer.until(next) => false,
            };
            // Whichever branch it was: slots that are due at the end must still be counted.
            let stopping = stopping || stop.is_cancelled();
            let now = Instant::now();
            awake_at = now;
            // Read before anything is sent: a rate that fell must take effect first.
            let new = *target.borrow_and_update();
            let due = if stopping {
                pacer.finish(now.into_std())
            } else if let Some(new) = new.filter(|new| Some(*new) != current) {
                pacer.change(now.into_std(), new.base, new.rate)
            } else {
                pacer.advance(now.into_std())
            };
            self.account_for(&due, current);
            if stopping || stop.is_cancelled() {
                self.emit_left(current);
                return;
            }
            if let Some(new) = new {
                self.emit_rate_change(current, new);
                current = Some(new);
            }
        }
    }

    /// The part of a gap before the first slot. The golden ratio spreads agents that become known together
    /// evenly, however many they are; the first one starts at once.
    fn phase(&self) -> Share {
        const GOLDEN: f64 = 0.618_033_988_749_895;
        #[expect(clippy::cast_precision_loss, reason = "far fewer agents than 2^53")]
        let turns = self.agent.0 as f64 * GOLDEN;
        Share::new(turns.fract())
    }

    fn emit_rate_change(&self, old: Option<TargetRate>, new: TargetRate) {
        let changed = RateChanged {
            ts: self.shared.events.now(),
            agent: self.agent,
            from: old.map_or(JobsPerMinute::ZERO, |old| old.rate),
            to: new.rate,
            base: new.base,
            uptime: new.uptime,
            reason: new.reason,
        };
        if old.is_none() || changed.from != changed.to {
            self.shared.events.record(&Event::RateChanged(changed));
        } else if old.is_some_and(|old| old.base != new.base) {
            self.shared.events.record(&Event::BaseChanged(changed));
        }
    }

    /// If the run goes on without this agent, its slots are not counted any more.
    fn emit_left(&self, current: Option<TargetRate>) {
        if self.shared.stop.is_cancelled() {
            return;
        }
        let ts = self.shared.events.now();
        let agent = self.agent;
        if let Some(current) = current {
            self.shared.events.record(&Event::RateChanged(RateChanged {
                ts,
                agent,
                from: current.rate,
                to: JobsPerMinute::ZERO,
                base: JobsPerMinute::ZERO,
                uptime: None,
                reason: RateReason::Unknown,
            }));
        }
        self.shared.events.record(&Event::AgentLeft { ts, agent });
    }

    /// Sends or counts each slot of `due`, also those that were due before a stop.
    fn account_for(&mut self, due: &Due, current: Option<TargetRate>) {
        for _ in 0..due.withheld {
            let capability = self.picker.next_unsent();
            self.shared
                .events
                .record(&Event::Delayed(self.agent, capability));
        }
        for _ in 0..due.overdue {
            self.drop_slot(DropReason::Late);
        }
        let Some((rate, uptime)) = current.and_then(|target| Some((target.rate, target.uptime?)))
        else {
            return;
        };
        let mut has_money = true;
        for slot in due.slots() {
            // After the money has run out the rest of the batch is dropped, so that no slot is lost.
            if !has_money {
                self.drop_slot(DropReason::Budget);
                continue;
            }
            let Some(permit) = self.shared.in_flight.try_acquire(self.agent) else {
                self.drop_slot(DropReason::InFlight);
                continue;
            };
            let granted = match self.reserve_money() {
                Grant::Units(units) => units,
                Grant::NotNow => {
                    self.drop_slot(DropReason::Budget);
                    continue;
                }
                spent @ (Grant::AgentSpent | Grant::AllSpent) => {
                    self.drop_slot(DropReason::Budget);
                    self.handle_spent(spent);
                    has_money = false;
                    continue;
                }
            };
            let Some(left) = self.shared.job_count.try_take() else {
                self.give_back(granted);
                return;
            };
            self.send(slot.into(), rate, uptime, permit, granted);
            if left == 0 {
                self.shared.stop.cancel();
                return;
            }
        }
    }

    fn handle_spent(&self, spent: Grant) {
        if spent == Grant::AllSpent {
            tracing::warn!("--budget-wei is spent: the run ends");
            self.shared.stop.cancel();
        } else {
            tracing::warn!(
                agent = &*self.agent_id,
                "the agent's budget_wei is spent: no more jobs are sent to it"
            );
            self.shared.rates.budget_spent(self.agent);
        }
    }

    /// Reserves for the longest job that may come next: which capability it is, is drawn later.
    fn reserve_money(&self) -> Grant {
        match (&self.shared.budgets, &self.price) {
            (Some(budgets), Some(price)) => {
                let capabilities = self.templates.iter().zip(&self.timeouts);
                let most = capabilities.map(|(template, &timeout)| {
                    price.most_units(timeout, template.timeout_seconds(u64::MAX))
                });
                budgets.reserve(self.agent, price, most.max().unwrap_or(1))
            }
            _ => Grant::Units(u64::MAX),
        }
    }

    fn give_back(&self, granted: u64) {
        if let (Some(budgets), Some(price)) = (&self.shared.budgets, &self.price) {
            budgets.settle(self.agent, price, granted, 0);
        }
    }

    fn drop_slot(&mut self, reason: DropReason) {
        let capability = self.picker.next_unsent();
        self.shared
            .events
            .record(&Event::Dropped(self.agent, capability, reason));
    }

    /// The seconds that are reserved for a job with these units of its price.
    fn granted_seconds(&self, granted: u64) -> u64 {
        match &self.price {
            Some(price) if price.per == ChargedPer::Job => u64::MAX,
            _ => granted,
        }
    }

    /// Spawns a job, for which `granted` units of its price are reserved. Its permit is released after its answer is
    /// recorded and the output has capacity, so a reader that is too slow ends up dropping slots.
    fn send(
        &mut self,
        slot: Instant,
        rate: JobsPerMinute,
        uptime: Percent,
        permit: Permit,
        granted: u64,
    ) {
        let shared = Arc::clone(&self.shared);
        let agent = self.agent;
        let (index, seed) = self.picker.next_sent();
        let template = &self.templates[index.0];
        let job_id = Uuid::new_v4();
        let payload = template.payload(&PlaceholderValues {
            agent_id: &self.agent_id,
            job_id,
            seed,
            timestamp: unix_seconds(Utc::now()),
        });
        let seconds = self.granted_seconds(granted);
        let timeout_seconds = template.timeout_seconds(seconds);
        let paid = Duration::from_secs(seconds).saturating_sub(TIMER_GRAIN);
        let orchestrator = self.orchestrators.next();
        let job = Job {
            id: job_id,
            capability: index,
            payload,
            orchestrator: orchestrator.clone(),
            timeout_seconds,
            timeout: self.timeouts[index.0].min(paid),
        };
        let timeout = job.timeout;
        let own = orchestrator.as_ref().map(|own| own.index());
        let in_flight = self.job_stats.sent(own, Instant::now().into_std());
        // One time for both events: between them a row of slots may be recorded, which counts the job or does not.
        let ts = shared.events.now();
        shared.events.record(&Event::Sent(JobSent {
            ts,
            agent,
            job_id,
            capability: index,
        }));
        let (price, job_stats) = (self.price.clone(), Arc::clone(&self.job_stats));
        let destination = self.destination.clone();
        let jobs = shared.jobs.clone();
        jobs.spawn(async move {
            let sent_at = Instant::now();
            let send_lag = sent_at.saturating_duration_since(slot);
            let answer = tokio::select! {
                biased;
                answer = destination.send(job) => answer,
                () = shared.abandon.cancelled() => JobAnswer::failure(
                    Outcome::CutShort,
                    destination.abandoned().to_owned(),
                ),
            };
            let answered_at = Instant::now();
            let latency = answered_at.saturating_duration_since(slot);
            shared.learn(agent, &answer, orchestrator.as_deref());
            let to = (own.unwrap_or_default(), index.0);
            if let Some(change) = job_stats.pause_change(answer.outcome, to) {
                shared.pause(agent, change, answer.outcome);
            }
            let ended_at = answer.unpaid_since.unwrap_or(answered_at);
            let work = Work {
                outcome: answer.outcome,
                is_stream: answer.is_stream,
                // A timer that is late costs nobody anything.
                time: ended_at
                    .saturating_duration_since(sent_at)
                    .saturating_sub(answer.connect.unwrap_or_default())
                    .min(timeout),
                timeout_seconds,
            };
            if let (Some(budgets), Some(price)) = (&shared.budgets, &price) {
                budgets.settle(agent, price, granted, price.units(work));
            }
            job_stats.ended(&in_flight, &answer, latency, Instant::now().into_std());
            shared.events.record(&Event::Job(JobDone {
                ts,
                agent,
                job_id,
                capability: index,
                sent_to: orchestrator.as_ref().map(|own| own.address().into()),
                latency,
                send_lag,
                rate,
                uptime,
                work,
                cost: price.map(|price| price.of(work)),
                answer,
            }));
            shared.events.ready().await;
            drop(permit);
        });
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact to the microsecond for centuries"
)]
fn unix_seconds(ts: chrono::DateTime<Utc>) -> f64 {
    ts.timestamp_micros() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::events::event::Freshness;
    use crate::runner::rate::controller::Sharing;
    use crate::runner::rate::policy::Policy;
    use crate::runner::send::capability::Capability;
    use crate::runner::testing::{Sink, SlowGateway, percent, recorder};
    use proptest::prelude::*;
    use serde_json::Value;

    const SECOND: Duration = Duration::from_secs(1);

    struct Bench {
        gateway: SlowGateway,
        shared: Arc<SubmitterContext>,
        sink: Sink,
        running: tokio::task::JoinHandle<()>,
        start: Instant,
    }

    impl Bench {
        fn start(rate: u32, latency: Duration, in_flight: usize, max_jobs: Option<u64>) -> Self {
            Self::with(rate, latency, in_flight, max_jobs, None)
        }

        fn start_with_budgets(rate: u32, budgets: Option<Budgets>) -> Self {
            Self::with(rate, Duration::from_millis(10), 1000, None, budgets)
        }

        fn start_without_answers(rate: u32, budgets: Option<Budgets>) -> Self {
            Self::with(rate, 1000 * SECOND, 1000, None, budgets)
        }

        fn with(
            rate: u32,
            latency: Duration,
            in_flight: usize,
            max_jobs: Option<u64>,
            budgets: Option<Budgets>,
        ) -> Self {
            let (recorder, sink) = recorder(rate);
            let gateway = SlowGateway::new(latency);
            let rates = Arc::new(RateController::new(Policy::default(), Sharing::Own));
            let job_stats = Arc::new(JobStats::new(0, SECOND));
            let base = JobsPerMinute::new(rate);
            let target = rates.add(AgentIndex(0), base, Arc::clone(&job_stats));
            let shared = Arc::new(SubmitterContext {
                in_flight: Arc::new(InFlightLimit::new(in_flight)),
                job_count: JobCount::new(max_jobs),
                budgets,
                events: recorder,
                rates: Arc::clone(&rates),
                jobs: TaskTracker::new(),
                stop: CancellationToken::new(),
                abandon: CancellationToken::new(),
            });
            let submitter = Submitter {
                agent: AgentIndex(0),
                agent_id: "agent-001".into(),
                destination: gateway.clone(),
                templates: vec![Capability::built_in()[0].prepare(); 2],
                timeouts: vec![SECOND, 9 * SECOND],
                orchestrators: OrchestratorTurns::new(&[]),
                price: Some(Price::per_second(1)),
                job_stats,
                stop: shared.stop.clone(),
                picker: JobPicker::new([1.0, 0.0], 1),
                timer: PreciseTimer::of_runtime(),
                shared: Arc::clone(&shared),
            };
            shared.in_flight.add_agent(AgentIndex(0));
            let running = tokio::spawn(submitter.run(target));
            Self {
                gateway,
                shared,
                sink,
                running,
                start: Instant::now(),
            }
        }

        fn observe(&self, state: Freshness, uptime: Option<f64>) {
            let now = Instant::now().into_std();
            let uptime = uptime.map(percent);
            self.shared.rates.observe(AgentIndex(0), state, uptime, now);
        }

        fn uptime(&self, uptime: f64) {
            self.observe(Freshness::Fresh, Some(uptime));
        }

        /// Stops, waits for all answers, and gives the accounts.
        async fn finish(self) -> (Value, SlowGateway, Sink) {
            self.shared.stop.cancel();
            self.running.await.unwrap();
            self.shared.jobs.close();
            self.shared.jobs.wait().await;
            self.shared.events.close().await.unwrap();
            let summary = self.sink.events("summary").remove(0);
            (
                summary["capabilities"]["gpu-check"].clone(),
                self.gateway,
                self.sink,
            )
        }
    }

    fn counts(account: &Value) -> [u64; 3] {
        ["attempts", "delayed", "dropped"].map(|name| account[name].as_u64().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_leave_at_their_slots_whatever_the_latency() {
        for latency in [Duration::ZERO, 10 * SECOND] {
            let bench = Bench::start(60, latency, 100, None);
            bench.uptime(100.0);
            tokio::time::sleep(Duration::from_millis(29_500)).await;
            let start = bench.start;
            let (account, gateway, _) = bench.finish().await;
            let arrivals = gateway.arrivals_ms(start);
            assert_eq!(counts(&account), [30, 0, 0]);
            for (k, at) in arrivals.into_iter().enumerate() {
                let slot = k as u128 * 1000;
                assert!((slot..slot + 3).contains(&at), "job {k} left at {at} ms");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_without_a_place_is_dropped_and_counted() {
        let bench = Bench::start(60, 1000 * SECOND, 3, None);
        bench.uptime(100.0);
        tokio::time::sleep(Duration::from_millis(9_500)).await;
        let (account, gateway, _) = bench.finish().await;
        assert_eq!(gateway.arrivals.lock().unwrap().len(), 3);
        assert_eq!(counts(&account), [3, 0, 7]);
    }

    #[tokio::test(start_paused = true)]
    async fn rates_take_hold_at_once_and_keep_the_gap_that_has_passed() {
        let bench = Bench::start(60, Duration::ZERO, 100, None);
        bench.uptime(100.0);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        bench.uptime(96.0);
        tokio::time::sleep(Duration::from_millis(4_000)).await;
        bench.uptime(85.0);
        tokio::time::sleep(Duration::from_millis(10_000)).await;
        bench.uptime(99.0);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let start = bench.start;
        let (account, gateway, sink) = bench.finish().await;
        let expected = [0, 1000, 2000, 3500, 5500, 16_500, 17_500];
        let arrivals = gateway.arrivals_ms(start);
        assert_eq!(arrivals.len(), expected.len(), "{arrivals:?}");
        for (at, slot) in arrivals.iter().zip(expected) {
            assert!((slot..slot + 5).contains(at), "{arrivals:?}");
        }
        let changes: Vec<(u64, u64)> = sink
            .events("rate_changed")
            .iter()
            .map(|event| {
                (
                    event["from"].as_u64().unwrap(),
                    event["to"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(changes, [(0, 60), (60, 30), (30, 0), (0, 60)]);
        assert_eq!(counts(&account), [7, 12, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspended_agent_gets_nothing_and_its_slots_count_as_delayed() {
        let bench = Bench::start(60, Duration::ZERO, 100, None);
        bench.uptime(100.0);
        bench.observe(Freshness::Stale, Some(100.0));
        tokio::time::sleep(Duration::from_millis(10_500)).await;
        let (account, ..) = bench.finish().await;
        assert_eq!(counts(&account), [0, 10, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_of_jobs_ends_the_run() {
        let bench = Bench::start(6000, SECOND, 1000, Some(25));
        bench.uptime(100.0);
        bench.shared.stop.cancelled().await;
        let (account, ..) = bench.finish().await;
        assert_eq!(counts(&account), [25, 0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_slot_is_lost_when_the_money_runs_out_in_the_middle_of_a_batch() {
        let budgets = Budgets::new(None);
        budgets.open(AgentIndex(0), "30".parse().ok());
        let bench = Bench::start_with_budgets(600_000, Some(budgets));
        bench.uptime(100.0);
        tokio::time::sleep(Duration::from_millis(1)).await;
        // Late by ten batches: each of them holds 64 slots.
        tokio::time::advance(Duration::from_millis(64)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let slots = bench.start.elapsed().as_millis() as u64 * 10;
        let (account, _, sink) = bench.finish().await;
        let [attempts, delayed, dropped] = counts(&account);
        // Each job sets 10 s at 1 wei aside, and is charged for one: 30 can be sent.
        assert!((1..=30).contains(&attempts), "{attempts}");
        let all = attempts + delayed + dropped;
        assert!(all.abs_diff(slots) <= 3, "{all} of {slots}");
        let reasons: Vec<Value> = sink
            .events("rate_changed")
            .iter()
            .map(|event| event["reason"].clone())
            .collect();
        assert_eq!(reasons, ["uptime", "budget"]);
    }

    /// What a job may cost at most is what the longest timeout may cost: which capability comes next is
    /// drawn later.
    #[tokio::test(start_paused = true)]
    async fn the_longest_timeout_is_reserved_for_each_job() {
        let budgets = Budgets::new("25".parse().ok());
        let bench = Bench::start_without_answers(60, Some(budgets));
        bench.uptime(100.0);
        tokio::time::sleep(Duration::from_millis(4_500)).await;
        let (account, ..) = bench.finish().await;
        // Of 25 wei, 9 s are reserved twice; the rest is for 7 s.
        assert_eq!(counts(&account), [3, 0, 2]);
    }

    /// The example block of the scripts' summary: 120.5 s, of which 68.75 s at 60/min and the rest at 30/min,
    /// are 95 jobs and 25 delayed ones: together the 120 slots of the base rate.
    #[tokio::test(start_paused = true)]
    async fn the_example_of_the_seed_adds_up() {
        let bench = Bench::start(60, Duration::from_millis(48), 100, None);
        bench.uptime(99.5);
        tokio::time::sleep(Duration::from_millis(68_750)).await;
        bench.uptime(96.25);
        tokio::time::sleep(Duration::from_millis(51_750)).await;
        assert_eq!(bench.start.elapsed(), Duration::from_millis(120_500));
        let (account, ..) = bench.finish().await;
        assert_eq!(counts(&account), [95, 25, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Under any sequence of uptimes every slot of the base rate is sent, delayed or dropped.
        #[test]
        fn the_accounts_add_up(
            base in 1..=60_000_u32, in_flight in 1..200_usize, latency_ms in 0..3000_u64,
            steps in prop::collection::vec((1..3000_u64, 80.0..=100.0_f64), 1..12),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(async {
                let latency = Duration::from_millis(latency_ms);
                let bench = Bench::start(base, latency, in_flight, None);
                let mut changes = 1;
                for (milliseconds, uptime) in steps {
                    bench.uptime(uptime);
                    changes += 1;
                    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
                }
                let elapsed = bench.start.elapsed().as_secs_f64();
                let (account, gateway, _) = bench.finish().await;
                let [attempts, delayed, dropped] = counts(&account);
                let expected = elapsed * f64::from(base) / 60.0;
                let all = (attempts + delayed + dropped) as f64;
                prop_assert_eq!(attempts as usize, gateway.arrivals.lock().unwrap().len());
                prop_assert!((all - expected).abs() <= f64::from(changes) + 1.0, "{all} of {expected}");
                Ok(())
            })?;
        }
    }
}
