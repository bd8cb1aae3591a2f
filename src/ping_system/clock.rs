//! The ping system's time of day: that of the database, continued by a clock that cannot be set. A wall clock that is set
//! moves it within seconds, and back when that is set right; no length of time is measured by it alone.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use parking_lot::Mutex;

use super::store::whole_micros;
use crate::clock::since_boot;
use crate::units::saturating_add;

/// Smaller differences are those of two readings, and of the way to the database.
const GRAIN: TimeDelta = TimeDelta::milliseconds(50);

#[derive(Debug)]
pub(crate) struct PingClock {
    anchor: Mutex<Anchor>,
}

/// A time of day, and the time since boot at which it was.
#[derive(Debug, Clone, Copy)]
struct Anchor {
    wall: DateTime<Utc>,
    since_boot: Duration,
}

impl PingClock {
    /// Begins with a time of day.
    pub(crate) fn start(now: DateTime<Utc>) -> Self {
        Self {
            anchor: Mutex::new(Anchor {
                wall: now,
                since_boot: since_boot(),
            }),
        }
    }

    /// The time now, in the precision in which times are stored.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.anchor.lock().at(since_boot())
    }

    /// Sets it to the database's time, and returns how far it was moved.
    pub(crate) fn set(&self, now: DateTime<Utc>) -> TimeDelta {
        self.set_at(since_boot(), now)
    }

    fn set_at(&self, since_boot: Duration, now: DateTime<Utc>) -> TimeDelta {
        let mut anchor = self.anchor.lock();
        let moved = now - anchor.at(since_boot);
        if moved.abs() <= GRAIN {
            return TimeDelta::zero();
        }
        *anchor = Anchor {
            wall: now,
            since_boot,
        };
        moved
    }
}

impl Anchor {
    fn at(self, since_boot: Duration) -> DateTime<Utc> {
        whole_micros(saturating_add(
            self.wall,
            since_boot.saturating_sub(self.since_boot),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::utc;
    use super::*;

    #[test]
    fn it_follows_the_database_and_goes_on_by_itself() {
        let clock = PingClock::start(utc("2026-01-01T00:00:00Z"));
        let start = clock.anchor.lock().since_boot;
        let after = |seconds| start + Duration::from_secs(seconds);
        let moved = |seconds, now| clock.set_at(after(seconds), utc(now)).num_milliseconds();
        assert_eq!(moved(60, "2026-01-01T00:01:00.040Z"), 0);
        assert_eq!(moved(60, "2026-01-01T01:01:00Z"), 3_600_000);
        assert_eq!(
            clock.anchor.lock().at(after(70)),
            utc("2026-01-01T01:01:10Z")
        );
        assert_eq!(moved(120, "2026-01-01T00:02:00Z"), -3_600_000);
    }
}
