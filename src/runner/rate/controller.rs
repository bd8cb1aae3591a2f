//! The rate of each agent. The controller alone decides it: from what the agent has earned, its share of a
//! total, and its budget. It publishes a [`TargetRate`], which the agent's submitter obeys.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::allocation::{Allocation, Split, base_rates, redistribute};
use super::decision::{ClaimChange, DecisionState, Observation, RateDecision};
use super::job_stats::JobStats;
use super::policy::Policy;
use crate::runner::deadline;
use crate::runner::events::event::{Freshness, RateReason, ThrottleScope};
use crate::runner::roster::AgentIndex;
use crate::units::{JobsPerMinute, Percent, Share};

/// What is sent of an agent that is paused: one job every 10 s shows when it can go on.
const PAUSED_RATE: JobsPerMinute = JobsPerMinute::new(6);
/// The smoothing factor of weights: one bad minute must not reverse all rates.
const SMOOTHING: f64 = 0.3;

/// Where base rates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each agent has its own.
    Own,
    /// All agents share one.
    Total {
        /// All of it.
        rate: JobsPerMinute,
        /// How it is divided.
        split: Split,
        /// Whether what a punished agent loses goes to the others.
        redistribute: bool,
    },
}

/// The rate at which an agent is to be sent jobs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TargetRate {
    /// The rate of the slots that are counted.
    pub base: JobsPerMinute,
    /// The rate of the jobs that are sent.
    pub rate: JobsPerMinute,
    /// The last known uptime.
    pub uptime: Option<Percent>,
    /// Why base and rate are what they are.
    pub reason: RateReason,
}

/// The result of an observation, besides the target rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Observed {
    /// Set if claim and evidence began or ceased to differ.
    pub claim: Option<ClaimChange>,
    /// When to observe the agent again even without news: its rate may rise then.
    pub again_at: Option<Instant>,
}

/// The rates of all agents.
#[derive(Debug)]
pub(crate) struct RateController {
    policy: Policy,
    sharing: Sharing,
    /// Until when no job of any agent is sent because a server asked so; locked after `entries`.
    all_throttled_until: Mutex<Option<Instant>>,
    throttling_changed: Notify,
    /// By agent; `None` for one that was removed.
    entries: Mutex<Vec<Option<AgentEntry>>>,
}

#[derive(Debug)]
struct AgentEntry {
    base: JobsPerMinute,
    weight: Option<f64>,
    decisions: DecisionState,
    holds: Holds,
    /// Until when none of its jobs is sent because a server asked so.
    throttled_until: Option<Instant>,
    job_stats: Arc<JobStats>,
    target: watch::Sender<Option<TargetRate>>,
    /// The share behind the target rate.
    published_share: Option<Share>,
}

/// Why an agent is sent fewer jobs than it has earned.
#[derive(Debug, Clone, Copy, Default)]
struct Holds {
    budget_spent: bool,
    throttled: bool,
    paused: bool,
}

impl Holds {
    /// What is left of a rate, and why.
    fn apply(self, rate: JobsPerMinute) -> (JobsPerMinute, Option<RateReason>) {
        if self.budget_spent {
            (JobsPerMinute::ZERO, Some(RateReason::Budget))
        } else if self.throttled {
            (JobsPerMinute::ZERO, Some(RateReason::Throttled))
        } else if self.paused {
            (rate.min(PAUSED_RATE), Some(RateReason::Paused))
        } else {
            (rate, None)
        }
    }
}

impl AgentEntry {
    fn share(&self) -> Option<Share> {
        self.decisions.decided().and_then(RateDecision::share)
    }

    fn allocation(&self, policy: &Policy) -> Allocation {
        let decided = self.decisions.decided();
        Allocation {
            base: self.base,
            rate: decided.map_or(JobsPerMinute::ZERO, |d| d.rate(policy, self.base)),
        }
    }

    /// Publishes the target rate, from the first decision on.
    fn publish(&mut self, Allocation { base, rate }: Allocation) {
        let Some(decision) = self.decisions.decided() else {
            return;
        };
        let (rate, held) = self.holds.apply(rate);
        let earned_the_same = self.published_share == decision.share();
        self.target.send_if_modified(|target| {
            let reason = match (decision.reason(), *target) {
                (reason, _) if held.is_some() => held.unwrap_or(reason),
                (RateReason::Uptime, Some(old)) if earned_the_same && !old.reason.is_hold() => {
                    if (old.base, old.rate) == (base, rate) {
                        old.reason
                    } else {
                        RateReason::Allotment
                    }
                }
                (reason, _) => reason,
            };
            let new = Some(TargetRate {
                base,
                rate,
                uptime: decision.uptime(),
                reason,
            });
            let modified = *target != new;
            *target = new;
            modified
        });
        self.published_share = decision.share();
    }
}

impl RateController {
    /// Without agents.
    #[must_use]
    pub(crate) fn new(policy: Policy, sharing: Sharing) -> Self {
        Self {
            policy,
            sharing,
            all_throttled_until: Mutex::default(),
            throttling_changed: Notify::new(),
            entries: Mutex::default(),
        }
    }

    /// Adds an agent, whose target rate is published on what is returned. Of a total it has its part
    /// after the next [`Self::rebalance`].
    pub(crate) fn add(
        &self,
        AgentIndex(agent): AgentIndex,
        own_base: JobsPerMinute,
        job_stats: Arc<JobStats>,
    ) -> watch::Receiver<Option<TargetRate>> {
        let (target, receiver) = watch::channel(None);
        let base = match self.sharing {
            Sharing::Own => own_base,
            Sharing::Total { .. } => JobsPerMinute::ZERO,
        };
        let mut entries = self.entries.lock();
        if entries.len() <= agent {
            entries.resize_with(agent + 1, || None);
        }
        entries[agent] = Some(AgentEntry {
            base,
            weight: None,
            decisions: DecisionState::new(&self.policy),
            holds: Holds {
                throttled: self.all_throttled_until.lock().is_some(),
                ..Holds::default()
            },
            throttled_until: None,
            job_stats,
            target,
            published_share: None,
        });
        receiver
    }

    /// Removes an agent; its channel closes.
    pub(crate) fn remove(&self, AgentIndex(agent): AgentIndex) {
        self.entries.lock()[agent] = None;
    }

    /// Decides again what an agent has earned, from its uptime as known at `now`.
    pub(crate) fn observe(
        &self,
        AgentIndex(agent): AgentIndex,
        state: Freshness,
        uptime: Option<Percent>,
        now: Instant,
    ) -> Observed {
        let mut entries = self.entries.lock();
        let Some(entry) = entries.get_mut(agent).and_then(Option::as_mut) else {
            // It was removed while its monitor observed it.
            return Observed {
                claim: None,
                again_at: None,
            };
        };
        let observation = Observation {
            state,
            uptime,
            evidence: entry.job_stats.evidence(now),
        };
        let before = entry.decisions.decided();
        let claim = entry.decisions.decide(&self.policy, observation, now);
        let observed = Observed {
            claim,
            again_at: entry.decisions.rises_at(),
        };
        if entry.decisions.decided() != before {
            if self.redistributes() {
                self.publish_all(&mut entries);
            } else {
                let allocation = entry.allocation(&self.policy);
                entry.publish(allocation);
            }
        }
        observed
    }

    /// Sets an agent's rate to 0 because its budget is spent.
    pub(crate) fn budget_spent(&self, AgentIndex(agent): AgentIndex) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(agent).and_then(Option::as_mut) {
            entry.holds.budget_spent = true;
            let base = entry
                .target
                .borrow()
                .map_or(entry.base, |target| target.base);
            entry.publish(Allocation {
                base,
                rate: JobsPerMinute::ZERO,
            });
        }
    }

    /// Begins or ends the pause of an agent's jobs.
    pub(crate) fn pause(&self, AgentIndex(agent): AgentIndex, paused: bool) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get_mut(agent).and_then(Option::as_mut) {
            entry.holds.paused = paused;
        }
        self.publish_all(&mut entries);
    }

    /// Sends no job of an agent, or of any, until an instant, or a later one that was set before.
    pub(crate) fn throttle_until(
        &self,
        AgentIndex(agent): AgentIndex,
        scope: ThrottleScope,
        until: Instant,
    ) {
        let mut entries = self.entries.lock();
        match scope {
            ThrottleScope::AllAgents => {
                let mut all = self.all_throttled_until.lock();
                *all = (*all).max(Some(until));
            }
            ThrottleScope::OneAgent => {
                if let Some(entry) = entries.get_mut(agent).and_then(Option::as_mut) {
                    entry.throttled_until = entry.throttled_until.max(Some(until));
                }
            }
        }
        self.apply_throttling(&mut entries);
        self.throttling_changed.notify_one();
    }

    /// Ends each throttling when its time is over; never returns.
    pub(crate) async fn end_throttling(&self) {
        loop {
            let next = self.next_end_of_throttling();
            tokio::select! {
                () = self.throttling_changed.notified() => {}
                () = deadline::reached(next.map(tokio::time::Instant::from_std)) => {
                    self.end_throttling_at(tokio::time::Instant::now().into_std());
                }
            }
        }
    }

    fn next_end_of_throttling(&self) -> Option<Instant> {
        let entries = self.entries.lock();
        let agents = entries.iter().flatten();
        let agents = agents.filter_map(|entry| entry.throttled_until);
        agents.chain(*self.all_throttled_until.lock()).min()
    }

    fn end_throttling_at(&self, now: Instant) {
        let is_over = |until: &mut Instant| *until <= now;
        let mut entries = self.entries.lock();
        self.all_throttled_until.lock().take_if(is_over);
        for entry in entries.iter_mut().flatten() {
            entry.throttled_until.take_if(is_over);
        }
        self.apply_throttling(&mut entries);
    }

    fn apply_throttling(&self, entries: &mut [Option<AgentEntry>]) {
        let all = self.all_throttled_until.lock().is_some();
        let mut has_changed = false;
        for entry in entries.iter_mut().flatten() {
            let throttled = all || entry.throttled_until.is_some();
            has_changed |= std::mem::replace(&mut entry.holds.throttled, throttled) != throttled;
        }
        if has_changed {
            self.publish_all(entries);
        }
    }

    /// Divides a total again, by what is known now.
    pub(crate) fn rebalance(&self) {
        let Sharing::Total { rate, split, .. } = self.sharing else {
            return;
        };
        let mut entries = self.entries.lock();
        let mut present: Vec<&mut AgentEntry> = entries.iter_mut().flatten().collect();
        for entry in &mut present {
            let uptime = entry.decisions.decided().and_then(RateDecision::uptime);
            let new = split.weight(uptime, entry.job_stats.performance());
            entry.weight = match (entry.weight, new) {
                (Some(old), Some(new)) if split == Split::Performance => {
                    Some(old + SMOOTHING * (new - old))
                }
                (old, new) => new.or(old),
            };
        }
        let weights: Vec<_> = present.iter().map(|entry| entry.weight).collect();
        for (entry, base) in present.into_iter().zip(base_rates(rate, split, &weights)) {
            entry.base = base;
        }
        self.publish_all(&mut entries);
    }

    fn redistributes(&self) -> bool {
        matches!(
            self.sharing,
            Sharing::Total {
                redistribute: true,
                ..
            }
        )
    }

    fn publish_all(&self, entries: &mut [Option<AgentEntry>]) {
        let present = || entries.iter().flatten();
        let mut allocations: Vec<_> = present()
            .map(|entry| entry.allocation(&self.policy))
            .collect();
        if self.redistributes() {
            let shares: Vec<_> = present().map(AgentEntry::share).collect();
            redistribute(&mut allocations, &shares);
        }
        for (entry, allocation) in entries.iter_mut().flatten().zip(allocations) {
            entry.publish(allocation);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::runner::events::event::JobAnswer;
    use crate::runner::testing::percent;
    use crate::wire::outcome::Outcome;

    struct TestFleet {
        rates: RateController,
        orders: Vec<watch::Receiver<Option<TargetRate>>>,
    }

    impl TestFleet {
        fn of(agents: usize, sharing: Sharing) -> Self {
            let rates = RateController::new(Policy::default(), sharing);
            let orders = (0..agents).map(|agent| {
                let job_stats = JobStats::new(0, Duration::from_hours(1));
                rates.add(
                    AgentIndex(agent),
                    JobsPerMinute::new(60),
                    Arc::new(job_stats),
                )
            });
            let orders = orders.collect();
            rates.rebalance();
            Self { rates, orders }
        }

        fn uptime(&self, agent: usize, uptime: f64) {
            self.rates.observe(
                AgentIndex(agent),
                Freshness::Fresh,
                Some(percent(uptime)),
                Instant::now(),
            );
        }

        fn reason(&self, agent: usize) -> RateReason {
            self.orders[agent].borrow().unwrap().reason
        }

        /// Base and rate of each agent of which something is known.
        fn now(&self) -> Vec<Option<(u32, u32)>> {
            let orders = self.orders.iter().map(|orders| *orders.borrow());
            orders
                .map(|orders| orders.map(|o| (o.base.get(), o.rate.get())))
                .collect()
        }
    }

    fn total(split: Split, redistribute: bool) -> Sharing {
        Sharing::Total {
            rate: JobsPerMinute::new(100),
            split,
            redistribute,
        }
    }

    #[test]
    fn own_rates_do_not_depend_on_others() {
        let fleet = TestFleet::of(2, Sharing::Own);
        fleet.uptime(0, 96.0);
        assert_eq!(fleet.now(), [Some((60, 30)), None]);
        fleet.uptime(1, 99.0);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((60, 30)), Some((60, 60))]);
    }

    #[test]
    fn what_is_withheld_stays_so_unless_it_is_redistributed() {
        for (redistribute, expected) in [
            (false, [Some((50, 50)), Some((50, 25))]),
            (true, [Some((75, 75)), Some((25, 25))]),
        ] {
            let fleet = TestFleet::of(2, total(Split::Equal, redistribute));
            fleet.uptime(0, 99.5);
            fleet.uptime(1, 96.0);
            assert_eq!(fleet.now(), expected);
        }
    }

    #[test]
    fn agents_that_come_and_go_change_the_shares() {
        let mut fleet = TestFleet::of(2, total(Split::Equal, false));
        fleet.uptime(0, 99.5);
        let job_stats = Arc::new(JobStats::new(0, Duration::from_hours(1)));
        let joined = fleet
            .rates
            .add(AgentIndex(2), JobsPerMinute::new(60), job_stats);
        fleet.orders.push(joined);
        fleet.rates.rebalance();
        fleet.uptime(2, 99.5);
        assert_eq!(fleet.now(), [Some((34, 34)), None, Some((33, 33))]);
        fleet.rates.remove(AgentIndex(1));
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((50, 50)), None, Some((50, 50))]);
        // Too late to matter.
        fleet.uptime(1, 99.5);
    }

    #[test]
    fn a_total_by_uptime_follows_it_at_the_next_rebalancing() {
        let fleet = TestFleet::of(2, total(Split::Uptime, false));
        fleet.uptime(0, 100.0);
        fleet.uptime(1, 100.0);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((50, 50)); 2]);
        fleet.uptime(1, 0.0);
        assert_eq!(fleet.now(), [Some((50, 50)), Some((50, 0))]);
        fleet.rates.rebalance();
        assert_eq!(fleet.now(), [Some((100, 100)), Some((0, 0))]);
    }

    #[test]
    fn the_reason_is_that_of_the_last_change() {
        let fleet = TestFleet::of(2, total(Split::Uptime, false));
        fleet.uptime(0, 100.0);
        fleet.uptime(1, 100.0);
        fleet.rates.rebalance();
        assert_eq!(fleet.reason(0), RateReason::Uptime);
        fleet.uptime(1, 50.0);
        fleet.rates.rebalance();
        // The one earned the same of another part, the other less.
        assert_eq!(fleet.reason(0), RateReason::Allotment);
        assert_eq!(fleet.now()[0], Some((67, 67)));
        fleet.uptime(0, 96.0);
        assert_eq!(fleet.reason(0), RateReason::Uptime);
        let stale = |state| {
            let now = Instant::now();
            let uptime = Some(percent(96.0));
            fleet.rates.observe(AgentIndex(0), state, uptime, now);
        };
        stale(Freshness::Stale);
        assert_eq!(fleet.reason(0), RateReason::Stale);
        assert_eq!(fleet.now()[0], Some((67, 0)));
    }

    #[test]
    fn an_agent_whose_budget_is_spent_is_sent_nothing_whatever_it_earns() {
        let fleet = TestFleet::of(2, Sharing::Own);
        fleet.uptime(0, 100.0);
        fleet.uptime(1, 100.0);
        fleet.rates.budget_spent(AgentIndex(0));
        assert_eq!(fleet.now(), [Some((60, 0)), Some((60, 60))]);
        assert_eq!(fleet.reason(0), RateReason::Budget);
        fleet.uptime(0, 96.0);
        assert_eq!(fleet.now()[0], Some((60, 0)));
        assert_eq!(fleet.reason(0), RateReason::Budget);
    }

    #[test]
    fn a_new_performance_counts_by_a_part_of_it_at_once() {
        let rates = RateController::new(Policy::default(), total(Split::Performance, false));
        let stats = [(); 2].map(|()| Arc::new(JobStats::new(0, Duration::from_hours(1))));
        let targets = [0, 1].map(|agent| {
            let stats = Arc::clone(&stats[agent]);
            rates.add(AgentIndex(agent), JobsPerMinute::new(60), stats)
        });
        // As many jobs as count: those before are forgotten.
        let answer_all = |agent: usize, millis: u64| {
            let success = JobAnswer::failure(Outcome::Success, String::new());
            for _ in 0..128 {
                let now = Instant::now();
                let sent = stats[agent].sent(None, now);
                stats[agent].ended(&sent, &success, Duration::from_millis(millis), now);
            }
        };
        answer_all(0, 100);
        answer_all(1, 100);
        for agent in [0, 1] {
            let uptime = Some(percent(100.0));
            let now = Instant::now();
            rates.observe(AgentIndex(agent), Freshness::Fresh, uptime, now);
        }
        rates.rebalance();
        let bases = || {
            let targets = targets.iter();
            let bases = targets.map(|target| target.borrow().unwrap().base.get());
            bases.collect::<Vec<_>>()
        };
        assert_eq!(bases(), [50, 50]);
        // Ten times as slow: its weight falls to a tenth, by 0.3 of the way at each look: 1000 to 730.
        answer_all(1, 1000);
        rates.rebalance();
        // A tenth is shared evenly: 5 + 90 × 1000 / 1730.
        assert_eq!(bases(), [57, 43]);
        for _ in 0..50 {
            rates.rebalance();
        }
        assert_eq!(bases(), [87, 13]);
    }
}
