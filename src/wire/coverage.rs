//! What a ping says about its agent, and which time it covers. Ping system and runner share these rules.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::ping_system::HistoryPing;
use crate::units::{Percent, saturating_sub};

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

/// The uptime that a ping reports; `None` if it reports none.
#[must_use]
pub(crate) fn percent_of(ping: &HistoryPing) -> Option<Percent> {
    let gone = ping.gpu_available == Some(false);
    match ping.uptime_percent {
        _ if !ping.success => Some(Percent::ZERO),
        reported if ping.first_ping => Some(first_ping_uptime(ping.gpu_available, reported)),
        None if gone => Some(Percent::ZERO),
        reported => reported,
    }
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

/// The seconds for which a ping of our own ping system speaks, by which it weighs: none of a first one, and of one that says
/// nothing.
#[must_use]
pub(crate) fn seconds_of(ping: &HistoryPing) -> f64 {
    if ping.is_void {
        return 0.0;
    }
    ping.covers_from
        .map_or(0.0, |from| seconds_between(from, ping.timestamp))
}

/// The mean of the pings since `begin`, each weighted by the time that it covers, and how many there are. `history` is sorted
/// oldest first, and may begin before.
///
/// First pings prove only that a GPU exists: they count only where there is nothing better.
#[must_use]
pub(crate) fn mean_since(
    history: &[HistoryPing],
    begin: DateTime<Utc>,
) -> (Option<Percent>, usize) {
    let first = history.partition_point(|ping| ping.timestamp < begin);
    let counting = counting(history);
    let weighted = |first_pings: bool| -> Vec<(Percent, Option<f64>)> {
        (first..history.len())
            .filter(|&index| counting[index] && history[index].first_ping == first_pings)
            .filter_map(|index| {
                let percent = percent_of(&history[index])?;
                Some((percent, covered_seconds(history, index, begin)))
            })
            .collect()
    };
    let mean = weighted_mean(&weighted(false)).or_else(|| weighted_mean(&weighted(true)));
    (mean, history.len() - first)
}

/// The mean of the uptimes between two instants, each weighted by the time in between for which its ping speaks. `history`
/// is sorted oldest first, and goes on until a ping that speaks for the end, if there is one.
#[must_use]
pub(crate) fn mean_between(
    history: &[HistoryPing],
    from: DateTime<Utc>,
    until: DateTime<Utc>,
) -> Option<Percent> {
    let counting = counting(history);
    let weighted = |first_pings: bool| -> Vec<(Percent, Option<f64>)> {
        (0..history.len())
            .filter(|&index| counting[index] && history[index].first_ping == first_pings)
            .filter_map(|index| {
                let ping = &history[index];
                let covered = covered_seconds(history, index, DateTime::<Utc>::MIN_UTC)?;
                let covered = Duration::try_from_secs_f64(covered).ok()?;
                let begin = saturating_sub(ping.timestamp, covered).max(from);
                let seconds = seconds_between(begin, ping.timestamp.min(until));
                Some((percent_of(ping)?, Some(seconds))).filter(|_| seconds > 0.0)
            })
            .collect()
    };
    weighted_mean(&weighted(false)).or_else(|| weighted_mean(&weighted(true)))
}

/// The seconds since `begin` for which a ping speaks. A ping system that does not tell from when on is taken at the word of
/// its agents, but for no more than the time since the last answer; without their word a ping speaks for the time since
/// the one before. `None` where nothing is known.
fn covered_seconds(history: &[HistoryPing], index: usize, begin: DateTime<Utc>) -> Option<f64> {
    let ping = &history[index];
    if let Some(from) = ping.covers_from {
        return Some(seconds_between(from.max(begin), ping.timestamp));
    }
    let since = |before: &HistoryPing| seconds_between(before.timestamp, ping.timestamp);
    let before = &history[..index];
    match ping.window_seconds {
        Some(window) => {
            let answered = before.iter().rfind(|ping| ping.success && !ping.is_void);
            Some(answered.map_or(window, |answered| window.min(since(answered))))
        }
        None => before.last().map(since),
    }
}

/// Which pings say something: a failed one does not if one that was answered later covers its time. The ping system says so
/// as well, but maybe only in its next answer.
fn counting(history: &[HistoryPing]) -> Vec<bool> {
    let mut answered_from = DateTime::<Utc>::MAX_UTC;
    let newest_first = history.iter().rev().map(|ping| {
        if let Some(from) = ping.covers_from.filter(|_| ping.success) {
            answered_from = answered_from.min(from);
        }
        !ping.is_void && (ping.success || ping.timestamp <= answered_from)
    });
    let mut counting: Vec<bool> = newest_first.collect();
    counting.reverse();
    counting
}

fn seconds_between(from: DateTime<Utc>, until: DateTime<Utc>) -> f64 {
    (until - from).as_seconds_f64().max(0.0)
}

/// `None` if `values` is empty; all weigh the same if a weight is missing or all are 0.
fn weighted_mean(pings: &[(Percent, Option<f64>)]) -> Option<Percent> {
    let (origin, _) = pings.first()?;
    let known: Option<Vec<f64>> = pings.iter().map(|(_, seconds)| *seconds).collect();
    let heaviest = known.iter().flatten().copied().fold(0.0, f64::max);
    let weights = match known {
        // Shares of the heaviest cannot overflow when they are added up.
        Some(seconds) if heaviest > 0.0 => seconds.iter().map(|s| s / heaviest).collect(),
        _ => vec![1.0; pings.len()],
    };
    let total: f64 = weights.iter().sum();
    // Counted from one of the values and rounded to a billionth, so that equal pings have exactly
    // that value as their mean: a 99.0 must not fall out of its tier by a rounding error.
    let above: f64 = pings
        .iter()
        .zip(&weights)
        .map(|((percent, _), weight)| (percent.get() - origin.get()) * weight)
        .sum();
    let mean = origin.get() + above / total;
    Percent::new(mean.clamp(0.0, 100.0))
        .map(Percent::to_a_billionth)
        .ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_000_000_000 + seconds, 0).unwrap()
    }

    pub(crate) fn percent(value: f64) -> Percent {
        Percent::new(value).unwrap()
    }

    pub(crate) fn ping(seconds: i64, uptime: f64, window_seconds: Option<f64>) -> HistoryPing {
        HistoryPing {
            timestamp: at(seconds),
            success: true,
            uptime_percent: Some(percent(uptime)),
            window_seconds,
            gpu_available: Some(true),
            first_ping: false,
            covers_from: None,
            is_void: false,
        }
    }

    fn failed(seconds: i64, covers_from: i64) -> HistoryPing {
        HistoryPing {
            success: false,
            uptime_percent: None,
            covers_from: Some(at(covers_from)),
            ..ping(seconds, 0.0, None)
        }
    }

    fn covering(covers_from: i64, seconds: i64, uptime: f64) -> HistoryPing {
        HistoryPing {
            covers_from: Some(at(covers_from)),
            ..ping(seconds, uptime, None)
        }
    }

    fn mean(history: &[HistoryPing]) -> Option<f64> {
        mean_since(history, at(-3600)).0.map(Percent::get)
    }

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
    fn pings_weigh_by_the_time_that_they_cover() {
        let history = [
            ping(-900, 100.0, Some(900.0)),
            ping(-100, 90.0, Some(300.0)),
        ];
        assert_eq!(mean(&history), Some(97.5));
    }

    #[test]
    fn what_an_answer_covers_is_not_held_against_the_agent() {
        let before = covering(-1800, -900, 100.0);
        let lost = failed(-600, -900);
        assert_eq!(mean(&[before.clone(), lost.clone()]), Some(75.0));
        let answered = covering(-900, -300, 100.0);
        assert_eq!(mean(&[before.clone(), lost.clone(), answered]), Some(100.0));
        // One that asked for less does not.
        let shorter = covering(-600, -300, 100.0);
        assert_eq!(mean(&[before.clone(), lost.clone(), shorter]), Some(80.0));
        let void = HistoryPing {
            is_void: true,
            ..lost
        };
        assert_eq!(mean(&[before, void]), Some(100.0));
    }

    #[test]
    fn only_the_part_inside_the_window_counts() {
        // A quarter of the window was down, and three quarters up.
        let history = [covering(-9000, -2700, 0.0), covering(-2700, 0, 100.0)];
        assert_eq!(mean(&history), Some(75.0));
    }

    #[test]
    fn a_missing_window_is_the_time_since_the_ping_before() {
        let before_the_window = ping(-3700, 0.0, None);
        let history = [
            before_the_window,
            ping(-3400, 90.0, None),
            ping(-2500, 98.0, None),
        ];
        assert_eq!(mean(&history), Some(96.0));
    }

    #[test]
    fn all_weigh_the_same_where_a_weight_is_unknown() {
        let history = [ping(-1000, 90.0, None), ping(-100, 100.0, Some(900.0))];
        assert_eq!(mean(&history), Some(95.0));
        let zero = [ping(-1000, 90.0, Some(0.0)), ping(-100, 100.0, Some(0.0))];
        assert_eq!(mean(&zero), Some(95.0));
    }

    #[test]
    fn an_unanswered_ping_counts_as_zero() {
        let mut missed = ping(-100, 100.0, Some(900.0));
        missed.success = false;
        missed.uptime_percent = None;
        assert_eq!(mean(&[ping(-1000, 100.0, Some(900.0)), missed]), Some(50.0));
    }

    #[test]
    fn first_pings_count_only_while_there_is_nothing_better() {
        let mut first = ping(-1000, 37.0, None);
        first.first_ping = true;
        assert_eq!(mean(&[first.clone()]), Some(100.0));
        assert_eq!(mean(&[first.clone(), ping(-100, 96.0, None)]), Some(96.0));
        first.gpu_available = Some(false);
        assert_eq!(mean(&[first.clone()]), Some(0.0));
        first.gpu_available = None;
        assert_eq!(mean(&[first.clone()]), Some(100.0));
        first.success = false;
        assert_eq!(mean(&[first]), Some(0.0));
    }

    #[test]
    fn pings_before_the_window_do_not_count() {
        assert_eq!(
            mean(&[ping(-3601, 0.0, None), ping(-3600, 99.0, None)]),
            Some(99.0)
        );
        assert_eq!(mean_since(&[ping(-3601, 50.0, None)], at(-3600)), (None, 0));
    }

    #[test]
    fn an_answer_without_uptime_says_nothing_unless_the_gpu_is_gone() {
        let mut silent = ping(-100, 0.0, None);
        silent.uptime_percent = None;
        assert_eq!(mean(&[ping(-1000, 99.0, None), silent.clone()]), Some(99.0));
        silent.gpu_available = Some(false);
        assert_eq!(mean(&[silent]), Some(0.0));
    }

    prop_compose! {
        fn any_ping()(
            seconds in -7200..100_i64, success in any::<bool>(), first_ping in any::<bool>(),
            uptime in prop::option::of(0.0..=100.0_f64), gpu_available in any::<Option<bool>>(),
            window_seconds in prop::option::of(0.0..1e308_f64),
        ) -> HistoryPing {
            HistoryPing {
                timestamp: at(seconds), success, first_ping, gpu_available, window_seconds,
                uptime_percent: uptime.map(percent), covers_from: None, is_void: false,
            }
        }
    }

    proptest! {
        #[test]
        fn the_mean_lies_between_its_pings(mut history in prop::collection::vec(any_ping(), 0..20)) {
            history.sort_by_key(|ping| ping.timestamp);
            let (mean, count) = mean_since(&history, at(-3600));
            let percents: Vec<f64> = history[history.len() - count..]
                .iter().filter_map(percent_of).map(Percent::get).collect();
            prop_assert_eq!(mean.is_none(), percents.is_empty());
            if let Some(mean) = mean {
                let least = percents.iter().copied().fold(f64::MAX, f64::min);
                let most = percents.iter().copied().fold(0.0, f64::max);
                prop_assert!(least - 1e-6 <= mean.get() && mean.get() <= most + 1e-6);
            }
        }

        #[test]
        fn equal_pings_have_exactly_their_value_as_mean(
            tenths in 0..=1000_u32, windows in prop::collection::vec(0.001..1e6_f64, 1..30),
        ) {
            let value = f64::from(tenths) / 10.0;
            let history: Vec<HistoryPing> = windows.iter().map(|w| ping(-10, value, Some(*w))).collect();
            prop_assert_eq!(mean(&history), Some(value));
        }
    }
}
