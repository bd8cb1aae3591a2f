//! What the runner makes of an agent is what the agent was: agent, ping system and runner together, without a network,
//! against a history that is known to the second. Answers get lost, agents and ping systems restart, machines are
//! suspended, wall clocks are set.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use crate::agent::checkpoint::Restored;
use crate::agent::known_gpus::KnownGpus;
use crate::agent::probe::gpu::GpuSnapshot;
use crate::agent::tracker::{RequestedWindow, TrackerConfig, UptimeTracker};
use crate::ping_system::evaluate::{PingAttempt, PingOutcome, PingPolicy};
use crate::ping_system::interval::{IntervalRules, Streak};
use crate::ping_system::mass_failure::{Before, Blame, MassFailure};
use crate::ping_system::store::{AgentRecord, PingRecord};
use crate::ping_system::stretch::{self, BootInstant, MeasuredStretch};
use crate::units::{Percent, saturating_add, saturating_sub};
use crate::wire::agent::{GpuDevice, GpuHealth, Reported};
use crate::wire::coverage::mean_since;
use crate::wire::ping_system::HistoryPing;
use crate::wire::ping_system::served::{Ping, Status};

/// Checks, and with them all that happens to the agent, lie on a grid: nothing falls between two checks, and the uptime
/// is exact.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

fn start() -> DateTime<Utc> {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

/// What happened to the agent since its start, by checks.
struct Truth {
    is_up: Vec<bool>,
    /// How many checks before each were up.
    up_before: Vec<u64>,
}

impl Truth {
    fn new(is_up: Vec<bool>) -> Self {
        let mut up_before = vec![0];
        for up in &is_up {
            up_before.push(up_before.last().unwrap() + u64::from(*up));
        }
        Self { is_up, up_before }
    }

    fn up_seconds(&self, until: Duration) -> f64 {
        let check = index(until);
        let whole = self.up_before[check] as f64 * CHECK_INTERVAL.as_secs_f64();
        let rest = until - CHECK_INTERVAL * u32::try_from(check).unwrap();
        whole
            + if self.is_up[check] {
                rest.as_secs_f64()
            } else {
                0.0
            }
    }
}

fn index(at: Duration) -> usize {
    usize::try_from(at.as_micros() / CHECK_INTERVAL.as_micros()).unwrap()
}

/// The agent's boot clock.
fn booted(at: Duration) -> BootInstant {
    BootInstant {
        boot_id: Uuid::from_u128(9),
        since_boot: at,
    }
}

/// What befalls the agent at a check.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    Up,
    Lost,
    Suspended,
    Dead,
}

/// An agent whose GPU is lost now and then, and whose machine sleeps and dies.
struct SimulatedAgent {
    moments: Vec<Moment>,
    tracker: UptimeTracker,
    /// The next check.
    next: usize,
    suspended: Duration,
}

impl SimulatedAgent {
    fn new(moments: Vec<Moment>) -> Self {
        let (tracker, _) = UptimeTracker::begin(
            Self::config(),
            Uuid::nil(),
            start(),
            booted(Duration::ZERO),
            None,
        );
        Self {
            moments,
            tracker,
            next: 0,
            suspended: Duration::ZERO,
        }
    }

    fn config() -> TrackerConfig {
        TrackerConfig {
            agent_id: "a".to_owned(),
            check_interval: CHECK_INTERVAL,
            max_transitions: 10_000,
            require_gpus: Some(1),
            source: "simulated",
        }
    }

    fn truth(&self) -> Truth {
        let up = |check| self.moments[check] == Moment::Up && !self.ends_after(check);
        Truth::new((0..self.moments.len()).map(up).collect())
    }

    /// Whether it dies right after a check, or sleeps for so long that the gap begins there: nobody has watched it since.
    fn ends_after(&self, check: usize) -> bool {
        let next = self.moments.get(check + 1);
        matches!(next, Some(Moment::Dead | Moment::Suspended))
    }

    /// Checks until `at`, and returns whether it can answer then.
    fn live_until(&mut self, at: Duration) -> bool {
        while self.next <= index(at) {
            let now = CHECK_INTERVAL * u32::try_from(self.next).unwrap();
            let before = self.next.checked_sub(1).map(|before| self.moments[before]);
            if before == Some(Moment::Suspended) {
                self.suspended += CHECK_INTERVAL;
            }
            let moment = self.moments[self.next];
            if matches!(moment, Moment::Up | Moment::Lost) {
                if before == Some(Moment::Dead) {
                    self.restart(now);
                }
                self.tracker.record_suspend(now, self.suspended);
                let health = if moment == Moment::Up {
                    GpuHealth::Ok
                } else {
                    GpuHealth::Lost
                };
                let device = GpuDevice {
                    health,
                    ..GpuDevice::default()
                };
                self.tracker.record_probe(
                    now,
                    GpuSnapshot {
                        devices: vec![device],
                        ..GpuSnapshot::default()
                    },
                );
            }
            self.next += 1;
        }
        matches!(self.moments[index(at)], Moment::Up | Moment::Lost) && !self.ends_after(index(at))
    }

    fn restart(&mut self, now: Duration) {
        let restored = Restored {
            ledger: self.tracker.ledger().clone(),
            watermark: self.tracker.watermark(),
            gpus: KnownGpus::default(),
        };
        // Within one boot the wall clock plays no part.
        let wall = start() - TimeDelta::hours(7);
        let (tracker, since_first_start) = UptimeTracker::begin(
            Self::config(),
            Uuid::nil(),
            wall,
            booted(now),
            Some(restored),
        );
        assert_eq!(since_first_start, now);
        self.tracker = tracker;
        self.suspended = Duration::ZERO;
    }

    fn answer(&mut self, at: Duration, asked: Option<Duration>) -> Reported {
        let window = asked.map_or(RequestedWindow::SinceLastPing, RequestedWindow::Last);
        let report = self.tracker.report(at, window).unwrap();
        Reported {
            uptime_percent: Some(report.uptime_percent),
            window_seconds: Some(report.window_seconds),
            gpu_available: Some(report.gpu_available),
            ..Reported::default()
        }
    }
}

/// What goes wrong at the ping system.
#[derive(Clone, Copy)]
struct Faults {
    /// Of all pings, how many are lost, and how many cannot be observed.
    lost: f64,
    unobserved: f64,
    /// How often its wall clock is set, and it is restarted on another machine.
    clock_set: f64,
    moved: f64,
    /// By which factor the agent exaggerates its window.
    lie: f64,
}

impl Faults {
    const NONE: Self = Self {
        lost: 0.0,
        unobserved: 0.0,
        clock_set: 0.0,
        moved: 0.0,
        lie: 1.0,
    };
    /// Of a ping system with a database of its own.
    const OF_ONE: Self = Self {
        lost: 0.15,
        unobserved: 0.05,
        clock_set: 0.02,
        ..Self::NONE
    };
    /// Of several on one database, by whose clock they go.
    const OF_SEVERAL: Self = Self {
        clock_set: 0.0,
        moved: 0.05,
        ..Self::OF_ONE
    };
}

/// A ping system of one agent, its store, and what a runner reads from it.
struct SimulatedPingSystem {
    policy: PingPolicy,
    record: AgentRecord,
    pings: Vec<Ping>,
    boot_id: Uuid,
    /// How far its wall clock is ahead.
    offset: TimeDelta,
    faults: Faults,
    random: fastrand::Rng,
}

impl SimulatedPingSystem {
    fn new(base: Duration, faults: Faults, random: fastrand::Rng) -> Self {
        Self {
            policy: PingPolicy {
                interval: IntervalRules {
                    base,
                    ..IntervalRules::default()
                },
                ..PingPolicy::default()
            },
            record: crate::ping_system::testing::known("a"),
            pings: Vec::new(),
            boot_id: Uuid::nil(),
            offset: TimeDelta::zero(),
            faults,
            random,
        }
    }

    /// Pings at `at`, and returns when the next ping is due, and whether this one was answered.
    fn ping(&mut self, agent: &mut SimulatedAgent, at: Duration) -> (Duration, bool) {
        // It only asks whether a GPU is there, and everything begins with it.
        let is_first = self.record.agent.last_ping_at.is_none();
        if is_first {
            self.offset = TimeDelta::zero();
        } else if self.random.f64() < self.faults.clock_set {
            let seconds = self.random.i64(-100_000..100_000);
            self.offset = TimeDelta::seconds(seconds);
        } else if self.random.f64() < self.faults.moved {
            // There only the wall clock tells how much time has passed.
            self.boot_id = Uuid::from_u128(self.random.u128(..));
        }
        let wall = saturating_add(start(), at) + self.offset;
        let began = BootInstant {
            boot_id: self.boot_id,
            since_boot: at,
        };
        let is_lost = !is_first && self.random.f64() < self.faults.lost;
        let outcome = if agent.live_until(at) && !is_lost {
            let measured = MeasuredStretch::until(&self.record, began);
            let asked = self
                .record
                .unanswered_since()
                .map(|since| stretch::length(since, wall, measured.since_unanswered(&self.record)));
            let mut reported = agent.answer(at, asked);
            reported.window_seconds = reported.window_seconds.map(|w| w * self.faults.lie);
            PingOutcome::Answered(reported)
        } else {
            PingOutcome::Failed("lost".to_owned())
        };
        let outcome = if !is_first && self.random.f64() < self.faults.unobserved {
            PingOutcome::Unobserved("not seen".to_owned())
        } else {
            outcome
        };
        let attempt = PingAttempt {
            at: wall,
            began,
            took: Duration::ZERO,
            clock_offset_seconds: None,
            also_reported: Vec::new(),
            outcome,
        };
        let new = self
            .policy
            .evaluate(&self.record, attempt, self.random.f64());
        let answered = new.ping.success;
        self.store(new);
        let failed = !answered && self.pings.last().unwrap().observed;
        if failed && self.random.f64() < self.faults.unobserved {
            self.void_failures(wall);
        }
        let wait = self.record.agent.next_ping_at - wall;
        let wait = wait
            .to_std()
            .unwrap_or_default()
            .max(Duration::from_secs(1));
        (at + wait, answered)
    }

    /// As the store does.
    fn store(&mut self, new: PingRecord) {
        if let Some(failures) = new.supersedes {
            let first = usize::try_from(failures.after_seq).unwrap();
            for ping in &mut self.pings[first..] {
                if ping.timestamp >= failures.from && !ping.success && ping.observed {
                    (ping.superseded, ping.window_seconds) = (true, Some(0.0));
                }
            }
        }
        self.pings.push(new.ping);
        self.record = new.after;
    }

    fn void_failures(&mut self, wall: DateTime<Utc>) {
        let since = saturating_sub(wall, Duration::from_mins(1));
        let latest = &self.pings[self.pings.len().saturating_sub(50)..];
        self.record =
            self.policy
                .without_failures(&self.record, latest, since, wall, "own network");
        for ping in &mut self.pings {
            let is_failure = ping.observed && !ping.success && !ping.superseded;
            if is_failure && ping.timestamp >= since {
                (ping.observed, ping.window_seconds) = (false, Some(0.0));
                (ping.covers_from, ping.first_ping) = (None, false);
            }
        }
    }

    /// What the runner makes of it, over all pings.
    fn mean(&self) -> Option<f64> {
        let mut history: Vec<HistoryPing> = self.pings.iter().map(HistoryPing::from).collect();
        history.sort_by_key(|ping| ping.timestamp);
        let begin = start() - TimeDelta::days(1000);
        mean_since(&history, begin).0.map(Percent::get)
    }

    /// The agent's standing by the pings that count.
    fn standing(&self) -> Streak {
        let counting = self
            .pings
            .iter()
            .filter(|ping| ping.observed && !ping.superseded && !ping.first_ping);
        counting.fold(Streak::default(), |streak, ping| {
            self.policy
                .interval
                .next_streak(streak, ping.uptime_percent)
        })
    }
}

/// A random life of so many checks, that begins well.
fn life(checks: usize, random: &mut fastrand::Rng) -> Vec<Moment> {
    let mut moments = vec![Moment::Up; 3];
    while moments.len() < checks {
        let (moment, longest) = match random.u32(0..10) {
            0 => (Moment::Suspended, 400),
            1 => (Moment::Dead, 400),
            2..4 => (Moment::Lost, 100),
            _ => (Moment::Up, 5000),
        };
        let length = random.usize(2..longest);
        moments.resize(moments.len() + length, moment);
    }
    moments
}

/// Lives through `span`, and compares what is known with the truth at the end of each answered ping whose number can
/// be divided by `every`.
fn compare(base: Duration, span: Duration, faults: Faults, every: u32, seed: u64) -> u32 {
    let mut random = fastrand::Rng::with_seed(seed);
    // The last interval may lead beyond it.
    let checks = index(span) + index(Duration::from_hours(50));
    let mut agent = SimulatedAgent::new(life(checks, &mut random));
    let truth = agent.truth();
    let mut system = SimulatedPingSystem::new(base, faults, random);
    let (mut at, mut first, mut answers, mut compared) = (CHECK_INTERVAL, None, 0, 0);
    while at < span {
        let (next, answered) = system.ping(&mut agent, at);
        if answered {
            let first = *first.get_or_insert(at);
            answers += 1;
            if answers > 1 && answers % every == 0 {
                let up = truth.up_seconds(at) - truth.up_seconds(first);
                let expected = up / (at - first).as_secs_f64() * 100.0;
                let got = system.mean().unwrap();
                assert!(
                    (got - expected).abs() < 1e-4,
                    "seed {seed}: {got}, not {expected}, after {at:?}"
                );
                let standing = system.standing();
                assert_eq!(system.record.streak, standing, "seed {seed}, after {at:?}");
                compared += 1;
            }
        }
        at = next;
    }
    compared
}

#[test]
fn the_mean_of_the_pings_is_the_agents_uptime_whatever_happens() {
    for seed in 0..60 {
        let minutes = [1, 5, 15, 60][usize::try_from(seed).unwrap() % 4];
        let base = Duration::from_mins(minutes);
        for faults in [Faults::OF_ONE, Faults::OF_SEVERAL] {
            let compared = compare(base, base * 300, faults, 7, seed);
            assert!(compared > 1, "seed {seed}");
        }
    }
}

#[test]
fn two_hundred_days_are_right_to_the_second() {
    let days = Duration::from_hours(200 * 24);
    let seed = fastrand::u64(..);
    for faults in [Faults::OF_ONE, Faults::OF_SEVERAL] {
        let compared = compare(Duration::from_mins(15), days, faults, 500, seed);
        assert!(compared >= 5, "{compared}");
    }
}

/// What they say of their windows changes nothing but to their loss.
#[test]
fn an_agent_that_lies_about_its_window_gains_nothing() {
    let mean = |lie| {
        let mut random = fastrand::Rng::with_seed(5);
        let mut agent = SimulatedAgent::new(life(1_000_000, &mut random));
        let faults = Faults {
            lie,
            ..Faults::NONE
        };
        let mut system = SimulatedPingSystem::new(Duration::from_mins(5), faults, random);
        let mut at = CHECK_INTERVAL;
        for _ in 0..100 {
            at = system.ping(&mut agent, at).0;
        }
        system.mean().unwrap()
    };
    let honest = mean(1.0);
    for exaggeration in [1.5, 1000.0, 3e9] {
        assert!((mean(exaggeration) - honest).abs() < 1e-9);
    }
    assert!(mean(0.5) < honest * 0.6);
}

#[test]
fn ninety_seconds_of_an_hour_are_two_and_a_half_percent() {
    let hour = Duration::from_hours(1);
    for (seconds, faults) in [30, 60, 300, 900, 1800].into_iter().flat_map(|seconds| {
        let all = [Faults::NONE, Faults::OF_ONE, Faults::OF_SEVERAL];
        all.map(|faults| (seconds, faults))
    }) {
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut moments = vec![Moment::Up; index(hour) * 3];
            let begin = 2 + random.usize(0..index(hour) - 12);
            moments[begin..begin + 9].fill(Moment::Lost);
            let mut agent = SimulatedAgent::new(moments);
            let base = Duration::from_secs(seconds);
            let mut system = SimulatedPingSystem::new(base, faults, random);
            let (mut at, mut first) = (CHECK_INTERVAL, None);
            // Until the first answer after an hour.
            let last = loop {
                let (next, answered) = system.ping(&mut agent, at);
                if answered {
                    let first = *first.get_or_insert(at);
                    if at - first >= hour {
                        break at - first;
                    }
                }
                at = next
                    .min(first.unwrap_or(at) + hour)
                    .max(at + Duration::from_secs(1));
            };
            let down = (100.0 - system.mean().unwrap()) / 100.0 * last.as_secs_f64();
            assert!(
                (down - 90.0).abs() < 0.1,
                "every {seconds} s, seed {seed}: {down}"
            );
        }
    }
}

/// Whether the pings of a thousand agents are theirs or the network's, as they come.
#[test]
fn a_thousand_agents_outlive_an_outage_of_their_ping_systems_network() {
    const AGENTS: usize = 1000;
    let outage = Duration::from_mins(40)..Duration::from_mins(45);
    let minute = Duration::from_mins(1);
    for base in [minute, minute * 15] {
        let mut random = fastrand::Rng::with_seed(3);
        let mut mass = MassFailure::default();
        let mut systems: Vec<SimulatedPingSystem> = (0..AGENTS)
            .map(|_| SimulatedPingSystem::new(base, Faults::NONE, random.fork()))
            .collect();
        let mut due: BinaryHeap<Reverse<(Duration, usize)>> = (0..AGENTS)
            .map(|agent| Reverse((base.mul_f64(random.f64()), agent)))
            .collect();
        let end = outage.end + minute * 2;
        while let Some(Reverse((at, agent))) = due.pop()
            && at < end
        {
            let key = i64::try_from(agent).unwrap();
            let system = &systems[agent];
            let next = system.record.agent.next_ping_at;
            if system.record.agent.total_pings > 0 && next != saturating_add(start(), at) {
                // It was due before, and has been pinged since.
                continue;
            }
            let before = Before::of(system.record.agent.status);
            let outcome = if outage.contains(&at) {
                match mass.failed(key, before, at, at) {
                    Blame::Agent => PingOutcome::Failed("no connection".to_owned()),
                    Blame::Network { begins } => {
                        let failed = systems.iter_mut().enumerate().filter(|(_, system)| {
                            system.record.agent.status == Status::Unreachable
                        });
                        for (agent, system) in failed.filter(|_| begins) {
                            system.void_failures(saturating_add(start(), at));
                            due.push(Reverse((at, agent)));
                        }
                        PingOutcome::Unobserved("own network".to_owned())
                    }
                }
            } else {
                mass.reached(key, before, at);
                PingOutcome::Answered(Reported {
                    uptime_percent: Some(Percent::FULL),
                    window_seconds: None,
                    gpu_available: Some(true),
                    ..Reported::default()
                })
            };
            let system = &mut systems[agent];
            let attempt = PingAttempt {
                at: saturating_add(start(), at),
                began: BootInstant {
                    boot_id: Uuid::nil(),
                    since_boot: at,
                },
                took: Duration::ZERO,
                clock_offset_seconds: None,
                also_reported: Vec::new(),
                outcome,
            };
            let new = system.policy.evaluate(&system.record, attempt, 0.5);
            system.store(new);
            let next = system.record.agent.next_ping_at - start();
            due.push(Reverse((next.to_std().unwrap(), agent)));
        }
        for system in &systems {
            let agent = &system.record.agent;
            assert!(matches!(agent.status, Status::Active), "{agent:?}");
            assert_eq!(agent.consecutive_poor_uptime, 0);
            assert_eq!(agent.ping_interval_minutes * 60.0, base.as_secs_f64());
            assert_eq!(system.mean(), Some(100.0));
        }
    }
}
