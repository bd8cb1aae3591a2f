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

/// The uptime of a stretch of `elapsed_seconds`, of which an answer speaks for `window_seconds`: what it leaves out is
/// down, unless it is so little that rounding and the way of the request explain it. An answer without a window speaks
/// for all of it, and one with a longer window for no more than all.
#[must_use]
pub(crate) fn uptime_of_stretch(
    uptime: Percent,
    window_seconds: Option<f64>,
    elapsed_seconds: f64,
) -> Percent {
    let tolerance = (elapsed_seconds / 10.0).min(2.0);
    match window_seconds {
        Some(window) if elapsed_seconds - window > tolerance => {
            let share = (window / elapsed_seconds).clamp(0.0, 1.0);
            Percent::new(uptime.get() * share).unwrap_or(Percent::ZERO)
        }
        _ => uptime,
    }
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
    fn what_an_answer_leaves_out_is_down() {
        for (uptime, window, elapsed, expected) in [
            (100, None, 900.0, 100.0),
            (100, Some(900.0), 900.0, 100.0),
            (100, Some(898.0), 900.0, 100.0),
            (100, Some(450.0), 900.0, 50.0),
            (80, Some(450.0), 900.0, 40.0),
            (100, Some(0.0), 900.0, 0.0),
            // Nobody can speak for more than there was.
            (100, Some(1e9), 900.0, 100.0),
            (100, Some(0.95), 1.0, 100.0),
            (100, Some(0.5), 1.0, 50.0),
            (100, Some(0.0), 0.0, 100.0),
        ] {
            let got = uptime_of_stretch(Percent::whole(uptime), window, elapsed);
            assert_eq!(got.get(), expected, "{uptime} {window:?} {elapsed}");
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
