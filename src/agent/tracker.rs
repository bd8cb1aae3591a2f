//! An agent's state and its answers. Pure: it takes instants and values only.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::checkpoint::{Restored, Watermark};
use super::known_gpus::KnownGpus;
use super::ledger::{GpuState, Ledger, Window};
use super::probe::xids::HeldXids;
use crate::agent::probe::gpu::GpuSnapshot;
use crate::clock::BootInstant;
use crate::units::{Percent, saturating_add, saturating_sub};
use crate::wire::agent::{GpuHealth, GpuStatus, UptimeReport};

/// How far the caller's clock may be ahead of ours before its `since` is refused.
const CLOCK_SKEW: TimeDelta = TimeDelta::minutes(5);

/// Up to this much two readings of different clocks may differ.
const CLOCK_GRAIN: TimeDelta = TimeDelta::milliseconds(100);

/// An agent whose probes are not answered for so long is not well itself.
const NO_ANSWER_TIMEOUT: Duration = Duration::from_mins(10);

/// The configuration of the tracker.
#[derive(Debug, Clone)]
pub struct TrackerConfig {
    /// The agent's id.
    pub agent_id: String,
    /// The time between checks.
    pub check_interval: Duration,
    /// The number of transitions that are kept.
    pub max_transitions: usize,
    /// The number of GPUs that must be healthy; by default as many as were ever there at a start, at least one.
    pub require_gpus: Option<usize>,
    /// What looks at the GPUs: `nvml` or `simulated`.
    pub source: &'static str,
}

impl TrackerConfig {
    /// The longest time between two checks that still counts as observed.
    #[must_use]
    pub fn longest_gap(&self) -> Duration {
        self.check_interval * 2
    }
}

/// An agent's state.
#[derive(Debug)]
pub(crate) struct UptimeTracker {
    rules: TrackerConfig,
    boot_id: Uuid,
    ledger: Ledger,
    /// The wall-clock time of the agent's first start, derived from that of this start: the wall clock is
    /// read only once, so that its jumps change nothing.
    first_start: DateTime<Utc>,
    /// This process's start, since the agent's first start.
    started_at: Duration,
    /// The same by the machine's boot clock.
    booted_at: BootInstant,
    window_begin: Duration,
    pinged: bool,
    gpus: KnownGpus,
    last: Option<(GpuSnapshot, Duration)>,
    /// When a probe was answered last.
    answered_at: Option<Duration>,
    /// Since when each device is in the state that the last check found.
    states: BTreeMap<u32, (GpuHealth, Duration)>,
    /// The suspended time since the start of the process that is in the ledger.
    suspended: Duration,
}

/// The time that an answer is about; each but [`SinceLastPing`](Self::SinceLastPing) leaves the state as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RequestedWindow {
    /// Since the last request of this kind, which begins a new window.
    SinceLastPing,
    /// The same, without a new window.
    Peek,
    /// As much time before now.
    Last(Duration),
    /// Since an instant, by the agent's wall clock.
    Since(DateTime<Utc>),
}

/// The window begins in the future, by more than clocks may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("since={since} lies in the future: expected a time before {now}")]
pub(crate) struct SinceInFuture {
    since: DateTime<Utc>,
    now: DateTime<Utc>,
}

impl UptimeTracker {
    /// Begins at `wall`, or goes on with what was restored. Returns it with the time since the
    /// agent's first start.
    #[must_use]
    pub(crate) fn begin(
        rules: TrackerConfig,
        boot_id: Uuid,
        wall: DateTime<Utc>,
        booted_at: BootInstant,
        restored: Option<Restored>,
    ) -> (Self, Duration) {
        let mut ledger = Ledger::default();
        let (mut window_begin, mut pinged) = (Duration::ZERO, false);
        let mut since_first_start = Duration::ZERO;
        let mut gpus = KnownGpus::default();
        let mut known_start = None;
        if let Some(restored) = restored {
            let watermark = restored.watermark;
            known_start = Some(saturating_sub(watermark.wall, watermark.watched_until));
            gpus = restored.gpus;
            if watermark
                .booted
                .is_some_and(|then| then.boot_id != booted_at.boot_id)
            {
                // The driver was reloaded.
                gpus.xids = HeldXids::default();
            }
            let away = watermark.until(wall, booted_at);
            since_first_start = watermark.watched_until.saturating_add(away);
            ledger = restored.ledger;
            ledger.resume(since_first_start);
            (window_begin, pinged) = (
                watermark.window_begin.min(since_first_start),
                watermark.pinged,
            );
        }
        let mut first_start = saturating_sub(wall, since_first_start);
        if let Some(known) = known_start
            && (known - first_start).abs() < CLOCK_GRAIN
        {
            // Times that were told stay what they are.
            first_start = known;
        }
        let tracker = Self {
            rules,
            boot_id,
            ledger,
            first_start,
            started_at: since_first_start,
            booted_at,
            window_begin,
            pinged,
            gpus,
            last: None,
            answered_at: None,
            states: BTreeMap::new(),
            suspended: Duration::ZERO,
        };
        (tracker, since_first_start)
    }

    /// Until `at` the machine was suspended for so long since the start of the process.
    pub(crate) fn record_suspend(&mut self, at: Duration, suspended: Duration) {
        let more = suspended.saturating_sub(self.suspended);
        if !more.is_zero() {
            self.suspended = suspended;
            self.ledger.suspend(more, at, self.rules.longest_gap());
        }
    }

    /// A check that began at `at` found this. Returns whether the state is another than before.
    pub(crate) fn record_probe(&mut self, at: Duration, mut snapshot: GpuSnapshot) -> bool {
        self.gpus.xids.apply(&mut snapshot);
        if snapshot.problem.is_none() {
            self.answered_at = Some(at);
        }
        // Those seen at the start; later ones do not change what is required.
        if self
            .last
            .as_ref()
            .is_none_or(|(last, _)| last.devices.is_empty())
            && !snapshot.devices.is_empty()
        {
            self.gpus.count = self.gpus.count.max(Some(snapshot.devices.len()));
        }
        let required = self.required();
        let state = if snapshot.healthy() >= required {
            GpuState::Up
        } else {
            GpuState::Down
        };
        self.gpus.record(&snapshot, required);
        let states = snapshot.devices.iter().map(|device| {
            let before = self.states.get(&device.device_id);
            let since = before.filter(|(health, _)| *health == device.health);
            let since = since.map_or(at, |(_, since)| *since);
            (device.device_id, (device.health.clone(), since))
        });
        self.states = states.collect();
        let gap = self.rules.longest_gap();
        let changed = self
            .ledger
            .observe(at, state, gap, self.rules.max_transitions);
        self.last = Some((snapshot, at));
        changed
    }

    /// How many GPUs must be healthy.
    fn required(&self) -> usize {
        let required = self.rules.require_gpus.or(self.gpus.count);
        required.unwrap_or(1).max(1)
    }

    /// What is known of the GPUs, which must survive a restart.
    pub(crate) fn known_gpus(&self) -> &KnownGpus {
        &self.gpus
    }

    /// Whether the driver has answered a probe lately, whatever it said about the GPUs.
    pub(crate) fn is_probing(&self, now: Duration) -> bool {
        now.saturating_sub(self.answered_at.unwrap_or(self.started_at)) < NO_ANSWER_TIMEOUT
    }

    /// The answer to a ping at `now`.
    ///
    /// # Errors
    /// When the window begins in the future by more than clocks may differ.
    pub(crate) fn report(
        &mut self,
        now: Duration,
        requested: RequestedWindow,
    ) -> Result<UptimeReport, SinceInFuture> {
        let timestamp = self.wall(now);
        let length = match requested {
            RequestedWindow::SinceLastPing | RequestedWindow::Peek => {
                now.saturating_sub(self.window_begin)
            }
            RequestedWindow::Last(length) => length,
            RequestedWindow::Since(since) if since > timestamp + CLOCK_SKEW => {
                return Err(SinceInFuture {
                    since,
                    now: timestamp,
                });
            }
            RequestedWindow::Since(since) => (timestamp - since).to_std().unwrap_or_default(),
        };
        let window = self.window(length, now);
        let is_running_window = matches!(
            requested,
            RequestedWindow::SinceLastPing | RequestedWindow::Peek
        );
        let first_ping = is_running_window && !self.pinged;
        if requested == RequestedWindow::SinceLastPing {
            self.window_begin = now;
            self.pinged = true;
        }
        Ok(UptimeReport {
            agent_id: self.rules.agent_id.clone(),
            uptime_percent: match (window.length, self.is_up(now)) {
                // An empty window reports the current state.
                (Duration::ZERO, true) => Percent::FULL,
                _ => window.uptime(),
            },
            window_seconds: window.length.as_secs_f64(),
            since: saturating_sub(timestamp, length),
            timestamp,
            first_ping,
            gpu_available: self.is_up(now),
            gpu_count: self
                .last
                .as_ref()
                .map_or(0, |(snapshot, _)| snapshot.healthy()),
            checks_total: window.checks_total,
            checks_available: window.checks_available,
            boot_id: self.boot_id,
            running_seconds: now.saturating_sub(self.started_at).as_secs_f64(),
            required_gpus: self.required(),
            gpu_uuids: self.uuids(),
            source: self.rules.source.to_owned(),
            driver_version: self
                .last
                .as_ref()
                .and_then(|(snapshot, _)| snapshot.driver_version.clone()),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// Of the GPUs that the last check found.
    fn uuids(&self) -> Vec<String> {
        let last = self.last.iter().flat_map(|(snapshot, _)| &snapshot.devices);
        last.filter_map(|device| device.uuid.clone()).collect()
    }

    /// The window of this length that ends at `now`.
    #[must_use]
    pub(crate) fn window(&self, length: Duration, now: Duration) -> Window {
        self.ledger.window(length, now, self.rules.longest_gap())
    }

    /// All GPUs at the last check.
    #[must_use]
    pub(crate) fn gpu_status(&self, now: Duration) -> GpuStatus {
        let Some((snapshot, at)) = &self.last else {
            return GpuStatus {
                status: "not checked yet".to_owned(),
                timestamp: self.wall(now),
                gpu_count: 0,
                devices: std::collections::BTreeMap::new(),
            };
        };
        let devices = snapshot.devices.iter().map(|device| {
            let mut device = device.clone();
            let state = self.states.get(&device.device_id);
            device.since = state.map(|(_, since)| self.wall(*since));
            (device.device_id, device)
        });
        GpuStatus {
            status: self.describe(snapshot, now),
            timestamp: self.wall(*at),
            gpu_count: snapshot.healthy(),
            devices: devices.collect(),
        }
    }

    fn describe(&self, snapshot: &GpuSnapshot, now: Duration) -> String {
        let required = self.required();
        if self.is_up(now) {
            "available".to_owned()
        } else if self.ledger.seen() == Some(GpuState::Up) {
            "the next check is overdue".to_owned()
        } else if snapshot.problem.is_none() && snapshot.devices.len() < required {
            let missing = self.gpus.missing(snapshot).join(", ");
            let missing = if missing.is_empty() {
                missing
            } else {
                format!(", {missing} missing")
            };
            format!("{snapshot}, {required} required{missing}")
        } else {
            snapshot.to_string()
        }
    }

    /// Whether the last check, if it is not overdue, found enough GPUs healthy.
    #[must_use]
    pub(crate) fn is_up(&self, now: Duration) -> bool {
        let overdue = now.saturating_sub(self.ledger.watched_until()) > self.rules.longest_gap();
        self.ledger.seen() == Some(GpuState::Up) && !overdue
    }

    /// The checkpoint of the current state.
    #[must_use]
    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// How far the GPUs were observed.
    #[must_use]
    pub(crate) fn watermark(&self) -> Watermark {
        let watched_until = self.ledger.watched_until();
        Watermark {
            boot_id: self.boot_id,
            watched_until,
            wall: self.wall(watched_until),
            booted: Some(BootInstant {
                boot_id: self.booted_at.boot_id,
                since_boot: (self.booted_at.since_boot + watched_until)
                    .saturating_sub(self.started_at),
            }),
            checks_so_far: self.ledger.checks_so_far(),
            window_begin: self.window_begin,
            pinged: self.pinged,
        }
    }

    fn wall(&self, at: Duration) -> DateTime<Utc> {
        saturating_add(self.first_start, at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::agent::{GpuDevice, GpuHealth};
    use proptest::prelude::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn wall(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn rules(require_gpus: Option<usize>) -> TrackerConfig {
        TrackerConfig {
            agent_id: "agent-001".into(),
            check_interval: INTERVAL,
            max_transitions: 100,
            require_gpus,
            source: "nvml",
        }
    }

    fn snapshot(healths: &[GpuHealth]) -> GpuSnapshot {
        let device = |(index, health): (usize, &GpuHealth)| GpuDevice {
            device_id: index as u32,
            health: health.clone(),
            ..GpuDevice::default()
        };
        GpuSnapshot {
            devices: healths.iter().enumerate().map(device).collect(),
            ..GpuSnapshot::default()
        }
    }

    fn begin(restored: Option<Restored>, at: i64) -> (UptimeTracker, Duration) {
        UptimeTracker::begin(
            rules(None),
            Uuid::from_u128(7),
            wall(at),
            another_boot(),
            restored,
        )
    }

    /// After a reboot: only the wall clock goes on.
    fn another_boot() -> BootInstant {
        BootInstant {
            boot_id: Uuid::new_v4(),
            since_boot: Duration::ZERO,
        }
    }

    /// Checks at each interval from `from` until before `to`.
    fn track(tracker: &mut UptimeTracker, from: u64, to: u64, health: &GpuHealth) {
        for at in (from..to).step_by(5) {
            tracker.record_probe(s(at), snapshot(std::slice::from_ref(health)));
        }
    }

    /// The process ends and is started again at this wall time.
    fn restart(tracker: &UptimeTracker, at: i64) -> (UptimeTracker, Duration) {
        let restored = Restored {
            ledger: tracker.ledger().clone(),
            watermark: tracker.watermark(),
            gpus: tracker.known_gpus().clone(),
        };
        begin(Some(restored), at)
    }

    #[test]
    fn a_restart_within_one_boot_goes_on_by_the_boot_clock() {
        let boot = |since_boot| BootInstant {
            boot_id: Uuid::from_u128(1),
            since_boot: s(since_boot),
        };
        let begin = |at, booted_at, restored| {
            UptimeTracker::begin(rules(None), Uuid::new_v4(), wall(at), booted_at, restored)
        };
        let (mut tracker, _) = begin(0, boot(1000), None);
        track(&mut tracker, 0, 65, &GpuHealth::Ok);
        let restored = || {
            Some(Restored {
                ledger: tracker.ledger().clone(),
                watermark: tracker.watermark(),
                gpus: tracker.known_gpus().clone(),
            })
        };
        // 600 s later, of which the wall clock knows 6.
        let (mut tracker, at) = begin(66, boot(1660), restored());
        assert_eq!(at, s(660));
        track(&mut tracker, 660, 720, &GpuHealth::Ok);
        let window = tracker.window(s(720), s(720));
        assert_eq!(window.up, s(120));
        // Its own clock goes on, too.
        assert_eq!(tracker.watermark().booted, Some(boot(1715)));
    }

    #[test]
    fn gpus_that_were_there_are_missed_after_a_restart() {
        let named = |names: &[&str]| {
            let mut snapshot = snapshot(&vec![GpuHealth::Ok; names.len()]);
            for (device, name) in snapshot.devices.iter_mut().zip(names) {
                device.uuid = Some((*name).to_owned());
            }
            snapshot
        };
        let (mut tracker, _) = begin(None, 0);
        tracker.record_probe(s(0), named(&["GPU-1", "GPU-2"]));
        assert!(tracker.is_up(s(1)));
        let (mut tracker, at) = restart(&tracker, 60);
        tracker.record_probe(at, named(&["GPU-2"]));
        assert!(!tracker.is_up(at));
        let report = tracker.report(at, RequestedWindow::Peek).unwrap();
        assert_eq!(report.required_gpus, 2);
        assert_eq!(report.gpu_uuids, ["GPU-2"]);
        let status = tracker.gpu_status(at).status;
        assert_eq!(status, "1 of 1 GPUs ok, 2 required, GPU-1 missing");
        // Another in its place will do.
        tracker.record_probe(at + s(5), named(&["GPU-2", "GPU-3"]));
        assert!(tracker.is_up(at + s(5)));
        // What the operator requires overrules.
        let restored = Restored {
            ledger: tracker.ledger().clone(),
            watermark: tracker.watermark(),
            gpus: tracker.known_gpus().clone(),
        };
        let rules = rules(Some(1));
        let (mut tracker, at) = UptimeTracker::begin(
            rules,
            Uuid::nil(),
            wall(100),
            another_boot(),
            Some(restored),
        );
        tracker.record_probe(at, named(&["GPU-3"]));
        assert!(tracker.is_up(at));
    }

    #[test]
    fn a_ping_answers_for_the_time_since_the_last_one() {
        let (mut tracker, start) = begin(None, 0);
        assert_eq!(start, Duration::ZERO);
        track(&mut tracker, 0, 50, &GpuHealth::Ok);
        track(&mut tracker, 50, 60, &GpuHealth::Lost);
        track(&mut tracker, 60, 120, &GpuHealth::Ok);
        let first = tracker
            .report(s(60), RequestedWindow::SinceLastPing)
            .unwrap();
        assert!(first.first_ping);
        assert_eq!((first.since, first.timestamp), (wall(0), wall(60)));
        assert!((first.uptime_percent.get() - 50.0 / 0.6).abs() < 1e-9);
        let peeked = tracker.report(s(119), RequestedWindow::Peek).unwrap();
        let second = tracker
            .report(s(119), RequestedWindow::SinceLastPing)
            .unwrap();
        assert_eq!(peeked, second);
        assert!(!second.first_ping);
        assert_eq!(
            (second.window_seconds, second.uptime_percent.get()),
            (59.0, 100.0)
        );
        assert_eq!(
            tracker
                .report(s(120), RequestedWindow::SinceLastPing)
                .unwrap()
                .window_seconds,
            1.0
        );
    }

    #[test]
    fn since_answers_out_of_the_ledger_and_disturbs_nobody() {
        let (mut tracker, _) = begin(None, 0);
        track(&mut tracker, 0, 50, &GpuHealth::Ok);
        track(&mut tracker, 50, 100, &GpuHealth::Lost);
        let report = tracker
            .report(s(100), RequestedWindow::Since(wall(40)))
            .unwrap();
        assert_eq!((report.window_seconds, report.since), (60.0, wall(40)));
        assert!((report.uptime_percent.get() - 10.0 / 0.6).abs() < 1e-9);
        assert_eq!(
            tracker
                .report(s(100), RequestedWindow::Since(wall(40)))
                .unwrap(),
            report
        );
        let before_the_start = tracker
            .report(s(100), RequestedWindow::Since(wall(-100)))
            .unwrap();
        assert_eq!(before_the_start.uptime_percent.get(), 25.0);
        let ahead = tracker
            .report(s(100), RequestedWindow::Since(wall(130)))
            .unwrap();
        assert_eq!(
            (ahead.window_seconds, ahead.uptime_percent.get()),
            (0.0, 0.0)
        );
        assert!(
            tracker
                .report(s(100), RequestedWindow::Since(wall(401)))
                .is_err()
        );
        assert!(
            tracker
                .report(s(100), RequestedWindow::SinceLastPing)
                .unwrap()
                .first_ping
        );
    }

    #[test]
    fn as_much_time_as_is_asked_for_is_answered_for() {
        let (mut tracker, _) = begin(None, 0);
        track(&mut tracker, 0, 50, &GpuHealth::Ok);
        track(&mut tracker, 50, 100, &GpuHealth::Lost);
        let last = |tracker: &mut UptimeTracker, millis| {
            let length = Duration::from_millis(millis);
            let report = tracker.report(s(100), RequestedWindow::Last(length));
            let report = report.unwrap();
            assert!(!report.first_ping);
            (report.window_seconds, report.uptime_percent.get())
        };
        assert_eq!(last(&mut tracker, 0), (0.0, 0.0));
        assert_eq!(last(&mut tracker, 62_500), (62.5, 20.0));
        // Before its first start it saw nothing.
        assert_eq!(last(&mut tracker, 200_000), (200.0, 25.0));
        let window = tracker.report(s(100), RequestedWindow::SinceLastPing);
        assert!(window.unwrap().first_ping, "nothing was disturbed");
    }

    #[test]
    fn suspended_time_is_down_however_short() {
        let (mut tracker, _) = begin(None, 0);
        track(&mut tracker, 0, 50, &GpuHealth::Ok);
        // Suspended for 2 s between two checks.
        tracker.record_suspend(s(49), s(2));
        track(&mut tracker, 50, 100, &GpuHealth::Ok);
        tracker.record_suspend(s(98), s(2));
        let uptime = |tracker: &mut UptimeTracker, at, length| {
            let report = tracker.report(s(at), RequestedWindow::Last(s(length)));
            report.unwrap().uptime_percent.get()
        };
        assert_eq!(uptime(&mut tracker, 100, 100), 98.0);
        assert_eq!(uptime(&mut tracker, 100, 50), 100.0);
        // A ping just after the machine woke up, before the next check.
        tracker.record_suspend(s(101), s(3));
        assert_eq!(uptime(&mut tracker, 101, 2), 50.0);
        // For longer than the longest gap: unwatched from the last check.
        tracker.record_suspend(s(201), s(90));
        assert_eq!(uptime(&mut tracker, 201, 100), 0.0);
    }

    #[test]
    fn a_restart_continues_and_its_gap_is_unwatched() {
        let (mut tracker, _) = begin(None, 0);
        track(&mut tracker, 0, 100, &GpuHealth::Ok);
        let _ = tracker.report(s(90), RequestedWindow::SinceLastPing);
        // Killed at 97, back at 195: the last check was at 95.
        let (mut tracker, start) = restart(&tracker, 195);
        assert_eq!(start, s(195));
        for at in (195..=295).step_by(5) {
            tracker.record_probe(s(at), snapshot(&[GpuHealth::Ok]));
        }
        let whole = tracker
            .report(s(295), RequestedWindow::Since(wall(0)))
            .unwrap();
        assert!((whole.uptime_percent.get() - 195.0 / 2.95).abs() < 1e-9);
        let window = tracker
            .report(s(295), RequestedWindow::SinceLastPing)
            .unwrap();
        assert!(!window.first_ping, "the window of the last ping goes on");
        assert_eq!((window.since, window.window_seconds), (wall(90), 205.0));
    }

    #[test]
    fn a_wall_clock_that_jumps_between_starts_creates_no_uptime() {
        for (back_at, start) in [(-3600, 95), (3695, 3695)] {
            let (mut tracker, _) = begin(None, 0);
            track(&mut tracker, 0, 100, &GpuHealth::Ok);
            let (mut tracker, began) = restart(&tracker, back_at);
            assert_eq!(began, s(start));
            tracker.record_probe(began, snapshot(&[GpuHealth::Ok]));
            tracker.record_probe(began + s(5), snapshot(&[GpuHealth::Ok]));
            let report = tracker
                .report(began + s(5), RequestedWindow::SinceLastPing)
                .unwrap();
            let up = report.uptime_percent.get() / 100.0 * report.window_seconds;
            assert!((up - 100.0).abs() < 1e-6, "{up}");
            assert_eq!(report.timestamp, wall(back_at + 5));
        }
    }

    #[test]
    fn as_many_gpus_must_be_healthy_as_were_seen_first() {
        let (mut tracker, _) = begin(None, 0);
        tracker.record_probe(s(0), GpuSnapshot::nothing("no driver"));
        assert!(!tracker.is_up(s(0)));
        tracker.record_probe(s(5), snapshot(&[GpuHealth::Ok, GpuHealth::Ok]));
        assert!(tracker.is_up(s(5)));
        tracker.record_probe(s(10), snapshot(&[GpuHealth::Ok, GpuHealth::Xid(79)]));
        assert!(!tracker.is_up(s(10)));
        assert_eq!(
            tracker.gpu_status(s(10)).status,
            "1 of 2 GPUs ok, GPU 1 xid 79"
        );
        assert_eq!(tracker.gpu_status(s(10)).gpu_count, 1);
        tracker.record_probe(s(15), snapshot(&[GpuHealth::Ok]));
        assert!(!tracker.is_up(s(15)), "one fell off the bus");

        let (mut tracker, _) =
            UptimeTracker::begin(rules(Some(1)), Uuid::nil(), wall(0), another_boot(), None);
        tracker.record_probe(s(0), snapshot(&[GpuHealth::Lost, GpuHealth::Ok]));
        assert!(tracker.is_up(s(0)));
        assert!(!tracker.is_up(s(11)), "the next check is overdue");
    }

    proptest! {
        /// Any script of up, lost and restarts that changes at checks is measured exactly.
        #[test]
        fn scripts_are_measured_exactly(
            script in prop::collection::vec((1..40_u64, any::<bool>(), prop::option::weighted(0.2, 1..100_u64)), 1..30),
        ) {
            let (mut tracker, mut at) = begin(None, 0);
            let mut up = 0;
            let mut end = 0;
            for (checks, is_up, away) in script {
                let health = if is_up { GpuHealth::Ok } else { GpuHealth::Lost };
                for _ in 0..checks {
                    tracker.record_probe(at, snapshot(std::slice::from_ref(&health)));
                    at += INTERVAL;
                    up += u64::from(is_up) * 5;
                }
                if let Some(away) = away {
                    // What the last check saw is known until that check only.
                    let known = tracker.watermark().watched_until;
                    up -= u64::from(is_up) * 5;
                    let wall_now = wall((known.as_secs() + away).cast_signed());
                    let restored = Restored {
                        ledger: tracker.ledger().clone(),
                        watermark: tracker.watermark(),
                        gpus: tracker.known_gpus().clone(),
                    };
                    (tracker, at) = UptimeTracker::begin(rules(Some(1)), Uuid::nil(), wall_now, another_boot(), Some(restored));
                    prop_assert_eq!(at, known + s(away));
                }
                end = at.as_secs();
            }
            let report = tracker.report(s(end), RequestedWindow::Since(wall(0))).unwrap();
            let got = report.uptime_percent.get() / 100.0 * report.window_seconds;
            prop_assert!((got - up as f64).abs() < 1e-3, "{} of {} in {}", got, up, end);
        }
    }
}
