//! Time as one process measures it, which no setting of the wall clock changes.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Differences below this are those between two readings.
const GRAIN: Duration = Duration::from_millis(5);

/// Measures time from its start, including the time for which the machine was suspended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SuspendClock {
    start: Reading,
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
