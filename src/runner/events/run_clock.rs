//! The time of a run.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::units::saturating_add;

/// The wall clock at the run's start, continued by the steady clock: the times of a run cannot step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunClock {
    wall: DateTime<Utc>,
    started: Instant,
}

impl RunClock {
    #[must_use]
    pub(crate) fn start() -> Self {
        Self {
            wall: Utc::now(),
            started: Instant::now(),
        }
    }

    #[must_use]
    pub(crate) fn now(self) -> DateTime<Utc> {
        saturating_add(self.wall, self.elapsed())
    }

    /// Since the run's start.
    #[must_use]
    pub(crate) fn elapsed(self) -> Duration {
        self.started.elapsed()
    }

    #[must_use]
    pub(crate) fn started_at(self) -> DateTime<Utc> {
        self.wall
    }
}
