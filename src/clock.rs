//! Time as one process measures it, which no setting of the wall clock changes.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Differences below this are those between two readings.
const GRAIN: Duration = Duration::from_millis(5);

/// Measures time from its start, including the time for which the machine was suspended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SuspendClock {
    start: Reading,
}

/// Time since the machine's boot, including the time for which it was suspended. Processes on one machine share it, also
/// one after the other.
#[must_use]
pub(crate) fn since_boot() -> Duration {
    duration(clock_gettime(ClockId::Boottime))
}

/// Identifies the boot since which [`since_boot`] counts. Where the kernel does not tell, each process has a boot of its
/// own.
#[must_use]
pub(crate) fn boot_id() -> Uuid {
    static BOOT_ID: LazyLock<Uuid> = LazyLock::new(|| {
        let told = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let told = told.and_then(|id| id.trim().parse().ok());
        told.unwrap_or_else(Uuid::new_v4)
    });
    *BOOT_ID
}

/// An instant by a machine's boot clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootInstant {
    pub boot_id: Uuid,
    pub since_boot: Duration,
}

impl BootInstant {
    #[must_use]
    pub(crate) fn now() -> Self {
        Self {
            boot_id: boot_id(),
            since_boot: since_boot(),
        }
    }
}

/// What the kernel's clocks say.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// `CLOCK_BOOTTIME`, which goes on while the machine is suspended.
    boot: Duration,
    /// `CLOCK_MONOTONIC`, which stands still.
    awake: Duration,
}

/// Time since the start of a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Elapsed {
    pub(crate) total: Duration,
    /// The part for which the machine was suspended.
    pub(crate) suspended: Duration,
}

impl SuspendClock {
    #[must_use]
    pub(crate) fn start() -> Self {
        Self {
            start: Reading::now(),
        }
    }

    #[must_use]
    pub(crate) fn elapsed(&self) -> Elapsed {
        self.start.until(Reading::now())
    }
}

impl Reading {
    fn now() -> Self {
        Self {
            boot: duration(clock_gettime(ClockId::Boottime)),
            awake: duration(clock_gettime(ClockId::Monotonic)),
        }
    }

    fn until(self, later: Self) -> Elapsed {
        let total = later.boot.saturating_sub(self.boot);
        let suspended = total.saturating_sub(later.awake.saturating_sub(self.awake));
        Elapsed {
            total,
            suspended: if suspended < GRAIN {
                Duration::ZERO
            } else {
                suspended
            },
        }
    }
}

/// The clocks of a task that compares ages: one that counts suspend, and the wall clock to notice when that is set.
#[derive(Debug, Clone)]
pub(crate) struct AgeClock {
    suspend: SuspendClock,
    /// Tests pause tokio's clock, suspend the machine and set the wall clock.
    #[cfg(test)]
    pub(crate) test: std::sync::Arc<TestClocks>,
}

/// What tests do to an [`AgeClock`].
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct TestClocks {
    start: (tokio::time::Instant, DateTime<Utc>),
    pub(crate) suspended: parking_lot::Mutex<Duration>,
    pub(crate) wall_step: parking_lot::Mutex<chrono::TimeDelta>,
}

impl AgeClock {
    #[must_use]
    pub(crate) fn start() -> Self {
        Self {
            suspend: SuspendClock::start(),
            #[cfg(test)]
            test: std::sync::Arc::new(TestClocks {
                start: (tokio::time::Instant::now(), Utc::now()),
                suspended: parking_lot::Mutex::default(),
                wall_step: parking_lot::Mutex::default(),
            }),
        }
    }

    /// How long the machine was suspended since the start.
    pub(crate) fn suspended(&self) -> Duration {
        let suspended = self.suspend.elapsed().suspended;
        #[cfg(test)]
        let suspended = suspended + *self.test.suspended.lock();
        suspended
    }

    /// An instant that suspended time makes later. Only for comparisons with others of this clock.
    #[must_use]
    pub(crate) fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std() + self.suspended()
    }

    /// When a timer must ring for an instant of this clock, unless the machine is suspended meanwhile.
    #[must_use]
    pub(crate) fn timer(&self, instant: Instant) -> tokio::time::Instant {
        let awake = instant.checked_sub(self.suspended()).unwrap_or(instant);
        tokio::time::Instant::from_std(awake)
    }

    /// This machine's time of day, for people and for comparison.
    #[must_use]
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, reason = "tests set the wall clock")
    )]
    pub(crate) fn wall(&self) -> DateTime<Utc> {
        #[cfg(test)]
        return {
            let (steady, wall) = self.test.start;
            let passed = steady.elapsed() + *self.test.suspended.lock();
            crate::units::saturating_add(wall, passed) + *self.test.wall_step.lock()
        };
        #[cfg(not(test))]
        return Utc::now();
    }
}

/// Notices that the wall clock was set, or the machine suspended.
#[derive(Debug)]
pub(crate) struct JumpDetector {
    last: (Instant, DateTime<Utc>, Duration),
}

impl JumpDetector {
    /// Up to this much the wall clock may be adjusted between two looks.
    const SLACK: Duration = Duration::from_secs(2);

    #[must_use]
    pub(crate) fn start(clock: &AgeClock) -> Self {
        Self {
            last: Self::look(clock),
        }
    }

    fn look(clock: &AgeClock) -> (Instant, DateTime<Utc>, Duration) {
        (clock.now(), clock.wall(), clock.suspended())
    }

    /// Whether that happened since the last look.
    pub(crate) fn has_jumped(&mut self, clock: &AgeClock) -> bool {
        let (instant, wall, suspended) = std::mem::replace(&mut self.last, Self::look(clock));
        let passed = self.last.0.saturating_duration_since(instant);
        let by_wall = (self.last.1 - wall).to_std().unwrap_or_default();
        self.last.2 > suspended || by_wall.abs_diff(passed) > Self::SLACK
    }
}

/// The kernel's clocks that count from the boot are never negative.
fn duration(time: Timespec) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_only_one_clock_counts_was_suspended() {
        let reading = |boot, awake| Reading {
            boot: Duration::from_millis(boot),
            awake: Duration::from_millis(awake),
        };
        let elapsed = |later| {
            let elapsed = reading(10_000, 8_000).until(later);
            (elapsed.total.as_millis(), elapsed.suspended.as_millis())
        };
        assert_eq!(elapsed(reading(12_000, 10_000)), (2000, 0));
        assert_eq!(elapsed(reading(12_000, 9_999)), (2000, 0));
        assert_eq!(elapsed(reading(12_500, 10_000)), (2500, 500));
        assert_eq!(elapsed(reading(9_000, 7_000)), (0, 0));
        assert_eq!(SuspendClock::start().elapsed().suspended, Duration::ZERO);
    }
}
