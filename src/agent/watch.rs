//! What an agent knows, and what it answers from it. Given instants and values only.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::checkpoint::{Note, Restored};
use super::gpu::Sighting;
use super::ledger::{Ledger, State};
use crate::wire::agent::{GpuStatus, UptimeReport};

/// How an agent watches.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Who it is.
    pub agent_id: String,
    /// The time between checks.
    pub check_interval: Duration,
    /// How many transitions are kept.
    pub max_transitions: usize,
    /// How many GPUs must be healthy; otherwise as many as were seen first, at least one.
    pub require_gpus: Option<usize>,
}

impl Rules {
    /// The longest time between two checks that still counts as watched.
    #[must_use]
    pub fn longest_gap(&self) -> Duration {
        self.check_interval * 2
    }
}

/// What an agent knows.
#[derive(Debug)]
pub struct Watch {
    rules: Rules,
    boot_id: Uuid,
    ledger: Ledger,
    /// The wall time of the agent's first start, as it follows from the wall time of this one: the
    /// wall clock is asked only once, so that its jumps change nothing.
    first_start: DateTime<Utc>,
    window_begin: Duration,
    pinged: bool,
    required: Option<usize>,
    last: Option<(Sighting, Duration)>,
}

/// A window that begins in the future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("since={since} lies in the future: expected a time before {now}")]
pub struct SinceInFuture {
    since: DateTime<Utc>,
    now: DateTime<Utc>,
}

impl Watch {
    /// Begins at `wall`, or goes on with what was restored. Returns it with the time since the
    /// agent's first start.
    #[must_use]
    pub fn begin(
        rules: Rules,
        boot_id: Uuid,
        wall: DateTime<Utc>,
        restored: Option<Restored>,
    ) -> (Self, Duration) {
        let mut ledger = Ledger::default();
        let (mut window_begin, mut pinged) = (Duration::ZERO, false);
        let mut since_first_start = Duration::ZERO;
        if let Some(restored) = restored {
            let note = restored.note;
            // A clock that was set back meanwhile: no time has passed.
            let away = (wall - note.wall).to_std().unwrap_or_default();
            since_first_start = note.watched_until.saturating_add(away);
            ledger = restored.ledger;
            ledger.resume(since_first_start);
            (window_begin, pinged) = (note.window_begin.min(since_first_start), note.pinged);
        }
        let first_start = back(wall, since_first_start);
        let required = rules.require_gpus;
        let watch = Self {
            rules,
            boot_id,
            ledger,
            first_start,
            window_begin,
            pinged,
            required,
            last: None,
        };
        (watch, since_first_start)
    }

    /// A check that began at `at` found this. Returns whether the state is another than before.
    pub fn checked(&mut self, at: Duration, sighting: Sighting) -> bool {
        let healthy = sighting.healthy();
        if self.required.is_none() && !sighting.devices.is_empty() {
            self.required = Some(sighting.devices.len());
        }
        let state = if healthy >= self.required.unwrap_or(1).max(1) {
            State::Up
        } else {
            State::Down
        };
        let gap = self.rules.longest_gap();
        let changed = self
            .ledger
            .observe(at, state, gap, self.rules.max_transitions);
        self.last = Some((sighting, at));
        changed
    }

    /// The answer to a ping at `now`. Without `since` it is for the window since the last such one,
    /// and starts another unless it only peeks.
    ///
    /// # Errors
    /// When `since` lies in the future.
    pub fn report(
        &mut self,
        now: Duration,
        since: Option<DateTime<Utc>>,
        peek: bool,
    ) -> Result<UptimeReport, SinceInFuture> {
        let timestamp = self.wall(now);
        let length = match since {
            None => now.saturating_sub(self.window_begin),
            Some(since) => (timestamp - since).to_std().map_err(|_| SinceInFuture {
                since,
                now: timestamp,
            })?,
        };
        let window = self.ledger.window(length, now, self.rules.longest_gap());
        let first_ping = since.is_none() && !self.pinged;
        if since.is_none() && !peek {
            self.window_begin = now;
            self.pinged = true;
        }
        Ok(UptimeReport {
            agent_id: self.rules.agent_id.clone(),
            uptime_percent: window.uptime(),
            window_seconds: window.length.as_secs_f64(),
            since: back(timestamp, length),
            timestamp,
            first_ping,
            gpu_available: self.is_up(now),
            gpu_count: self
                .last
                .as_ref()
                .map_or(0, |(sighting, _)| sighting.healthy()),
            checks_total: window.checks_total,
            checks_available: window.checks_available,
            boot_id: self.boot_id,
        })
    }

    /// All GPUs at the last check.
    #[must_use]
    pub fn gpu_status(&self, now: Duration) -> GpuStatus {
        let Some((sighting, at)) = &self.last else {
            return GpuStatus {
                status: "not checked yet".to_owned(),
                timestamp: self.wall(now),
                gpu_count: 0,
                devices: std::collections::BTreeMap::new(),
            };
        };
        let devices = sighting
            .devices
            .iter()
            .map(|device| (device.device_id, device.clone()));
        GpuStatus {
            status: if self.is_up(now) {
                "available".to_owned()
            } else {
                sighting.to_string()
            },
            timestamp: self.wall(*at),
            gpu_count: sighting.healthy(),
            devices: devices.collect(),
        }
    }

    /// Whether the last check, if it is not overdue, found enough GPUs healthy.
    #[must_use]
    pub fn is_up(&self, now: Duration) -> bool {
        let overdue = now.saturating_sub(self.ledger.watched_until()) > self.rules.longest_gap();
        self.ledger.seen() == Some(State::Up) && !overdue
    }

    /// What a checkpoint keeps.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// How far the watch has come.
    #[must_use]
    pub fn note(&self) -> Note {
        let watched_until = self.ledger.watched_until();
        Note {
            boot_id: self.boot_id,
            watched_until,
            wall: self.wall(watched_until),
            checks_so_far: self.ledger.checks_so_far(),
            window_begin: self.window_begin,
            pinged: self.pinged,
        }
    }

    fn wall(&self, at: Duration) -> DateTime<Utc> {
        TimeDelta::from_std(at)
            .ok()
            .and_then(|at| self.first_start.checked_add_signed(at))
            .unwrap_or(DateTime::<Utc>::MAX_UTC)
    }
}

fn back(from: DateTime<Utc>, by: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(by)
        .ok()
        .and_then(|by| from.checked_sub_signed(by))
        .unwrap_or(DateTime::<Utc>::MIN_UTC)
}
