//! What a ping says about its agent, and which time it covers. Ping system and runner share these rules.

use crate::units::Percent;

/// What an agent's first ping says, which only asks whether a GPU is there: 100 % or 0 %. An answer
/// without `gpu_available` says so by an uptime over 0.
#[must_use]
pub(crate) fn first_ping_uptime(gpu_available: Option<bool>, uptime: Option<Percent>) -> Percent {
    if gpu_available.unwrap_or(uptime != Some(Percent::ZERO)) {
        Percent::FULL
    } else {
        Percent::ZERO
    }
}

/// The seconds that a ping speaks for, by which it weighs in a mean: those of its own window, or else
/// those since the ping before it; `None` where neither is known.
#[must_use]
pub(crate) fn covered_seconds(
    window_seconds: Option<f64>,
    seconds_since_previous: Option<f64>,
) -> Option<f64> {
    window_seconds.or(seconds_since_previous.map(|seconds| seconds.max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_ping_proves_that_a_gpu_is_there_or_is_not() {
        for (gpu_available, uptime, expected) in [
            (Some(true), None, Percent::FULL),
            (Some(true), Some(Percent::ZERO), Percent::FULL),
            (Some(false), Some(Percent::FULL), Percent::ZERO),
            (None, Some(Percent::ZERO), Percent::ZERO),
            (None, Some(Percent::whole(1)), Percent::FULL),
            (None, None, Percent::FULL),
        ] {
            assert_eq!(first_ping_uptime(gpu_available, uptime), expected);
        }
    }

    #[test]
    fn the_own_window_counts_before_the_time_since_the_last_ping() {
        assert_eq!(covered_seconds(Some(0.0), Some(9.0)), Some(0.0));
        assert_eq!(covered_seconds(None, Some(9.0)), Some(9.0));
        assert_eq!(covered_seconds(None, Some(-9.0)), Some(0.0));
        assert_eq!(covered_seconds(None, None), None);
    }
}
