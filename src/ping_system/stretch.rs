//! How much time lies between two pings of an agent, measured by a clock that cannot be set.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::store::AgentRecord;
pub use crate::clock::BootInstant;

/// Up to this much the wall clock may be adjusted without being disbelieved.
const WALL_CLOCK_SLACK: Duration = Duration::from_secs(1);

/// When an agent was pinged last, by the boot clock of the machine that stored the ping. It is stored with the agent, so
/// that a restart of the ping system measures on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingMarks {
    boot_id: Uuid,
    stored: Mark,
    answered: Option<Mark>,
}

/// A ping by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    at: DateTime<Utc>,
    since_boot_us: u64,
}

impl PingMarks {
    /// The marks after an observed ping that began at `at` and `instant`.
    #[must_use]
    pub(crate) fn after(
        before: Option<&Self>,
        at: DateTime<Utc>,
        instant: BootInstant,
        is_answered: bool,
    ) -> Self {
        let since_boot_us = u64::try_from(instant.since_boot.as_micros()).unwrap_or(u64::MAX);
        let stored = Mark { at, since_boot_us };
        let answered_before = before
            .filter(|before| before.boot_id == instant.boot_id)
            .and_then(|before| before.answered);
        Self {
            boot_id: instant.boot_id,
            stored,
            answered: if is_answered {
                Some(stored)
            } else {
                answered_before
            },
        }
    }
}

/// The time since an agent's last pings; `None` where another machine stored them, this one before it was booted, or a
/// release up to 0.1.0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MeasuredStretch {
    pub since_answered: Option<Duration>,
    pub since_stored: Option<Duration>,
}

impl MeasuredStretch {
    /// The time until `now` since the last pings of an agent.
    #[must_use]
    pub(crate) fn until(known: &AgentRecord, now: BootInstant) -> Self {
        let Some(marks) = known
            .marks
            .as_ref()
            .filter(|marks| marks.boot_id == now.boot_id)
        else {
            return Self::default();
        };
        // A mark of another ping than the last one is out of date.
        let since = |mark: Option<Mark>, at: Option<DateTime<Utc>>| {
            let mark = mark.filter(|mark| Some(mark.at) == at)?;
            let marked = Duration::from_micros(mark.since_boot_us);
            Some(now.since_boot.saturating_sub(marked))
        };
        Self {
            since_answered: since(marks.answered, known.last_answered_at),
            since_stored: since(Some(marks.stored), known.agent.last_ping_at),
        }
    }

    /// The time since [`AgentRecord::unanswered_since`].
    #[must_use]
    pub(crate) fn since_unanswered(self, known: &AgentRecord) -> Option<Duration> {
        match known.last_answered_at {
            Some(_) => self.since_answered,
            None => self.since_stored,
        }
    }
}

/// The length of the stretch from `begin` to `end`, by the wall clock unless that was set since.
#[must_use]
pub(crate) fn length(
    begin: DateTime<Utc>,
    end: DateTime<Utc>,
    measured: Option<Duration>,
) -> Duration {
    let by_wall = (end - begin).to_std();
    match (measured, by_wall) {
        (Some(measured), Ok(by_wall)) if measured.abs_diff(by_wall) <= WALL_CLOCK_SLACK => by_wall,
        (Some(measured), _) => measured,
        (None, by_wall) => by_wall.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{known, utc};
    use super::*;
    use chrono::TimeDelta;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_stretch_is_as_long_as_the_steady_clock_says() {
        let begin = utc("2026-01-01T00:00:00Z");
        for (wall_seconds, measured, expected) in [
            (900, None, seconds(900)),
            (-900, None, seconds(0)),
            (900, Some(seconds(900)), seconds(900)),
            // Adjusted a little, set forward, set back.
            (901, Some(seconds(900)), seconds(901)),
            (4500, Some(seconds(900)), seconds(900)),
            (-2700, Some(seconds(900)), seconds(900)),
        ] {
            let end = begin + TimeDelta::seconds(wall_seconds);
            assert_eq!(length(begin, end, measured), expected, "{wall_seconds}");
        }
    }

    #[test]
    fn only_pings_of_this_boot_are_measured() {
        let boot_id = Uuid::from_u128(1);
        let at = |since_boot| BootInstant {
            boot_id,
            since_boot: seconds(since_boot),
        };
        let measure = |agent: &AgentRecord, now| {
            let measured = MeasuredStretch::until(agent, now);
            (measured.since_answered, measured.since_stored)
        };
        let mut agent = known("a");
        assert_eq!(measure(&agent, at(100)), (None, None));

        let answered = utc("2026-01-01T00:00:00Z");
        agent.agent.last_ping_at = Some(answered);
        agent.last_answered_at = Some(answered);
        agent.marks = Some(PingMarks::after(None, answered, at(10), true));
        let both = (Some(seconds(90)), Some(seconds(90)));
        assert_eq!(measure(&agent, at(100)), both);

        let failed = utc("2026-01-01T00:01:00Z");
        agent.agent.last_ping_at = Some(failed);
        agent.marks = Some(PingMarks::after(
            agent.marks.as_ref(),
            failed,
            at(70),
            false,
        ));
        let each = (Some(seconds(90)), Some(seconds(30)));
        assert_eq!(measure(&agent, at(100)), each);

        // After another boot, and on another machine.
        let elsewhere = BootInstant {
            boot_id: Uuid::from_u128(2),
            since_boot: seconds(200),
        };
        assert_eq!(measure(&agent, elsewhere), (None, None));
        // After a ping that was stored without marks.
        agent.agent.last_ping_at = Some(utc("2026-01-01T00:02:00Z"));
        assert_eq!(measure(&agent, at(100)), (Some(seconds(90)), None));
    }
}
